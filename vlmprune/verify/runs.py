"""Running a model as a user does, and by hand, with everything kept that the checks compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from vlmprune.engine.encode import encode
from vlmprune.patches import Family
from vlmprune.patches.host import returned_cache, with_cache
from vlmprune.patches.language_models import RECURRENT, rotary_of, window_of
from vlmprune.trace import CutTrace, Trace
from vlmprune.verify.byhand import Flow, Stretch, flow_of, flows, in_stretches, run_layers, stretches

__all__ = [
    "FORCED",
    "Hand",
    "Rows",
    "Run",
    "by_hand",
    "changes",
    "dropped_by",
    "has_pictures",
    "masked",
    "of_images",
    "other_positions",
    "rows_of",
    "run",
    "without",
    "wrong",
]

FORCED = 4  # tokens that are decoded after every prompt


@dataclass(frozen=True)
class Run:
    """A prefill and forced decode steps with a cache.

    Attributes:
        hidden: `(batch, prompt, dim)` last hidden states of the prefill, at the prompt's length.
        logits: `(batch, 1 + forced, vocab)` after the prompt's last token and after every forced one.
        lengths: entries that every layer with attention had cached when the prompt was read.
        keys, values: `(batch, heads, entries, dim)` of every such layer in the end.
        layers: their numbers.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    lengths: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    layers: list[int]


def attending(cache: Any) -> dict[int, Any]:
    """The layers of a cache that hold keys, by number; recurrent ones hold a state."""
    return {number: layer for number, layer in enumerate(cache.layers) if hasattr(layer, "keys")}


@contextmanager
def last_hidden(inner: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The last hidden states of the calls inside the block."""
    seen: list[torch.Tensor] = []
    hook = inner.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


def has_pictures(prompt: dict[str, Any]) -> bool:
    """Whether a call brings pictures."""
    return "pixel_values" in prompt or "pixel_values_videos" in prompt


def run(family: Family, model: nn.Module, inputs: dict[str, Any], forced: Sequence[int], alone: bool = False) -> Run:
    """Run a padded batch (or one prompt), patched or not.

    Without padding no mask is handed over (`generate` does the same): with one, attention may take another kernel than
    by hand, which in half precision is seen.

    Args:
        alone: whether the model is to place decoded tokens alone where positions lie on several axes; an unpatched one
            cannot, since it counts a mask that is longer than the call.
    """
    mask, padded = inputs["attention_mask"], not bool(inputs["attention_mask"].all())
    inputs = inputs if padded else without(inputs, "attention_mask")
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    every = torch.arange(len(mask), device=mask.device)
    on_axes = family.axes > 1
    counted = {} if on_axes else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + family.origin}
    with last_hidden(family.inner(model)) as seen:
        out = model(**inputs, **counted, use_cache=True, logits_to_keep=1)
    hidden, cache = seen[0], returned_cache(out)
    held = attending(cache)
    lengths = [layer.keys.shape[2] for layer in held.values()]  # they grow under way
    logits = [model.get_output_embeddings()(hidden[every, last])]
    place = place_behind(family, model, mask, has_pictures(inputs))
    for step, token in enumerate(forced):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        given = {"attention_mask": mask} if padded else {}
        if not (alone and on_axes):
            given["position_ids"] = place + step
        ids = mask.new_full((len(mask), 1), token)
        out = model(input_ids=ids, use_cache=True, **given, **with_cache(cache))
        logits.append(out.logits[:, -1])
    keys, values = [layer.keys for layer in held.values()], [layer.values for layer in held.values()]
    return Run(hidden, torch.stack(logits, 1), lengths, keys, values, list(held))


def place_behind(family: Family, model: nn.Module, mask: torch.Tensor, pictures: bool) -> torch.Tensor:
    """Position ids behind the prompts of a call that was just run, `(batch, 1)`, or `(axes, batch, 1)`."""
    place = mask.sum(1, keepdim=True) + family.origin
    if family.axes == 1:
        return place
    ahead = family.inner(model).rope_deltas if pictures else 0
    return (place + ahead).expand(family.axes, -1, -1)


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    """The other arguments of a call."""
    return {name: value for name, value in inputs.items() if name not in names}


@dataclass(frozen=True)
class Rows:
    """One prompt as the language model is about to read it.

    Attributes:
        ids: `(1, length)`.
        hidden: `(1, length, dim)` embeddings with the visual features in place.
        images: prompt columns of the tokens of every image, then of every video.
        places: `(length,)` position ids, or `(axes, length)`.
        injected: `(1, length, dim)` what is added to the hidden states behind layers 0, 1, ...
        blocks: `(1, length)` of `Family.blocks`.
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    images: list[list[int]]
    places: torch.Tensor
    injected: list[torch.Tensor]
    blocks: torch.Tensor | None


def rows_of(family: Family, model: nn.Module, prompt: dict[str, Any]) -> Rows:
    """Run the model's own vision part (patched, if the model is) and put its features where placeholders are.

    The engine's `encode` is used, which only calls the model's own encoders.
    """
    inner, ids = family.inner(model), prompt["input_ids"]
    hidden, images, injected = model.get_input_embeddings()(ids).clone(), [], []
    for modality, encoded in encode(inner, without(prompt, "input_ids", "attention_mask"), family).items():
        columns = (ids[0] == family.token(inner, modality)).nonzero().flatten()
        hidden[0, columns] = torch.cat(list(encoded.pooler_output)).to(hidden.dtype)
        images += [part.tolist() for part in columns.split(sizes_of(family, inner, modality, encoded, prompt, columns))]
        for layer, features in enumerate(getattr(encoded, "deepstack_features", ())):
            injected += [torch.zeros_like(hidden)] * (layer == len(injected))
            injected[layer][0, columns] = torch.cat(list(features)).to(hidden.dtype)
    blocks = family.blocks(prompt) if has_pictures(prompt) else None
    return Rows(ids, hidden, images, places_of(family, inner, prompt), injected, blocks)


def sizes_of(
    family: Family, inner: nn.Module, modality: str, encoded: Any, prompt: dict[str, Any], columns: torch.Tensor
) -> list[int]:
    """Tokens of every picture of one kind, whose placeholders stand at `columns`."""
    if family.runs:  # a picture ends where text begins
        ends = [*((columns.diff() > 1).nonzero().flatten() + 1).tolist(), len(columns)]
        return [end - start for start, end in pairwise([0, *ends])]
    known = family.sizes(modality, prompt) if family.sized(modality) else []
    return family.items(inner, modality, encoded, known)


def places_of(family: Family, inner: nn.Module, prompt: dict[str, Any]) -> torch.Tensor:
    """As `Rows.places`, on several axes by the host's own rule."""
    length, device = prompt["input_ids"].shape[1], prompt["input_ids"].device
    count = torch.arange(length, device=device) + family.origin
    if family.axes == 1:
        return count
    if not has_pictures(prompt):
        return count.expand(family.axes, -1)
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    return inner.get_rope_index(**{name: prompt[name] for name in wanted if name in prompt})[0][:, 0]


def extended(model: nn.Module, rows: Rows, forced: Sequence[int]) -> torch.Tensor:
    """`(1, length + forced, dim)`: with causal layers, a forced token at the end is what decoding computes."""
    more = torch.tensor([list(forced)], dtype=torch.long, device=rows.ids.device)
    return torch.cat((rows.hidden, model.get_input_embeddings()(more)), 1)


@dataclass(frozen=True)
class Hand:
    """What one prompt and its forced tokens come to by hand.

    Attributes:
        entered: `(entries, dim)` what the first layer reads, forced tokens included.
        hidden: `(entries, dim)` last hidden states of what is left of the prompt.
        columns: for every layer, the prompt column of each entry (forced tokens count on).
        logits, keys, values: as in `Run`, without the batch dimension.
    """

    entered: torch.Tensor
    hidden: torch.Tensor
    columns: list[list[int]]
    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def by_hand(
    family: Family, model: nn.Module, rows: Rows, cuts: Sequence[CutTrace], forced: Sequence[int], astray: int = 0
) -> Hand:
    """Select the rows that `cuts` kept and run the model's layers on them: the prompt, and then token by token.

    Everything has the shape that it has in the pruned model, so that the same kernels give the same bits.

    Args:
        astray: positions by which the forced tokens stand wrong, on purpose.
    """
    language_model, length = family.language_model(family.inner(model)), rows.ids.shape[1]
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    parts = stretches(cuts, [0] * len(rows.images), rows.images, (1, length), rows.hidden.device)
    cache = DynamicCache(config=language_model.config)
    entered, injected = parts[0].take(rows.hidden), [parts[0].take(x) for x in rows.injected]
    places, end = [part.positions + family.origin for part in parts], int(rows.places.max()) + 1
    if rows.places.ndim > 1:
        places = in_stretches(rows.places[:, None], parts)
    blocks = None if rows.blocks is None else in_stretches(rows.blocks, parts)
    prompt = run_layers(language_model, entered, parts, places, cache, injected=injected, blocks=blocks)
    logits, tokens = [head(prompt[:, -1])], embed(rows.ids.new_tensor([list(forced)]))
    for number in range(len(forced)):
        places = [end + number + astray - part.shift for part in parts]
        step = run_layers(language_model, tokens[:, number : number + 1], parts, places, cache, number + 1)
        logits.append(head(step)[:, -1])
    return Hand(
        torch.cat((entered, tokens), 1)[0],
        prompt[0],
        columns_of(parts, length, len(forced), len(cache.layers)),
        torch.cat(logits),
        [layer.keys[0] for layer in attending(cache).values()],
        [layer.values[0] for layer in attending(cache).values()],
    )


def columns_of(parts: Sequence[Stretch], length: int, forced: int, layers: int) -> list[list[int]]:
    """As in `Hand`, for a prompt of so many columns and so many tokens behind it."""
    columns, by_layer = list(range(length)), {}
    for part in parts:
        columns = [columns[entry] for entry in part.index[0].tolist()]
        by_layer[part.first] = columns + list(range(length, length + forced))
    return [by_layer[max(first for first in by_layer if first <= layer)] for layer in range(layers)]


@contextmanager
def masks_allowed(language_model: nn.Module) -> Iterator[None]:
    """Let the layers take a 4-D mask, which flash attention does not."""
    config = language_model.config
    before = config._attn_implementation
    if before not in ("sdpa", "eager"):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


def masked(
    family: Family, model: nn.Module, rows: Rows, cuts: Sequence[CutTrace], forced: Sequence[int], astray: int = 0
) -> torch.Tensor:
    """The plain layers on the whole sequence, dropped columns hidden by a 4-D mask from the layers above their cut.

    Nothing is gathered, shortened or cached: every layer has every row.

    Args:
        astray: as of `by_hand`.

    Returns:
        Logits as in `Hand`.
    """
    language_model = family.language_model(family.inner(model))
    hidden = extended(model, rows, forced)
    number = torch.arange(hidden.shape[1], device=hidden.device)
    alive = torch.ones_like(number, dtype=torch.bool)
    behind = rows.places.max() + 1 + astray + torch.arange(len(forced), device=number.device)
    place = torch.cat((rows.places, behind.expand(*rows.places.shape[:-1], -1)), -1)
    more = [nn.functional.pad(x, (0, 0, 0, len(forced))) for x in rows.injected]
    blocks = None if rows.blocks is None else nn.functional.pad(rows.blocks[0], (0, len(forced)), value=-1)
    masks: dict[Any, torch.Tensor] = {}
    with masks_allowed(language_model):
        for index, layer in enumerate(language_model.layers):
            if 0 < index <= len(more):
                hidden = hidden + more[index - 1]
            for cut in (cut for cut in cuts if cut.layer == index):
                gone, merging = taken(cut, rows.images, alive)
                hidden, *more[index:] = [merged(x, merging) for x in (hidden, *more[index:])]
                alive, masks = alive & ~gone, {}
                if cut.positions == "contiguous":
                    place = place - gone.cumsum(0)
            if (window := window_of(layer)) == RECURRENT:  # a state cannot be masked: what is gone is left out
                left = layer(hidden[:, alive], position_embeddings=None, attention_mask=None)
                hidden = hidden.index_copy(1, alive.nonzero().flatten(), left)
                continue
            if window not in masks:
                masks[window] = mask_of(alive, window, hidden.dtype, blocks)
            hidden = layer(
                hidden,
                attention_mask=masks[window][None, None],
                position_embeddings=rotary_of(layer, language_model.rotary_emb, hidden, place[..., None, :]),
                position_ids=number[None],
            )
        out = language_model.norm(hidden)[0, -1 - len(forced) :]
    return model.get_output_embeddings()(out)


def merged(hidden: torch.Tensor, merging: Sequence[Flow]) -> torch.Tensor:
    """`(1, length, dim)` after all flows."""
    for flow in merging:
        hidden = flow.apply(hidden)
    return hidden


def taken(cut: CutTrace, images: Sequence[Sequence[int]], alive: torch.Tensor) -> tuple[torch.Tensor, list[Flow]]:
    """The columns that a cut takes of those `alive`, `(length,)` bool, and how it merges them."""
    gone, there, merging = torch.zeros_like(alive), alive.tolist(), []
    for image, columns in enumerate(images):
        mine = torch.tensor(columns, dtype=torch.long, device=alive.device)
        gone[mine] = alive[mine] & ~cut.keep[image, : len(mine)]
        if flows(cut, gone[mine].any()):
            merging.append(flow_of(cut, image, 0, {c: c for c in columns if there[c]}, columns))
    return gone, merging


def mask_of(
    alive: torch.Tensor, window: int | None, dtype: torch.dtype, blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """The `(length, length)` mask of a layer that hides all columns but those `alive`, and those behind its window.

    Args:
        blocks: `(length,)` of `Family.blocks`.
    """
    number, rank = torch.arange(len(alive), device=alive.device), alive.cumsum(0)
    visible = number <= number[:, None]
    if blocks is not None:
        visible |= (blocks == blocks[:, None]) & (blocks >= 0)
    visible &= alive
    if window is not None:
        visible &= rank > rank[:, None] - window
    visible |= torch.eye(len(alive), dtype=torch.bool, device=alive.device)  # rows that nobody reads need something
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def alive_before(trace: Trace, number: int) -> torch.Tensor:
    """`(images, tokens)` bool of what cut `number` found."""
    if number:
        return trace.cuts[number - 1].keep
    keep = trace.cuts[0].keep
    tokens = torch.tensor([grid.tokens for grid in trace.grids], device=keep.device)
    return torch.arange(keep.shape[1], device=keep.device) < tokens[:, None]


def changes(trace: Trace) -> list[int]:
    """Numbers of the cuts that took something, or wrote it anew."""
    return [
        number
        for number, cut in enumerate(trace.cuts)
        if not torch.equal(cut.keep, alive_before(trace, number)) or (cut.merge and cut.merge.source is not None)
    ]


def wrong(trace: Trace) -> list[CutTrace]:
    """The cuts with one mistake in the first that took something: a kept token is mistaken for a dropped one.

    A merging cut forgets to merge instead.
    """
    made, at = list(trace.cuts), changes(trace)[0]
    if made[at].merge is not None:
        made[at] = replace(made[at], merge=None)
        return made
    keep = made[at].keep.clone()
    dropped = alive_before(trace, at) & ~keep
    image = int(dropped.any(1).nonzero()[0])
    if keep[image].any():
        keep[image, keep[image].nonzero()[-1]] = False
    keep[image, dropped[image].nonzero()[-1]] = True
    made[at] = replace(made[at], keep=keep)
    return made


def dropped_by(trace: Trace) -> int:
    """Positions by which decoded tokens would be wrong under the other position policy (for `astray`).

    Where nothing was dropped in the language model, as many as there are visual tokens.
    """
    lost = trace.prompt_length - min(trace.kv_lengths)
    if not lost:
        return -sum(grid.tokens for grid in trace.grids)
    return lost if trace.cuts[-1].positions == "contiguous" else -lost


def of_images(cut: CutTrace, images: Sequence[int]) -> CutTrace:
    """What a cut did to some images of a batch."""
    images = list(images)
    merge = cut.merge
    if merge is not None:
        source = None if merge.source is None else merge.source[images]
        merge = replace(merge, into=merge.into[images], weight=merge.weight[images], source=source)
    scores = None if cut.scores is None else cut.scores[images]
    return replace(cut, keep=cut.keep[images], merge=merge, scores=scores)


def other_positions(trace: Trace) -> list[CutTrace]:
    """The cuts with the other position policy in the last that took something."""
    made, at = list(trace.cuts), changes(trace)[-1]
    other = "original" if made[at].positions == "contiguous" else "contiguous"
    made[at] = replace(made[at], positions=other)
    return made
