"""VScan (arXiv 2505.22654; code Tencent/SelfEvolvingAgent, VScan/)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch

from vlmprune.methods.base import Cut, Decoder, Layout, ModelFacts, Pruner, Reduction, Seen, register
from vlmprune.parts import (
    Hidden,
    TextAttention,
    by_view,
    floored,
    layer_of,
    nearest_mean,
    row_of,
    scale_tower_layer,
    schedule_layers,
    top_k,
    upload,
)

__all__ = ["VScan", "two_scans"]

ACROSS = 4  # windows along each side of a view


def two_scans(
    shallow: torch.Tensor,
    deep: torch.Tensor,
    rows: torch.Tensor,
    window: torch.Tensor,
    shares: torch.Tensor,
    fill: bool = True,
) -> torch.Tensor:
    """Half of every view's share from its windows by a shallow layer, the rest from the whole view by a deep one.

    Args:
        shallow, deep: `(images, tokens)`; window: `(images, tokens)` long, 0..15 within a view.
        rows: `(images, views, tokens)` bool, candidates; shares: `(images, views)` long.
        fill: let the windows of the best tokens have what does not divide; without, it is lost (as released).

    Returns:
        `(images, tokens)` bool.
    """
    members = rows[:, :, None] & (window[:, None, None] == torch.arange(ACROSS**2, device=window.device)[:, None])
    near, far = (x[:, None].expand_as(rows) for x in (shallow, deep))
    half = shares // 2
    part = (half // ACROSS**2)[..., None].expand(members.shape[:-1])
    if fill:
        best = near[:, :, None].masked_fill(~members, -torch.inf).amax(-1)
        part = part + top_k(best, half % ACROSS**2, members.any(-1))
    local = top_k(near[:, :, None].expand_as(members), part, members).any(2)
    left = shares - (local.sum(-1) if fill else half)
    return (local | top_k(far, left, rows & ~local)).any(1)


@register("vscan")
@dataclass(frozen=True)
class VScan(Pruner):
    """Scan the picture twice in the tower, merge what is left over, and cut again in the middle of the decoder.

    Stage 1: half of its budget comes in equal parts from 4 x 4 windows of every view, by `row_of` a shallow tower
    layer; the rest from the whole view by that of the layer whose output becomes the features. Every patch that goes is
    averaged into the kept one that it is most like. Stage 2: the attention of the last prompt token at a middle decoder
    layer keeps a third of that.

    Args:
        keep: left after stage 2; three times as many enter the LLM (released 96, then 32). Without a stage 2 it is
            those that enter. `average` is the same as a mean over decoder layers (with layer 16 of 32: twice `keep`).
        window_layer: 0-based tower layer of 24 (scaled) of the windows (code: 5).
        layer: 0-based decoder layer of 32 (scaled) of stage 2 (code: 16); None leaves it out.
        parity: None gives the windows whose best patch is looked at most what does not divide by 16. "released" loses
            it: fewer tokens than asked come out of stage 1, and no local one of fewer than 32.
        positions: contiguous in both stages (code).
        newlines: of both stages; the code knows none.
    """

    summary = "two scans of the tower's [CLS] attention, the rest merged; then what the prompt's end looks at"
    paper = "arXiv 2505.22654"
    needs = "tower attention (two layers), features, decoder attention (one layer)"
    looks_at = "tower"
    stage = "before the LLM + decoder layer 16 of 32"
    served_with: ClassVar[dict[str, Any]] = {"layer": None}

    window_layer: Annotated[int, layer_of(24, 0, 23)] = 5
    layer: Annotated[int | None, layer_of(32, 1, 31)] = 16
    parity: Literal["released"] | None = None

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        late = 0 if self.layer is None else schedule_layers((self.layer,), facts.decoder_layers)[0]
        early = late / facts.decoder_layers  # share of the layers that see what enters
        see = (Hidden(), row_of(facts, scale_tower_layer(self.window_layer, facts)), row_of(facts))
        cuts = [Cut(Decoder(0), tuple(dict.fromkeys(see)), partial(self.scan, early=early), self.positions)]
        if late:
            look = partial(self.look, early=early)
            cuts.append(Cut(Decoder(late), (TextAttention(late, "last"),), look, self.positions))
        return cuts

    def budgets(self, patches: int, early: float) -> tuple[int, int]:
        """How many of an image's patches enter the LLM, and how many are left after stage 2."""
        given = self.budget * patches if isinstance(self.budget, float) else self.budget
        if not early or self.keep is not None:
            enters, left = given * (3 if early else 1), given
        else:
            left = given / (1 + 2 * early)
            enters = 3 * left
            if enters > patches:  # stage 2 takes what stage 1 cannot add
                enters, left = patches, (given - early * patches) / (1 - early)
        enters = min(max(1, floored(enters)), patches)
        return enters, min(max(1, floored(left)), enters)

    def scan(self, seen: Seen, layout: Layout, early: float) -> Reduction:
        """Pure: features and two attention rows in, what enters the LLM out."""
        features, shallow, deep = (*seen.values(), *list(seen.values())[1:])[:3]  # of a tiny tower one layer is both
        rows, shares, counts = by_view(layout, [self.budgets(grid.patches, early)[0] for grid in layout.grids])
        side = upload([grid.side for grid in layout.grids], deep.device)
        patch = layout.stack("source") % side.prod(1, keepdim=True)
        row, col = patch // side[:, 1:] * ACROSS // side[:, :1], patch % side[:, 1:] * ACROSS // side[:, 1:]
        shares = upload(shares, deep.device)
        kept = two_scans(shallow, deep, rows, row * ACROSS + col, shares, fill=self.parity is None)
        merge = nearest_mean(features, kept, layout.patches)
        return self.kept(kept, layout, None if self.parity else counts, deep, merge)

    def look(self, seen: Seen, layout: Layout, early: float) -> Reduction:
        """Pure: one attention row of the decoder in, what stays out."""
        (row,) = seen.values()
        counts = [self.budgets(grid.patches, early)[1] for grid in layout.grids]
        return self.best(row, layout, counts)
