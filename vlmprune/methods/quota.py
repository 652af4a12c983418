"""QuoTA (arXiv 2503.08689; code MAC-AutoML/QuoTA), with frame scores of the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from vlmprune.methods.base import Cut, Decoder, Layout, Merge, ModelFacts, Pruner, Reduction, Seen, Tap, register
from vlmprune.parts import Hidden, Must, TextAttention, check_layer, count, frames_of

__all__ = ["Quota", "frame_budgets"]

SCORER = Must(
    "a function that makes scores of at least 0 `(frames,)` of features `(frames, patches, dim)`, or None for the "
    "model's own attention",
    lambda given: given is None or callable(given),
)


def frame_budgets(scores: torch.Tensor, budget: int, most: int) -> torch.Tensor:
    """Tokens of every frame, `(frames,)` long: in proportion to the square of its score, none above a whole frame.

    What frames cannot take is handed to the others once, in proportion. The best frame gets at least one token.

    Args:
        scores: `(frames,)` of at least 0.
        budget: tokens of the video; most: tokens of a frame.
    """
    weight = (scores.double() / scores.double().amax().clamp(min=1e-300)) ** 2
    share = budget * weight / weight.sum().clamp(min=1e-300)
    full = share >= most
    spare = (share - most).clamp(min=0).sum()
    rest = torch.where(full, 0, weight)
    share = share.clamp(max=most) + spare * rest / rest.sum().clamp(min=1e-300)
    best = torch.arange(len(share), device=share.device) == weight.argmax()
    return (share.clamp(max=most) + 1e-9).floor().long().clamp(min=best.long())


@register("quota")
@dataclass(frozen=True)
class Quota(Pruner):
    """Split a video's budget over its frames by their scores, and average every frame on a grid that its part pays for.

    QuoTA has a second model score the frames and moves a fixed budget among them; it saves nothing by itself. Here the
    scores are the attention that the text behind the video pays each frame in an early layer, or a function's, and no
    frame gets more than it has. A frame whose part is under one token goes.

    Args:
        keep, average: at most so many patches per video, or a fraction: grids are whole, so that a few are left over
            (tables show the real count). All of them leaves the video as it is.
        scorer: scores `(frames,)`, at least 0, made of projected features `(frames, patches, dim)`; the cut is then
            before the LLM. None reads the attention of layer `layer` - 1, and the cut is at the input of `layer`.
        layer: 0-based, at least 1; not scaled.
        positions: contiguous, a new sequence (source).
    """

    summary = "a video's budget split over frames by what the question looks at, each pooled"
    paper = "arXiv 2503.08689"
    needs = "decoder attention (one layer), or a function's scores"
    looks_at = "decoder"
    stage = "decoder layer K (with a scorer, before the LLM)"
    syncs = 1
    refuses_inputs: ClassVar[dict[str, str]] = {
        "image": "shares a budget among the frames of a video, and a still picture has none: ask it about videos alone"
    }

    scorer: Annotated[Any, SCORER] = None
    layer: int = 2

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        layer = check_layer("layer", self.layer, facts.decoder_layers, lowest=1)
        see: Tap = Hidden() if self.scorer else TextAttention(layer - 1, "instruction")
        return [Cut(Decoder(0 if self.scorer else layer), (see,), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features or attention in, decision out."""
        (values,) = seen.values()
        into = torch.arange(layout.width, device=values.device).expand(len(layout), -1).clone()
        keep, weight = layout.patches.clone(), layout.alive.double()
        for video, places in enumerate(frames_of(self.known_as, layout)):
            frames, most = places.shape
            if (budget := count(self.budget, places.numel())) == places.numel():
                continue
            scores = values[video, places]
            scores = self.scorer(scores) if self.scorer else scores.sum(1)
            if tuple(scores.shape) != (frames,):
                raise ValueError(f"scorer= must make {(frames,)} scores of so many frames, not {tuple(scores.shape)}.")
            number = frame_budgets(scores, budget, most)[:, None]
            # every frame on a grid of its own, as square as its part allows
            rows, cols = layout.grids[video].planes[0]
            down = number.double().sqrt().floor().long().clamp(max=rows)
            across = (number // down.clamp(min=1)).clamp(max=cols)
            cell = (layout.row[video, places] * down // rows) * cols + layout.col[video, places] * across // cols
            first = torch.full((frames, rows * cols), layout.width, device=cell.device)
            first = first.scatter_reduce(1, cell, places, "amin").gather(1, cell)
            into[video, places], keep[video, places] = first, (first == places) & (number > 0)
            size = torch.zeros(frames, rows * cols, dtype=torch.double, device=cell.device)
            size = size.scatter_add(1, cell, torch.ones_like(cell, dtype=torch.double))
            weight[video, places] = 1 / size.gather(1, cell)
        weight = weight.float() if weight.device.type == "mps" else weight
        return self.kept(keep, layout, None, merge=Merge(into, weight))
