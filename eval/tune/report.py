"""What `vlmprune tune` says and writes: the statement, the table, the front, the worst pictures, the recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from vlmprune.eval import statistics
from vlmprune.eval.fidelity.cards import captioned, sheet_of, worst_cards
from vlmprune.eval.fidelity.costs import AXES, UNPRUNED
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import worst
from vlmprune.eval.report import render
from vlmprune.eval.report.chart import Chart, Mark, blind
from vlmprune.eval.report.document import Block, Bullets, Captioned, Cards, Code, Heading, Table, Text, repeat
from vlmprune.eval.tune.calibrate import Trial
from vlmprune.eval.tune.judge import CONFIDENCE
from vlmprune.eval.tune.run import Candidate, Goal
from vlmprune.eval.tune.search import FINALISTS
from vlmprune.recipe import Recipe
from vlmprune.runtime.files import write_all
from vlmprune.runtime.loading import Loaded
from vlmprune.runtime.prompts import Pair
from vlmprune.runtime.tables import counted
from vlmprune.spec import BUDGETS, write_value

__all__ = ["PAGE", "RECIPE", "Result", "as_json", "command_line", "python_line", "recipe", "statement", "table_of"]
__all__ += ["verdict_line", "ways", "write"]


PAGE, RECIPE, SHEET = "report.html", "recipe.yaml", "worst.png"
UNFINISHED = "Time was over, or it was interrupted: not all was measured."


@dataclass(frozen=True)
class Result:
    """All that was found.

    Attributes:
        about: what to repeat it by.
        goal: what was wanted.
        scored: whether answers were given, so that loss is of a score; else of agreement.
        all: every candidate that was timed.
        finalists: those that saw all pictures, best first.
        skipped: pictures that could not be read, and why.
        refused: methods that do not go with the model or the pictures, and why.
        complete: whether time was enough.
        trials: of a search for one method's options, which the finalists' pictures were no part of.
    """

    about: dict[str, Any]
    goal: Goal
    scored: bool
    all: Sequence[Candidate]
    finalists: Sequence[Candidate]
    skipped: dict[str, str]
    refused: dict[str, list[str]]
    complete: bool
    trials: Sequence[Trial] = ()

    @property
    def best(self) -> Candidate:
        return self.finalists[0]

    @property
    def front(self) -> set[str]:
        """The finalists that none beats in both speed and loss."""
        times = [1 / one.speedup(self.goal) for one in self.finalists]
        values = [-one.verdict.loss for one in self.finalists]
        marks = statistics.pareto(times, values)
        return {one.label for one, mark in zip(self.finalists, marks, strict=True) if mark}


def per_cent(share: float) -> str:
    """`0.4`."""
    return f"{100 * share:.1f}"


def span(one: Candidate, goal: Goal) -> str:
    """`1.1 to 1.3`: the interval of the speed-up on this machine."""
    times = getattr(one.costs, goal.of)
    return f"{times['low']:.2f} to {times['high']:.2f}"


def statement(result: Result, one: Candidate) -> str:
    """`fopru, keep 0.25: 2.3 times as fast (...), loss 0.4 points, under 1.0 with 95 % confidence: yes`."""
    goal, found = result.goal, one.verdict
    what = "first token" if goal.of == "first" else f"answer of {one.costs.tokens} tokens"
    lost = per_cent(found.loss)
    lost = f"loss {lost} points of the score" if result.scored else f"{lost} % of the answers changed"
    end = {"yes": "yes", "no": "no", "open": "no, as it looks, and more pictures may tell"}[found.answer]
    if found.more is not None:
        end = f"needs about {found.more} more pictures"
    return (
        f"{one.label}: {one.speedup(goal):.2f} times as fast ({what}; 95 % interval {span(one, goal)}), "
        f"{lost}, under {per_cent(goal.loss)} with {CONFIDENCE:.0%} confidence: {end}."
    )


def verdict_line(result: Result) -> str:
    """The answer to the question that was asked."""
    goal, best = result.goal, result.best
    fastest = max(result.all, key=lambda one: one.speedup(goal))
    wanted = f"{goal.speedup:g} times as fast at a loss of at most {per_cent(goal.loss)} points"
    if best.speedup(goal) < goal.speedup:
        return (
            f"None of the {counted(len(result.all), 'candidate')} tried is {wanted} here: the fastest of all was "
            f"{fastest.label}, {fastest.speedup(goal):.2f} times. The best that was found:"
        )
    if best.verdict.answer == "yes":
        return f"Yes, {wanted}:"
    return f"Not proved: {wanted}. The best that was found:"


def table_of(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the finalists, then those that went earlier."""
    header = [
        "method",
        "budget",
        "first token",
        "answer",
        "memory",
        "cache",
        "pictures",
        "loss",
        "at most",
        "KL",
        "front",
    ]
    ends = {one.label for one in result.finalists}
    others = sorted((one for one in result.all if one.label not in ends), key=lambda one: (-one.rung, one.label))
    front = result.front
    return header, [[*cells(one), "*" if one.label in front else ""] for one in [*result.finalists, *others]]


def cells(one: Candidate) -> list[str]:
    """A candidate's row but for its last cell."""
    costs, found = one.costs, one.verdict
    return [
        one.entry.method,
        one.entry.budget,
        f"{costs.first['median']:.2f}x",
        f"{costs.answer['median']:.2f}x",
        f"{100 * costs.memory:.0f} %",
        f"{100 * costs.cache:.0f} %",
        str(len({row.picture for row in one.rows})),
        *(["", ""] if found is None else [per_cent(found.loss), per_cent(found.high)]),
        f"{one.kl:.3f}" if one.rows else "",
    ]


def chart(result: Result) -> Chart:
    """Loss of the finalists and drift of all that answered something, against what was timed."""
    axes = {result.goal.of: AXES[result.goal.of]} | AXES  # first what was asked for
    panels = {"loss": "loss, points", "KL": "KL, nats per token"}
    points = [Mark("", "unpruned", UNPRUNED, 0.0, panel=i, full=True) for i in (0, 1)]
    for one in result.all:
        costs, found = one.costs, one.verdict
        x = costs.place
        if found is not None:
            ends = (100 * found.low, 100 * found.high)
            points.append(Mark(one.entry.method, one.label, x, 100 * found.loss, *ends))
        if one.rows:
            points.append(Mark(one.entry.method, one.label, x, one.kl, panel=1))
    return Chart(axes, panels, points, blind(one.entry.method for one in result.all))


def options(one: Candidate) -> dict[str, Any]:
    """The options that mean a candidate, its seed among them."""
    return dict(one.entry.seeded(one.entry.seeds[0]))


def recipe(result: Result, made: str) -> Recipe:
    """The best as a file."""
    one, goal = result.best, result.goal
    found, given = one.verdict, options(one)
    budgets = {word: given.pop(word) for word in BUDGETS if word in given}
    measured = {
        "speedup_first_token": round(one.costs.first["median"], 3),
        "speedup_answer": round(one.costs.answer["median"], 3),
        "cache": round(one.costs.cache, 4),
        "memory": round(one.costs.memory, 4),
        "batch": one.costs.batch,
        "pictures": found.pictures,
        "loss_of": goal.metric if result.scored else "agreement",
        "loss": round(found.loss, 4),
        "loss_at_most": round(found.high, 4),
        "loss_limit": goal.loss,
        "under_the_limit": found.answer,
        "device": result.about["device"],
        "dtype": result.about["dtype"],
    }
    return Recipe(
        recipe=1, method=one.entry.method, options=given, family=result.about["family"], model=result.about["model"],
        measured=measured, versions={"told": result.about["versions"]}, made=made, **budgets,
    )  # fmt: skip


def python_line(result: Result) -> str:
    """The patch in Python."""
    given = "".join(f", {name}={value!r}" for name, value in options(result.best).items())
    return f'vlmprune.patch(model, "{result.best.entry.method}"{given})'


def command_line(result: Result) -> str:
    """The server, where vLLM can be given the method; else why not."""
    from vlmprune import registry
    from vlmprune.serving.choice import refusals

    family = result.about["family"]
    why = refusals(registry.find(result.best.entry.method)).get(family)
    if why:
        return f"# vLLM cannot be given it: {why}"
    given = options(result.best)
    words = [f"--{word} {given.pop(word)}" for word in BUDGETS if word in given]
    words += [f"--option {shlex.quote(f'{name}={write_value(value)}')}" for name, value in given.items()]
    model, method = shlex.quote(result.about["model"]), result.best.entry.method
    return " ".join(["vlmprune serve --model", model, "--method", method, *words])


def ways(result: Result, recipe: Path) -> list[str]:
    """How to have the best: in Python, served, and by the recipe."""
    return [python_line(result), command_line(result), f'vlmprune.patch(model, "{recipe}")']


def write(result: Result, loaded: Loaded, pairs: Sequence[Pair], count: int, folder: Path) -> None:
    """Write page, data, recipe and the `count` worst pictures into `folder`, each file at once or not at all.

    Raises:
        OSError: no room or no permission.
    """
    best, title = result.best, f"Tuning of {result.about['model']}"
    cards = worst_cards(loaded, best.entry, best.rows, pairs, count, Labels.of(pairs, result.goal.metric))
    files = render.pages(build(result, title, [captioned(card) for card in cards], folder), title, folder)
    files["results.json"] = render.data(as_json(result))
    files[RECIPE] = recipe(result, date.today().isoformat()).text().encode()
    if cards:
        files[SHEET] = sheet_of(best.label, cards)
    write_all(folder, files)


def build(result: Result, title: str, cards: Sequence[Captioned], folder: Path) -> list[Block]:
    """The page; pictures are in `folder`."""
    header, rows = table_of(result)
    blocks: list[Block] = [
        Heading(title, 1),
        Text(verdict_line(result)),
        Text(statement(result, result.best)),
        Code("\n".join(ways(result, folder / RECIPE))),
        *([] if result.complete else [Text(UNFINISHED, warning=True)]),
        chart(result).block(
            folder / "tune.svg",
            "Loss of the finalists (bars are one-sided 95 % bounds, for all of them together), and KL divergence from "
            "the unpruned model of all that answered, on as many pictures as each saw.",
        ),
        Heading("Finalists, and what was given up earlier"),
        Table(header, rows, range(2)),
        Bullets([statement(result, one) for one in result.finalists[:FINALISTS]]),
        Text(
            "First token and answer: how many times as fast as the unpruned model, medians of interleaved pairs on "
            "this machine; memory (above the weights, while the prompt is read) and cache: what is left of them. Loss: "
            f"points lost {'of the score' if result.scored else '(answers that changed)'}, on the same prompts; at "
            f"most: its one-sided {CONFIDENCE:.0%} bound, for all finalists together. A star: no finalist is both "
            "faster and better."
        ),
    ]
    blocks += searched(result, folder)
    if cards:
        blocks += [
            Heading(f"Worst pictures: {result.best.label}"),
            Cards(cards, folder / SHEET, result.best.label),
        ]
    methods = {name: " ".join(why) for name, why in result.refused.items()}
    blocks += [*left_out("Pictures", result.skipped), *left_out("Methods", methods)]
    facts = {name: value for name, value in result.about.items() if name != "command"}
    return blocks + repeat(facts, result.about["command"])


def left_out(what: str, why: Mapping[str, str]) -> list[Block]:
    """The section about what was left out, if something was."""
    return [Heading(f"{what} left out"), Bullets([f"{n}: {w}" for n, w in why.items()])] if why else []


def searched(result: Result, folder: Path) -> list[Block]:
    """The trials of a search for options; nothing without one."""
    if not result.trials:
        return []
    names = list(dict.fromkeys(name for one in result.trials for name in one.options))
    rows = [trial_cells(one, names) for one in result.trials]
    points = [mark_of(one) for one in result.trials if one.kl is not None]
    axes = {"trial": "number of the trial"} | {name: name for name in names}
    chart = Chart(axes, {"KL": "KL, nats per token"}, points, {"not taken"}, {"trial", "not taken"})
    return [
        Heading("The search for options"),
        Text(
            f"Each trial answered the same prompts about {counted(result.trials[0].pictures, 'picture')}, by none of "
            "which the finalists are judged. The star and its line are the method's own options."
        ),
        chart.block(folder / "trials.svg", "KL divergence from the unpruned model, trial by trial."),
        Table(["trial", *names, "KL", "layer average", "not taken, since"], rows, (0, len(names) + 3)),
    ]


def trial_cells(one: Trial, names: Sequence[str]) -> list[str]:
    """A row of the table of trials."""
    tried = [f"{one.options[name]:g}" if name in one.options else "" for name in names]
    measured = ["", ""] if one.kl is None else [f"{one.kl:.4f}", f"{one.layer_average:.1f}"]
    return [str(one.number or "own"), *tried, *measured, one.why]


def mark_of(one: Trial) -> Mark:
    """A trial that was measured; the method's own options are what others are beside."""
    label, place = "not taken" if one.why else "trial", {"trial": one.number, **one.options}
    return Mark(label, f"trial {one.number}", place, one.kl, full=one.number == 0)


def as_json(result: Result) -> dict[str, Any]:
    """Everything, for a program."""
    return {
        "format": 1,
        "about": result.about,
        "goal": asdict(result.goal),
        "scored": result.scored,
        "complete": result.complete,
        "answer": verdict_line(result),
        "statement": statement(result, result.best),
        "best": {"method": result.best.entry.method, "options": options(result.best)},
        "finalists": [told(one) | {"front": one.label in result.front} for one in result.finalists],
        "candidates": [told(one) for one in result.all],
        "worst": [row.as_json() for row in worst(result.best.rows, 10)],
        "skipped": result.skipped,
        "refused": result.refused,
        "trials": [
            {
                "number": one.number,
                "options": one.options,
                "kl": one.kl,
                "layer_average": one.layer_average,
                "why": one.why,
            }
            for one in result.trials
        ],
    }


def told(one: Candidate) -> dict[str, Any]:
    """A candidate."""
    verdict = None if one.verdict is None else asdict(one.verdict)
    about = {
        "label": one.label,
        "method": one.entry.method,
        "options": one.entry.options,
        "rung": one.rung,
        "kl": one.kl,
    }
    return about | {"pictures": len({row.picture for row in one.rows}), "costs": asdict(one.costs), "verdict": verdict}
