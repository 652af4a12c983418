"""The report of a run: `write` makes report.md, report.html, results.csv, results.json and plots/ in its folder."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmprune.eval.lmms import store
from vlmprune.eval.report import ledger, page, plots, render, tables
from vlmprune.eval.report.document import Picture
from vlmprune.eval.report.gather import gather
from vlmprune.eval.report.rows import COLUMNS, Results
from vlmprune.runtime.files import write_all

__all__ = ["read", "summary", "write"]

#: Of results.json.
FORMAT = 1
#: What stands in results.csv and results.json where a row is about all tasks.
ALL = "(all tasks)"


def read(folder: str | Path) -> Results:
    """Read a run, finished or not, and compare its cells.

    Raises:
        StoreError: there is no readable run in `folder`.
    """
    return gather(store.load_run(folder))


def summary(folder: str | Path, results: Results | None = None) -> str:
    """The run's table for a terminal, no line longer than 120 columns.

    Args:
        folder: of the run.
        results: of `read`, where a caller has them already.

    Raises:
        StoreError: there is no readable run in `folder`.
    """
    return tables.summary(results or read(folder))


def write(folder: str | Path, results: Results | None = None) -> list[Path]:
    """Write the report of a run, finished or not, into its folder; older reports there are replaced.

    Args:
        folder: of the run.
        results: of `read`, where a caller has them already.

    Returns:
        the files, report.html first. Without matplotlib there are no plots, and the report says so.

    Raises:
        StoreError: there is no readable run in `folder`, or it cannot be written to.
    """
    folder = Path(folder)
    results = results or read(folder)
    try:
        pictures = draw(results, folder / "plots") if plots.available() else None
        files = render.pages(page.build(results, pictures), page.title(results), folder) | data(results)
        written = write_all(folder, files)
    except OSError as error:
        raise store.StoreError(f"cannot write the report into {folder}: {error.strerror or error}.") from None
    return [*written, *(picture.path for mine in (pictures or {}).values() for picture in mine)]


def data(results: Results) -> dict[str, bytes]:
    """The files for programs."""
    told = json.dumps(as_json(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    texts = {"results.csv": as_csv(results), "results.json": told}
    return {name: text.encode(errors=render.ESCAPED) for name, text in texts.items()}


def draw(results: Results, folder: Path) -> dict[str, Sequence[Picture]]:
    """Every model's pictures; those of an older report are removed."""
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    stems = [re.sub(r"[^\w.+-]+", "_", model) for model in results.models]
    stems = [stem if stems.count(stem) == 1 else f"{i}-{stem}" for i, stem in enumerate(stems)]
    return {model: plots.draw(results, model, folder, stem) for model, stem in zip(results.models, stems, strict=True)}


def records(results: Results) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) | {"task": ALL if row.task is None else row.task} for row in results.rows]


def as_csv(results: Results) -> str:
    """One line per method, budget and task; numbers in full precision, nothing where there is none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(results))
    return text.getvalue()


def as_json(results: Results) -> dict[str, Any]:
    """The same rows, what is wrong with the run, and the ledger."""
    return {
        "format": FORMAT,
        "rows": records(results),
        "problems": [asdict(problem) for problem in results.problems],
        "skipped": results.info.get("skipped") or [],
        "notes": results.info.get("notes") or [],
        "published": [asdict(line) for line in ledger.lines(results)],
    }
