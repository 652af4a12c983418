"""What `vlmprune fidelity` writes: a page (Markdown, self-contained HTML), sheets of the worst pictures, and JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.eval import statistics
from vlmprune.eval.fidelity.measure import Entry, Estimate, Line, Row, summarise
from vlmprune.runtime import draw
from vlmprune.runtime.files import write_whole
from vlmprune.runtime.tables import counted

__all__ = ["Card", "Study", "as_json", "in_words", "table_of", "write"]

SIDE = 256  # pixels of a picture's longer side on a card
GAP = 6
WRAP = 30  # characters of a line on a sheet
SAID = 3  # lines of an answer on a sheet; the page has all of it
ESCAPED = "backslashreplace"  # file names may hold bytes that are no text

DEFINITIONS = (
    ("first token", "how often the likeliest first token is that of the unpruned model, in per cent"),
    (
        "answer",
        "how often the greedy answer is the unpruned model's, token for token and with the same end, in per cent",
    ),
    (
        "KL first",
        "KL(unpruned || pruned) of the distributions of the first token, in nats: 0 is the same, and 0.1 means that "
        "the pruned model gives what the unpruned one would say a tenth less probability (geometric mean)",
    ),
    (
        "KL answer",
        "the same, averaged over the tokens of the unpruned answer, which both models read (teacher-forced): two "
        "models that read their own answers are soon asked different questions",
    ),
    ("entering", "visual tokens of a picture that enter the language model, newlines included"),
    ("layer average", "visual tokens that a decoder layer sees, averaged over all layers"),
    ("answer - random", "difference to `random` at the same budget in percentage points, paired prompt by prompt"),
)
INTERVALS = (
    "In brackets: 95 % intervals, from drawing whole pictures with replacement (2000 times), since prompts about one "
    "picture are not independent. Where all pictures have the same share the interval is the exact one of Clopper and "
    "Pearson, and where all have the same KL there is none."
)
CAVEAT = (
    "Agreement says what pruning changes, not whether the unpruned model was right: a changed answer may be a better "
    "one. It is worth what it is worth beside the controls, which look at nothing."
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
th{border-bottom:2px solid #888}tr.control{color:#666;background:#f6f6f6}
dt{font-weight:600}dd{margin:0 0 .4rem 1.5rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(34rem,1fr));gap:1rem}
.card{border:1px solid #ddd;border-radius:6px;padding:.8rem;overflow-wrap:anywhere}
.card img{max-width:100%;height:auto}.card p{margin:.2rem 0}.card .same{color:#666}
.note{color:#555}
"""


@dataclass(frozen=True)
class Card:
    """One of the worst pictures: its row, and the picture as it is and with what was kept."""

    row: Row
    plain: draw.Panel
    kept: draw.Panel


@dataclass(frozen=True)
class Study:
    """All that was measured.

    Attributes:
        about: what to repeat it by: model, device, versions, command, ... (JSON types).
        entries: in the order of the tables.
        rows: of all entries.
        skipped: (picture, why) of what could not be read.
        cards: the worst pictures of every entry that is no control, worst first, by label.
        planned: how many prompts there were to be (fewer were measured if it was interrupted).
    """

    about: dict[str, Any]
    entries: Sequence[Entry]
    rows: Sequence[Row]
    skipped: Sequence[tuple[str, str]]
    cards: dict[str, list[Card]]
    planned: int

    @cached_property
    def lines(self) -> list[Line]:
        """The sums."""
        return summarise(self.entries, self.rows)

    @property
    def prompts(self) -> int:
        """Prompts that were measured."""
        return len({(row.picture, row.prompt) for row in self.rows})

    @property
    def pictures(self) -> int:
        """Pictures that were measured."""
        return len({row.picture for row in self.rows})

    @property
    def asked(self) -> str:
        """`8 prompts about 4 pictures`; a pair of a picture and a question is a prompt."""
        return f"{counted(self.prompts, 'prompt')} about {counted(self.pictures, 'picture')}"


# Numbers as text


def spread(estimate: Estimate, number: str, scale: float = 1.0) -> str:
    """`97.5 [95.0, 99.2]`; no brackets where there is no interval."""
    value = format(scale * estimate.value, number)
    if estimate.low is None:
        return value
    return f"{value} [{format(scale * estimate.low, number)}, {format(scale * estimate.high, number)}]"


def whole(number: float) -> str:
    """`256`, or `91.3` where a mean is not whole."""
    return f"{number:.1f}".removesuffix(".0")


def few_pictures(pictures: int) -> str:
    """What too few pictures mean."""
    few = "1 picture is one case" if pictures == 1 else f"{pictures} pictures are few"
    return f"{few}: below {statistics.FEW_CLUSTERS} the intervals are too narrow to trust."


def table_of(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of a study; columns that would be empty are left out."""
    header = ["method", "budget", "entering", "layer average", "first token", "answer", "KL first", "KL answer"]
    compared = any(line.over_random is not None for line in lines)
    rows = []
    for line in lines:
        seeds = f" ({len(line.entry.seeds)} seeds)" if len(line.entry.seeds) > 1 else ""
        measured = line.measures
        row = [
            f"{line.entry.method}{seeds}",
            line.entry.budget,
            f"{whole(line.tokens_before)} -> {whole(line.tokens_after)}",
            f"{line.layer_average:.1f}",
            spread(measured["first_agrees"], ".1f", 100),
            spread(measured["answer_agrees"], ".1f", 100),
            spread(measured["kl_first"], ".3f"),
            spread(measured["kl_answer"], ".3f"),
        ]
        if compared:
            row.append("" if line.over_random is None else spread(line.over_random, "+.1f", 100))
        rows.append(row)
    return header + (["answer - random"] if compared else []), rows


def in_words(line: Line, pictures: int) -> str:
    """One sentence about an entry and `random`."""
    same = spread(line.measures["answer_agrees"], ".1f", 100)
    told = f"{line.entry.label}: {same} % of the answers stay the same"
    few = f" (only {counted(pictures, 'picture')}: trust neither numbers nor intervals much)"
    few = few if pictures < statistics.FEW_CLUSTERS else ""
    if line.over_random is None:
        return f"{told}{few}."
    gap = spread(line.over_random, "+.1f", 100)
    verdicts = {
        "better": f"more than with random patches ({gap} points)",
        "worse": f"fewer than with random patches ({gap} points)",
        "noise": f"which cannot be told from random patches ({gap} points)",
        "equal": "exactly as with random patches, prompt by prompt",
        None: f"with random patches the difference is {gap} points, and one picture gives no interval",
    }
    return f"{told}, {verdicts[line.verdict]}{few}."


# One page in two languages


class Page:
    """Collects blocks as Markdown and as HTML."""

    def __init__(self) -> None:
        self.markdown: list[str] = []
        self.html: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self.markdown.append(f"{'#' * level} {plain(text)}")
        self.html.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        """A paragraph."""
        self.markdown.append(plain(text))
        self.html.append(f"<p>{html.escape(text)}</p>")

    def bullets(self, items: Iterable[str]) -> None:
        """A list."""
        items = list(items)
        self.markdown.append("\n".join(f"- {plain(item)}" for item in items))
        self.html.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], pale: Sequence[bool] = ()) -> None:
        """A table; rows that are `pale` stand back in HTML."""
        lines = [header, ["---"] * len(header), *rows]
        self.markdown.append("\n".join("| " + " | ".join(plain(cell) for cell in row) + " |" for row in lines))
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = ""
        for row, back in zip(rows, pale or [False] * len(rows), strict=True):
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            body += f"<tr{' class=control' if back else ''}>{cells}</tr>\n"
        self.html.append(f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`\\])", r"\\\1", text)


def as_page(study: Study, sheets: dict[str, str]) -> Page:
    """The whole report; `sheets` are the file names of the pictures by label."""
    page, about = Page(), study.about
    lines = study.lines
    page.heading(f"Fidelity of {about['model']}", 1)
    page.paragraph(
        f"{study.asked}; the reference is the unpruned model's own greedy "
        f"answer (at most {about['max_new_tokens']} tokens). Nothing was labelled."
    )
    if left := study.planned - about["prompts_skipped"] - study.prompts:
        page.paragraph(
            f"Interrupted: {left} of {counted(study.planned, 'prompt')} {'was' if left == 1 else 'were'} not measured."
        )
    if study.pictures < statistics.FEW_CLUSTERS:
        page.paragraph(few_pictures(study.pictures))
    header, rows = table_of(lines)
    page.table(header, rows, [line.entry.control for line in lines])
    page.bullets(in_words(line, study.pictures) for line in lines if not line.entry.control)
    page.paragraph(INTERVALS)
    page.paragraph(CAVEAT)
    page.heading("What the columns are")
    shown = [(name, text) for name, text in DEFINITIONS if name in header]
    page.bullets(f"{name}: {text}" for name, text in shown)
    for entry in study.entries:
        if not entry.control:
            worst_pictures(page, entry.label, study.cards.get(entry.label, []), sheets.get(entry.label))
    if study.skipped:
        page.heading(f"Left out: {counted(len(study.skipped), 'picture')}")
        page.bullets(f"{name}: {why}" for name, why in study.skipped)
    page.heading("To repeat it")
    page.table(["what", "value"], [[name, str(value)] for name, value in about.items()])
    return page


def worst_pictures(page: Page, label: str, cards: Sequence[Card], sheet: str | None) -> None:
    """The section of one entry."""
    page.heading(f"Worst pictures: {label}")
    if not cards:
        page.paragraph("Every picture got the same answer and the same distributions.")
        return
    page.paragraph(
        "Changed answers first, then by KL answer; of a picture with several prompts the worst one is shown. Dark is "
        "what was dropped."
    )
    page.markdown.append(f"![{plain(label)}]({sheet})")
    rows = [
        [str(i), c.row.picture, c.row.prompt, shown(c.row.unpruned), shown(c.row.pruned), kl(c.row)]
        for i, c in enumerate(cards, 1)
    ]
    header = ["", "picture", "prompt", "unpruned", "pruned", "KL answer"]
    page.markdown.append(table_markdown(header, rows))
    page.html.append(
        '<div class="cards">' + "\n".join(card_html(i, card) for i, card in enumerate(cards, 1)) + "</div>"
    )


def table_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for Markdown alone."""
    page = Page()
    page.table(header, rows)
    return page.markdown[0]


def kl(row: Row) -> str:
    """`0.123`, of the answer."""
    return f"{row.compared.kl_answer:.3f}"


def shown(answer: str) -> str:
    """An answer, or that there is none."""
    return answer or "(empty)"


def card_html(number: int, card: Card) -> str:
    """One of the worst pictures with its text beside it."""
    row = card.row
    made = io.BytesIO()
    side_by_side([*card.plain.pictures, *card.kept.pictures]).save(made, "JPEG", quality=90, subsampling=0)
    data = base64.b64encode(made.getvalue()).decode()
    seed = "" if row.seed is None else f", seed {row.seed}"
    said = html.escape(shown(row.pruned))
    texts = [
        f"<b>{number}. {html.escape(row.picture)}</b>",
        f"<b>prompt:</b> {html.escape(row.prompt)}",
        f"<b>unpruned:</b> {html.escape(shown(row.unpruned))}",
        f"<b>pruned:</b> {said}{' <span class=same>(the same)</span>' if row.compared.answer_agrees else ''}",
        f'<span class="note">KL answer {kl(row)}, KL first {row.compared.kl_first:.3f} nats; '
        f"{html.escape(', '.join(card.kept.lines))}{seed}</span>",
    ]
    alt = html.escape(f"{row.picture} and what was kept of it", quote=True)
    image = f'<img alt="{alt}" src="data:image/jpeg;base64,{data}">'
    return f'<div class="card">{image}' + "".join(f"<p>{text}</p>" for text in texts) + "</div>"


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row on white."""
    size = (sum(p.width for p in pictures) + GAP * (len(pictures) - 1), max(p.height for p in pictures))
    made, left = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        made.paste(picture, (left, 0))
        left += picture.width + GAP
    return made


def sheet_of(label: str, cards: Sequence[Card], across: int = 2) -> Image.Image:
    """The worst pictures of an entry as one picture with text, `across` of them in a row."""
    panels = []
    for number, card in enumerate(cards, 1):
        row = card.row
        asked = wrapped("prompt: ", row.prompt) + wrapped("unpruned: ", shown(row.unpruned))
        mark = " (the same)" if row.compared.answer_agrees else ""
        said = [*card.kept.lines, *wrapped("pruned: ", shown(row.pruned) + mark)]
        panels.append(draw.Panel(f"{number}. {row.picture}", asked, card.plain.pictures))
        panels.append(draw.Panel(f"KL answer {kl(row)} nats", said, card.kept.pictures))
    rows = [panels[i : i + 2 * across] for i in range(0, len(panels), 2 * across)]
    return draw.sheet(rows, heading=f"Worst pictures: {label}")


def wrapped(head: str, text: str) -> list[str]:
    """At most `SAID` lines; a cut is shown."""
    return textwrap.wrap(head + " ".join(text.split()), WRAP, max_lines=SAID, placeholder=" ...")


# Files


def as_json(study: Study) -> dict[str, Any]:
    """The sums and every row, for a program."""
    return {
        "format": 1,
        "about": study.about,
        "pictures": study.pictures,
        "prompts": study.prompts,
        "planned": study.planned,
        "skipped": [{"picture": name, "why": why} for name, why in study.skipped],
        "summary": [
            {"label": line.entry.label} | asdict(line.entry) | {k: v for k, v in asdict(line).items() if k != "entry"}
            for line in study.lines
        ],
        "rows": [row.as_json() for row in study.rows],
    }


def write(folder: Path, study: Study) -> list[Path]:
    """Write everything into `folder` (which exists), each file at once or not at all.

    Pictures of an older report there go, since nothing points to them any more.

    Returns:
        The files, the page to look at first.

    Raises:
        OSError: no room or no permission.
    """
    sheets = {label: f"worst-{re.sub(r'[^A-Za-z0-9.]+', '-', label)}.png" for label, c in study.cards.items() if c}
    page = as_page(study, sheets)
    title = html.escape(f"Fidelity of {study.about['model']}")
    document = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        + "\n".join(page.html)
        + "\n</body></html>\n"
    )
    files = {
        "report.html": document.encode(errors=ESCAPED),
        "report.md": ("\n\n".join(page.markdown) + "\n").encode(errors=ESCAPED),
        "results.json": (json.dumps(as_json(study), indent=1, ensure_ascii=False) + "\n").encode(errors=ESCAPED),
    }
    for label, name in sheets.items():
        made = io.BytesIO()
        sheet_of(label, study.cards[label]).save(made, "PNG")
        files[name] = made.getvalue()
    for name, content in files.items():
        write_whole(folder / name, content)
    for old in folder.glob("worst-*.png"):
        if old.name not in files:
            old.unlink()
    return [folder / name for name in files]
