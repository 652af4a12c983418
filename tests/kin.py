"""Tiny models of the families beyond LLaVA, what they are shown, and their traces carried out by hand.

The reference takes the embeddings of the whole row off the unpruned model (prompt and forced tokens), and runs the
host's decoder layers one by one, each with a mask written out as a matrix and no cache. Of the library it shares the
trace alone: which tokens were kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from inspect import signature
from itertools import chain

import tiny
import torch
from scenes import FALLBACK, MOVING, OPTIONS, REPEATS, changes_of
from tiny import CACHE, IMAGE, PAD, VIDEO, VOCAB
from torch import nn

from vlmprune import registry
from vlmprune.parts import ModelFacts, ProjectorCut, TowerCut

SIDE, PATCH = 36, 6  # pixels of a view, of a patch
PIXELS = (("image", "pixel_values"), ("image", "pixel_values_images"), ("video", "pixel_values_videos"))
FORCED = [9, 33, 21, 50]

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": PAD,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """The arguments of one call for one row, and the columns of every picture, images before videos."""

    inputs: dict
    items: list[list[int]]

    @property
    def ids(self) -> torch.Tensor:
        return self.inputs["input_ids"]

    def without(self) -> dict:
        """The text alone, as a later turn brings it."""
        return {name: self.inputs[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Kin:
    """A family: how a tiny model of it is built, and what is special about it.

    Attributes:
        build: makes the model.
        pictures: makes the pixel arguments of pictures, one number each: seeds.
        tokens: placeholders of every part of a picture, by its number; text stands between the parts.
        whole: whether a picture is one item, and not every part of it.
        shows: what a scene and what three rows consist of.
        prefix: whether the prompt up to the answer is one block that sees itself.
        blocks: whether every picture sees itself.
        origin: position of the first token.
        join: arguments of several prompts as one batch's; pixels are concatenated by default.
        tolerance: of logits, in float64; PaliGemma is as near by hand unpruned (float32 inside its norms).
        has_cls: whether the tower has a [CLS] token.
        refused: methods that cannot be had, by words of the error.
    """

    name: str
    build: Callable[..., nn.Module]
    pictures: Callable[..., dict]
    tokens: Callable[[int], list[int]]
    whole: bool = False
    prefix: bool = False
    blocks: bool = False
    origin: int = 0
    join: Callable[[list[dict]], dict] | None = None
    tolerance: float = 1e-9
    has_cls: bool = False
    shows: list | None = None
    refused: dict = field(default_factory=dict)

    def refusal(self, name: str) -> str | None:
        """Words of the error by which a method cannot be had, or not with what the scene shows; None if it can."""
        still = self.shows is not FILMS and "a still picture has none"
        whole = "reads pictures whole" if name in REPEATS else None
        return self.refused.get(name) or whole or (still if name in MOVING else None) or None

    def windowed(self) -> bool:
        """Whether a layer of the language model sees a window alone."""
        text = self.model().config.get_text_config()
        return "sliding_attention" in (getattr(text, "layer_types", None) or [])

    def model(self, **options) -> nn.Module:
        return shared(self.name, **options)

    def prompt(self, parts: list, seed: int = 0) -> Prompt:
        """A prompt of `parts`: numbers of text tokens, and ("image", number) or ("video", number)."""
        model, generator = self.model(), torch.Generator().manual_seed(seed + 100)
        ids, items, shown = [], {"image": [], "video": []}, {"image": [], "video": []}
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(6, VOCAB, (part,), generator=generator).tolist()
                continue
            kind, number = part
            shown[kind].append(number)
            pieces, found = self.tokens(number) if kind == "image" else [2 * 17], []
            for at, piece in enumerate(pieces):
                ids += [7] if at else []
                found.append(list(range(len(ids), len(ids) + piece)))
                ids += [IMAGE if kind == "image" else VIDEO] * piece
            items[kind] += [list(chain(*found))] if self.whole else found
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if self.blocks or self.prefix:
            inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long() * int(self.blocks)
        if any(shown.values()):
            given = self.pictures(model, shown["image"], shown["video"], seed)
            kind = next(model.parameters()).dtype
            inputs |= {name: value.to(kind) if value.is_floating_point() else value for name, value in given.items()}
        return Prompt(inputs, items["image"] + items["video"])

    def batch(self, prompts: list[Prompt], side: str = "left") -> dict:
        """Single prompts padded into one batch."""
        width, rows = max(p.ids.shape[1] for p in prompts), {}
        fills = {"input_ids": PAD, "attention_mask": 0, "token_type_ids": 0}
        for name, fill in fills.items():
            if name in prompts[0].inputs:
                padded = []
                for p in prompts:
                    value = p.inputs[name]
                    more = value.new_full((1, width - value.shape[1]), fill)
                    padded.append(torch.cat((more, value) if side == "left" else (value, more), 1))
                rows[name] = torch.cat(padded)
        shown = [{n: v for n, v in p.inputs.items() if n not in fills} for p in prompts]
        return rows | (self.join(shown) if self.join else joined(shown))

    def scene(self, seed: int = 0) -> Prompt:
        """Several pictures with text around them."""
        return self.prompt((self.shows or TEXTS)[0], seed)

    def rows(self) -> list[Prompt]:
        """Prompts that differ in all they can: one picture, none, two of them and nothing in front."""
        return [self.prompt(each, seed) for seed, each in enumerate((self.shows or TEXTS)[1:])]


def joined(shown: list[dict]) -> dict:
    """The pixel arguments of several prompts side by side."""
    names = dict.fromkeys(name for each in shown for name in each)
    return {name: torch.cat([each[name] for each in shown if name in each]) for name in names}


def lively(model: nn.Module) -> nn.Module:
    """Weights that make the outputs depend strongly on all that goes in; the default init hardly reacts to anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            elif weight.ndim > 1:
                weight.mul_(4.0 if "embed" not in name else 12.0)
            elif "lambda" in name:
                weight.fill_(1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


@lru_cache
def shared(name: str, **options) -> nn.Module:
    """A model of a family, built once a process; what a test leaves on it is taken off (tests/conftest.py)."""
    torch.manual_seed(0)
    model = lively(KIN[name].build(**options)).to(torch.float64)
    tiny.SHARED.append(model)
    return model


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def options(kin: Kin, name: str) -> dict:
    """Options of a method that make a difference, with its documented fallback where there is no [CLS] token."""
    given = OPTIONS[name](kin.model()) if name in OPTIONS else {"keep": 0.4}
    return given if kin.has_cls else given | FALLBACK.get(name, {})


# -- by hand


def language_model(model: nn.Module) -> nn.Module:
    inner = model.model
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model


@torch.no_grad()
def embedded(model: nn.Module, prompt: Prompt, forced: list[int]) -> torch.Tensor:
    """`(length, dim)` what the first decoder layer of the unpruned model reads of prompt and forced tokens."""
    inputs, found = dict(prompt.inputs), []
    for name, fill in {"input_ids": forced, "attention_mask": 1, "token_type_ids": 1}.items():
        if name in inputs:
            more = torch.tensor([forced]) if name == "input_ids" else torch.full((1, len(forced)), fill)
            inputs[name] = torch.cat((inputs[name], more.long()), 1)
    first = language_model(model).layers[0]
    handle = first.register_forward_pre_hook(
        lambda m, args, kw: found.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return found[0][0]


@torch.no_grad()
def features_of(model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """`(tokens, dim)` what the encoders make of a prompt's pictures, images before videos."""
    made = []
    for kind, name in PIXELS:
        if name in prompt.inputs:
            encode = getattr(model.model, f"get_{kind}_features")
            made += encode(prompt.inputs[name], return_dict=True).pooler_output
    return torch.cat(made)


def mask_of(kin: Kin, model: nn.Module, index: int, columns: list[int], prompt: Prompt) -> torch.Tensor:
    """`(rows, keys)` bool: what sees what in decoder layer `index`, by the config and the prompt alone."""
    n, text = len(columns), model.config.get_text_config()
    row, column = torch.arange(n)[:, None], torch.arange(n)
    seen = column <= row
    if kin.blocks or kin.prefix:
        group = torch.full((n,), -1)
        for i, c in enumerate(columns):
            if kin.prefix and c < prompt.ids.shape[1]:
                group[i] = 0
            if kin.blocks:
                group[i] = next((k for k, item in enumerate(prompt.items) if c in item), -1)
        seen = seen | ((group[:, None] == group) & (group >= 0))
    types = getattr(text, "layer_types", None) or ["full_attention"] * 99
    window = getattr(text, "sliding_window", None)
    if text.model_type == "mistral":
        types = ["sliding_attention"] * 99
    if types[index] == "sliding_attention" and window:
        seen = seen & (column > row - window)
    return seen


@torch.no_grad()
def by_hand(
    kin: Kin,
    prompt: Prompt,
    trace: object,
    forced: list[int] = FORCED,
    wrong: bool = False,
    positions: str | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(1 + forced, vocab)` logits of the prompt's last token and of every forced one, with what a trace says was kept.

    Args:
        trace: None for the unpruned model.
        wrong: swap one kept token of the first image at its first cut for a dropped one.
        positions: another position policy than the trace's.
        features: `(tokens, dim)` of all pictures, where they are not those of the unpruned tower.
    """
    model = kin.model()
    lm, x, length = language_model(model), embedded(model, prompt, forced), prompt.ids.shape[1]
    if features is not None:
        x = x.index_put((torch.tensor([c for item in prompt.items for c in item]),), features)
    cuts = trace.cuts if trace else []
    changed = changes_of(trace) if wrong else []
    columns, place = list(range(len(x))), torch.arange(len(x)) + kin.origin
    alive = [[True] * len(item) for item in prompt.items]
    for index, layer in enumerate(lm.layers):
        for cut in [c for c in cuts if c.layer == index]:
            drop = set()
            for i, item in enumerate(prompt.items):
                keep = cut.keep[i, : len(item)].tolist()
                if changed and cut is changed[0] and i == 0 and any(keep):
                    gone = max(t for t, k in enumerate(keep) if k)
                    come = next(t for t in reversed(range(len(keep))) if not keep[t] and alive[i][t])
                    keep[gone], keep[come] = False, True
                if cut.merge is not None:
                    x = merged(x, cut.merge, i, item, columns, alive[i], keep)
                drop |= {c for c, k, a in zip(item, keep, alive[i], strict=True) if a and not k}
                alive[i] = [a and k for a, k in zip(alive[i], keep, strict=True)]
            if (positions or cut.positions) == "contiguous":
                place = place - torch.tensor([sum(d < c for d in drop) for c in columns])
            stay = [r for r, c in enumerate(columns) if c not in drop]
            x, place, columns = x[stay], place[stay], [columns[r] for r in stay]
        seen = mask_of(kin, model, index, columns, prompt)
        kind = [layer.self_attn.layer_type] if "layer_type" in signature(lm.rotary_emb.forward).parameters else []
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        out = layer(
            x[None],
            attention_mask=mask[None, None],
            position_embeddings=lm.rotary_emb(x[None], place[None], *kind),
            position_ids=torch.arange(len(x))[None],
        )
        x = (out[0] if isinstance(out, tuple) else out)[0]
    last = [max(r for r, c in enumerate(columns) if c < length)]
    rows = lm.norm(x)[last + [r for r, c in enumerate(columns) if c >= length]]
    return model.lm_head(rows)


def merged(x: torch.Tensor, merge: object, i: int, item: list, columns: list, alive: list, keep: list) -> torch.Tensor:
    """The rows of one picture with what flows into its anchors."""
    here, x = {c: r for r, c in enumerate(columns)}, x.clone()
    flows = zip(merge.into[i].tolist(), merge.weight[i].tolist(), strict=True)
    rows = {t: torch.zeros_like(x[0]) for t in range(len(item))}
    for t, (into, weight) in enumerate(flows):
        if t < len(item) and alive[t] and into in rows:
            rows[into] = rows[into] + weight * x[here[item[t]]]
    for t, c in enumerate(item):
        if keep[t] and alive[t]:
            x[here[c]] = rows[t]
    return x


@torch.no_grad()
def answered(kin: Kin, inputs: dict, forced: list[int] = FORCED) -> tuple[torch.Tensor, object]:
    """`(batch, 1 + forced, vocab)` logits at the last token and after every forced one, and the cache."""
    model, mask = kin.model(), inputs["attention_mask"]
    real, last = mask.sum(1), (mask * torch.arange(mask.shape[1])).amax(1)
    out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0) + kin.origin, use_cache=True)
    logits, cache = [out.logits[torch.arange(len(mask)), last]], out[CACHE]
    for step, token in enumerate(forced):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        out = model(
            input_ids=torch.full((len(mask), 1), token), attention_mask=mask,
            position_ids=(real + step)[:, None] + kin.origin, **{CACHE: cache}, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), cache


# -- families


def internvl(text: str = "qwen2", **options) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config, Qwen3Config

    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[text]
    vision = VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_qk_norm": text == "qwen3"}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision, text_config=kind(**TEXT), image_token_id=IMAGE, tie_word_embeddings=False, **options
        )
    )


TILES = [1, 3, 2]  # of a picture, by its number


def tiles(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Tiles of several pictures side by side."""
    made = [noise(TILES[n], 3, SIDE, SIDE, seed=seed + 50 + 7 * i) for i, n in enumerate(images)]
    return {"pixel_values": torch.cat(made)}


def parts(n: int) -> list[int]:
    """Placeholders of every tile of a picture, where text stands between them."""
    return [9] * TILES[n]


def aya_vision(**options) -> nn.Module:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

    text = Cohere2Config(**TEXT, sliding_window=12, layer_types=MIXED)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    return AyaVisionForConditionalGeneration(
        AyaVisionConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, downsample_factor=2,
            adapter_layer_norm_eps=1e-6, tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def cohere2_vision(**options) -> nn.Module:
    from transformers import (
        Cohere2Config,
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        SiglipVisionConfig,
    )

    text = Cohere2Config(**TEXT, sliding_window=12, layer_types=MIXED)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    return Cohere2VisionForConditionalGeneration(
        Cohere2VisionConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, alignment_intermediate_size=48,
            tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def deepseek_vl(**options) -> nn.Module:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**VISION | {"image_size": 24}, vision_use_head=False)
    return DeepseekVLForConditionalGeneration(
        DeepseekVLConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, tie_word_embeddings=False,
            **options,
        )
    )  # fmt: skip


def views(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Pictures of one view each, and videos of two frames."""
    side, given = 24, {}
    if images:
        # as Video-LLaVA called it before transformers 5.23
        old = "pixel_values" not in signature(model.model.get_image_features).parameters
        name = "pixel_values_images" if old else "pixel_values"
        given[name] = torch.cat([noise(1, 3, side, side, seed=seed + 50 + 7 * n) for n in images])
    if videos:
        given["pixel_values_videos"] = torch.cat([noise(1, 2, 3, side, side, seed=seed + 90 + 7 * n) for n in videos])
    return given


SIZES = [(48, 24), (24, 48), (48, 48)]  # pixels of a picture, by its number


def pixtral(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Pictures of any size, filled up to the largest height and width."""
    shown = [noise(1, 3, *SIZES[n], seed=seed + 50 + 7 * n) for n in images]
    return side_by_side([{"pixel_values": x, "image_sizes": torch.tensor([x.shape[-2:]])} for x in shown])


def side_by_side(shown: list[dict]) -> dict:
    """Pixels of any size as one tensor."""
    shown = [each for each in shown if each]
    height, width = (max(each["pixel_values"].shape[axis] for each in shown) for axis in (-2, -1))
    pixels = [
        nn.functional.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        for x in (each["pixel_values"] for each in shown)
    ]
    return {"pixel_values": torch.cat(pixels), "image_sizes": torch.cat([each["image_sizes"] for each in shown])}


def grid(step: int) -> Callable[[int], list[int]]:
    """Placeholders of every row of a picture, by its number, where a break stands behind each."""
    return lambda n: [SIZES[n][1] // step] * (SIZES[n][0] // step)


def mistral3(**options) -> nn.Module:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(**TEXT, sliding_window=None)
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=PixtralVisionConfig(**VISION), text_config=text, image_token_index=IMAGE,
            spatial_merge_size=2, tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def llava_pixtral(**options) -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(**TEXT, sliding_window=None)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=PixtralVisionConfig(**VISION), text_config=text, image_token_index=IMAGE,
            vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def smolvlm(family: str = "SmolVLM", **options) -> nn.Module:
    import transformers
    from transformers import LlamaConfig

    config, kind = (getattr(transformers, f"{family}{name}") for name in ("Config", "ForConditionalGeneration"))
    return kind(
        config(
            vision_config=VISION | {"patch_size": 3}, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
            scale_factor=4,  # transformers 5.20 wants the tokens of a prompt to be a multiple of patch_size
            pad_token_id=PAD, tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def listed(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """The tiles of all pictures of a row in one list."""
    return {"pixel_values": tiles(model, images, videos, seed)["pixel_values"][None]}


def filled_up(shown: list[dict]) -> dict:
    """Lists of tiles of several rows, the shorter ones filled up with black tiles."""
    given = [each["pixel_values"][0] if each else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.float64) for each in shown]
    most = max(len(x) for x in given)
    return {"pixel_values": torch.stack([torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))) for x in given])}


def ovis2(**options) -> nn.Module:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config

    vision = VISION | {"hidden_stride": 2, "vocab_size": 40}
    return Ovis2ForConditionalGeneration(
        Ovis2Config(
            vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, vocab_size=VOCAB,
            hidden_size=TEXT["hidden_size"], visual_indicator_token_ids=[7, 60, 61, 62, 63], tie_word_embeddings=False,
            **options,
        )
    )  # fmt: skip


def video_llava(**options) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    vision = CLIPVisionConfig(**VISION | {"image_size": 24}, projection_dim=16)
    return VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
            tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def gemma3(window: int = 24, **options) -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(**TEXT, sliding_window=window, layer_types=kinds, query_pre_attn_scalar=8)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=vision, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=9,
            tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def paligemma(**options) -> nn.Module:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(**VISION | {"image_size": 24}, vision_use_head=False)
    text = GemmaConfig(**TEXT)
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32,
            tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def squares(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Pictures of one view each, of the side of a tile."""
    return {"pixel_values": torch.cat([noise(1, 3, SIDE, SIDE, seed=seed + 50 + 7 * n) for n in images])}


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def merges_in_tower(name: str) -> bool:
    """Whether a method makes cuts in the tower of LLaVA-1.5, or behind it."""
    facts = ModelFacts("llava", 24, 22, True, decoder_layers=32, views=True, view_patches=576)
    made = registry.find(name)(**(OPTIONS[name](None) if name in OPTIONS else {"keep": 0.4})).cuts(facts)
    return any(isinstance(cut, TowerCut | ProjectorCut) for cut in made)


WHOLE = {
    "globalcom2": "globalcom2 shares a budget among the crops of an image",
    "lrs": "lrs chooses among the crops of an image",
}
#: Methods that merge or pick patches in the vision tower or behind it: what leaves it is no longer what it would be.
IN_TOWER = [name for name in registry.names() if name not in ("atp", *REPEATS) and merges_in_tower(name)]
#: What cannot be had where a token is no patch of the tower as its layers leave it.
UNLIKE = WHOLE | dict.fromkeys(IN_TOWER, "merges patches in or behind")

QWEN3 = partial(internvl, "qwen3")
NO_SCREENS = WHOLE | {"showui": "frames of a video are no screenshots"}
PACKED = UNLIKE | dict.fromkeys(("downsample", "showui", *IN_TOWER), "packs pictures of any size")
TEXTS = [[4, ("image", 1), 3, ("image", 0), 5], [3, ("image", 0), 4], [6], [("image", 1), 2, ("image", 2), 9]]
BOTH = [
    [4, ("video", 1), 3, ("image", 0), 2, ("video", 0), 5],
    [3, ("video", 0), 4],
    [6],
    [("image", 1), 2, ("video", 2), 9],
]
FILMS = [[4, ("video", 1), 3, ("video", 0), 5], [3, ("video", 0), 4], [6], [("video", 1), 2, ("video", 2), 9]]
SHORT = "sees the last 24 tokens alone"
NORMED = UNLIKE | {"transprune": "puts that through norms", "atp": SHORT, "sparsevlm": SHORT}

KIN: dict[str, Kin] = {
    kin.name: kin
    for kin in (
        Kin("internvl", internvl, tiles, lambda n: [9 * TILES[n]], has_cls=True, refused=UNLIKE),
        Kin(
            "internvl-qwen3", partial(internvl, "qwen3"), tiles, lambda n: [9 * TILES[n]], has_cls=True, refused=UNLIKE
        ),
        Kin("deepseek_vl", deepseek_vl, views, lambda n: [16], refused=UNLIKE),
        Kin("aya_vision", aya_vision, tiles, parts, refused=UNLIKE),
        Kin("cohere2_vision", cohere2_vision, tiles, parts, refused=UNLIKE),
        Kin("mistral3", mistral3, pixtral, grid(12), whole=True, join=side_by_side, refused=PACKED),
        Kin(
            "llava-pixtral",
            llava_pixtral,
            pixtral,
            grid(6),
            whole=True,
            join=side_by_side,
            refused=PACKED,
        ),
        Kin("smolvlm", smolvlm, listed, parts, join=filled_up, refused=UNLIKE),
        Kin("idefics3", partial(smolvlm, "Idefics3"), listed, parts, join=filled_up, refused=UNLIKE),
        Kin("ovis2", ovis2, tiles, parts, refused=UNLIKE),
        Kin("gemma3", gemma3, squares, lambda n: [9], blocks=True, refused=NORMED),
        Kin("paligemma", paligemma, views, lambda n: [16], prefix=True, origin=1, tolerance=1e-6, refused=UNLIKE),
        Kin("video_llava", video_llava, views, lambda n: [16], has_cls=True, shows=BOTH, refused=NO_SCREENS),
        Kin("video_llava-video", video_llava, views, lambda n: [16], has_cls=True, shows=FILMS, refused=NO_SCREENS),
    )
}
