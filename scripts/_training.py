"""A training that can be stopped at any time and goes on from its checkpoint: optimizers, clock and log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


class TrainingRun:
    """Trains the matrices of some blocks by Muon and everything else by AdamW.

    Args:
        module: what is trained; a checkpoint that is there is loaded into it.
        blocks: the part of it whose matrices Muon takes.
        peaks: the full learning rates of the two.
        checkpoint, log: files; a line of the log is a JSON object.
        **noted: what a checkpoint says besides.

    Attributes:
        step, spent: steps taken and seconds spent, of earlier runs too.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: nn.Module,
        peaks: tuple[float, float],
        checkpoint: Path,
        log: Path,
        **noted: Any,
    ) -> None:
        self.module, self.peaks, self.checkpoint, self.noted = module, peaks, checkpoint, noted
        hidden = [p for p in blocks.parameters() if p.ndim == 2]
        rest = [p for p in module.parameters() if p.requires_grad and not any(p is h for h in hidden)]
        self.trained = hidden + rest
        self.optimizers = [
            torch.optim.Muon(hidden, lr=peaks[0], weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=peaks[1], weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.step, self.spent = 0, 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            module.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.spent = state["step"], state["spent"]
            print("resumed at step", self.step, flush=True)
        self.log = log.open("a")
        self.start()

    def start(self) -> None:
        """Count time from now on."""
        self.last = time.time()

    def update(self, factor: float) -> None:
        """Take a step along the gradients that are there, at `factor` times the full rates, and forget them."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        now = time.time()
        self.spent, self.last = self.spent + (now - self.last), now

    def write(self, **record: Any) -> None:
        """A line of the log."""
        line = json.dumps({"step": self.step, "spent": round(self.spent)} | record)
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {"model": self.module.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save(state | {"step": self.step, "spent": self.spent} | self.noted, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)
