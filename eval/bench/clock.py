"""Time stamps on a device: CUDA events on a GPU, the process clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Clock"]


class Clock:
    """Stamps that can be taken inside a timed path without waiting for the device.

    Args:
        device: whose work is timed.
        read: the process clock, in seconds; on a GPU it is not asked.
    """

    def __init__(self, device: torch.device | str, read: Callable[[], float] = time.perf_counter):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.read = read

    def now(self) -> Any:
        """A stamp at this place of the device's work."""
        if not self.cuda:
            return self.read()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Wait until the device has done all its work; before a first stamp and after a last one only."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one stamp to another; after `wait`."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """The result of a call and its seconds; waits at its two ends alone."""
        self.wait()
        start = self.now()
        result = call()
        end = self.now()
        self.wait()
        return result, self.between(start, end)
