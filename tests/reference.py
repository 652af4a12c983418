"""What a pruned model must compute, written out by hand. Imports nothing from the library that it judges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

IMAGE, VIDEO = 5, 4  # placeholder ids of the tiny models


@dataclass(frozen=True)
class Rule:
    """A cut by pure arithmetic: token t of a prompt's image number o stays iff (7 t + 3 o + 5) % mod < rest.

    `mod=0` keeps every token and `rest=0` none. With `merge`, a dropped token flows into the last kept one before it
    (or the first kept) with weight 1 + t % 3 before normalising. `wrong` moves one kept token per image to a dropped
    number: the negative twin.
    """

    layer: int
    mod: int = 3
    rest: int = 1
    positions: str = "contiguous"
    merge: bool = False
    emergent: bool = True
    wrong: bool = False

    def keeps(self, ordinal: int, tokens: int) -> list[bool]:
        keep = [not self.mod or (7 * t + 3 * ordinal + 5) % self.mod < self.rest for t in range(tokens)]
        if self.wrong and any(keep) and not all(keep):
            gone, come = keep.index(True), len(keep) - 1 - keep[::-1].index(False)
            keep[gone], keep[come] = False, True
        return keep

    def flow(self, keep: list[bool], alive: list[bool]) -> tuple[list[int], list[float]]:
        """(anchor of every token, its weight)."""
        kept = [t for t, (k, a) in enumerate(zip(keep, alive, strict=True)) if k and a]
        into, raw = list(range(len(keep))), [0.0] * len(keep)
        for t, a in enumerate(alive):
            if a and kept:
                into[t], raw[t] = max((k for k in kept if k <= t), default=kept[0]), 1.0 + t % 3
        total = [0.0] * len(keep)
        for t, r in zip(into, raw, strict=True):
            total[t] += r
        return into, [r / total[t] if r else 0.0 for t, r in zip(into, raw, strict=True)]


#: Cuts of models whose positions lie on several axes, where there is nothing to close.
ON_AXES = {
    "0": [Rule(0, positions="original")],
    "1": [Rule(1, positions="original")],
    "2": [Rule(2, positions="original")],
    "3": [Rule(3, positions="original")],
    "several": [
        Rule(0, 2, positions="original"),
        Rule(2, 5, 3, positions="original"),
        Rule(3, 4, 3, positions="original"),
    ],
    "merge 0": [Rule(0, merge=True, positions="original")],
    "merge 2": [Rule(2, merge=True, positions="original")],
    "nothing left": [Rule(0, 3, 0, positions="original")],
}


def wrong(rules: list[Rule]) -> list[Rule]:
    """The same cuts with one wrong kept index in the first."""
    return [replace(rules[0], wrong=True), *rules[1:]]


def other_positions(rules: list[Rule]) -> list[Rule]:
    """The same cuts with the other position policy in the last."""
    other = "original" if rules[-1].positions == "contiguous" else "contiguous"
    return [*rules[:-1], replace(rules[-1], positions=other)]


def image_features(model: nn.Module, prompt: dict) -> list[torch.Tensor]:
    """`(tokens, dim)` features per image, as the model makes them."""
    if "pixel_values" not in prompt:
        return []
    return list(image_output(model, prompt).pooler_output)


def image_output(model: nn.Module, prompt: dict) -> object:
    names = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw")
    return model.model.get_image_features(**{k: prompt[k] for k in names if k in prompt}, return_dict=True)


def video_features(model: nn.Module, prompt: dict) -> list[torch.Tensor]:
    """`(tokens, dim)` features per video, as the model makes them."""
    if "pixel_values_videos" not in prompt:
        return []
    return list(video_output(model, prompt).pooler_output)


def video_output(model: nn.Module, prompt: dict) -> object:
    names = ("pixel_values_videos", "video_grid_thw")
    return model.model.get_video_features(**{k: prompt[k] for k in names if k in prompt}, return_dict=True)


def on_axes(model: nn.Module) -> bool:
    """Whether a token's position has an axis for time, height and width each."""
    return hasattr(model.model, "get_rope_index")


def places(model: nn.Module, prompt: dict, forced: int = 0) -> torch.Tensor:
    """`(length + forced,)` positions of a prompt and of what is forced behind it, or `(3, length + forced)`."""
    length = prompt["input_ids"].shape[1]
    if not on_axes(model):
        return torch.arange(length + forced)
    if "image_grid_thw" not in prompt and "video_grid_thw" not in prompt:
        return torch.arange(length + forced).expand(3, -1)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    at, _ = model.model.get_rope_index(**{k: prompt[k] for k in names if k in prompt})
    return torch.cat((at[:, 0], (at.max() + 1 + torch.arange(forced)).expand(3, -1)), 1)


def injected(model: nn.Module, prompt: dict, length: int) -> list[torch.Tensor]:
    """`(length, dim)` what is added to the hidden states behind layers 0, 1, ..., 0 in columns of text."""
    ids, made = prompt["input_ids"][0], []
    for token, name, output in ((IMAGE, "pixel_values", image_output), (VIDEO, "pixel_values_videos", video_output)):
        for layer, features in enumerate(
            getattr(output(model, prompt), "deepstack_features", ()) if name in prompt else ()
        ):
            if layer == len(made):
                made.append(torch.zeros(length, features[0].shape[-1], dtype=features[0].dtype))
            made[layer][: len(ids)][ids == token] = torch.cat(list(features))
    return made


def embed(model: nn.Module, prompt: dict) -> tuple[torch.Tensor, list[range]]:
    """`(length, dim)` embeddings of one prompt, image features in place, and the columns of every image."""
    ids = prompt["input_ids"][0]
    rows = list(model.get_input_embeddings()(ids))
    features, images, column = image_features(model, prompt), [], 0
    holes = (ids == IMAGE).nonzero().flatten().tolist()
    for feature in features:
        images.append(range(holes[column], holes[column] + len(feature)))
        for vector in feature:
            rows[holes[column]] = vector
            column += 1
    assert column == len(holes)
    return torch.stack(rows), images


def window_of(model: nn.Module, index: int) -> int | None:
    """Sliding window of a decoder layer, from the config alone."""
    config = model.config.text_config
    if config.model_type == "mistral":
        return config.sliding_window
    if config.model_type == "qwen2" and config.layer_types[index] == "sliding_attention":
        return config.sliding_window
    return None


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate`, of neighbouring numbers, of which some at the end stay as they are (GLM-4V)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    pairs = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos + pairs * sin, rest), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return torch.cat((x * cos + turned * sin, rest), -1)


def probabilities(model: nn.Module, index: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(heads, rows, keys)` attention of decoder layer `index` for its input `(length, dim)`."""
    layer, attention = model.model.language_model.layers[index], model.model.language_model.layers[index].self_attn
    dim, nothing = attention.head_dim, nn.Identity()
    normed = layer.input_layernorm(x)
    cos, sin = (c[0] for c in model.model.language_model.rotary_emb(x[None], position_ids=positions[..., None, :]))
    query = attention.q_proj(normed).view(len(x), -1, dim)
    query = query[:, ::2] if model.config.model_type == "qwen3_5" else query  # every other one is a gate
    query = getattr(attention, "q_norm", nothing)(query)
    key = getattr(attention, "k_norm", nothing)(attention.k_proj(normed).view(len(x), -1, dim))
    turn = rotate_pairs if model.config.model_type == "glm4v" else rotate
    query, key = (turn(side.transpose(0, 1), cos, sin) for side in (query, key))
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    row, column = torch.arange(len(x))[:, None], torch.arange(len(x))
    hidden = column > row
    if (window := window_of(model, index)) is not None:
        hidden |= column <= row - window
    return (query @ key.transpose(1, 2) / dim**0.5).masked_fill(hidden, -torch.inf).softmax(-1)


def gate_of(model: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | float:
    """`(length, heads * dim)` what attention's output is weighted by; 1 where a layer has no gate."""
    if model.config.model_type != "qwen3_5":
        return 1.0
    both = layer.self_attn.q_proj(layer.input_layernorm(x)).view(len(x), -1, 2, layer.self_attn.head_dim)
    return both[:, :, 1].flatten(1).sigmoid()


def run_layer(model: nn.Module, index: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Decoder layer `index` on `(length, dim)`."""
    layer, nothing = model.model.language_model.layers[index], nn.Identity()
    if not hasattr(layer, "self_attn"):  # recurrent: the host's own, of a row without padding
        return layer(x[None], position_embeddings=None, attention_mask=None)[0]
    weights = probabilities(model, index, x, positions)
    value = layer.self_attn.v_proj(layer.input_layernorm(x)).view(len(x), -1, layer.self_attn.head_dim).transpose(0, 1)
    value = value.repeat_interleave(weights.shape[0] // value.shape[0], 0)
    closing = [getattr(layer, f"post_{block}_layernorm", nothing) for block in ("self_attn", "mlp")]
    seen = (weights @ value).transpose(0, 1).flatten(1) * gate_of(model, layer, x)
    x = x + closing[0](layer.self_attn.o_proj(seen))
    return x + closing[1](layer.mlp(layer.post_attention_layernorm(x)[None])[0])


@dataclass
class Result:
    """One prompt, layer by layer.

    Attributes:
        logits: `(1 + forced, vocab)` at the prompt's last token and at every forced one.
        hidden: `(kept, dim)` final normed states of what is left, forced tokens included.
        columns: the prompt column of every entry of `hidden` (forced tokens count on).
        inputs: `(kept, dim)` input of every decoder layer after its cuts, and the columns there.
        positions: position ids at every layer.
        kv_lengths: prompt columns that every layer sees.
        kept: kept token numbers per cut and image.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    columns: list[int]
    inputs: list[tuple[torch.Tensor, list[int]]]
    positions: list[torch.Tensor]
    kv_lengths: list[int]
    kept: list[list[list[int]]]

    def at_prompt_length(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """Spread `(kept, ...)` values over the prompt: a dropped column repeats the last kept one, or the first."""
        out = []
        for column in range(length):
            before = [i for i, c in enumerate(self.columns) if c <= column]
            out.append(values[before[-1] if before else 0])
        return torch.stack(out)


def run(
    model: nn.Module,
    prompt: dict,
    rules: list[Rule],
    forced: list[int] | None = None,
    turns: list[tuple[int, list[Rule]]] | None = None,
) -> Result:
    """One prompt through the model with cuts, without any cache: causality makes forced tokens decode steps.

    `turns` says that the prompt is several turns of a conversation: how many images each has, and its own rules, which
    number these from 0 (`rules` then says nothing).
    """
    forced = forced or []
    x, images = embed(model, prompt)
    length = len(x)
    if forced:
        x = torch.cat((x, model.get_input_embeddings()(torch.tensor(forced))))
    columns, positions = list(range(len(x))), places(model, prompt, len(forced))
    alive, more = [[True] * len(image) for image in images], injected(model, prompt, len(x))
    cuts, start = [], 0
    for number, mine in [(len(images), rules)] if turns is None else turns:
        cuts += [(rule, range(start, start + number)) for rule in mine]
        start += number
    assert start == len(images)
    inputs, kv, kept, history = [], [], [], []
    for index in range(len(model.model.language_model.layers)):
        x = x + more[index - 1][columns] if 0 < index <= len(more) else x
        for rule, mine in [(r, mine) for r, mine in cuts if r.layer == index]:
            drop, cut_kept = set(), []
            for o in mine:
                image = images[o]
                keep = [k and a for k, a in zip(rule.keeps(o - mine.start, len(image)), alive[o], strict=True)]
                if rule.merge:
                    # X' = M X over the tokens of this image, written out as a matrix
                    into, weight = rule.flow(keep, alive[o])
                    matrix = x.new_zeros(len(image), len(image))
                    for t, (anchor, w) in enumerate(zip(into, weight, strict=True)):
                        matrix[anchor, t] = w
                    here = {c: i for i, c in enumerate(columns)}
                    x = merged(matrix, x, [here.get(c) for c in image], alive[o], keep)
                    more = [
                        merged(matrix, side, image, alive[o], keep) if number >= index else side
                        for number, side in enumerate(more)
                    ]
                drop |= {c for c, k, a in zip(image, keep, alive[o], strict=True) if a and not k}
                alive[o] = keep
                cut_kept.append([t for t, k in enumerate(keep) if k])
            kept.append(cut_kept)
            if rule.positions == "contiguous":
                lost = torch.tensor([sum(d < c for d in drop) for c in columns])
                positions = positions - lost
            stay = [i for i, c in enumerate(columns) if c not in drop]
            x, positions, columns = x[stay], positions[..., stay], [columns[i] for i in stay]
        inputs.append((x, columns))
        history.append(positions)
        kv.append(sum(c < length for c in columns))
        x = run_layer(model, index, x, positions)
    x = model.model.language_model.norm(x)
    last = [max(i for i, c in enumerate(columns) if c < length)]
    last += [i for i, c in enumerate(columns) if c >= length]
    return Result(model.lm_head(x[last]), x, columns, inputs, history, kv, kept)


def merged(matrix, x, rows, alive, keep):
    """`(length, dim)` with the tokens of an image, which are so many rows, merged by X' = M X."""
    tokens = torch.stack([x[r] if a else torch.zeros_like(x[0]) for r, a in zip(rows, alive, strict=True)])
    new, out = matrix @ tokens, list(x)
    for t, row in enumerate(rows):
        if keep[t]:
            out[row] = new[t]
    return torch.stack(out)


def short_sequence(model: nn.Module, prompt: dict, rule: Rule, forced: list[int]) -> torch.Tensor:
    """A `Decoder(0)` cut with the model's own language model: embed, select rows, run it on the short sequence."""
    x, images = embed(model, prompt)
    gone = {c for o, image in enumerate(images) for c, k in zip(image, rule.keeps(o, len(image)), strict=True) if not k}
    stay = [c for c in range(len(x)) if c not in gone]
    x = torch.cat((x[stay], model.get_input_embeddings()(torch.tensor(forced))))
    old = [*stay, *range(prompt["input_ids"].shape[1], prompt["input_ids"].shape[1] + len(forced))]
    positions = torch.arange(len(x)) if rule.positions == "contiguous" else torch.tensor(old)
    # a 4-D mask: gaps in the ids would be taken for packed sequences
    mask = torch.full((len(x), len(x)), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
    out = model.model.language_model(inputs_embeds=x[None], attention_mask=mask, position_ids=positions[None])
    return model.lm_head(out.last_hidden_state[0, len(stay) - 1 :])


def loss(model: nn.Module, result: Result, labels: list[int]) -> torch.Tensor:
    """Next-token loss over what is left; every label stands at its kept column."""
    logits = model.lm_head(result.hidden)
    kept = [labels[c] for c in result.columns]
    pairs = [(logits[i], kept[i + 1]) for i in range(len(kept) - 1) if kept[i + 1] != -100]
    return -torch.stack([row.double().log_softmax(-1)[label] for row, label in pairs]).mean()


def top(scores: list[float], count: int, candidates: list[int]) -> list[int]:
    """Best candidates, ties to the lower index, ascending."""
    return sorted(sorted(candidates, key=lambda i: (-scores[i], i))[:count])
