"""VidCom² (arXiv 2505.14454; code xuyang-liu16/VidCom2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vlmprune.methods.base import BeforeLLM, Layout, Reduction, Seen, register
from vlmprune.parts import Hidden, count, frames_of, upcast

__all__ = ["VidCom2", "commonness", "frame_scales"]

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
TEMPERATURE = 0.01  # of the frames' budgets


def commonness(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How near every patch of `(frames, patches, dim)` is to the mean of its video, and of its frame: high is common.

    Of the half of the channels that vary least, unit vectors; a sum of Gaussians of the distance.

    Returns:
        two `(frames, patches)`.
    """
    x = upcast(frames)
    quiet = x.flatten(0, 1).var(0).sort(stable=True).indices[: x.shape[-1] // 2]
    x = normalize(x[..., quiet], dim=-1)

    def near(centre: torch.Tensor) -> torch.Tensor:
        apart = ((x - centre) ** 2).sum(-1)
        return sum(torch.exp(-apart / (2 * width)) for width in WIDTHS)

    return near(x.mean((0, 1))), near(x.mean(1, keepdim=True))


def frame_scales(common: torch.Tensor, ratio: float) -> torch.Tensor:
    """The share of its patches that every frame keeps, `(frames,)`: more for one that is unlike the video.

    Args:
        common: `(frames, patches)`, nearness to the video's mean.
        ratio: the share of the video.
    """
    unique = (-common.mean(-1) / TEMPERATURE).softmax(0)
    return (ratio * (1 + unique - unique.mean())).clamp(max=1)


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(BeforeLLM):
    """Give frames that are unlike the video more tokens, and keep in each what is unlike the video and the frame.

    Args:
        keep, average: patches per video, or a fraction; 0.25 without one (the code's R).
        parity: None keeps exactly the budget: tokens are taken in turns in proportion to the frames' shares, the first
            of every frame before any other. "released" keeps round(share * patches) of every frame, at least 1, so that
            the total is emergent (one device sync more) and hardly ever the budget.
        newlines: kept (as the released code for LLaVA-Video, whose rows have one).
    """

    summary = "more tokens for frames unlike the video, in each the patches unlike video and frame"
    paper = "arXiv 2505.14454"
    needs = "features of a video"
    looks_at = "features"
    optional = True
    sees = (Hidden(),)
    refuses_inputs: ClassVar[dict[str, str]] = {
        "image": "shares a budget among the frames of a video, and a still picture has none: ask it about videos alone"
    }

    parity: Literal["released"] | None = None

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features in, decision out."""
        (features,) = seen.values()
        budget = 0.25 if self.budget is None else self.budget
        scores, counts = features.new_zeros(features.shape[:2], dtype=upcast(features).dtype), []
        keep = torch.zeros_like(layout.alive)
        for video, places in enumerate(frames_of(self.known_as, layout)):
            total = places.numel()
            ratio = budget if isinstance(budget, float) else min(1.0, budget / total)
            counts.append(count(budget, total))
            of_video, of_frame = commonness(features[video, places])
            rank = (of_video + of_frame).sort(dim=1, stable=True).indices.argsort(1)  # 0 is least common
            wanted = frame_scales(of_video, ratio)[:, None] * places.shape[1]
            turn = torch.where(rank == 0, 0, (rank + 0.5) / wanted)
            scores[video, places] = -turn.to(scores)
            keep[video, places] = rank < wanted.round().clamp(min=1)
        if self.parity is None:
            return self.best(scores, layout, counts)
        everything = counts == [grid.patches for grid in layout.grids]
        return self.kept(keep, layout, counts if everything else None, scores)
