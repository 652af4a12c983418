"""The blocks that all reports (of `vlmprune report`, `fidelity`, `tune` and `bench`) are written with.

All text in them is plain: the templates of `render` escape what they must.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Block",
    "Bullets",
    "Captioned",
    "Cards",
    "Code",
    "Heading",
    "Picture",
    "Plot",
    "Table",
    "Text",
    "command",
    "repeat",
]


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `warning` makes it stand out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines shown as they are."""

    text: str


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells. The columns numbered in `left` are flush left, the others flush right.

    `kinds` says per row what it is about: "full", "control", "start" (the first of a budget), several with spaces.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int]
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture file beside the report, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Plot:
    """Points that a reader can turn over (`interactive.points`, `Chart.values`), and the same as pictures.

    The pictures are shown where nothing can be drawn: in Markdown, without scripts, without Plotly.
    """

    points: Mapping[str, Any]
    caption: str
    still: Sequence[Picture]


@dataclass(frozen=True)
class Captioned:
    """One picture of `Cards`: a JPEG or PNG file's content, what it shows, and what is said beside it, by name."""

    title: str
    image: bytes
    alt: str
    facts: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """Pictures with text beside them, numbered from 1; all have facts of the same names.

    Markdown, which cannot lay them out, shows them as one picture file beside the report and their text as a table.
    """

    cards: Sequence[Captioned]
    sheet: Path
    caption: str


Block = Heading | Text | Bullets | Code | Table | Picture | Plot | Cards


def command(verb: str, given: Mapping[str, Any]) -> str:
    """The command whose flags mean values, by name; what is None was not said."""
    told = ["vlmprune", verb]
    for name, value in given.items():
        several = value if isinstance(value, list) else [value]
        told += [f"--{name.replace('_', '-')} {shlex.quote(str(one))}" for one in several if one is not None]
    return " ".join(told)


def repeat(facts: Mapping[str, Any], command: str) -> list[Block]:
    """The section that says how to do it again."""
    rows = [[name, str(value)] for name, value in facts.items()]
    return [Heading("Repeat it"), Table(["what", "value"], rows, range(2)), Text("Command:"), Code(command)]
