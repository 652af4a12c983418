"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

vLLM imports torchvision, PyPI has the CUDA build alone, and that one registers shapes for two operators which it could
not load. Defining them empty is enough: nothing here calls them. `make test-serving` puts this file into its
environment's site-packages with a line in a .pth file, since it must act in every process of an engine.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Shim(MetaPathFinder):
    """Acts once, when somebody first asks for torchvision, and finds nothing itself."""

    library: Any = None  # its operators live as long as it does

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and Shim.library is None:
            sys.meta_path.remove(self)
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                Shim.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    Shim.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Shim())
