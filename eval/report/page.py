"""What stands on the page, in which order."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vlmprune.eval import statistics, testbed
from vlmprune.eval.report import document, interactive, ledger, plots, tables, words
from vlmprune.eval.report.document import Block, Bullets, Code, Heading, Picture, Plot, Table, Text
from vlmprune.eval.report.rows import DAMAGED, MISSING, OK, Problem, Results, Row
from vlmprune.runtime.tables import counted, short
from vlmprune.spec import budget_text

__all__ = ["NO_PLOTS", "build", "title"]

NO_PLOTS = "No pictures were drawn: matplotlib is not installed (pip install 'vlmprune[plot]', then vlmprune report)."


def title(results: Results) -> str:
    """The page's title."""
    return f"vlmprune: {', '.join(results.models) or 'no results yet'}"


def build(results: Results, pictures: Mapping[str, Sequence[Picture]] | None) -> list[Block]:
    """All blocks; `pictures` per model, None where they could not be drawn."""
    blocks: list[Block] = [Heading(title(results), 1), *summary(results), Text(state(results)), *troubles(results)]
    if pictures is None:
        blocks.append(Text(NO_PLOTS, warning=True))
    for model in results.models:
        blocks += section(results, model, (pictures or {}).get(model, ()))
    if found := ledger.lines(results):
        blocks += [
            Heading("Published numbers"),
            Text("Paper, ours, and the difference, in the paper's unit. Read the definition before the difference."),
            ledger.table(results, found),
        ]
    blocks += [
        Heading("How to read this"),
        Bullets(words.definitions(batched(results), embedded(results))),
        *repeat(results),
    ]
    return blocks


def summary(results: Results) -> list[Block]:
    """What came out, in words."""
    several = len(results.models) > 1
    told = []
    for model in results.models:
        tasks = results.tasks(model)
        rows = results.of(model, None if len(tasks) > 1 or not tasks else tasks[0])
        told += [f"{model}, {text}" if several else text for text in words.in_short(rows)]
    return [Heading("In short"), Bullets(told)] if told else []


def state(results: Results) -> str:
    """How much of the plan is there."""
    planned, bad = len(results.info["cells"]), {problem.cell for problem in results.problems}
    text = f"{planned - len(bad)} of {planned} planned cells are in this report."
    return text if results.info.get("finished") else f"{text} The run is not finished."


def troubles(results: Results) -> list[Block]:
    """Everything that a reader must know before the numbers."""
    blocks: list[Block] = [Text(note, warning=True) for note in results.info.get("notes") or []]
    return [*blocks, *not_compared(results.problems), *left_out(results.info.get("skipped") or [])]


def not_compared(problems: Sequence[Problem]) -> list[Block]:
    """The planned cells that are not in the tables."""
    if not problems:
        return []
    rows = [[p.cell, p.state, short(p.why, 400)] for p in problems]
    again = Text("Missing and damaged cells are evaluated by running the same vlmprune eval again.")
    return [
        Heading(f"Not in the comparison: {counted(len(problems), 'cell')}"),
        Table(["cell", "state", "why"], rows, range(3)),
        *([again] if any(p.state in (MISSING, DAMAGED) for p in problems) else []),
    ]


def left_out(skipped: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What the plan never had."""
    if not skipped:
        return []
    rows = [[s["model"], s["label"], budget_text(s.get("budget")), s["reason"]] for s in skipped]
    return [
        Heading(f"Left out of the plan: {len(skipped)}"),
        Table(["model", "method", "budget", "why"], rows, range(4)),
    ]


def section(results: Results, model: str, pictures: Sequence[Picture]) -> list[Block]:
    """One model."""
    tasks, rows = results.tasks(model), results.of(model, None)
    blocks: list[Block] = [Heading(model), *(Text(text, warning=True) for text in words.no_bases(rows))]
    blocks += drawn(results, model, pictures)
    if len(tasks) > 1:
        blocks += [Heading(f"All {len(tasks)} tasks", 3), *told(rows, tables.overview(rows))]
        blocks += [Heading("Scores of all tasks", 3), tables.matrix(results, model)]
    for task in tasks:
        mine = results.of(model, task)
        blocks += [Heading(task, 3), Text(about(mine)), *told(mine, tables.detail(mine))]
    over_all = len(tasks) > 1  # with one task, the row over all of them says the same again
    tested = words.chance([row for row in results.rows if row.model == model and (over_all or row.task is not None)])
    return [*blocks, Text(tested)] if tested else blocks


def drawn(results: Results, model: str, pictures: Sequence[Picture]) -> list[Block]:
    """A model's pictures; those of points as one that can be turned over."""
    found = interactive.points(results, model)
    still = [picture for picture in pictures if not picture.path.stem.endswith(plots.HEAT)]
    if found is None or not still:
        return list(pictures)
    return [Plot(found, f"{model}: {plots.TURN}", still), *(picture for picture in pictures if picture not in still)]


def told(rows: Sequence[Row], table: Table) -> list[Block]:
    """A table of rows with what is to be said above and below it."""
    warnings = [Text(text, warning=True) for text in words.few(rows)]
    said = words.differences(rows)
    return [*warnings, table, *notes(rows), *([Bullets(said)] if said else [])]


def about(rows: Sequence[Row]) -> str:
    """A task's metric and samples."""
    known = [row for row in rows if row.metric is not None]
    if not known:
        return "No cell of this task has a result."
    first = known[0]
    text = (
        f"{first.metric}, {'more' if first.higher_is_better else 'less'} is better; {counted(first.samples, 'sample')}"
    )
    many = next((row.clusters for row in known if row.clusters), None)
    if many and many != first.samples:
        text += f" in {many} clusters (pictures)"
    return f"{text}."


def notes(rows: Sequence[Row]) -> list[Block]:
    """What is to be said about single rows, equal notes together."""
    names = {id(row): f"{tables.shown(row)} {row.budget}".strip() for row in rows}
    said: dict[str, list[str]] = {}
    for row in (row for row in rows if row.note):
        text = row.note if row.state == OK else f"{row.state}: {row.note}"
        said.setdefault(short(text, 400), []).append(names[id(row)])
    told = [f"{most(mine, list(names.values()))}: {text}" for text, mine in said.items()]
    return [Bullets(told)] if told else []


def most(names: Sequence[str], every: Sequence[str]) -> str:
    """`a, b`, or `all rows but c` where that is shorter."""
    others = [name for name in every if name not in names]
    if len(others) >= len(names):
        return ", ".join(names)
    return f"all rows but {', '.join(others)}" if others else "all rows"


def batched(results: Results) -> bool:
    """Whether any cell was measured with more than one request at a time."""
    return any((cell["depends"].get("batch_size") or 1) > 1 for cell in results.cells)


def embedded(results: Results) -> bool:
    """Whether any model is one of those that the package ships."""
    config = results.info.get("config") or {}
    return any(part.get("model") in testbed.NAMES for part in (config, *config.get("runs", [])))


def repeat(results: Results) -> list[Block]:
    """Everything needed to do it again."""
    info = results.info
    command = info.get("command") or []
    blocks = document.repeat(facts(results), command if isinstance(command, str) else shlex.join(map(str, command)))
    if info.get("config_text"):
        blocks += [Text("Config, as given:"), Code(info["config_text"])]
    blocks += [Text("Config, as resolved:"), Code(json.dumps(info.get("config"), indent=1, ensure_ascii=False))]
    return blocks


def facts(results: Results) -> dict[str, Any]:
    """What the numbers hang on beside the config."""
    info = results.info
    seeds = {cell["cell"].get("seed") for cell in results.cells} - {None}
    return {
        **{f"version of {name}": version for name, version in (info.get("versions") or {}).items()},
        "commit": info.get("commit") or "not known (installed from a package)",
        "device": info.get("device"),
        "seeds": ", ".join(map(str, sorted(seeds))) or "none were needed",
        "bootstrap": f"{statistics.DRAWS} draws, seed {statistics.SEED}",
        "started": info.get("started"),
        "finished": info.get("finished") or "not finished",
        "evaluation time": f"{sum(cell.get('elapsed_s') or 0 for cell in results.cells):.0f} s in cells",
    }
