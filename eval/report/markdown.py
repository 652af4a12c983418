"""A document as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlmprune.eval.report.document import Block, Code, Heading, Items, Picture, Table, Text

__all__ = ["render"]


def render(blocks: Sequence[Block], folder: Path) -> str:
    """The text of the file; pictures are named relative to `folder`."""
    return "\n\n".join(block(one, folder) for one in blocks) + "\n"


def escape(text: str) -> str:
    """Text that comes out as it is, on one line."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*|<~$]|&(?=[#\w])|\](?=[(\[])|(?<!\w)_|_(?!\w))", r"\\\1", text)


def paragraph(text: str) -> str:
    """Text at the start of a line, where some signs would begin a list, a quotation or a heading."""
    return re.sub(r"^([#+>-]|\d+(?=[.)]))", r"\\\1", escape(text))


def block(one: Block, folder: Path) -> str:
    """One block."""
    match one:
        case Heading(text, level):
            return f"{'#' * level} {escape(text)}"
        case Text(text, warning):
            return f"> **Note:** {escape(text)}" if warning else paragraph(text)
        case Items(items):
            return "\n".join(f"- {paragraph(item)}" for item in items)
        case Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}\n{text.rstrip()}\n{fence}"
        case Picture(path, caption):
            short = escape(caption.partition(". ")[0])
            return f"![{short}]({path.relative_to(folder).as_posix()})\n\n{paragraph(caption)}"
        case Table(header, rows, left):
            rule = ["---" if i in left else "---:" for i in range(len(header))]
            lines = [[escape(c) for c in header], rule, *([escape(c) for c in row] for row in rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    raise TypeError(one)
