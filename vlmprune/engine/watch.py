"""Handing a frame to hooks on modules that get none of our keyword arguments."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from threading import get_ident
from typing import Any

import torch
from torch import nn

from vlmprune.engine.plan import Hook

__all__ = ["Watch", "Watched"]


def caller() -> int:
    """The thread's number. A compiled graph cannot ask for it and needs none: it begins and ends its own watch."""
    return 0 if torch.compiler.is_compiling() else get_ident()


class Watch:
    """Shared by the pre-hook of a module (`Watched`) and the hooks on modules inside it.

    All of them run in one thread within one call of the layer, so the thread's number finds the frame.
    """

    def __init__(self) -> None:
        self.frames: dict[int, Any] = {}

    def begin(self, frame: Any) -> None:
        """Called by the module's pre-hook."""
        self.frames[caller()] = frame

    def end(self) -> None:
        """Called by the module's pre-hook before anything else: a call that failed inside it left its frame."""
        self.frames.pop(caller(), None)

    def frame(self, last: bool) -> Any:
        """The frame of the call under way, or None; `last` ends the watch."""
        return self.frames.pop(caller(), None) if last else self.frames.get(caller())


@dataclass
class Watched(Hook):
    """Base of pre-hooks of modules (a layer, a tower) inside which other hooks may want the frame.

    Attributes:
        watching: one shared with each of them.
    """

    _: KW_ONLY
    watching: tuple[Watch, ...] = ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        for watch in self.watching:
            watch.end()
        return self.start(module, args, kwargs)

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What the pre-hook does; it calls `show` with the frame."""
        raise NotImplementedError

    def show(self, frame: Any) -> None:
        """Show the frame to the hooks inside."""
        for watch in self.watching:
            watch.begin(frame)
