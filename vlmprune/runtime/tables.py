"""Plain text tables, and how values are written in them."""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

__all__ = ["OVERHEAD", "change", "columns", "counted", "room", "short", "table"]

#: What is said beside the times of models that are too small.
OVERHEAD = "On models as small as the embedded ones times are bound by overhead: they say nothing about a real model."


def width(text: str) -> int:
    """Columns that `text` takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def room() -> int | None:
    """Columns of the terminal that stdout goes to; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), limit: int | None = None
) -> str:
    """Columns two spaces apart under a header; those named in `right` are flush right, the last one is not padded.

    A row without cells is an empty line. What is wider than `limit` (None: the terminal, if there is one) is written
    row by row instead, one cell a line.
    """
    made = columns(header, rows, right)
    limit = room() if limit is None else limit
    return made if limit is None or max(map(width, made.split("\n"))) <= limit else blocks(header, rows, limit)


def blocks(header: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> str:
    """Every row as a block of `name: cell` lines, without those that are empty."""
    made = []
    for row in filter(None, rows):
        lines = [f"{name}: {cell}" for name, cell in zip(header, row, strict=True) if cell]
        wrapped = [
            textwrap.wrap(line, max(limit, 20), initial_indent="  " * (i > 0), subsequent_indent="    ")
            for i, line in enumerate(lines)
        ]
        made.append("\n".join(part for parts in wrapped for part in parts))
    return "\n\n".join(made)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> str:
    """`table` without a limit."""
    wide = [max(width(row[i]) for row in (header, *rows) if row) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = []
        for name, cell, room in zip(header, row, wide, strict=True):
            pad = " " * (room - width(cell))
            cells.append(pad + cell if name in right else cell + pad)
        return "  ".join(cells).rstrip()

    rule = ["-" * room for room in wide]
    return "\n".join(line(row) if row else "" for row in (header, rule, *rows))


def change(before: int, after: int) -> str:
    """`256 -> 26`, or one number where nothing changed."""
    return str(before) if before == after else f"{before} -> {after}"


def counted(number: int, thing: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def short(text: str, limit: int) -> str:
    """`text` on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
