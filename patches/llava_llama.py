"""The original LLaVA package: `LlavaLlamaForCausalLM` and its Mistral twin, which expand their prompts themselves.

Its prompts have one placeholder (-200) per image; `prepare_inputs_labels_for_multimodal` puts embeddings in its place
before the language model, or `generate`, sees anything. `ExpandPrompt` stands before that method on one instance, lets
it run, and pins what its embeddings do not tell to them (`Tagged`); `open` takes the pin off at the language model.
Nothing here imports `llava`; the module of the model's own class is asked.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid, upload
from vlmprune.patches.base import Bound, Family, feature_index
from vlmprune.patches.tagged import tag, untag
from vlmprune.patches.towers import TOWERS

__all__ = ["LlavaLlama", "LlavaMistral"]

IMAGE, IGNORE = -200, -100  # llava.constants
EXPAND = "prepare_inputs_labels_for_multimodal"
WAY_OUT = "use the Hugging Face conversion of the checkpoint (llava-hf/...)"
# transformers then hangs recorders on all layers of the model, those of a tower that has recorders of its own too
RECORDED = ("output_hidden_states", "output_attentions")
TWICE = "transformers records every layer of the vision tower twice, and its features are those of another layer"


class LlavaLlama(Family):
    """`LlavaLlamaForCausalLM` of the `llava` package."""

    model_type = "llava_llama"
    title = "original LLaVA (LlavaLlamaForCausalLM of the llava package, in Python); with anyres also globalcom2"
    views = False  # without anyres; `facts` tells of a model
    single = "images that are given without crops"
    fixed = ()

    def inner(self, model: nn.Module) -> nn.Module:
        """The language model, in which tower and projector are."""
        if not hasattr(model, EXPAND):
            raise UnsupportedError(
                f"{type(model).__name__} has no {EXPAND}: give the whole model of the llava package."
            )
        return model.get_model()

    def towers(self, inner: nn.Module) -> list[nn.Module]:
        return [inner.get_vision_tower().vision_tower]

    def language_model(self, inner: nn.Module) -> nn.Module:
        return inner

    def decoder_layers(self, inner: nn.Module) -> nn.ModuleList:
        return inner.layers

    def token(self, inner: nn.Module, modality: str = "image") -> int:
        return IMAGE

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {}  # the llava package has no processor

    def side(self, inner: nn.Module, size: Any = None) -> tuple[int, int]:
        return (inner.get_vision_tower().num_patches_per_side,) * 2

    def facts(self, inner: nn.Module) -> ModelFacts:
        tower, config = inner.get_vision_tower(), inner.config
        if not isinstance(tower, nn.Module) or not isinstance(inner.vision_tower, nn.Module):
            raise UnsupportedError("this LLaVA has no vision tower inside the model, so nothing can be pruned.")
        if not getattr(tower, "is_loaded", False):
            raise UnsupportedError(
                "the vision tower is not loaded: call model.get_vision_tower().load_model() first, as llava's "
                "load_pretrained_model does."
            )
        kind = getattr(getattr(tower, "vision_tower", None), "config", None)
        if getattr(kind, "model_type", None) != "clip_vision_model" or getattr(config, "s2", False):
            raise UnsupportedError(f"{type(tower).__name__} is not supported: original LLaVA needs its CLIP tower.")
        if tower.select_feature != "patch":
            raise UnsupportedError(
                f"mm_vision_select_feature={tower.select_feature!r} makes the tower's [CLS] token a visual token, "
                "which is not supported; use 'patch'."
            )
        tower_layers = self.tower_layers(tower.vision_tower)
        recorders = [getattr(hook, "__name__", "") for hook in tower_layers[0]._forward_hooks.values()]
        if recorders.count("output_capturing_hook") > 1:
            raise UnsupportedError(
                f"this model was run with {' or '.join(RECORDED)}: {TWICE}, with or without a patch. Load it again."
            )
        layers = len(tower_layers)
        return ModelFacts(
            family=self.model_type,
            tower_layers=layers,
            feature_layer=feature_index(tower.select_layer, layers),
            has_cls=TOWERS[kind.model_type],
            decoder_layers=len(inner.layers),
            views=spatial(config) and getattr(config, "image_aspect_ratio", None) == "anyres",
            view_patches=math.prod(self.side(inner)),
        )

    def bind(self, model: nn.Module, plan: Any) -> None:
        setattr(model, EXPAND, ExpandPrompt(model, plan))

    def open(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if asked := [name for name in RECORDED if kwargs.get(name)]:
            raise UnsupportedError(
                f"{asked[0]} is not supported on models of the llava package (from then on, {TWICE}): {WAY_OUT}."
            )
        embeds, prompt = untag(kwargs.get("inputs_embeds"))
        return kwargs if prompt is None else kwargs | {"inputs_embeds": embeds} | prompt.for_rows(embeds)

    def close(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("inputs_embeds") is None:
            return kwargs
        return {name: value for name, value in kwargs.items() if name not in ("input_ids", "mm_encoder_outputs")}

    def grid(self, inner: nn.Module, size: tuple) -> tuple[int, tuple[int, int]]:
        """Of an image's (whether in a list, views, (width, height)); see `ExpandPrompt`."""
        _, views, shape = size
        if views == 1:
            return 1, (1, 1)
        config = inner.config
        if not spatial(config):
            raise UnsupportedError(
                f"mm_patch_merge_type={getattr(config, 'mm_patch_merge_type', 'flat')!r} with {views} views of one "
                "image is not supported: give one view per image, or use a 'spatial' merge type."
            )
        tile = inner.get_vision_tower().config.image_size
        across, down = host(inner).get_anyres_image_grid_shape(shape, config.image_grid_pinpoints, tile)
        return views, (down, across)

    def pack(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor, size: tuple) -> torch.Tensor:
        listed, count, shape = size
        images = torch.zeros(count, 3, 1, 1)
        packed = getattr(host(inner).LlavaMetaForCausalLM, EXPAND)(
            PackingStandIn(inner, views, newline),
            input_ids=torch.tensor([[IMAGE, 0]]),
            position_ids=None,
            attention_mask=None,
            past_key_values=None,
            labels=None,
            images=[images] if listed else images,
            image_sizes=[shape],
        )
        return packed[4][0, :-1]


class LlavaMistral(LlavaLlama):
    """`LlavaMistralForCausalLM` of the `llava` package."""

    model_type = "llava_mistral"
    title = "original LLaVA (LlavaMistralForCausalLM of the llava package, in Python); with anyres also globalcom2"


def spatial(config: Any) -> bool:
    """Whether the views of one image are laid out as a picture."""
    return getattr(config, "mm_patch_merge_type", "flat").startswith("spatial")


def host(inner: nn.Module) -> ModuleType:
    """The `llava_arch` module that this model's class comes from."""
    for cls in type(inner).__mro__:
        if cls.__name__ == "LlavaMetaModel":
            return sys.modules[cls.__module__]
    raise UnsupportedError(f"{type(inner).__name__} is no model of the llava package; {WAY_OUT}.")


class PackingStandIn:
    """Stands for the model while the host packs coordinates instead of features: a prompt of one image, on the CPU."""

    device = torch.device("cpu")

    def __init__(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor):
        self.get_vision_tower, self.views, self.image_newline = inner.get_vision_tower, views, newline
        self.config = copy.copy(inner.config)
        self.config.tokenizer_model_max_length = None
        self.model = self

    def get_model(self) -> PackingStandIn:
        return self

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.views

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.views.new_zeros(len(ids), self.views.shape[-1])


@dataclass
class Prompt:
    """What the embeddings of a prompt batch do not tell.

    Attributes:
        plan: of the model that expands them; its tower, which other models may share, asks.
        visual: `(batch, length)` bool, the visual tokens.
        rows: for every row what the layout of each of its images depends on.
        tokens: visual tokens of every image, in the same order.
        unread: for every view that the tower saw whether no prompt has its image; None if all are read.
        grids: layout of every image that the tower sees.
    """

    plan: Any
    visual: torch.Tensor
    rows: list[list[tuple]]
    tokens: list[list[int]]
    unread: list[bool] | None
    vlmprune_seen: Any = None  # the engine's channel SEEN
    sizes: None = None  # its views are all of one
    grids: list[ImageGrid] = field(default_factory=list)

    def for_rows(self, embeds: torch.Tensor) -> dict[str, Any]:
        """Arguments for the engine, once it is known how often `generate` repeats each row for its beams."""
        (rows, length), batch = embeds.shape[:2], len(self.rows)
        if length != self.visual.shape[1] or rows % batch:
            raise UnsupportedError(
                f"the prompt's embeddings were expanded to {tuple(self.visual.shape)} tokens and arrive as "
                f"{(rows, length)}: a prompt with images must run in one piece (no `prefill_chunk_size`, no "
                "concatenation). To go on with a cache, call the model itself with the new tokens and images alone."
            )
        beams = rows // batch
        features = Features(
            [range(n) for row in self.tokens for _ in range(beams) for n in row],
            embeds,
            vlmprune_sizes=[size for row in self.rows for size in row],
            vlmprune_seen=self.seen_of_read(),
        )
        ids = torch.where(self.visual, IMAGE, 0).repeat_interleave(beams, 0)
        return {"input_ids": ids, "mm_encoder_outputs": {"image": features}}

    def seen_of_read(self) -> Any:
        """What was seen of the views that a prompt reads."""
        seen = self.vlmprune_seen
        if self.unread is None or seen is None:
            return seen
        read = [view for view, unread in enumerate(self.unread) if not unread]
        return replace(seen, taps={tap: values[upload(read, values.device)] for tap, values in seen.taps.items()})


@dataclass
class Features:
    """Stands for an encoder's output: how many tokens every image has, and the embeddings that they are among."""

    pooler_output: list[range]
    embeds: torch.Tensor
    vlmprune_sizes: list[tuple]  # the engine's channels SIZES
    vlmprune_seen: Any  # and SEEN
    last_hidden_state: None = None


class ExpandPrompt(Bound):
    """Stands before `prepare_inputs_labels_for_multimodal` on one instance and pins a `Prompt` to its embeddings.

    The host expands labels as it expands tokens, so labels that number the columns tell where every token came from.
    """

    def __init__(self, model: nn.Module, plan: Any):
        self.model, self.plan = model, plan
        self.__signature__ = inspect.signature(self.expand())

    def expand(self) -> Any:
        """The model's own method."""
        return getattr(type(self.model), EXPAND).__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple:
        given = self.__signature__.bind(*args, **kwargs).arguments
        images, ids = given.get("images"), given.get("input_ids")
        if images is None or ids is None or ids.shape[1] == 1:  # a decode step may bring its images again
            return self.expand()(**given)
        mask, labels = given.get("attention_mask"), given.get("labels")
        if isinstance(given.get("image_sizes"), torch.Tensor):
            given["image_sizes"] = given["image_sizes"].tolist()  # one host read; the host would make one per number
        sizes = self.sizes(images, given.get("image_sizes"))
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        counts = ((ids == IMAGE) & real).sum(1).tolist()
        prompt = Prompt(self.plan, torch.empty(0), *self.assign(counts, sizes))
        given["images"] = self.announced(images, prompt, sizes)
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        given |= {"attention_mask": real if mask is None else mask, "labels": columns}
        none, positions, padded, cache, embeds, source = self.expand()(**given)
        prompt.visual = (source == IGNORE) & padded.bool()
        if labels is not None:
            labels = labels.gather(1, source.clamp(min=0)).masked_fill(source == IGNORE, IGNORE)
        if any(counts):
            embeds = tag(embeds, prompt)
        return none, positions, None if mask is None else padded, cache, embeds, labels

    def announced(self, images: Any, prompt: Prompt, sizes: list[tuple]) -> Any:
        """The images, which tell the tower whose they are where it has something to do."""
        if not (self.plan.enabled and self.plan.in_tower):
            return images
        inner = self.plan.family.inner(self.model)
        prompt.grids = [self.plan.grid(inner, "image", size) for size in sizes]
        return [tag(x, prompt) for x in images] if isinstance(images, list) else tag(images, prompt)

    def sizes(self, images: Any, shapes: Any) -> list[tuple]:
        """What the packing of every image depends on: whether it is in a list, its views, its (width, height)."""
        listed = isinstance(images, list) or images.ndim == 5
        views = [len(image) if image.ndim == 4 else 1 for image in images]
        return [(listed, n, tuple(shapes[i]) if n > 1 and shapes is not None else None) for i, n in enumerate(views)]

    def assign(self, counts: list[int], sizes: list[tuple]) -> tuple[list[list[tuple]], list[list[int]], Any]:
        """Hand the images to the rows as the host does, which gives a prompt without images one that nobody reads."""
        rows, unread, at = [], [], 0
        for row, count in enumerate(counts):
            mine = sizes[at : at + count]
            if len(mine) < count:
                raise ValueError(f"prompt {row} has {count} images, and only {len(mine)} are left of {len(sizes)}.")
            rows.append(mine)
            unread += [not count] * sum(views for _, views, _ in sizes[at : at + max(count, 1)])
            at += max(count, 1)
        unread += [True] * sum(views for _, views, _ in sizes[at:])
        inner = self.plan.family.inner(self.model)
        tokens = [[self.plan.grid(inner, "image", size).tokens for size in row] for row in rows]
        return rows, tokens, unread if any(unread) else None
