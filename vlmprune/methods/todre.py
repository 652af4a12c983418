"""ToDRE (arXiv 2505.18757)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch

from vlmprune.methods.base import Cut, Decoder, Layout, ModelFacts, Pruner, Reduction, Seen, Tap, register
from vlmprune.parts import (
    CrossShare,
    Hidden,
    Must,
    Seed,
    VisionAttention,
    check_layer,
    is_number,
    need_cls,
    random_scores,
    select_diverse,
    system_prefix,
    told_system,
    upcast,
    upload,
)

__all__ = ["ToDRE", "stage2_layer"]

SHARE_OR_NONE = Must("a number between 0 and 1 (a share of attention), or None for no stage 2", is_number)


def stage2_layer(layers: int) -> int:
    """1-based number of the layer whose attention decides stage 2: 7L/8, floored (the paper is silent on rounding)."""
    return 7 * layers // 8


@register("todre")
@dataclass(frozen=True)
class ToDRE(Pruner):
    """Keep mutually dissimilar patches; late in the decoder, drop all that are left once text and image stop looking.

    Stage 1 (before the LLM) picks `keep` patches greedily by the cosine of their projected features, starting from the
    one the tower's [CLS] token looks at most. Stage 2 reads the attention of layer 7L/8 during prefill: if the share of
    text attention that goes to the image and the share of image attention that goes to the text are both under `tau`,
    all visual tokens of that sample leave the later layers, newlines too. Decided per sample, once.

    Args:
        keep, average: of stage 1; what stage 2 saves is in the trace only.
        objective: "max_sum" (v2 of the paper, the default) or "max_min" (v1, k-center; its metric is inferred).
        pivot: the first pick: "cls" (of an anyres image in its thumbnail, of a video in all frames, of tiles alike in
            all), "mean" (the patch nearest the mean feature, the paper's "center"), "random" (seeded) or "first".
        cls_layer: tower layer of the [CLS] row; the paper says the last.
        tau: threshold of stage 2 (paper: 0.10); None leaves stage 2 out.
        system: tokens of the system prompt and template, which stage 2 takes neither for text nor for image (paper): a
            number, or a processor, whose chat template tells (the command and the evaluation ask theirs). None takes
            all that stands in front of the first image for it.
        seed: for `pivot="random"`.
        positions: of stage 1 (contiguous is inferred); stage 2 always leaves the ids of the text alone.
    """

    summary = "mutually dissimilar patches; late in the LLM none, once text and image stop looking at each other"
    paper = "arXiv 2505.18757"
    needs = "features, [CLS] token (or another pivot), decoder attention (one layer)"
    looks_at = "features"
    stage = "before the LLM + decoder layer 7L/8"
    syncs = 1
    served_with: ClassVar[dict[str, Any]] = {"tau": None}

    objective: Literal["max_sum", "max_min"] = "max_sum"
    pivot: Literal["cls", "mean", "random", "first"] = "cls"
    cls_layer: int = -1
    tau: Annotated[float | None, SHARE_OR_NONE] = 0.1
    system: Annotated[int | None, told_system] = None
    seed: Seed = 0

    def told_by(self, processor: Any) -> ToDRE:
        return replace(self, system=system_prefix(processor)) if self.system is None else self

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        see: tuple[Tap, ...] = (Hidden(),)
        if self.pivot == "cls":
            need_cls("todre with pivot='cls'", facts, "use pivot='mean', 'random' or 'first'")
            see += (VisionAttention(check_layer("cls_layer", self.cls_layer, facts.tower_layers)),)
        cuts = [Cut(Decoder(0), see, self.stage1, self.positions)]
        late = stage2_layer(facts.decoder_layers)
        if self.tau is not None and 1 <= late < facts.decoder_layers:
            cuts.append(Cut(Decoder(late), (CrossShare(late - 1, self.system),), self.stage2, "original"))
        return cuts

    def stage1(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features (and the [CLS] row) in, decision out."""
        features, *cls_row = seen.values()
        first = self.first_pick(features, layout, *cls_row)
        return select_diverse(features, first, self.budget, layout, self.newlines, self.objective)

    def first_pick(self, features: torch.Tensor, layout: Layout, row: torch.Tensor | None = None) -> torch.Tensor:
        """`(images,)` index of the first pick; `row` is the [CLS] token's attention."""
        score = pool = layout.patches
        if self.pivot == "cls":
            alike = upload([grid.apart for grid in layout.grids], pool.device)[:, None]
            thumbnail = pool & ((layout.view == 0) | alike)
            score, pool = row, torch.where(thumbnail.any(1, keepdim=True), thumbnail, pool)
        elif self.pivot == "mean":
            x, weight = features.float(), pool[..., None].float()
            mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
            score = torch.nn.functional.cosine_similarity(x, mean, dim=-1)
        elif self.pivot == "random":
            score = random_scores(self.seed, layout)
        return upcast(score).masked_fill(~pool, -torch.inf).argmax(1)

    def stage2(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, 2)` shares in, keep all or nothing of every sample."""
        (shares,) = seen.values()
        stay = ~(shares < self.tau).all(-1)
        return Reduction(layout.alive & stay[:, None])
