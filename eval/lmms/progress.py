"""Progress of a run on stderr."""

from __future__ import annotations

from typing import Any

from vlmprune.eval.lmms.cells import Cell
from vlmprune.eval.lmms.plan import ModelJob
from vlmprune.eval.lmms.survey import Survey
from vlmprune.runtime.status import Bar, status

__all__ = ["Show"]


class Show(Bar):
    """A bar over cells in a terminal, a line per cell elsewhere."""

    def start(self, found: Survey) -> None:
        """Say what is there already."""
        for line in found.told():
            self.say(line)
        self.at(len(found.done))

    def loading(self, job: ModelJob) -> None:
        """A model is about to be loaded."""
        self.say(f"loading {job.setting.name} ...")

    def cell(self, job: ModelJob, cell: Cell) -> None:
        """A cell begins."""
        status(f"{cell.model}: {cell.title} on {cell.task}")

    def samples(self, answered: int, of: int) -> None:
        """So many of a cell's samples are answered."""
        self.at(int(self.done) + min(answered / max(of, 1), 0.999))

    def finished(self, cell: Cell, content: dict[str, Any]) -> None:
        """A cell is on disk."""
        self.at(int(self.done) + 1)
        where = f"{cell.model}: {cell.title} on {cell.task}"
        if content["error"] is not None:
            self.say(f"failed: {where}: {content['error']}")
        elif self.rich is None:
            value = content["metrics"][content["metric"]]["value"]
            told = f"{content['metric']} {value:.4g}, {content['elapsed_s']:.1f} s"
            self.say(f"[{self.done}/{self.total}] {where}: {told}")
