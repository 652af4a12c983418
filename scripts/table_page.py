"""Write docs/table.md from benchmarks/table.json and table-costs.json (`scripts/table_results.py` makes them).

    python scripts/table_page.py

Every number and every sentence that judges follows from these files; tests/test_table.py writes the page again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from table_results import ANSWERS, COSTS, NATIVE, ROOT, SPLIT_OF, asked, no_of, unpacked

from vlmprune import registry
from vlmprune.eval import statistics, testbed
from vlmprune.methods.base import LOOKS_AT
from vlmprune.spec import NONE

PAGE = ROOT / "docs" / "table.md"
#: Below this an adjusted p says that a difference is none of chance.
SURE = 0.05
#: Of random's tokens over layers, how far those of a method on a schedule of its own may be away to be compared.
NEAR = 0.1
#: Of `random`.
SEEDS = 3
BUDGETS = (0.5, 0.25, 0.1, 0.05)
GROUPS = {**LOOKS_AT, "nothing": "nothing (controls)"}
#: Made for flat screenshots, and so no example of its group here.
APART = "showui"
#: The groups of methods that are compared as groups.
KINDS = {"tower": "attention", "features": "likeness", "question": "question", "decoder": "inside the LLM"}
RIVALS = {"scene-qwen": "fewer pixels", "scene-llava-next": "one crop"}
#: Where positions lie on three axes (M-RoPE), none is renumbered.
THREE_AXES = ("scene-qwen",)
LONG = "vlmprune_scene_llava_long"


@dataclass
class Against:
    """A paired difference to a base row, in points."""

    value: float
    low: float
    high: float
    p: float
    adjusted: float = 1.0

    @property
    def sure(self) -> bool:
        """Whether it is one after the correction for all comparisons."""
        return self.adjusted < SURE

    @property
    def better(self) -> bool:
        return self.sure and self.value > 0

    @property
    def worse(self) -> bool:
        return self.sure and self.value < 0

    def __str__(self) -> str:
        told = f"{self.value:+.1f}"
        return f"{f'**{told}**' if self.sure else told} [{self.low:+.1f}, {self.high:+.1f}]"


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
        # one that asks whether things are there is for the column of false yes alone
        self.tasks = [task for task in every if not task.endswith("_exist")]
        self.exist = [task for task in every if "said_yes" in next(row for row in rows if row["task"] == task)]
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
        no = {task: len(no_of(task, by_task[task][0]["count"])) for task in self.exist}
        yes = [np.mean([unpacked(row["said_yes"], no[task]) for row in by_task[task]], 0) for task in self.exist]
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
        if not scores:
            return []
        mine = np.ones(len(self.clusters), bool) if mine is None else mine
        names = [name for name, there in zip(self.clusters, mine, strict=True) if there]
        apart, resampler = np.stack(scores, 1)[mine] - np.stack(bases, 1)[mine], statistics.Resampler(names)
        where = np.array([resampler.position[name] for name in names])
        made = []
        for drawn, column in zip(resampler.means(names, apart).T, apart.T, strict=True):
            found, _ = statistics.difference(drawn, float(column.mean()), len(resampler), 1.0, not column.any())
            p = statistics.sign_flip(np.bincount(where, column, len(resampler)))
            made.append(Against(100 * found.value, 100 * found.low, 100 * found.high, p))
        return made

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
        short = [row for row in rows if "said_yes" in row]
        names = dict.fromkeys(row["model"] for row in short)
        order = [name for name in testbed.NAMES if name in names]
        models = [Model(name, [row for row in short if row["model"] == name], timed) for name in order]
        # an unfinished run may lack the unpruned model, or `random`: then there is nothing to compare with
        self.models = [model for model in models if {NONE, "random"} <= {line.label for line in model.lines}]
        longs = [row for row in rows if row["task"] == LONG]
        self.long = Model(longs[0]["model"], longs, []) if longs else None
        self.made_up = {(row["label"], (row["budget"] or {}).get("keep"), row["seed"]): row["made_up"] for row in longs}
        self.comparisons = adjust(self.models)
        if self.long is not None:
            self.long_comparisons = adjust([self.long])


def correct(found: Sequence[Against]) -> int:
    """Correct comparisons for how many they are; returns that."""
    for against, p in zip(found, statistics.holm([one.p for one in found]), strict=True):
        against.adjusted = float(p)
    return len(found)


def adjust(models: Iterable[Model]) -> int:
    """Correct all comparisons of some models together; returns how many there are."""
    return correct([against for model in models for line in model.lines for against in line.against.values()])


# Words


def name_of(line: Line, model: Model) -> str:
    """What tables call a line."""
    return RIVALS[model.name] if line.label == NATIVE else f"`{line.label}`"


def percent(share: float) -> str:
    """`5 %`."""
    return f"{100 * share:.0f} %"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are flush left."""
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def budget_name(budget: float | None) -> str:
    """What headings call a budget."""
    return "own budget" if budget is None else percent(budget)


def title(model: Model, budget: float) -> str:
    """What a row about a model at a budget is called."""
    return f"{model.name}, {percent(budget)}"


def groups_of(lines: Sequence[Line]) -> list[str]:
    """The groups of `KINDS` that some lines belong to."""
    return [group for group in KINDS if any(line.group == group for line in lines)]


def means(lines: Sequence[Line], what: Callable[[Line], np.ndarray]) -> dict[str, np.ndarray]:
    """Something of every sample, averaged over the methods of a group, without the one that is apart."""
    lines = [line for line in lines if line.method != APART]
    return {g: np.mean([what(line) for line in lines if line.group == g], 0) for g in groups_of(lines)}


def cells(table: Table) -> Iterator[tuple[Model, float, list[Line]]]:
    """Every model and budget with the methods that were asked there."""
    for model in table.models:
        for budget in BUDGETS:
            if lines := [line for line in model.at(budget, controls=False) if "random" in line.against]:
                yield model, budget, lines


# The summary


def summary(table: Table) -> list[str]:
    """What a reader who decides should know, in order."""
    parts = (verdicts, fronts, losses, rivals, lengths, kinds, false_yes, times)
    return [told for part in parts if (told := part(table))]


def verdicts(table: Table) -> str:
    """How many methods are told apart from what."""
    rows = []
    for model, budget, mine in cells(table):
        over, under = (sum(getattr(line.against["random"], word) for line in mine) for word in ("better", "worse"))
        lost, base, top = sum(line.against["full"].worse for line in mine), model.random(budget), max(mine, key=score)
        tops = listed([name_of(line, model) for line in mine if line.score == top.score])
        counts = [len(mine), over, len(mine) - over - under, under, len(mine) - lost]
        rows.append([title(model, budget), *map(str, counts), f"{base.score:.1f}", f"{top.score:.1f}", tops])
    header = ["model, tokens left", "methods", "above `random`", "not told apart", "below it", "not told from unpruned"]
    told = """\
**How many are better than chance.** Methods above three seeds of `random` at the same budget, those that cannot be
told apart from it, those below, and those that cannot be told from the unpruned model (no proof that they are as
good):"""
    return f"{told}\n\n{markdown([*header, '`random`', 'best', 'which'], rows)}"


def score(line: Line) -> float:
    """By which lines are ranked."""
    return line.score


def fronts(table: Table) -> str:
    """Which rows nothing beats, by what they cost."""
    rows = []
    for model in table.models:
        for kind, cost in COSTS_BY.items():
            found = [
                f"{name_of(line, model)}{'' if line.budget is None else f' {percent(line.budget)}'} "
                f"({percent(cost(line))}: {line.score:.1f})"
                for line in pareto(model, cost)
                if line is not model.full
            ]
            if found:
                rows.append([model.name, kind, "; ".join(found)])
    told = """\
**What to take**, as far as such models tell. `keep` counts what is left after the last cut, and a method that cuts
late has run most layers on all tokens by then; so rows are compared by their tokens in the mean over layers, by the
FLOPs of a whole prefill (tower, language model and the method's own work), and by its time. On a front no other row
of the model has at least its accuracy for at most its cost (in brackets: cost as a share of the unpruned model's, and
accuracy). Neighbours on it need not differ for certain:"""
    return f"{told}\n\n{markdown(['model', 'by', 'front, cheapest first'], rows, 3)}"


def pareto(model: Model, cost: Callable[[Line], float | None]) -> list[Line]:
    """The lines that no other one beats at less or equal cost, cheapest first; `downsample` saves nothing."""
    lines = [line for line in model.lines if line.method != "downsample" and cost(line) is not None]
    best = statistics.pareto([cost(line) for line in lines], [line.score for line in lines])
    return sorted((line for line, there in zip(lines, best, strict=True) if there), key=cost)


def losses(table: Table) -> str:
    """Who is below random."""
    made = []
    for model in table.models:
        below: dict[str, list[str]] = {}
        for line in (one for budget in BUDGETS for one in model.at(budget) if "random" in one.against):
            if line.against["random"].worse:
                told = f"{percent(line.budget)}: {line.against['random'].value:+.1f}"
                below.setdefault(name_of(line, model), []).append(told)
        found = [f"{name} ({', '.join(some)})" for name, some in below.items()]
        made += [f"- {model.name}: {listed(found)}."] if found else []
    told = "**Below `random`** at the same budget for certain, controls included (in points):"
    return "\n".join([told, "", *made]) if made else f"{told} none."


def rivals(table: Table) -> str:
    """The native rival beside the best, and how many it beats."""
    made = []
    for model in table.models:
        for line in (one for one in model.lines if one.label == NATIVE and model.at(one.budget, controls=False)):
            others = model.at(line.budget, controls=False)
            apart = model.differences([other.scores for other in others], [line.scores] * len(others))
            correct(apart)
            best = max(others, key=score)
            flops = ["" if one.flops is None else f", {percent(one.flops)} of the FLOPs" for one in (line, best)]
            better, worse = (sum(getattr(one, word) for one in apart) for word in ("better", "worse"))
            made.append(
                f"- {model.name} at {percent(line.budget)}: {RIVALS[model.name]} {line.score:.1f} "
                f"({percent(line.share)} of the tokens{flops[0]}). Of {len(others)} methods {better} are better for "
                f"certain, {worse} worse; the best is {name_of(best, model)}, {best.score:.1f} "
                f"({percent(best.share)} of the tokens{flops[1]})."
            )
    told = "**The native rival**, fewer pixels or crops, which spares the tower too (corrected within each budget):"
    return "\n".join([told, "", *made]) if made else ""


def kinds(table: Table) -> str:
    """Attention of the tower against diversity, on sparse and on crowded pictures."""
    model = next((one for one in table.models if "crowded" in one.part), None)
    rows, apart, words = [], [], []
    for split in ("sparse", "crowded") if model is not None else ():
        mine = np.array(model.part) == split
        for budget in BUDGETS:
            found = means(model.at(budget, controls=False), lambda line: line.scores)
            if {"tower", "features"} <= set(found):
                apart += model.differences([found["features"]], [found["tower"]], mine)
                told = [f"{100 * found[group][mine].mean():.1f}" if group in found else "" for group in KINDS]
                rows.append([f"{split}, {percent(budget)}", *told])
    correct(apart)
    for split in ("sparse", "crowded"):
        mine = [
            (row[0].partition(", ")[2], one) for row, one in zip(rows, apart, strict=True) if row[0].startswith(split)
        ]
        sure = [f"{budget} ({one.value:+.1f})" for budget, one in mine if one.sure]
        words.append(f"on {split} pictures at {listed(sure) if sure else 'no budget'}")
    pulled = 0.0 if not rows else np.mean([drag(model, budget) for budget in BUDGETS if model.at(budget)])
    told = f"""\
**Attention or diversity?** Public findings: the tower's attention does better on simple pictures, diversity on
crowded ones. Here (scene-llava, means over the methods of a group, without `showui`, which is made for flat screenshots
and would pull likeness down by {pulled:.0f} points) the two differ for certain {listed(words)}; a plus is for
diversity. Last column: likeness minus attention, corrected within this table:"""
    rows = [[*row, str(one)] for row, one in zip(rows, apart, strict=True)]
    return f"{told}\n\n{markdown(['scenes, tokens left', *KINDS.values(), 'difference'], rows)}" if rows else ""


def lengths(table: Table) -> str:
    """What methods lose on short and on long answers."""
    short = next((one for one in table.models if one.name == "scene-llava"), None)
    made = []
    for budget in BUDGETS if short is not None and table.long is not None else ():
        lost = [
            {line.label: -line.against["full"].value for line in model.at(budget, controls=False)}
            for model in (short, table.long)
        ]
        both = [label for label in lost[1] if label in lost[0]]
        if both:
            least = sorted(both, key=lambda label: lost[1][label])[:3]
            told = listed([f"`{label}` ({lost[1][label]:.1f})" for label in least])
            means = [np.mean([one[label] for label in both]) for one in lost]
            made.append(
                f"- at {percent(budget)}, {len(both)} methods lose {means[0]:.1f} points on average on scene-llava's "
                f"short answers, and {means[1]:.1f} on [long ones](#long-answers), where {told} lose least."
            )
    told = (
        "**Short answers hide the damage**, on another model, other pictures and by another score, so read the order:"
    )
    return "\n".join([told, "", *made]) if made else ""


def drag(model: Model, budget: float) -> float:
    """How far the method that is apart would pull down the mean of its group, in points."""
    scores = {line.label: line.score for line in model.at(budget, controls=False) if line.group == "features"}
    rest = [score for label, score in scores.items() if label != APART]
    return float(np.mean(rest) - np.mean([*scores.values()])) if rest else 0.0


def false_yes(table: Table) -> str:
    """Whether diversity hallucinates more: a yes where there is nothing."""
    rows, apart, count = [], [], {}
    for model, budget, lines in cells(table):
        rates = means(lines, lambda line: line.said_yes)
        if not {"tower", "features"} <= set(rates) or not len(model.full.said_yes):
            continue
        apart.append(plain_difference(rates["features"] - rates["tower"]))
        told = [f"{100 * rates[group].mean():.0f}" if group in rates else "" for group in KINDS]
        shown = [f"{100 * one.said_yes.mean():.0f}" for one in (model.full, model.random(budget))]
        rows.append([title(model, budget), *shown, *told])
        count[model.name] = len(model.full.said_yes)
    correct(apart)
    named = list(zip(rows, apart, strict=True))
    more, less = ([row[0] for row, one in named if getattr(one, word)] for word in ("better", "worse"))
    asked_of = listed([f"{number} of {name}" for name, number in count.items()])
    told = f"""\
**Does diversity hallucinate more?** Public findings say so. Per cent of the questions `is there a ... ?` about things
that are not in the picture which are answered yes, as means over the same methods. There are few such questions
({asked_of}). Methods that go by likeness say yes more often for certain at: {listed(more)}; less often at:
{listed(less)} (last column: likeness minus attention, corrected within this table):"""
    rows = [[*row, f"**{one.value:+.1f}**" if one.sure else f"{one.value:+.1f}"] for row, one in named]
    header = ["model, tokens left", "unpruned", "`random`", *KINDS.values(), "difference"]
    return f"{told}\n\n{markdown(header, rows)}" if rows else ""


def plain_difference(apart: np.ndarray) -> Against:
    """A mean difference of questions, without an interval."""
    value = 100 * float(apart.mean())
    return Against(value, value, value, statistics.sign_flip(apart))


def times(table: Table) -> str:
    """What was measured in time."""
    rows = []
    for model, budget, lines in cells(table):
        if timed := [line.cost["speedup"] for line in lines if line.cost is not None]:
            ratios = sorted(one["median"] for one in timed)
            told = [f"{ratios[place]:.2f}" for place in (0, len(ratios) // 2, -1)]
            sure = (sum(one["low"] > 1 for one in timed), sum(one["high"] < 1 for one in timed), len(timed))
            rows.append([title(model, budget), *told, *map(str, sure)])
    if not rows:
        return ""
    loads, about = [row["load"] for row in table.costs["rows"]], table.costs["machine"]
    told = f"""\
**Time.** One prefill of one prompt, in turns with the unpruned model's ({table.costs["pairs"]} pairs: the median of
their ratios, with its 95 % interval by order statistics), on one thread of {about["processor"]} with {about["cores"]}
cores, **which ran other work meanwhile** (load average {min(loads)} to {max(loads)}). At two million parameters time
is overhead, and the tower most of the work: [performance.md](performance.md) has real sizes. Unpruned / pruned, over
the methods:"""
    header = ["model, tokens left", "least", "median", "most", "faster for certain", "slower for certain", "methods"]
    return f"{told}\n\n{markdown(header, rows)}"


# All rows


def overview(model: Model) -> str:
    """Accuracy of every method at every budget."""
    order = sorted(
        {(list(GROUPS).index(line.group), line.label) for line in model.lines if line is not model.full and line.budget}
    )
    rows = []
    for place, label in order:
        mine = {line.budget: line for line in model.lines if line.label == label}
        scores = [score_of(mine[budget]) if budget in mine else "" for budget in BUDGETS]
        one = next(iter(mine.values()))
        rows.append([name_of(one, model), GROUPS[list(GROUPS)[place]], positions(one, model), *scores])
    return markdown(["method", "looks at", "positions", *map(percent, BUDGETS)], rows, 3)


def positions(line: Line, model: Model) -> str:
    """What becomes of the positions of the tokens that stay."""
    if line.label == NATIVE or "positions" not in registry.options(registry.find(line.method)):
        return ""
    own = next(field for field in fields(registry.find(line.method)) if field.name == "positions").default
    return "kept" if own == "original" or (own is None and model.name in THREE_AXES) else "renumbered"


def score_of(line: Line) -> str:
    """A score, with arrows where it is certain against random."""
    against = line.against.get("random")
    return f"{line.score:.1f}{' ▲' if against and against.better else ' ▼' if against and against.worse else ''}"


def details(model: Model, budget: float | None) -> str:
    """All there is about the lines of a budget."""
    splits = list(dict.fromkeys(model.part)) if len(set(model.part)) > 1 else []
    rows = []
    for line in sorted(model.at(budget), key=lambda line: (list(GROUPS).index(line.group), line.control, -line.score)):
        ratio = line.cost and line.cost["speedup"]
        rows.append(
            [name_of(line, model), percent(line.share), "" if line.flops is None else percent(line.flops)]
            + [
                "" if not ratio else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                f"{line.score:.1f}",
            ]
            + [str(line.against[base]) if base in line.against else "" for base in ("full", "random")]
            + [f"{model.of(line, split):.1f}" for split in splits]
            + [f"{100 * line.said_yes.mean():.0f}" if len(line.said_yes) else ""]
        )
    header = [
        "method",
        "tokens",
        "FLOPs",
        "unpruned / pruned time",
        "all",
        "- unpruned",
        "- `random`",
        *splits,
        "false yes",
    ]
    return markdown(header, rows)


def long_captions(table: Table) -> str:
    """The task with long answers."""
    if table.long is None:
        return ""
    model = table.long
    made = {}
    for (label, budget, _), value in table.made_up.items():
        made.setdefault((label, budget), []).append(value)
    length = model.full.tokens["output_tokens"]
    rows = []
    for budget in [one for one in BUDGETS if model.at(one)]:
        for line in sorted(model.at(budget), key=lambda line: (list(GROUPS).index(line.group), -line.score)):
            told = [str(line.against[base]) if base in line.against else "" for base in ("full", "random")]
            tokens = f"{line.tokens['output_tokens']:.0f}"
            lost = f"{100 * np.mean(made[line.label, budget]):.1f}"
            rows.append([f"{name_of(line, model)}, {percent(budget)}", f"{line.score:.1f}", *told, lost, tokens])
    full = f"{100 * np.mean(made[NONE, None]):.1f}"
    rows.insert(0, ["unpruned", f"{model.full.score:.1f}", "", "", full, f"{length:.0f}"])
    told = f"""\
`{model.name}` is scene-llava, taught for a few minutes to describe a picture at length
([how](../eval/testbed/README.md#scene-llava-long)): {length:.0f} tokens on average, in which it says how many things
there are, what is in every quadrant, and what is beside and below each. Scored by the things named (F1 of colour and
shape or digit, in per cent) on {len(model.clusters)} pictures with three or four things; *made up* is the share of the
things named that are not there. Corrected for the {table.long_comparisons} comparisons of this table."""
    header = ["method, tokens left", "things", "- unpruned", "- `random`", "made up", "tokens written"]
    return f"## Long answers\n\n{told}\n\n{markdown(header, rows)}\n"


def left_out(table: Table) -> str:
    """What was not asked, and why."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in table.about["absent"]:
        at = "" if one["budget"] is None else f" at {percent(one['budget']['keep'])}"
        found.setdefault(one["why"], []).append((one["model"], f"`{one['method']}`{at}"))
    rows = []
    for why, some in found.items():
        who = listed(list(dict.fromkeys(name for _, name in some)))
        rows.append([who, ", ".join(dict.fromkeys(model for model, _ in some)), why.replace("|", "\\|")])
    return markdown(["not asked", "of", "why"], rows, 3)


def origin(table: Table) -> str:
    """Where the numbers come from."""
    told = [
        f"commit {(run['commit'] or 'unknown')[:12]}, {run['day']}, {run['device']}, "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version and name != "python")
        for run in table.about["runs"]
    ]
    runs = "; ".join(told)
    lost = table.about["missing"]
    unfinished = f" **{lost} cells of the run are missing still, and so are their rows.**" if lost else ""
    about = "\n".join(f"- {model.name}: {composition(model)}." for model in table.models)
    return f"""\
{about}

The questions are the first of each picture in the shipped splits, and those are not balanced: what is rarely possible
(a digit, a relation) comes first. So a score here is none of the testbed's README, and says more of fine detail than of
colours and places. Measured: {runs}.{unfinished}"""


def composition(model: Model) -> str:
    """How many questions there are about what."""
    counts = Counter(one.category for task in model.tasks for one in asked(task, model.counts[task]))
    told = ", ".join(f"{count} {category}" for category, count in counts.most_common())
    return f"{len(model.clusters)} questions about {len(set(model.clusters))} pictures ({told})"


def unmeasured(table: Table) -> str:
    """How many rows have no costs yet."""
    lines = [line for model in table.models for line in model.lines if line is not model.full]
    lacking = sum(line.cost is None for line in lines)
    return f"Of {len(lines)} rows {lacking} have no costs yet, and are on no front of FLOPs or time." if lacking else ""


def page(table: Table) -> str:
    """The whole page."""
    bullets = "\n\n".join(summary(table))
    tables = []
    for model in table.models:
        budgets = [budget for budget in (*BUDGETS, None) if model.at(budget)]
        parts = [
            f"### {model.name}\n\nUnpruned: {model.full.score:.1f}. ▲ and ▼: above and below `random` for certain.\n"
        ]
        parts.append(overview(model) + "\n")
        parts += [f"#### {model.name}, {budget_name(budget)}\n\n{details(model, budget)}\n" for budget in budgets]
        tables += parts
    return f"""\
<!-- Written by scripts/table_page.py from benchmarks/table.json and benchmarks/table-costs.json: do not edit. -->
# Every method in one table

All methods that run on the [embedded models](../eval/testbed/README.md), beside `random` (three seeds), `grid`,
`pool`, `m3` (nested pooling without its training), `downsample` (fewer pixels, all tokens: it saves nothing) and the
native rival (fewer pixels or crops for equal tokens), at a half, a quarter, a tenth and a twentieth of the visual
tokens. **These are models of two million parameters that answer questions about drawn scenes. Nothing here is a claim
about any other model**: a method that leads here may lose on photographs, and the other way round
([ledger](#the-ledger)). No method was tuned to them. All run with their sources' options, except where a model lacks
something: `todre` starts from the mean patch where there is no [CLS] token, and `cdpruner` reads the question by the
language model's embeddings, for these towers have no text half. They renumber positions or keep them as their sources
do, which matters to models this small ([results](results.md)). `prunesid` and `tcc` draw numbers too, and ran with one
seed.

```bash
vlmprune eval table.yaml                              # under an hour of one CPU core; started again, it goes on
python scripts/table_results.py answers runs/table    # -> benchmarks/table.json
python scripts/table_results.py costs                 # -> benchmarks/table-costs.json
python scripts/table_page.py                          # -> this page
```

{origin(table)}

Differences are paired, question by question, in points, with 95 % intervals that resample whole pictures. **Bold** is
what stays certain after Holm's correction for all {table.comparisons} comparisons of this page with the unpruned
model and with `random` together, at 5 %; p values are those of the exact randomization test over pictures, so that
they can be as small as that needs. An interval without 0 in it that is not bold may be chance.

## In short

{bullets}

![Accuracy against tokens over layers, FLOPs and time of a prefill](table.png)

Crosses are controls (the native rival too), the dotted line the unpruned model, the grey one the front.

## All rows

*tokens*: in the mean over the decoder's layers, of those of the prompt; *FLOPs*: of a whole prefill as torch counts
them, the method's own work included; *time*: above 1 is faster; *false yes*: per cent of the questions about things
that are not there. {unmeasured(table)}

{chr(10).join(tables)}
{long_captions(table)}
## What was not asked

{left_out(table)}

## The ledger

What papers and single-evaluator tables publish for LLaVA-1.5-7B stands in
[table-llava-1.5-7b.yaml](../configs/table-llava-1.5-7b.yaml), number by number with source and definition. With a GPU
and the weights, `vlmprune eval table-llava-1.5-7b.yaml` measures the same cells and its report sets ours against
theirs. It was not run by us.
"""


def draw(table: Table, path: Path) -> None:
    """Accuracy against cost: a row for each model, a column for each cost, a colour for each group."""
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        len(table.models), len(COSTS_BY), figsize=(4.2 * len(COSTS_BY), 3.4 * len(table.models)), squeeze=False
    )
    for axes, model in zip(grid, table.models, strict=True):
        lines = [line for line in model.lines if line.method != "downsample"]
        for axis, (kind, cost) in zip(axes, COSTS_BY.items(), strict=True):
            for group, told in {**KINDS, "nothing": "controls"}.items():
                mine = [line for line in lines if line.group == group and cost(line) is not None]
                look = {"marker": "x", "color": "black"} if group == "nothing" else {"marker": "o", "alpha": 0.7}
                axis.scatter(
                    [100 * cost(line) for line in mine], [line.score for line in mine], s=18, label=told, **look
                )
            front = [line for line in pareto(model, cost) if cost(line) is not None]
            axis.step([100 * cost(line) for line in front], [line.score for line in front], where="post", color="0.6")
            axis.axhline(model.full.score, linestyle=":", color="0.5")
            axis.set(title=model.name, xlabel=f"{kind}, % of unpruned", ylabel="right answers, %")
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Write the page and its picture."""
    answers = json.loads(ANSWERS.read_text())
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else None
    table = Table(answers, costs)
    PAGE.write_text(page(table), encoding="utf-8")
    draw(table, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
