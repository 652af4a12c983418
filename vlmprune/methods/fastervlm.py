"""FasterVLM (arXiv 2412.01818v1), the first version of VisPruner."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.methods.base import register
from vlmprune.methods.vispruner import VisPruner
from vlmprune.parts import Share

__all__ = ["FasterVLM"]


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(VisPruner):
    """Keep the patches that [CLS] looks at most: the first version of VisPruner, which is it with important_ratio=1.

    Args:
        important_ratio: as of VisPruner; less than 1 is VisPruner.
    """

    summary = "the patches that [CLS] looks at in one layer (VisPruner, important_ratio=1)"
    paper = "arXiv 2412.01818v1"
    needs = "tower attention"

    important_ratio: Share = 1.0
