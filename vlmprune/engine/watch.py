"""Handing a frame to hooks on modules that get none of our keyword arguments."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch

__all__ = ["Watch"]


def caller() -> int:
    """The thread's number. A compiled graph cannot ask for it and needs none: it begins and ends its own watch."""
    return 0 if torch.compiler.is_compiling() else get_ident()


class Watch:
    """Shared by the pre-hook of a module (a layer, a tower) and the hooks on modules inside it.

    All of them run in one thread within one call of the layer, so the thread's number finds the frame.
    """

    def __init__(self) -> None:
        self.frames: dict[int, Any] = {}

    def begin(self, frame: Any) -> None:
        """Called by the layer's pre-hook."""
        self.frames[caller()] = frame

    def end(self) -> None:
        """Called by the layer's pre-hook before anything else: a call that failed inside the layer left its frame."""
        self.frames.pop(caller(), None)

    def frame(self, last: bool) -> Any:
        """The frame of the call under way, or None; `last` ends the watch."""
        return self.frames.pop(caller(), None) if last else self.frames.get(caller())
