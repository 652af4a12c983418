"""A clock that stands still until a test moves it, so that nothing hangs on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["PATIENCE", "FakeClock"]

#: Seconds after which another process hangs, however busy the machine is; nothing is decided by it.
PATIENCE = 1200


class FakeClock:
    """In place of `time.perf_counter`.

    Attributes:
        now: seconds; add to it what something is to take.
        tick: seconds that every reading takes.
    """

    def __init__(self, tick: float = 0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def slow(self, call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """`call`, which takes so many seconds more."""

        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.sleep(seconds)
            return call(*args, **kwargs)

        return slowed
