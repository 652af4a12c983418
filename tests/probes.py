"""A test method with arbitrary cuts, and ways to drive a model by hand."""

from __future__ import annotations

from dataclasses import dataclass

import tiny
import torch
from reference import Rule
from tiny import CACHE
from torch import nn
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from vlmprune import Cut, Decoder, Layout, Merge, Method, Reduction
from vlmprune.parts import Schedule
from vlmprune.parts.tracing import trace_packing
from vlmprune.patches import family_of


@dataclass(frozen=True)
class Ruled:
    """`reduce` of one rule; a class so that patched models pickle."""

    rule: Rule

    def __call__(self, seen: dict, layout: Layout) -> Reduction:
        rule, shape = self.rule, layout.position.shape
        keep, into, weight = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape).long(), torch.zeros(shape)
        for i, (grid, ordinal) in enumerate(zip(layout.grids, layout.ordinal, strict=True)):
            mine = rule.keeps(ordinal, grid.tokens)
            keep[i, : grid.tokens] = torch.tensor(mine)
            if rule.merge:
                alive = layout.alive[i, : grid.tokens].tolist()
                flow = rule.flow([k and a for k, a in zip(mine, alive, strict=True)], alive)
                into[i, : grid.tokens] = torch.tensor(flow[0])
                weight = weight.double()
                weight[i, : grid.tokens] = torch.tensor(flow[1], dtype=torch.float64)
        # what is gone must not flow anywhere, whatever is said about it
        weight = weight.where(layout.alive, 1.0)
        into = into.where(layout.alive, (keep & layout.alive).long().argmax(1, keepdim=True))
        counts = None if rule.emergent else (keep & layout.alive).sum(1).tolist()
        return Reduction(keep, counts, merge=Merge(into, weight) if rule.merge else None)


@dataclass(frozen=True)
class Rules(Method):
    """Cuts by arithmetic, anywhere."""

    rules: tuple[Rule, ...] = ()

    def cuts(self, facts: object) -> list[Cut]:
        return [Cut(Decoder(rule.layer), (), Ruled(rule), rule.positions) for rule in self.rules]


def rules(*given: Rule) -> Rules:
    return Rules(tuple(given))


def left(method: Method, total: int, stage: int, share: tuple[float, ...] = ()) -> int:
    """Tokens of an image's `total` that a staged method keeps behind a cut; `share` is `Schedule.shares`."""
    return Schedule(method.keep_ratios, share, method.keep, method.average).left(total, stage)


def step_inputs(inputs: dict) -> dict:
    """`inputs` with the position ids that `generate` would pass."""
    mask = inputs["attention_mask"]
    return inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def forced_logits(model: nn.Module, inputs: dict, forced: torch.Tensor, cache: object = None) -> torch.Tensor:
    """`(batch, 1 + steps, vocab)` logits at each prompt's last token and at every forced token `(batch, steps)`."""
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    mask, real = inputs["attention_mask"], inputs["attention_mask"].sum(1)
    length = mask.shape[1]
    last = (mask * torch.arange(length)).amax(1)
    out = model(**step_inputs(inputs), **{CACHE: cache}, use_cache=True)
    assert out.logits.shape[1] == length
    logits = [out.logits[torch.arange(len(mask)), last]]
    for step in range(forced.shape[1]):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        out = model(
            input_ids=forced[:, step : step + 1], attention_mask=mask, position_ids=(real + step)[:, None],
            **{CACHE: cache}, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


class Force:
    """A logits processor that makes `generate` emit given tokens `(batch, steps)`."""

    def __init__(self, tokens: torch.Tensor, prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        out = torch.full_like(scores, -torch.inf)
        return out.scatter(1, self.tokens[:, step : step + 1], 0.0)


def generated_logits(model: nn.Module, inputs: dict, forced: torch.Tensor, **options: object) -> torch.Tensor:
    """As `forced_logits`, through `model.generate` (whose own `output_logits` are float32)."""
    steps = torch.cat((forced, forced[:, :1]), 1)  # the last logits need one more token
    logits = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))
    try:
        out = model.generate(
            **inputs, max_new_tokens=steps.shape[1], do_sample=False,
            logits_processor=[Force(steps, inputs["input_ids"].shape[1])], **options,
        )  # fmt: skip
    finally:
        hook.remove()
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], steps)
    return torch.stack(logits, 1)


def random_tokens(batch: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 60, (batch, steps), generator=torch.Generator().manual_seed(seed))


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert gap(a, b) <= tolerance, f"differs by {gap(a, b):.3g}"


def far(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    """The negative twin of `same`: without it an equality may hold whatever the engine does."""
    assert gap(a, b) >= 100 * tolerance, f"differs by {gap(a, b):.3g} only"


def hand_layout(*grids: object, sample: list[int] | None = None) -> Layout:
    """A layout of `ImageGrid`s, one image after the other without text between."""
    sizes = [grid.tokens for grid in grids]
    sample = [0] * len(grids) if sample is None else sample
    width, starts = max(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
    token = torch.arange(width)
    return Layout(
        grids=list(grids), sample=sample, ordinal=[sample[:i].count(s) for i, s in enumerate(sample)],
        start=[sum(g.encoded for g in grids[:i]) for i in range(len(grids))],
        position=torch.stack([token + start for start in starts]),
        alive=torch.stack([token < size for size in sizes]),
        alive_counts=sizes, alive_patches=[grid.patches for grid in grids],
        entered=sizes, entered_patches=[grid.patches for grid in grids],
    )  # fmt: skip


def raster(rows: int, cols: int) -> object:
    """The grid of one view without newlines."""
    return trace_packing(lambda x, newline: x[0], 1, rows, cols, (1, 1))


def anyres(height: int, width: int) -> object:
    """The grid that the tiny llava_next model gives an image of this size."""
    model = tiny.shared(family="llava_next")
    return family_of(model).image_grid(model.model, (height, width))


def kept(reduction: Reduction, image: int = 0) -> list[int]:
    return reduction.keep[image].nonzero().flatten().tolist()


class Heard(BaseStreamer):
    """Keeps the tokens that a stream brings."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True
