"""Tables of plain text, laid out by Rich, and how values are written in them."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["OVERHEAD", "change", "columns", "counted", "room", "short", "table"]

WIDE = 10_000  # columns, where there is no terminal

#: What is said beside the times of models that are too small.
OVERHEAD = "On models as small as the embedded ones times are bound by overhead: they say nothing about a real model."


def room() -> int | None:
    """Columns of the terminal that stdout goes to; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), limit: int | None = None
) -> str:
    """Columns two spaces apart under a header; those named in `right` are flush right, the last one is not padded.

    A row without cells is an empty line. Cells wrap where it is wider than `limit` (None: the terminal, if there is
    one); where not even their words fit, it is written row by row, one cell a line.
    """
    limit = room() if limit is None else limit
    if limit is None:
        return columns(header, rows, right)
    if widths(header, rows, limit) is None:
        return "\n\n".join(block(header, row, max(limit, 20)) for row in rows if row)
    return printed(grid(header, rows, right, limit), limit)


def block(header: Sequence[str], row: Sequence[str], limit: int) -> str:
    """A row as lines of `name: cell`, without those that are empty."""
    told = [(name, cell) for name, cell in zip(header, row, strict=True) if cell]
    lines = [(f"{'  ' * (i > 0)}{name}:", cell) for i, (name, cell) in enumerate(told)]
    return printed(grid((), lines, (), limit, gap=1), limit)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> str:
    """`table` without a limit."""
    return printed(grid(header, rows, right), WIDE)


def widths(header: Sequence[str], rows: Sequence[Sequence[str]], limit: int, gap: int = 2) -> list[int] | None:
    """How wide every column may be: the widest give room until all fit, but none less than its longest word needs.

    None where that does not fit. (Rich would take room from all of them, and break words that could stay whole.)
    """
    from rich.cells import cell_len

    cells = list(zip(*filter(None, (header, *rows)), strict=True))
    least = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in cells]
    wide = [max(map(cell_len, column)) for column in cells]
    room = limit - gap * (len(cells) - 1)
    if sum(least) > room:
        return None
    while sum(wide) > room:
        i = max(range(len(wide)), key=lambda i: (wide[i] > least[i], wide[i]))
        wide[i] -= 1
    return wide


def grid(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], limit: int = WIDE, gap: int = 2
) -> Table:
    """Rich's table: no box, a rule under the header, every cell as it is written."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, gap, 0, 0))
    names = header or rows[0]
    for name, wide in zip(names, widths(header, rows, limit, gap) or [None] * len(names), strict=True):
        made.add_column(justify="right" if name in right else "left", overflow="fold", width=wide)
    if header:
        made.add_row(*map(Text, header))
        made.add_row(*(Rule(characters="-", style="") for _ in header))
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def paper(wide: int) -> Console:
    """Where Rich writes without colours."""
    from rich.console import Console

    return Console(file=io.StringIO(), width=wide, color_system=None, legacy_windows=False)


def printed(made: Table, wide: int) -> str:
    """A table's lines, without spaces at their ends."""
    console = paper(wide)
    console.print(made)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


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
