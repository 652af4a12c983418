"""What a benchmark found as a page: in words, as a picture, and in tables that sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmprune.eval.bench import report
from vlmprune.eval.bench.report import Grid
from vlmprune.eval.report import document, render
from vlmprune.eval.report.chart import Chart, Mark, blind
from vlmprune.eval.report.document import Block, Bullets, Heading, Table, Text

__all__ = ["Changes", "page"]

#: Of `compare`: an older file's name, the figures that changed, and the settings that differ.
Changes = tuple[str, Sequence[dict[str, Any]], dict[str, tuple[Any, Any]]]
ORACLE = "oracle"
CAPTION = (
    "Time of the first token: medians with quartiles. An oracle's is what the same tokens would cost if they were "
    "known beforehand."
)


def page(results: dict[str, Any], changed: Changes | None = None) -> bytes:
    """The page, which needs no other file."""
    title = f"Speed of {results['settings']['model']}"
    with TemporaryDirectory() as folder:  # for a picture that is inlined
        text = render.html(build(results, title, Path(folder), changed), title)
    return text.encode(errors=render.ESCAPED)


def build(results: dict[str, Any], title: str, folder: Path, changed: Changes | None) -> list[Block]:
    """All blocks; a picture is drawn into `folder`."""
    blocks: list[Block] = [Heading(title, 1), *(Text(line) for line in report.head(results).split("\n"))]
    if not results["cells"]:
        return [*blocks, Text("Nothing was measured.", warning=True)]
    blocks += [Text(line, warning=True) for line in report.unlike(results)]
    blocks += [Heading("In short"), Bullets(in_short(results)), chart(results).block(folder / "bench.svg", CAPTION)]
    blocks += part("First token", report.speed_grid(results["cells"]), report.speed_legend(results))
    if decoded := report.decoded_in(results):
        grid = report.decode_grid(decoded, results["settings"]["new_tokens"])
        blocks += part("Tokens after the first", grid, report.decode_legend(results, decoded))
    blocks += part("Stage by stage, ms", report.stage_grid(results), report.stage_legend(results))
    blocks += part("Memory and operations", report.needs_grid(results), report.needs_legend(results))
    if results.get("sizes"):
        blocks += [Heading("Picture sizes"), Text(report.sizes_text(results["sizes"]))]
    return [*blocks, *changes(changed), *repeat(results)]


def part(title: str, grid: Grid, legend: str) -> list[Block]:
    """A table with what its columns are."""
    header, rows = grid
    kinds = ["full" if row[0] == "unpruned" else "" for row in rows]
    return [Heading(title), Table(header, rows, (0,), kinds), Text(" ".join(legend.split()))]


def in_short(results: dict[str, Any]) -> list[str]:
    """A sentence per method and batch size."""
    cells = sorted(results["cells"], key=whose)
    return [sentence(*who, list(mine), len(results["unpruned"]) > 1) for who, mine in groupby(cells, whose)]


def whose(cell: dict[str, Any]) -> tuple[str, int]:
    """Method and batch size of a cell."""
    return cell["method"], cell["batch"]


def sentence(method: str, batch: int, cells: Sequence[dict[str, Any]], several: bool) -> str:
    """What a method brought and cost, from the budget that brings least to the one that brings most."""
    cells = sorted(cells, key=lambda cell: cell["speedup"]["median"])

    def ends(told: Callable[[dict[str, Any]], str]) -> str:
        """Of the first and the last cell, once where both say the same."""
        return " to ".join(dict.fromkeys(told(cell) for cell in (cells[0], cells[-1])))

    who = f"{method}, {ends(lambda cell: cell['budget'])}" + (f", batch {batch}" if several else "")
    fast, possible = (
        ends(lambda cell, what=what: f"{cell[what]['median']:.2f}") for what in ("speedup", "oracle_speedup")
    )
    over = ends(lambda cell: f"{100 * (cell['overhead']['median'] - 1):+.0f} %")
    return f"{who}: the first token comes {fast} times as soon; the oracle's {possible} times, and this takes {over}."


def chart(results: dict[str, Any]) -> Chart:
    """Every method and the oracles, a panel per batch size."""
    axes = {
        "tokens": "visual tokens, mean over layers",
        "kv": "cache, MB",
        "flops": "counted GFLOPs",
    }
    by_batch: dict[int, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        by_batch.setdefault(cell["batch"], []).append(cell)
    bases = {one["batch"]: one for one in results["unpruned"]}
    points = []
    for panel, (batch, cells) in enumerate(by_batch.items()):
        x = {"tokens": cells[0]["tokens"]["visual"]} | needs(bases[batch])
        points.append(point("", "unpruned", x, cells[0]["first_token_ms"]["unpruned"], panel, full=True))
        for cell in cells:
            points += both(cell, panel)
    panels = {f"batch {batch}": f"first token, ms (batch {batch})" for batch in by_batch}
    return Chart(axes, panels, points, {ORACLE, *blind(cell["method"] for cell in results["cells"])}, {ORACLE})


def both(cell: dict[str, Any], panel: int) -> list[Mark]:
    """A cell's method, and its oracle."""
    x, name = {"tokens": cell["tokens"]["layer_average"]} | needs(cell), f"{cell['method']} {cell['budget']}"
    times = cell["first_token_ms"]
    method = point(cell["method"], name, x, times["pruned"], panel)
    return [method, point(ORACLE, f"oracle of {name}", x, times["oracle"], panel)]


def needs(cell: dict[str, Any]) -> dict[str, float]:
    """What a cell needs, as the axes have it."""
    return {"kv": cell["kv_bytes"] / 1e6, "flops": cell["flops"]["counted"] / 1e9}


def point(label: str, name: str, x: dict[str, float], times: dict[str, float], panel: int, full: bool = False) -> Mark:
    """A median with its quartiles."""
    return Mark(label, name, x, times["median"], times["low"], times["high"], panel, full)


def changes(changed: Changes | None) -> list[Block]:
    """What changed since an older file."""
    if changed is None:
        return []
    name, found, differing = changed
    blocks: list[Block] = [Heading(f"Changes since {name}")]
    if differing:
        blocks.append(Text("The two were not measured alike; absolute times may say nothing.", warning=True))
        blocks.append(Bullets(report.unlike_settings(differing)))
    if not found:
        return [*blocks, Text("The two have no cell in common (method, options and batch).")]
    return [*blocks, Table(*report.changes_grid(found), (0, 3, 7)), Text(report.VERDICTS)]


def repeat(results: dict[str, Any]) -> list[Block]:
    """How to measure it again."""
    settings = {name: value for name, value in results["settings"].items() if name != "replaced"}
    return document.repeat(settings | results["machine"], document.command("bench", results["asked"]))
