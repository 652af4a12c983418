"""Plain text tables, and how values are written in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ["OVERHEAD", "change", "short", "table"]

#: What is said beside the times of models that are too small.
OVERHEAD = "On models as small as the embedded ones times are bound by overhead: they say nothing about a real model."


def width(text: str) -> int:
    """Columns that `text` takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Columns two spaces apart under a header; those named in `right` are flush right, the last one is not padded.

    A row without cells is an empty line.
    """
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


def short(text: str, limit: int) -> str:
    """`text` on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
