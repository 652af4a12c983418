"""HoloV (arXiv 2510.02912; code obananas/HoloV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmprune.methods.base import BeforeLLM, Layout, Merge, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Hidden, row_of, take_rows, top_k, upcast, upload

__all__ = ["HoloV", "shared_out", "slice_scores", "slices"]

SLICES = 16


def slices(among: torch.Tensor) -> torch.Tensor:
    """The slice that every candidate of `(images, tokens)` is in: 16 of consecutive ones, the first ones one longer."""
    number, total = among.cumsum(1) - 1, among.sum(1, keepdim=True)
    base, longer = total // SLICES, total % SLICES
    edge = longer * (base + 1)
    late = longer + (number - edge) // base.clamp(min=1)
    return torch.where(number < edge, number // (base + 1), late).clamp(0, SLICES - 1)


def slice_scores(features: torch.Tensor, row: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How much every slice is worth: attention, and how unevenly its patches are like each other.

    Args:
        features: `(..., patches, dim)`; row: `(..., patches)` attention; real: `(..., patches)` bool, what is there.

    Returns:
        `(...)`; 0 for an empty slice.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1) * real[..., None]
    cosine = unit @ unit.transpose(-1, -2)
    cosine = cosine - torch.diag_embed(cosine.diagonal(dim1=-2, dim2=-1))
    size = real.sum(-1).clamp(min=1)
    others = (size - 1).clamp(min=1)[..., None]
    mean = cosine.sum(-1) / others
    apart = (cosine - mean[..., None]) ** 2 * real[..., None, :]
    spread = apart.sum(-1) / others * real  # the diagonal, which is 0, counts as in the released code
    look = 1000 * row.float() * real
    of = lambda x: x.sum(-1) / size  # noqa: E731
    balance = of(look.abs()) / (of(spread.abs()) + 1e-6)
    return of(look + 0.09 * spread * balance[..., None])


def shared_out(scores: torch.Tensor, sizes: torch.Tensor, keep: torch.Tensor, fill: bool = True) -> torch.Tensor:
    """Split a budget over slices in proportion to their scores, whole numbers, the rest one each to the best.

    Args:
        scores, sizes: `(images, slices)`; keep: `(images,)` long.
        fill: give what a slice has no room for to the best ones that have.
    """
    part = (keep[:, None] * scores / scores.sum(1, keepdim=True).clamp(min=1e-12)).floor().long()
    best = scores.argsort(dim=1, descending=True, stable=True)
    part = torch.minimum(part + (best.argsort(1) < (keep - part.sum(1))[:, None]), sizes)
    if not fill:
        return part
    room = (sizes - part).gather(1, best)
    more = ((keep - part.sum(1))[:, None] - (room.cumsum(1) - room)).clamp(min=0)
    return part.scatter_add(1, best, torch.minimum(more, room))


@register("holov")
@dataclass(frozen=True)
class HoloV(BeforeLLM):
    """Give every stretch of the picture its share of the budget, and keep there what [CLS] looks at.

    Sixteen slices of consecutive patches share the budget in proportion to their scores: the mean attention of `row_of`
    the layer whose output becomes the features, and 0.09 times how unevenly the projected patches of the slice are like
    each other. Inside a slice attention alone decides.

    Args:
        keep, average: of the whole image (released: 64, whatever it is).
        parity: None gives what a slice has no room for to the best ones that have some. "released" leaves it empty:
            vectors of zeros stand for it, tokens come slice by slice by falling attention, and newlines go.
    """

    summary = "every stretch of the picture has its share, of which stays what [CLS] looks at"
    paper = "arXiv 2510.02912"
    needs = "tower attention and features"
    looks_at = "tower"

    parity: Literal["released"] | None = None

    @property
    def reorders(self) -> bool:
        return self.parity == "released"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        return Hidden(), row_of(facts)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features and one attention row in, decision out."""
        features, row = seen.values()
        among, counts, reached = self.contest(layout)
        own = slices(among)
        members = among[:, None] & (own[:, None] == torch.arange(SLICES, device=own.device)[:, None])
        # every slice in a row of its own, of `(images, slices, patches)`
        sizes, place = members.sum(-1), torch.arange(-(-layout.width // SLICES), device=own.device)
        order = among.long().sort(dim=1, descending=True, stable=True).indices
        nth = ((sizes.cumsum(1) - sizes)[..., None] + place).clamp(max=layout.width - 1)
        at = order.gather(1, nth.flatten(1))
        boxed, look = (x.unflatten(1, nth.shape[1:]) for x in (take_rows(features, at), row.gather(1, at)))
        keep = torch.minimum(upload(counts, row.device), among.sum(1))
        worth = slice_scores(boxed, look, place < sizes[..., None])
        part = shared_out(worth, sizes, keep, fill=not self.reorders)
        kept = top_k(row[:, None].expand_as(members), part, members).any(1)
        if self.reorders:
            return self.as_released(kept, own, row, reached)
        return self.kept(kept, layout, reached, row)

    def as_released(self, kept: torch.Tensor, own: torch.Tensor, row: torch.Tensor, counts: list[int]) -> Reduction:
        """The kept tokens slice by slice, by falling attention, over the image's first places; then zeros."""
        order = row.masked_fill(~kept, -torch.inf).argsort(dim=1, descending=True, stable=True)
        by_slice = torch.where(kept, own, SLICES).gather(1, order).argsort(dim=1, stable=True)
        number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        keep = number < upload(counts, kept.device)[:, None]
        weight = upcast((number < kept.sum(1, keepdim=True)).to(row.dtype))
        return Reduction(keep, counts, merge=Merge(number, weight, order.gather(1, by_slice)), scores=row)
