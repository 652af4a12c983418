"""A document as one HTML file that needs nothing else (no network; pictures and scripts inlined), and as Markdown.

What the pages look like is in templates/: `page.html.jinja`, `page.md.jinja`, `style.css` and `page.js`. Both templates
escape for HTML whatever no filter of `FILTERS` has made safe, so that a forgotten filter shows too many signs and never
markup.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.eval.report.document import Block, Plot

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["ESCAPED", "data", "html", "markdown", "pages"]

TEMPLATES = Path(__file__).with_name("templates")
#: How files are encoded: file names and command lines may hold bytes that are no text.
ESCAPED = "backslashreplace"


def pages(blocks: Sequence[Block], title: str, folder: Path) -> dict[str, bytes]:
    """The contents of report.html and report.md, which are to be written into `folder`.

    Raises:
        OSError: a picture of the document cannot be read.
    """
    texts = {"report.html": html(blocks, title), "report.md": markdown(blocks, folder)}
    return {name: text.encode(errors=ESCAPED) for name, text in texts.items()}


def data(value: Any) -> bytes:
    """The content of a JSON file beside a page."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors=ESCAPED)


def html(blocks: Sequence[Block], title: str) -> str:
    """The text of the HTML file."""
    drawing = plotly() if any(isinstance(block, Plot) for block in blocks) else None
    return environment().get_template("page.html.jinja").render(blocks=blocks, title=title, plotly=drawing)


@cache
def plotly() -> str | None:
    """The library that draws plots on the page, to be inlined once; None where it is not installed."""
    from markupsafe import Markup

    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return Markup(get_plotlyjs())


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The text of the Markdown file; pictures are named relative to `folder`."""
    return environment().get_template("page.md.jinja").render(blocks=blocks, folder=folder)


@cache
def environment() -> Environment:
    """The templates, with `FILTERS`; jinja2 is imported where a page is written and not before."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.do"],
    )
    made.filters |= {name: lambda *given, make=make: Markup(make(*given)) for name, make in FILTERS.items()}
    made.filters["kind"] = kind
    return made


def kind(block: Block) -> str:
    """The name of the block's class, by which the templates tell blocks apart."""
    if not isinstance(block, Block):
        raise TypeError(f"a document has no block of the type {type(block).__name__}")
    return type(block).__name__


def inlined(content: bytes) -> str:
    """A picture file's content as an address that fetches nothing."""
    kinds = {b"\x89PNG": "png", b"<?xm": "svg+xml"}
    kind = kinds.get(content[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def plain(text: str, brackets: str = r"\](?=[(\[])") -> str:
    """Text that Markdown shows as it is, on one line; of the brackets in it those that match are escaped."""
    text = " ".join(str(text).split())
    return re.sub(rf"([\\`*|<~$]|&(?=[#\w])|{brackets}|(?<![^\W_])_|_(?![^\W_])|#(?=#*$))", r"\\\1", text)


def paragraph(text: str) -> str:
    """`plain` at the start of a line, where some signs would begin a list, a quotation, a heading or a definition."""
    return re.sub(r"^(\d*)(?=[#+>=[-]|(?<=\d)[.)])", r"\1\\", plain(text))


def short(caption: str) -> str:
    """A caption's first sentence, for the brackets of a picture."""
    return plain(caption.partition(". ")[0], r"[\[\]]")


def fenced(text: str) -> str:
    """Lines shown as they are, between fences that do not occur in them."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


#: What makes text safe, by its name in the templates.
FILTERS = {"fenced": fenced, "inlined": inlined, "paragraph": paragraph, "plain": plain, "short": short}
