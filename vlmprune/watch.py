"""Handing a frame to hooks on modules that get none of our keyword arguments."""

from __future__ import annotations

from threading import get_ident
from typing import Any

__all__ = ["Watch"]


class Watch:
    """Shared by a layer's pre-hook and the hooks on modules inside that layer.

    All of them run in one thread within one call of the layer, so the thread's number finds the frame.
    """

    def __init__(self) -> None:
        self.frames: dict[int, Any] = {}

    def begin(self, frame: Any) -> None:
        """Called by the layer's pre-hook."""
        self.frames[get_ident()] = frame

    def end(self) -> None:
        """Called by the layer's pre-hook before anything else: a call that failed inside the layer left its frame."""
        self.frames.pop(get_ident(), None)

    def frame(self, last: bool) -> Any:
        """The frame of the call under way, or None; `last` ends the watch."""
        return self.frames.pop(get_ident(), None) if last else self.frames.get(get_ident())
