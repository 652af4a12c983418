"""The pictures that suffered most, with what was kept of them and both answers."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import StudyEntry, StudyRow, worst
from vlmprune.eval.report.document import Captioned
from vlmprune.runtime import draw
from vlmprune.runtime.answering import guarded, patch, seen_by
from vlmprune.runtime.errors import printable
from vlmprune.runtime.loading import Loaded, model_inputs
from vlmprune.runtime.prompts import Pair
from vlmprune.runtime.status import status
from vlmprune.runtime.videos import read_visual
from vlmprune.spec import Job

__all__ = ["Card", "captioned", "sheet_of", "worst_cards"]

SIDE = 256  # pixels of a picture's longer side on a card
GAP = 6
WRAP = 30  # characters of a line on a sheet
SAID = 3  # lines of an answer on a sheet; the page has all of it


@dataclass(frozen=True)
class Card:
    """One of the worst pictures: its row, the picture as it is and with what was kept, and what was right."""

    row: StudyRow
    plain: draw.Panel
    kept: draw.Panel
    right: Sequence[str] = ()


def worst_cards(
    loaded: Loaded,
    entry: StudyEntry,
    rows: Iterable[StudyRow],
    pairs: Sequence[Pair],
    count: int,
    labels: Labels | None,
) -> list[Card]:
    """Prefill the worst pictures of an entry once more, each by itself, and draw what was kept."""
    shown = {pair.picture: pair for pair in pairs}
    cards = []
    for row in worst((row for row in rows if row.label == entry.label), count, labels):
        status(f"drawing {entry.label}: {printable(row.picture)}")
        panels = drawn(loaded, Job(entry.method, entry.seeded(row.seed)), shown[row.picture], row.prompt)
        cards.append(Card(row, *panels, () if labels is None else tuple(labels.right(row))))
    status()
    return cards


def drawn(loaded: Loaded, job: Job, pair: Pair, prompt: str) -> tuple[draw.Panel, draw.Panel]:
    """A picture as it is, and what a job kept of it."""
    image = read_visual(pair.path, pair.frames)
    with patch(loaded, job) as handle:
        inputs = model_inputs(seen_by(loaded, job), [image], prompt)
        guarded(lambda: loaded.model(**inputs, use_cache=True, logits_to_keep=1))
        part = draw.eyes(loaded.processor, handle.trace.grids[0])
        kept = draw.kept_panel(image, handle.trace, part, 0, "", (), SIDE)
    return draw.plain_panel(image, "", (), SIDE), kept


def captioned(card: Card) -> Captioned:
    """One of the worst pictures with its text beside it."""
    row, made = card.row, io.BytesIO()
    side_by_side([*card.plain.pictures, *card.kept.pictures]).save(made, "JPEG", quality=90, subsampling=0)
    facts = {
        "prompt": row.prompt,
        **({"right": " / ".join(card.right)} if card.right else {}),
        "unpruned": shown(row.unpruned),
        "pruned": pruned(row),
        "KL answer": kl(row),
    }
    seed = [] if row.seed is None else [f"seed {row.seed}"]
    note = ", ".join([f"KL first {row.compared.kl_first:.3f}", *card.kept.lines, *seed])
    return Captioned(row.picture, made.getvalue(), f"{row.picture} and what was kept of it", facts, note)


def kl(row: StudyRow) -> str:
    """`0.123`, of the answer."""
    return f"{row.compared.kl_answer:.3f}"


def shown(answer: str) -> str:
    """An answer, or that there is none."""
    return answer or "(empty)"


def pruned(row: StudyRow) -> str:
    """The pruned model's answer, and whether it is the unpruned one's."""
    return shown(row.pruned) + (" (the same)" if row.compared.answer_agrees else "")


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row on white."""
    size = (sum(p.width for p in pictures) + GAP * (len(pictures) - 1), max(p.height for p in pictures))
    made, left = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        made.paste(picture, (left, 0))
        left += picture.width + GAP
    return made


def sheet_of(label: str, cards: Sequence[Card]) -> bytes:
    """The worst pictures of an entry as one PNG with text, two of them in a row; of strips of videos one."""
    across = 2 if all(max(p.width for p in card.plain.pictures) <= 2 * SIDE for card in cards) else 1
    panels = []
    for number, card in enumerate(cards, 1):
        row = card.row
        asked = wrapped("prompt: ", row.prompt) + wrapped("unpruned: ", shown(row.unpruned))
        asked += wrapped("right: ", " / ".join(card.right)) if card.right else []
        said = [*card.kept.lines, *wrapped("pruned: ", pruned(row))]
        panels.append(draw.Panel(f"{number}. {row.picture}", asked, card.plain.pictures))
        panels.append(draw.Panel(f"KL answer {kl(row)} nats", said, card.kept.pictures))
    rows = [panels[i : i + 2 * across] for i in range(0, len(panels), 2 * across)]
    made = io.BytesIO()
    draw.sheet(rows, heading=f"Worst pictures: {label}").save(made, "PNG")
    return made.getvalue()


def wrapped(head: str, text: str) -> list[str]:
    """At most `SAID` lines; a cut is shown."""
    return textwrap.wrap(head + " ".join(text.split()), WRAP, max_lines=SAID, placeholder=" ...")
