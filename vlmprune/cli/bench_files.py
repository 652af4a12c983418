"""The files of `vlmprune bench`: checked before the work, read, gone on with, written."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmprune.runtime.errors import CommandError, UserError, brief

__all__ = ["check_paths", "check_same", "previous", "read_results", "save", "write", "write_extras"]

EFFORT = ("pairs", "plain_runs", "stage_runs")


def check_paths(args: argparse.Namespace) -> None:
    """Find out before the work whether the files can be written, and that none takes the place of another.

    Raises:
        UserError: they cannot, or results are there already and nobody said --resume.
    """
    taken: dict[str, str] = {}
    for name, flag in (("source", "--from"), ("compare", "--compare")):
        if (path := getattr(args, name)) is not None:
            taken[os.path.realpath(Path(path).expanduser())] = flag
    for name in ("json", "csv", "plot"):
        if (path := getattr(args, name)) is None:
            continue
        check_writable(path, f"--{name}")
        real = os.path.realpath(Path(path).expanduser())
        if real in taken:
            raise UserError(f"{taken[real]} and --{name} name the same file, {path}.")
        taken[real] = f"--{name}"
    if args.json and not args.resume and has_content(args.json):
        way = "" if args.selection else "--resume goes on with it, or "
        raise UserError(f"{args.json} exists, and nothing is overwritten: {way}name another file.")


def has_content(path: str) -> bool:
    """Whether there is a file with something in it."""
    target = Path(path).expanduser()
    return target.is_file() and target.stat().st_size > 0


def check_writable(path: str, flag: str) -> None:
    """Try whether a file can be written."""
    target = Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{flag} {path} is a folder: name a file.")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} to write {target.name} in.")
    try:
        if target.exists() and not target.is_file():  # /dev/stdout, a pipe
            if not os.access(target, os.W_OK):
                raise PermissionError("no permission")
        else:  # files are written beside their place and renamed: permission bits do not tell whether that works
            tempfile.TemporaryFile(dir=Path(os.path.realpath(target)).parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {brief(error)}") from None
    if flag == "--plot":
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install 'vlmprune[plot]'.") from None
        endings = FigureCanvasBase.get_supported_filetypes()
        if target.suffix.lstrip(".").lower() not in endings:
            raise UserError(f"--plot {path}: name it .png, .svg or .pdf.")


def previous(path: str | None) -> dict[str, Any] | None:
    """What the file of --json holds so far, None without one."""
    return read_results(path) if path is not None and has_content(path) else None


def check_same(old: dict[str, Any], new: dict[str, Any], path: str) -> None:
    """Refuse to put results of two kinds into one file; what `new` does not know yet is not compared.

    Raises:
        UserError: other settings, machine, versions or numbers of runs.
    """
    from vlmprune.eval.bench.compare import differing_settings

    found = differing_settings(old, new)
    found |= {name: (old["asked"][name], new["asked"][name]) for name in EFFORT}
    skipped = {"replaced"} | ({"dtype"} if new["settings"]["dtype"] is None else set())
    other = {name: both for name, both in found.items() if both[0] != both[1] and name not in skipped}
    if other:
        said = "; ".join(f"{name} {was} there and {now} here" for name, (was, now) in other.items())
        raise UserError(f"{path} cannot be gone on with: {said}. Name another file.")


def read_results(path: str) -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        UserError: no such file, or no results in it.
    """
    from vlmprune.eval.bench import results

    try:
        return results.read(Path(path).expanduser())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(brief(error)) from None


def save(found: dict[str, Any], path: str) -> None:
    """Write results, together with what another run has put into the file meanwhile."""
    from vlmprune.eval.bench import results

    if (there := previous(path)) is not None:
        check_same(there, found, path)
        results.absorb(found, there)
    write(path, lambda target: results.write_json(found, target))


def write(path: str, how: Callable[[Path], None]) -> None:
    """Write one file and say what failed."""
    try:
        how(Path(path).expanduser())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {brief(error)}") from None


def write_extras(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The table and the picture that were asked for."""
    from vlmprune.eval.bench.plot import plot
    from vlmprune.eval.bench.results import write_csv

    for path, how in ((args.csv, write_csv), (args.plot, plot)):
        if path:
            write(path, lambda target, how=how: how(results, target))
            print(f"written: {path}", file=sys.stderr)
