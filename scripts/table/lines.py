"""Cells as lines of the table: a method at a budget on a model, and what each is compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from table_results import FALSE_YES, NATIVE, SPLIT_OF, asked, unpacked

from vlmprune import registry
from vlmprune.eval import statistics, testbed
from vlmprune.spec import NONE

from .differences import Against, correct, differences

#: Of random's tokens over layers, how far those of a method on a schedule of its own may be away to be compared.
NEAR = 0.1
#: Of `random`.
SEEDS = 3
BUDGETS = (0.5, 0.25, 0.1, 0.05)
LONG = "vlmprune_scene_llava_long"


@dataclass
class Line:
    """A method at a budget on a model: what its cells say, seeds averaged, tasks one after the other."""

    label: str
    method: str
    budget: float | None
    control: bool
    scores: np.ndarray
    tokens: dict[str, float]
    said_yes: np.ndarray
    seeds: int = 1
    cost: dict[str, Any] | None = None
    against: dict[str, Against] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The heading under which it stands."""
        return "nothing" if self.label == NATIVE or self.method == NONE else registry.find(self.method).looks_at

    @property
    def share(self) -> float:
        """Visual tokens in the mean over the decoder's layers, of those of the prompt."""
        return self.tokens["layer_average"] / self.tokens["whole"]

    @property
    def score(self) -> float:
        return 100 * float(self.scores.mean())

    @property
    def flops(self) -> float | None:
        """Of a prefill, as a share of the unpruned model's."""
        return self.cost and self.cost["flops"][1] / self.cost["flops"][0]

    @property
    def time(self) -> float | None:
        """Of a prefill, as a share of the unpruned model's."""
        return self.cost and 1 / self.cost["speedup"]["median"]


#: What accuracy is shown against.
COSTS_BY: dict[str, Callable[[Line], float | None]] = {
    "tokens over layers": lambda line: line.share,
    "prefill FLOPs": lambda line: line.flops,
    "prefill time": lambda line: line.time,
}


def whole_row(rows: Sequence[dict[str, Any]], every: Sequence[str]) -> bool:
    """Whether a method's cells at a budget are all there: every task, and of what is seeded every seed."""
    seeds = {row["seed"] for row in rows}
    wanted = SEEDS if None not in seeds else 1
    return len(seeds) == wanted and len(rows) == wanted * len(every)


class Model:
    """One model's lines on some tasks, and what they are compared by."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]]):
        self.name, every = name, list(dict.fromkeys(row["task"] for row in rows))
        self.tasks = [task for task in every if task not in FALSE_YES]
        self.exist = [task for task in every if task in FALSE_YES]
        self.counts = counts = {row["task"]: row["count"] for row in rows}
        self.clusters, self.part = [], []
        for task in self.tasks:
            self.clusters += [one.picture_id for one in asked(task, counts[task])] or [*map(str, range(counts[task]))]
            self.part += [SPLIT_OF.get(task, task)] * counts[task]
        cost = {(one["label"], str(one["budget"])): one for one in costs if one["model"] == name}
        found: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault((row["label"], (row["budget"] or {}).get("keep")), []).append(row)
        whole = {row["task"]: row["tokens_before"] for row in rows if row["label"] != NATIVE}
        self.lines = [
            self.line(label, budget, some, whole, cost.get((label, str(some[0]["budget"]))))
            for (label, budget), some in found.items()
            if whole_row(some, every)
        ]
        if any(line.label == NONE for line in self.lines):
            self.compare()

    def line(
        self, label: str, budget: float | None, rows: list[dict[str, Any]], whole: dict[str, float], cost: Any
    ) -> Line:
        """Cells of one method at one budget as a line."""
        by_task = {task: [row for row in rows if row["task"] == task] for task in [*self.tasks, *self.exist]}
        scores = [np.mean([unpacked(row["scores"], row["count"]) for row in by_task[task]], 0) for task in self.tasks]
        yes = [np.mean([unpacked(row["said_yes"], row["count"]) for row in by_task[task]], 0) for task in self.exist]
        rows = [row for task in self.tasks for row in by_task[task]]
        tokens = {word: float(np.mean([row[word] for row in rows])) for word in ("layer_average", "output_tokens")}
        tokens["whole"] = float(np.mean([whole[task] for task in self.tasks]))
        one = rows[0]
        said = np.concatenate(yes) if yes else np.array([])
        seeds = len({row["seed"] for row in rows})
        return Line(label, one["method"], budget, one["control"], np.concatenate(scores), tokens, said, seeds, cost)

    @cached_property
    def full(self) -> Line:
        return next(line for line in self.lines if line.label == NONE)

    def random_for(self, line: Line) -> Line | None:
        """`random` at the same budget, or of about as many tokens over layers where a method has its own."""
        drawn = [one for one in self.lines if one.label == "random"]
        if line.budget is not None:
            return next((one for one in drawn if one.budget == line.budget), None)
        near = min(drawn, key=lambda one: abs(one.share - line.share), default=None)
        return near if near is not None and abs(near.share - line.share) <= NEAR * line.share else None

    def random(self, budget: float) -> Line:
        """`random` at a budget."""
        return next(line for line in self.at(budget) if line.label == "random")

    def compare(self) -> None:
        """Every line against the unpruned model and against `random`."""
        pairs = []
        for line in (one for one in self.lines if one is not self.full):
            bases = {"full": self.full, "random": self.random_for(line) if line.label != "random" else None}
            pairs += [(line, name, base) for name, base in bases.items() if base is not None]
        found = self.differences([line.scores for line, *_ in pairs], [base.scores for *_, base in pairs])
        for (line, name, _), against in zip(pairs, found, strict=True):
            line.against[name] = against

    def differences(
        self, scores: Sequence[np.ndarray], bases: Sequence[np.ndarray], mine: np.ndarray | None = None
    ) -> list[Against]:
        """Of pairs of scores, on the questions of a mask or on all; whole pictures are drawn, and given signs."""
        mine = np.ones(len(self.clusters), bool) if mine is None else mine
        names = [name for name, there in zip(self.clusters, mine, strict=True) if there]
        return differences(names, [score[mine] for score in scores], [base[mine] for base in bases])

    def of(self, line: Line, split: str) -> float:
        """A line's score on one split."""
        return 100 * float(line.scores[np.array(self.part) == split].mean())

    def at(self, budget: float | None, controls: bool | None = None) -> list[Line]:
        """The lines of a budget, without the unpruned model."""
        found = [line for line in self.lines if line.budget == budget and line is not self.full]
        return [line for line in found if controls is None or line.control == controls]


class Table:
    """All models, with one correction for all their comparisons."""

    def __init__(self, answers: dict[str, Any], costs: dict[str, Any] | None):
        self.about, self.costs = answers, costs
        timed = costs["rows"] if costs else []
        rows = answers["rows"]
        short = [row for row in rows if row["task"] != LONG]
        names = dict.fromkeys(row["model"] for row in short)
        order = [name for name in testbed.NAMES if name in names]
        models = [Model(name, [row for row in short if row["model"] == name], timed) for name in order]
        # an unfinished run may lack the unpruned model, or `random`: then there is nothing to compare with
        self.models = [model for model in models if {NONE, "random"} <= {line.label for line in model.lines}]
        longs = [row for row in rows if row["task"] == LONG]
        self.long = Model(longs[0]["model"], longs, []) if longs else None
        self.shares: dict[tuple[str, float | None], list[float]] = {}
        for row in longs:
            self.shares.setdefault((row["label"], (row["budget"] or {}).get("keep")), []).append(row["made_up"])
        self.comparisons = adjust(self.models)
        if self.long is not None:
            self.long_comparisons = adjust([self.long])

    def made_up(self, line: Line) -> float:
        """Of the things that a line's long answers name, the share that is not there, seeds averaged."""
        return float(np.mean(self.shares[line.label, line.budget]))


def adjust(models: Iterable[Model]) -> int:
    """Correct all comparisons of some models together; returns how many there are."""
    return correct([against for model in models for line in model.lines for against in line.against.values()])


def cells(table: Table) -> Iterator[tuple[Model, float, list[Line]]]:
    """Every model and budget with the methods that were asked there."""
    for model in table.models:
        for budget in BUDGETS:
            if lines := [line for line in model.at(budget, controls=False) if "random" in line.against]:
                yield model, budget, lines


def score(line: Line) -> float:
    """By which lines are ranked."""
    return line.score


def pareto(model: Model, cost: Callable[[Line], float | None]) -> list[Line]:
    """The lines that no other one beats at less or equal cost, cheapest first; `downsample` saves nothing."""
    lines = [line for line in model.lines if line.method != "downsample" and cost(line) is not None]
    best = statistics.pareto([cost(line) for line in lines], [line.score for line in lines])
    return sorted((line for line, there in zip(lines, best, strict=True) if there), key=cost)
