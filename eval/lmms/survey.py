"""What of a plan is measured already, what must be measured and why, and how long that may take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vlmprune.eval.lmms import store, taskindex
from vlmprune.eval.lmms.cells import Cell
from vlmprune.eval.lmms.plan import EvalPlan, ModelJob

__all__ = ["Survey", "TimeLeft", "estimate", "survey"]

NEW, FAILED = "not measured yet", "failed the last time"
UNKNOWN = "measured, but whether anything changed cannot be told: lmms-eval is not installed here"
#: Hashes say nothing to a reader.
HASHED = {
    "library": "vlmprune's code",
    "code": "the method's code",
    "weights": "the method's weights",
    "model.files": "the model's files",
    "task.files": "the task's files",
    "task.yaml": "the task's YAML",
    "task.data": "the task's data",
    "template": "the chat template",
    "plain_pictures": "how pictures are read",
}


@dataclass(frozen=True)
class Survey:
    """`done` and `todo` are ids in plan order (failed ones last); `reasons` tells for each to do why."""

    done: tuple[str, ...]
    todo: tuple[str, ...]
    reasons: dict[str, str]

    def told(self) -> list[str]:
        """How many are done and why others are not, one line each."""
        lines = (
            [f"{len(self.done)} of {len(self.done) + len(self.todo)} cells are measured already"] if self.done else []
        )
        counts = Counter(self.reasons[name] for name in self.todo)
        return lines + [f"{count} to measure: {reason}" for reason, count in counts.items()]


def survey(plan: EvalPlan, folder: Path) -> Survey:
    """Compare a plan to what its output folder holds."""
    told = {cell.id: why_again(job, cell, store.read_cell(folder, cell.id)) for job, cell in plan.cells}
    reasons = {name: why for name, why in told.items() if why is not None}
    todo = sorted(reasons, key=lambda name: reasons[name] == FAILED)
    return Survey(tuple(name for name in told if name not in reasons), tuple(todo), reasons)


def why_again(job: ModelJob, cell: Cell, found: Mapping[str, Any] | None) -> str | None:
    """Why a cell is to be measured, by what was found of it; None where it is done."""
    if found is None:
        return NEW
    if not taskindex.have_lmms_eval():  # whose version and the task's files are in the key
        return UNKNOWN
    if found["key"] != job.key(cell):
        return changed(found["depends"], job.depends(cell))
    return None if found["error"] is None else FAILED


def changed(old: Any, new: Mapping[str, Any]) -> str:
    """What is different now: `changed: limit 10 -> 20; versions.torch 2.12 -> 2.13`."""
    before, now = flat(old) if isinstance(old, dict) else {}, flat(new)
    parts = []
    for word in dict.fromkeys([*before, *now]):
        a, b = before.get(word, "none"), now.get(word, "none")
        if a != b:
            parts.append(HASHED.get(word, f"{word} {a} -> {b}"))
    return f"changed: {'; '.join(parts)}" if parts else "changed"


def flat(value: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested mappings as dotted words with texts."""
    made: dict[str, str] = {}
    for word, inner in value.items():
        made |= flat(inner, f"{above}{word}.") if isinstance(inner, dict) else {above + word: str(inner)}
    return made


@dataclass(frozen=True)
class TimeLeft:
    """Seconds for the cells that something is known of, from `measured` cells; `unknown` is how many are left."""

    seconds: float
    measured: int
    unknown: int


def estimate(plan: EvalPlan, found: Survey, folder: Path) -> TimeLeft:
    """How long the cells to do may take, by what cells in the folder took, of whatever config they are.

    A cell takes as long per sample as others of its model, method and task did, with whatever limit; failing that, as
    others of its model and task, or of its model. Cells of a model that nothing was measured of stay unknown.
    """
    rates: dict[tuple[str, ...], list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}
    measured = telling(plan, folder)
    for old in measured:
        sizes[old["cell"]["task"]] = old.get("documents") or len(old["samples"])
        for group in groups(old["cell"]):
            rates[group].append(old["elapsed_s"] / len(old["samples"]))
    todo = set(found.todo)
    told = [seconds_of(job, cell, rates, sizes) for job, cell in plan.cells if cell.id in todo]
    known = [seconds for seconds in told if seconds is not None]
    return TimeLeft(sum(known), len(measured), len(told) - len(known))


def telling(plan: EvalPlan, folder: Path) -> list[dict[str, Any]]:
    """The cells in a folder that tell something of the plan's."""
    planned = {group for _, cell in plan.cells for group in groups(asdict(cell))}
    whole = (old for old in store.all_cells(folder) if old["error"] is None)
    return [old for old in whole if planned & {*groups(old["cell"])}]


def seconds_of(
    job: ModelJob, cell: Cell, rates: Mapping[tuple[str, ...], list[float]], sizes: Mapping[str, int]
) -> float | None:
    """How long a cell may take, of seconds per sample and of the sizes of tasks; None where nothing is known."""
    rate = next((fmean(rates[group]) for group in groups(asdict(cell)) if group in rates), None)
    # the limit, or all that its task has, if a cell was measured of it
    size = min((many for many in (job.setting.limit, sizes.get(cell.task)) if many is not None), default=None)
    return None if rate is None or size is None else rate * size


def groups(cell: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """From like to less like."""
    model, label, task = cell["model"], cell["label"], cell["task"]
    return (model, label, task), (model, task), (model,)
