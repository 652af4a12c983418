"""Data-parallel training over single-threaded processes, for a CPU which other work shares.

A step is cut into small microbatches that the workers take one by one, so a worker whose core is busy with something
else simply takes fewer: no barrier inside the layers ever waits for it, as it does with threads. Parameters and the
gradient sum live in shared memory. Which pictures a step sees depends on the step alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch import nn

#: Makes the function that draws microbatch (step, index, progress), runs forward and backward, returns statistics.
MakeMicro = Callable[[nn.Module, object], Callable[[int, int, float], torch.Tensor]]


def _work(make: MakeMicro, model: nn.Module, args: object, shared: dict, lock) -> None:
    torch.set_num_threads(1)
    micro = make(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    counters, progress, gradient, statistics = (shared[k] for k in ("counters", "progress", "gradient", "statistics"))
    while True:
        with lock:
            step, taken, _, total = counters.tolist()
            mine = taken < total
            if mine:
                counters[1] += 1
        if total < 0 or os.getppid() == 1:  # told to stop, or the parent is gone
            return
        if not mine:
            time.sleep(0.002)
            continue
        found = micro(step, taken, float(progress))
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trained])
        for p in trained:
            p.grad = None
        with lock:
            gradient += flat
            statistics += found
            counters[2] += 1


class Workers:
    """Worker processes which compute the gradient of one step after another.

    Args:
        make: builds a worker's microbatch function; a module-level function.
        model: its parameters move to shared memory.
        args: handed to `make`.
        number: processes.
        width: length of the statistics vector that microbatches return.
    """

    def __init__(self, make: MakeMicro, model: nn.Module, args: object, number: int, width: int) -> None:
        context = mp.get_context("spawn")
        model.share_memory()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.gradient = torch.zeros(sum(p.numel() for p in self.trained)).share_memory_()
        self.statistics = torch.zeros(width, dtype=torch.float64).share_memory_()
        self.counters = torch.zeros(4, dtype=torch.int64).share_memory_()  # step, taken, finished, wanted
        self.progress = torch.zeros((), dtype=torch.float64).share_memory_()
        self.lock = context.Lock()
        shared = {k: getattr(self, k) for k in ("counters", "progress", "gradient", "statistics")}
        self.processes = [
            context.Process(target=_work, args=(make, model, args, shared, self.lock), daemon=True)
            for _ in range(number)
        ]
        for process in self.processes:
            process.start()

    def step(self, step: int, micros: int, progress: float) -> torch.Tensor:
        """Leaves the mean gradient in every parameter's `.grad`; returns the summed statistics."""
        self.gradient.zero_()
        self.statistics.zero_()
        self.progress.fill_(progress)
        with self.lock:
            self.counters.copy_(torch.tensor([step, 0, 0, micros]))
        while int(self.counters[2]) < micros:
            time.sleep(0.002)
            if not all(p.is_alive() for p in self.processes):
                raise RuntimeError("a training process died")
        self.gradient /= micros
        pieces = self.gradient.split([p.numel() for p in self.trained])
        for p, piece in zip(self.trained, pieces, strict=True):
            p.grad = piece.view_as(p)
        return self.statistics.clone()

    def stop(self) -> None:
        """Ends the processes."""
        with self.lock:
            self.counters[3] = -1
        for process in self.processes:
            process.join(10)
