"""ToDRE (arXiv 2505.18757)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    CrossShare,
    Cut,
    Decoder,
    Hidden,
    Layout,
    ModelFacts,
    Must,
    Reduction,
    Seed,
    Seen,
    Tap,
    UnsupportedError,
    VisionAttention,
    check_layer,
    is_number,
    is_whole,
    random_scores,
    select_diverse,
    system_prefix,
    upload,
)

__all__ = ["ToDRE", "stage2_layer"]

SHARE_OR_NONE = Must("a number between 0 and 1 (a share of attention), or None for no stage 2", is_number)


def told(name: str, given: Any) -> int:
    """Length of the system prefix: a number, or what a processor's chat template tells.

    Raises:
        ValueError: neither.
    """
    if not hasattr(given, "apply_chat_template"):
        if is_whole(given):
            return given
        raise ValueError(
            f"{name}={given!r} must be a number of tokens of at least 0, a processor whose chat template tells it, or "
            "None for all that stands in front of the first image."
        )
    if (length := system_prefix(given)) is None:
        raise ValueError(f"{type(given).__name__} has no chat template that tells the system prefix: give a number.")
    return length


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
    all visual tokens of that sample leave the later layers. Decided per sample, once.

    Args:
        keep, average: patches per image, or a fraction (floored, at least 1), for stage 1; what stage 2 saves is in the
            trace only.
        objective: "max_sum" (v2 of the paper, the default) or "max_min" (v1, k-center; its metric, the cosine too,
            is inferred).
        pivot: the first pick: "cls" (of an anyres image in its thumbnail, of a video in all frames, of tiles alike in
            all), "mean" (the patch nearest the mean feature, the paper's "center"), "random" (seeded) or "first". The
            paper's "farthest" is not offered: from what is not known to us. Towers without a [CLS] token need another
            pivot than "cls".
        cls_layer: tower layer of the [CLS] row; the paper says the last.
        tau: threshold of stage 2 (paper: 0.10); None leaves stage 2 out.
        system: tokens of the system prompt and template at the start of a conversation, which stage 2 takes neither for
            text nor for image (as the paper): a number, or a processor, whose chat template tells. The command and the
            evaluation ask their processor. None takes all that stands in front of the first image for it, which is
            right where the image comes first; a question in front of the image then counts for nothing.
        seed: for `pivot="random"`; a whole number of at least 0.
        positions: stage 1, the family's own, contiguous (inferred); stage 2 always leaves the ids of the text alone.
        newlines: stage 1; the paper is silent (its budget counts patches). Stage 2 drops newlines too.
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
    system: Annotated[int | None, told] = None
    seed: Seed = 0

    def told_by(self, processor: Any) -> ToDRE:
        return replace(self, system=system_prefix(processor)) if self.system is None else self

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        see: tuple[Tap, ...] = (Hidden(),)
        if self.pivot == "cls":
            if not facts.has_cls:
                raise UnsupportedError(
                    "todre starts from the patch the tower's [CLS] token looks at most, and this tower has none; "
                    "use pivot='mean', 'random' or 'first'."
                )
            see += (VisionAttention(check_layer("cls_layer", self.cls_layer, facts.tower_layers)),)
        cuts = [Cut(Decoder(0), see, self.stage1, self.positions)]
        late = stage2_layer(facts.decoder_layers)
        if self.tau is not None and 1 <= late < facts.decoder_layers:
            cuts.append(Cut(Decoder(late), (CrossShare(late - 1, self.system),), self.stage2, "original"))
        return cuts

    def stage1(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features (and the [CLS] row) in, decision out."""
        features, patches = seen[Hidden()], layout.patches
        cls_row = next((value for tap, value in seen.items() if isinstance(tap, VisionAttention)), None)
        first = self.first_pick(features, patches, cls_row, layout)
        return select_diverse(features, first, self.budget, layout, self.newlines, self.objective)

    def first_pick(
        self, features: torch.Tensor, patches: torch.Tensor, cls_row: torch.Tensor | None, layout: Layout
    ) -> torch.Tensor:
        """`(images,)` index of the first pick."""
        if self.pivot == "cls":
            alike = upload([grid.apart for grid in layout.grids], patches.device)[:, None]
            thumbnail = patches & ((layout.view == 0) | alike)
            pool = torch.where(thumbnail.any(1, keepdim=True), thumbnail, patches)
            return cls_row.masked_fill(~pool, -torch.inf).argmax(1)
        if self.pivot == "mean":
            x = features.float()
            weight = patches[..., None].float()
            mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
            near = torch.nn.functional.cosine_similarity(x, mean, dim=-1)
            return near.masked_fill(~patches, -torch.inf).argmax(1)
        if self.pivot == "random":
            return random_scores(self.seed, layout).masked_fill(~patches, -torch.inf).argmax(1)
        return patches.to(torch.uint8).argmax(1)

    def stage2(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, 2)` shares in, keep all or nothing of every sample."""
        (shares,) = seen.values()
        stay = ~(shares < self.tau).all(-1)
        return Reduction(layout.alive & stay[:, None])
