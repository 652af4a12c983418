"""A document as one HTML file that needs nothing else: no script, no network, pictures inlined."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from vlmprune.eval.report.document import Block, Code, Heading, Items, Picture, Table, Text

__all__ = ["render"]

STYLE = """
:root { color-scheme: light dark; --fore: #1c1e21; --soft: #5d646c; --back: #fff; --line: #d9dde1; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --fore: #e6e8ea; --soft: #a0a8b0; --back: #16181b; --line: #363b41; --tint: #1f2327; }
}
body { color: var(--fore); background: var(--back); font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; padding: 0 1rem; max-width: 84rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p, li { max-width: 60rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--tint); vertical-align: bottom; }
td.left, th.left { text-align: left; }
td.long { white-space: normal; min-width: 16rem; max-width: 40rem; overflow-wrap: anywhere; }
tr.start td { border-top: 2px solid var(--soft); }
tr.control td { color: var(--soft); }
tr.full td { font-weight: 600; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
.note { border-left: 4px solid #d9822b; padding-left: .8rem; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--soft); max-width: 60rem; }
"""
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
#: A cell with more characters may be broken into lines.
LONG = 45


def render(blocks: Sequence[Block], title: str) -> str:
    """The text of the file."""
    body = "\n".join(block(one) for one in blocks)
    return PAGE.format(title=escape(title), style=STYLE, body=body)


def block(one: Block) -> str:
    """One block."""
    match one:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, warning):
            return f'<p class="note">{escape(text)}</p>' if warning else f"<p>{escape(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case Table():
            return table(one)
    raise TypeError(one)


def table(one: Table) -> str:
    """A table that scrolls where it is wider than the window."""

    def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
        kinds = [" ".join(["left"] * (i in one.left) + ["long"] * (len(cell) > LONG)) for i, cell in enumerate(cells)]
        made = [f"{start(tag, k)}{escape(cell)}</{tag}>" for k, cell in zip(kinds, cells, strict=True)]
        return f"{start('tr', kind)}{''.join(made)}</tr>"

    kinds = one.kinds or [""] * len(one.rows)
    rows = "\n".join(row(cells, "td", kind) for cells, kind in zip(one.rows, kinds, strict=True))
    head = row(one.header, "th")
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def start(tag: str, kind: str) -> str:
    """An opening tag."""
    return f'<{tag} class="{kind}">' if kind else f"<{tag}>"
