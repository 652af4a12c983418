"""ATP-LLaVA (arXiv 2412.00447): trained modules that set two thresholds for every image and question."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from vlmprune.methods.atp.modules import TRAIN, Norm, Thresholds, load
from vlmprune.methods.base import Method, register
from vlmprune.parts import (
    Cut,
    Decoder,
    Layout,
    ModelFacts,
    Positions,
    ReceivedAttention,
    Reduction,
    Seen,
    keep_patches,
)

__all__ = ["Atp", "hard_keep", "min_max", "redundancy", "soft_masks", "spatial_scores"]


def spatial_scores(
    row: torch.Tensor,
    col: torch.Tensor,
    strides: tuple[int, ...],
    lambda_sample: float = 3.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """1 - lambda_sample / stride^2 of the sparsest grid that a token lies on, 0 on none (Eq. 5).

    Args:
        row, col: `(..., tokens)` long, the token's original cell.

    Returns:
        `(..., tokens)`.
    """
    scores = torch.zeros(row.shape, dtype=dtype, device=row.device)
    for stride in sorted(strides):
        scores = torch.where((row % stride == 0) & (col % stride == 0), 1 - lambda_sample / stride**2, scores)
    return scores


def min_max(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Rescale `(..., tokens)` so that the tokens of `among` span 0 to 1."""
    low = scores.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low), 0)


def redundancy(
    own: torch.Tensor, cross: torch.Tensor, among: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The self and cross scores as `norm` has them, and their mean, the redundancy score (Eq. 3, 4)."""
    if norm == "minmax":
        own, cross = min_max(own, among), min_max(cross, among)
    return own, cross, (own + cross) / 2


def soft_masks(
    red: torch.Tensor, space: torch.Tensor, theta_r: torch.Tensor, theta_s: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mask by redundancy, the mask by space and their maximum, `(..., tokens)` (Eq. 9-11)."""
    by_r = ((red - theta_r[..., None]) * temperature).sigmoid()
    by_s = ((space - theta_s[..., None]) * temperature).sigmoid()
    return by_r, by_s, torch.maximum(by_r, by_s)


def hard_keep(
    red: torch.Tensor, space: torch.Tensor, theta_r: torch.Tensor, theta_s: torch.Tensor, among: torch.Tensor
) -> torch.Tensor:
    """Tokens of `among` over either threshold, `(..., tokens)` bool; if there is none, the one nearest to passing."""
    margin = torch.maximum(red - theta_r[..., None], space - theta_s[..., None]).masked_fill(~among, -torch.inf)
    return ((margin > 0) | guard(margin)) & among


def guard(margin: torch.Tensor) -> torch.Tensor:
    """Mark the best token of every row of `(..., tokens)` margins in which none is above 0."""
    best = torch.zeros_like(margin, dtype=torch.bool).scatter(-1, margin.argmax(-1, keepdim=True), True)
    return best & ~(margin > 0).any(-1, keepdim=True)


@register("atp")
@dataclass(frozen=True)
class Atp(Method):
    """Keep tokens over either of two thresholds that trained modules set for every image and question.

    After layers 4, 14 and 24 of 32 (scaled with depth), from the attention of the layer just before: a token stays if
    the attention it receives from image and text is over one threshold, or its place on nested regular grids over the
    other. How many stay differs between samples; the `average` of the training steers their mean, so neither keep nor
    average is an option here. The scores cost one attention map of all visual rows at three layers, chunked.

    There is no code and there are no weights by the authors: train modules for your model with scripts/train_atp.py.

    Inferred, since the paper could not be seen in full: scores min-maxed per image (attention is far under any sigmoid;
    "none" and "logits" are options of the training), pooled to a fixed length for the modules, several nested grids
    instead of one, log(mask) added to attention scores in training, masks multiplied over cuts, and the token nearest
    to passing kept where none does. Newlines of anyres images are not scored.

    Args:
        weights: a folder or hub id with trained modules, or "atp-scene-llava" for those of the embedded model; they
            state the model and the average that they are for.
        use: "both" thresholds, or only "redundancy" or "spatial" (for ablations).
        newlines: "all" are kept, or "none".
        positions: original (source).
        thresholds: the modules themselves instead of `weights`, for training.
    """

    summary = "tokens over thresholds that trained modules set per image and question"
    paper = "arXiv 2412.00447"
    needs = "decoder attention of all visual rows (three layers)"
    looks_at = "decoder"
    stage = "decoder layers 4, 14, 24 of 32"
    syncs = 1
    training = "modules (scripts/train_atp.py)"
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(
        ("keep", "average"),
        "how many tokens stay follows from the average that its weights were trained for. For another budget train "
        f"other weights: {TRAIN}",
    )

    weights: str | Path | None = None
    use: Literal["both", "redundancy", "spatial"] = "both"
    newlines: Literal["all", "none"] = "all"
    positions: Positions = "original"
    thresholds: Thresholds | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds is None:
            if self.weights is None:
                raise ValueError(f"atp needs trained modules: weights= a folder or hub id. Train them with: {TRAIN}")
            object.__setattr__(self, "thresholds", load(self.weights))
        elif not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"thresholds={self.thresholds!r} must be modules: name their folder by weights=.")

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        config, mine = self.thresholds.config, asdict(facts)
        # files may be older than a fact
        theirs = {f.name: f.default for f in fields(facts) if f.default is not MISSING} | config.model
        if other := [k for k in mine if theirs.get(k) != mine[k]]:
            told = ", ".join(f"{k} {theirs.get(k)!r} (this model: {mine[k]!r})" for k in other)
            raise ValueError(f"these weights are for another model: {told}. Train modules for this one: {TRAIN}")
        logits = config.score_norm == "logits"
        # layers count from 1: "after layer p" is the input of layer p counted from 0
        return [
            Cut(Decoder(p), (ReceivedAttention(p - 1, logits),), partial(self.reduce, stage=stage), self.positions)
            for stage, p in enumerate(config.layers)
        ]

    def reduce(self, seen: Seen, layout: Layout, stage: int) -> Reduction:
        """Pure but for the modules' weights: `(images, tokens, 2)` attention in, decision out."""
        (received,) = seen.values()
        config, module = self.thresholds.config, self.thresholds.cuts[stage].to(received.device)
        among = layout.patches if layout.standing is None else layout.patches & layout.standing
        own, cross, red = redundancy(received[..., 0], received[..., 1], among, config.score_norm)
        space = spatial_scores(layout.row, layout.col, config.strides, config.lambda_sample, red.dtype)
        with torch.autocast(red.device.type, enabled=False):
            theta_r, theta_s = (theta.to(red.dtype) for theta in module(own, cross, among))
        if self.use != "both":
            never = torch.full_like(theta_r, torch.inf)
            theta_r, theta_s = (theta_r, never) if self.use == "redundancy" else (never, theta_s)
        margin = torch.maximum(red - theta_r[..., None], space - theta_s[..., None]).detach()
        keep = hard_keep(red, space, theta_r, theta_s, among)
        reduction = keep_patches(keep, layout, None, self.newlines, margin)
        if not self.thresholds.training:
            return reduction
        soft = soft_masks(red, space, theta_r, theta_s, self.thresholds.temperature)[-1]
        rescued = guard(margin.masked_fill(~among, -torch.inf)) & among
        soft = torch.where(rescued, 1.0, torch.where(layout.newline, float(self.newlines == "all"), soft))
        return Reduction(reduction.keep, scores=margin, soft=soft)
