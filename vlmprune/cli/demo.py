"""`vlmprune demo`: the embedded models on a few shipped pictures, with several methods, in one table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.runtime.errors import CommandError, UserError, brief

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.runtime.answering import Outcome
    from vlmprune.runtime.loading import Loaded

__all__ = ["verb"]

#: The controls stand beside the methods, as everywhere.
METHODS = ("fopru", "vtc_cls", "fastv", "random", "grid", "pool")
KEEPS = (0.25, 0.1)
LONGEST = 16  # tokens of an answer
LARGEST = 256  # pixels of a drawn picture's longer side
CLOSING = """\
A handful of questions shows how it works, not how well: random and pooling are there to be beaten, and sometimes they
win. Measured numbers on a thousand questions are in the embedded models' card."""


@dataclass(frozen=True)
class Asked:
    """One shipped picture, and what the full model and every job answered."""

    picture: dict[str, Any]
    plain: str
    outcomes: list[Outcome]


def shipped() -> list[dict[str, Any]]:
    """The shipped pictures whose model is there too."""
    from vlmprune.eval import testbed

    try:
        pictures = testbed.pictures()
    except FileNotFoundError as error:
        raise CommandError(f"the demo's pictures are missing from this installation: {brief(error)}") from None
    there, missing = [], set()
    for name in testbed.NAMES:
        try:
            testbed.path(name)
            there += [picture for picture in pictures if picture["model"] == name]
        except FileNotFoundError as error:
            missing.add(brief(error))
    if not there:
        raise CommandError(f"nothing to show: {'; '.join(sorted(missing)) or 'no pictures'}")
    for reason in sorted(missing):
        print(f"left out: {reason}", file=sys.stderr)
    return there


def verb(out: Annotated[str, Option(metavar="FOLDER", help="folder for the pictures")] = "demo-out") -> None:
    """Ask the embedded models, with a quarter and a tenth of their visual tokens.

    Asks about shipped pictures: the full model, and several methods. Prints one table and draws what was kept.
    """
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {brief(error)}") from None

    from vlmprune import spec
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.pictures import read_picture
    from vlmprune.runtime.status import Bar, show, status

    todo = spec.jobs(METHODS, [{"keep": keep} for keep in KEEPS], {})
    asked: list[Asked] = []
    drawn: list[Path] = []
    loaded: Loaded | None = None
    pictures = shipped()
    with Bar(len(pictures) * (1 + len(todo))) as bar:
        for number, picture in enumerate(pictures, 1):
            if loaded is None or loaded.source.name != picture["model"]:
                loaded = loading.load(loading.find_model(picture["model"]))
            image = read_picture(picture["file"])
            inputs = loading.model_inputs(loaded, [image], picture["question"])
            status(f"{Path(picture['file']).name}: full model")
            plain, outcomes = answering.answer(loaded, inputs, LONGEST), []
            for job in todo:
                bar.step()
                outcomes.append(answering.run_job(loaded, job, inputs, LONGEST))
            bar.step()
            asked.append(Asked(picture, plain, outcomes))
            drawn.append(folder / f"{number}-{Path(picture['file']).stem}.png")
            save(drawn[-1], loaded, asked[-1], image)

    show(as_table(asked))
    print(f"\n{CLOSING}\n\nWhat was kept:")
    for path in drawn:
        print(f"  {path}")


def correct(said: str, expected: str) -> bool:
    """Whether an answer is the expected one, capitals and a final full stop aside."""
    return said.strip().rstrip(".").lower() == expected.strip().lower()


def as_table(asked: list[Asked]) -> str:
    """One block of rows per picture, one row per method, and how many answers were right."""
    from vlmprune.runtime.tables import short, table

    yes, no = ("\u2713", "\u2717") if "utf" in (sys.stdout.encoding or "").lower() else ("ok", "wrong")

    def cell(said: str, expected: str, tokens: int) -> str:
        return f"{short(said, 14) or '(empty)'} {yes if correct(said, expected) else no} ({tokens})"

    header = ["picture", "question", "expected", "full model", "method", *(f"{keep:.0%} kept" for keep in KEEPS)]
    rows: list[list[str]] = []
    for one in asked:
        expected = one.picture["answer"]
        whole = sum(one.outcomes[0].total[f"{kind}_before"] for kind in ("patches", "newlines"))
        start = [Path(one.picture["file"]).name, one.picture["question"], expected, cell(one.plain, expected, whole)]
        for method in METHODS:
            mine = [outcome for outcome in one.outcomes if outcome.job.method == method]
            left = [outcome.total["patches_after"] + outcome.total["newlines_after"] for outcome in mine]
            cells = [cell(outcome.answer, expected, n) for outcome, n in zip(mine, left, strict=True)]
            rows.append([*(start if method == METHODS[0] else [""] * 4), method, *cells])
        rows.append([])
    full = sum(correct(one.plain, one.picture["answer"]) for one in asked)
    start = ["right answers", f"of {len(asked)}", "", str(full)]
    for i, method in enumerate(METHODS):
        counts = [
            sum(correct(o.answer, one.picture["answer"]) for one in asked for o in one.outcomes if o.job == job)
            for job in (o.job for o in asked[0].outcomes if o.job.method == method)
        ]
        rows.append([*(start if i == 0 else [""] * 4), method, *map(str, counts)])
    return table(header, rows) + "\n\nIn brackets: visual tokens left after the last cut, newlines included."


def save(target: Path, loaded: Loaded, asked: Asked, image: Image.Image) -> None:
    """Draw one row of panels per budget, one panel per method."""
    from vlmprune.runtime import draw
    from vlmprune.runtime.pictures import write_picture

    expected, image_processor = asked.picture["answer"], loaded.processor.image_processor
    rows = []
    for keep in KEEPS:
        row = [draw.plain_panel(image, "full model", [f"answer: {asked.plain}"], LARGEST)]
        for outcome in asked.outcomes:
            if outcome.job.options["keep"] == keep:
                wrong = "" if correct(outcome.answer, expected) else " (wrong)"
                title, more = outcome.job.label, [f"answer: {outcome.answer}{wrong}"]
                row.append(draw.kept_panel(image, outcome.trace, image_processor, 0, title, more, LARGEST))
        rows.append(row)
    write_picture(draw.sheet(rows, heading=f"{asked.picture['question']}   ({expected})"), target)
