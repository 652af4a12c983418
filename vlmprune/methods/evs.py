"""EVS, efficient video sampling (arXiv 2510.14624; code vllm-project/vllm, vllm/multimodal/evs.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from vlmprune.methods.base import BeforeLLM, Layout, Reduction, Seen, register
from vlmprune.parts import Hidden, count, frames_of, upcast

__all__ = ["Evs", "changes"]


def changes(frames: torch.Tensor) -> torch.Tensor:
    """1 - cosine of every patch to the same place one frame before, of `(frames, patches, dim)`; 255 in the first."""
    unit = functional.normalize(upcast(frames), dim=-1)
    change = 1 - (unit[1:] * unit[:-1]).sum(-1)
    return torch.cat((torch.full_like(unit[:1, :, 0], 255), change))


@register("evs")
@dataclass(frozen=True)
class Evs(BeforeLLM):
    """Keep the patches of a video that changed most since the frame before; the first frame stays whole.

    Args:
        keep, average: patches per video, or a fraction, never fewer than one frame's (code). The source's share q is
            what goes: keep = 1 - q.
        positions: contiguous; the source recomputes three-axis ids, which keep their places.
    """

    summary = "the patches of a video that changed since the frame before"
    paper = "arXiv 2510.14624"
    needs = "features of a video"
    looks_at = "features"
    sees = (Hidden(),)
    refuses_inputs: ClassVar[dict[str, str]] = {
        "image": "keeps what changed since the frame before, and a still picture has none: ask it about videos alone"
    }

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features in, decision out."""
        (features,) = seen.values()
        scores, counts = features.new_zeros(features.shape[:2], dtype=upcast(features).dtype), []
        for video, places in enumerate(frames_of(self.known_as, layout)):
            scores[video, places] = changes(features[video, places])
            counts.append(max(places.shape[1], count(self.budget, places.numel())))
        return self.best(scores, layout, counts)
