"""A run on disk: one file per cell, written whole or not at all, and `run.json`, which says what belongs together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import filelock

from vlmprune.runtime.files import PREFIX, write_whole

__all__ = ["FORMAT", "StoreError", "StoredRun", "all_cells", "load_run", "locked", "read_cell", "write_cell"]
__all__ += ["write_run"]

#: Of cell files and `run.json`; files of another format are not read.
FORMAT = 1
CELLS, RUN, LOCK = "cells", "run.json", ".lock"
#: What a cell is told apart by, and what every sample of a good cell has measured.
ABOUT = {"id", "model", "method", "label", "options", "budget", "seed", "task", "control"}
PARTS = {"config": dict, "versions": dict, "published": list, "skipped": list, "notes": list}  # of run.json, if there
TOKENS = ("tokens_before", "tokens_after", "layer_average")


class StoreError(Exception):
    """A run folder that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class StoredRun:
    """What is on disk of one run.

    Attributes:
        folder: the run's folder.
        info: what `run.json` holds.
        cells: the cells that are there, in plan order; failed ones (with an `error`) included.
        missing: ids of cells that are not there yet, were measured for another config, version or model, or damaged.
        damaged: of the missing ones by id, which file it is and what is wrong with it.
    """

    folder: Path
    info: dict[str, Any]
    cells: list[dict[str, Any]]
    missing: list[str]
    damaged: dict[str, str] = field(default_factory=dict)


def load_run(folder: str | Path) -> StoredRun:
    """Read a run, finished or not.

    Raises:
        StoreError: no run in this folder, a damaged `run.json`, or one of another format.
    """
    folder = Path(folder)
    info = open_run(folder)
    good, damaged = {}, {}
    for name in info["cells"]:
        try:
            cell = open_cell(folder, name)
        except StoreError as error:
            damaged[name] = str(error)
            continue
        if cell is not None and cell["key"] == info["keys"][name]:
            good[name] = cell
    return StoredRun(folder, info, list(good.values()), [name for name in info["cells"] if name not in good], damaged)


def parsed(file: Path) -> dict[str, Any]:
    """What `run.json` says; raises ValueError, KeyError or TypeError where that is not what was written."""
    info = json.loads(file.read_text(), parse_constant=no_number)
    for word in ("cells", "keys"):
        _ = info[word]  # whatever the format
    if info.get("format") == FORMAT and not whole_run(info):
        raise ValueError("not as it was written")
    return info


def open_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        StoreError: as of `load_run`.
    """
    try:
        info = parsed(folder / RUN)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder} has no {RUN}: not the output folder of `vlmprune eval`.") from None
    except OSError as error:
        raise StoreError(f"{folder / RUN} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{folder / RUN} is damaged ({wrong(error)}): run `vlmprune eval` again, which keeps the cells."
        ) from None
    if info.get("format") != FORMAT:
        raise StoreError(
            f"{folder / RUN} is of format {info.get('format')!r}, and this version reads {FORMAT}: "
            "run `vlmprune eval` again, or read it with the version that wrote it."
        )
    return info


def read_cell(folder: Path, name: str) -> dict[str, Any] | None:
    """The cell called `name`; None if it is not there, damaged, or of another format."""
    try:
        return open_cell(folder, name)
    except StoreError:
        return None


def open_cell(folder: Path, name: str) -> dict[str, Any] | None:
    """The cell called `name`; None if it is not there.

    Raises:
        StoreError: it cannot be read, or is damaged or of another format.
    """
    path = folder / CELLS / f"{name}.json"
    try:
        cell = json.loads(path.read_text(), parse_constant=no_number)
        if not whole_cell(cell, name):
            raise ValueError("not as it was written, or of another format")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: {wrong(error)}.") from None
    return cell


def wrong(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error) or type(error).__name__


def all_cells(folder: Path) -> Iterator[dict[str, Any]]:
    """Every good cell in the folder, of whatever plan."""
    for path in sorted((folder / CELLS).glob("*.json")):
        if (cell := read_cell(folder, path.stem)) is not None:
            yield cell


def no_number(text: str) -> None:
    """NaN and infinity, which Python reads and JSON does not have."""
    raise ValueError(text)


def whole_run(info: dict[str, Any]) -> bool:
    """Whether `run.json` has the shape that it was written with, as far as it is read."""
    ids, keys = info["cells"], info["keys"]
    return (
        isinstance(ids, list)
        and all_texts(ids)
        and all_texts([keys[name] for name in ids])
        and all(isinstance(info.get(word) or kind(), kind) for word, kind in PARTS.items())
        and all(isinstance(one, dict) for one in chain(info.get("published") or (), info.get("skipped") or ()))
    )


def all_texts(values: Sequence[Any]) -> bool:
    """Whether all values are texts."""
    return all(isinstance(value, str) for value in values)


def whole_cell(cell: Any, name: str) -> bool:
    """Whether a cell has the shape that it was written with; what is read from it may raise where it has not."""
    good = all(  # a list: whatever is lacking is told
        [
            whole_about(cell["cell"], name),
            cell["format"] == FORMAT,
            isinstance(cell["key"], str),
            isinstance(cell["depends"], dict),
        ]
    )
    if cell["error"] is not None or not good:
        return good and isinstance(cell["error"], str)
    return cell["metric"] in cell["metrics"] and whole_samples(cell["samples"]) and all_numbers(cell)


def whole_about(about: Any, name: str) -> bool:
    """Whether a cell says whose it is; as of `whole_cell`."""
    budget = about["budget"]
    texts = all_texts([about[word] for word in ("model", "method", "label", "task")])
    amounts = budget is None or (isinstance(budget, dict) and all(map(is_number, budget.values())))
    return texts and amounts and {*about} >= ABOUT and about["id"] == name


def whole_samples(samples: Any) -> bool:
    """Whether there are samples, and each says what it is of and how it scored."""
    good = len(samples) > 0 and all({"doc", "cluster", "target"} <= {*sample} for sample in samples)
    return good and all(sample["score"] is None or is_number(sample["score"]) for sample in samples)


def all_numbers(cell: Any) -> bool:
    """Whether what was measured are numbers; what a machine may not tell is None."""
    summary = cell["summary"]
    measured = [*(summary[word] for word in TOKENS), cell["elapsed_s"]]
    optional = [summary[word] for word in ("ttft_s", "decode_tokens_per_s", "peak_memory_bytes")]
    optional += [entry["value"] for entry in cell["metrics"].values()]
    return all(map(is_number, measured)) and all(value is None or is_number(value) for value in optional)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_cell(folder: Path, cell: dict[str, Any]) -> Path:
    """Write one cell; after a crash at any moment the file is the old one or the new one."""
    return write_json(folder / CELLS / f"{cell['cell']['id']}.json", cell)


def write_run(folder: Path, info: dict[str, Any]) -> Path:
    """Write `run.json` in the same way."""
    return write_json(folder / RUN, info)


def write_json(path: Path, value: Any) -> Path:
    """Write a file whole or not at all, and its folder where there is none.

    Raises:
        ValueError: something in `value` is not JSON (NaN included).
        StoreError: the file cannot be written.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}.") from None
    return path


class RunLock(filelock.FileLock):
    """A class of our own, since lmms-eval makes all locks on one file be the same object, which lets everybody in."""


@contextmanager
def locked(folder: Path, verb: str = "eval", another: str = "--set output=FOLDER") -> Iterator[None]:
    """Hold the folder for one run of `verb`; the system lets go of it when the process ends, however it ends.

    Raises:
        StoreError: another process holds it, or it cannot be made.
    """
    lock = RunLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(
            f"another `vlmprune {verb}` is writing into {folder}: wait for it, or choose another folder ({another})."
        ) from None
    except OSError as error:
        raise StoreError(f"cannot use {folder} as output folder: {error.strerror or error}.") from None
    try:
        for left in (folder / CELLS).glob(f"{PREFIX}*"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
