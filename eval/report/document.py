"""The blocks a report is written with. All text in them is plain: `markdown` and `html` escape what they must."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "Code", "Heading", "Items", "Picture", "Table", "Text"]


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
class Items:
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


Block = Heading | Text | Items | Code | Table | Picture
