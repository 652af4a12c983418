"""`vlmprune demo`: the embedded models on a few shipped pictures, with several methods, in one table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import CommandError, UserError, brief

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from vlmprune.runtime.answering import Outcome
    from vlmprune.runtime.loading import Loaded
    from vlmprune.spec import Job

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
class AnsweredPicture:
    """One shipped picture, and what the full model and every job answered."""

    picture: dict[str, Any]
    plain: str
    outcomes: list[Outcome]

    @property
    def expected(self) -> str:
        return self.picture["answer"]

    def right(self, said: str) -> bool:
        """Whether an answer is the expected one, capitals and a final full stop aside."""
        return said.strip().rstrip(".").lower() == self.expected.strip().lower()

    def cell(self, said: str, tokens: int) -> str:
        """An answer, whether it is right, and from how many tokens it came."""
        from vlmprune.runtime.tables import short

        yes, no = ("\u2713", "\u2717") if "utf" in (sys.stdout.encoding or "").lower() else ("ok", "wrong")
        return f"{short(said, 14) or '(empty)'} {yes if self.right(said) else no} ({tokens})"

    def of(self, method: str) -> list[Outcome]:
        """A method's outcomes, budget by budget."""
        return [outcome for outcome in self.outcomes if outcome.job.method == method]

    def cells(self, method: str) -> list[str]:
        """A method's answers, budget by budget; dashes where it does not fit the model."""
        if not self.of(method):
            return ["-"] * len(KEEPS)
        return [self.cell(o.answer, o.total["patches_after"] + o.total["newlines_after"]) for o in self.of(method)]

    def rights(self, method: str) -> list[bool]:
        """Whether a method's answers are right, budget by budget; nothing where it does not fit the model."""
        return [self.right(outcome.answer) for outcome in self.of(method)]


def shipped() -> list[dict[str, Any]]:
    """The shipped pictures whose model is there too."""
    from vlmprune.eval import testbed

    try:
        pictures = testbed.pictures()
    except FileNotFoundError as error:
        raise CommandError(f"the demo's pictures are missing from this installation: {brief(error)}") from None
    lacks = {name: lack_of(name) for name in testbed.NAMES}
    there = [picture for name in lacks if not lacks[name] for picture in pictures if picture["model"] == name]
    reasons = sorted({*lacks.values()} - {""})
    if not there:
        raise CommandError(f"nothing to show: {'; '.join(reasons) or 'no pictures'}")
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return there


def lack_of(name: str) -> str:
    """Why an embedded model is not there; empty if it is."""
    from vlmprune.eval import testbed

    try:
        testbed.path(name)
    except FileNotFoundError as error:
        return brief(error)
    return ""


def verb(out: Annotated[str, Option(metavar="FOLDER", help="folder for the pictures")] = "demo-out") -> None:
    """Ask the embedded models, with a quarter and a tenth of their visual tokens.

    Asks about shipped pictures: the full model, and several methods. Prints one table and draws what was kept.
    """
    folder = flags.folder(out)

    from vlmprune import spec
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.pictures import read_picture
    from vlmprune.runtime.status import Bar, show, status

    todo = spec.jobs(METHODS, [{"keep": keep} for keep in KEEPS], {})
    asked: list[AnsweredPicture] = []
    drawn: list[Path] = []
    loaded: Loaded | None = None
    reasons: dict[str, str] = {}
    pictures = shipped()
    with Bar(len(pictures) * (1 + len(todo))) as bar:
        for number, picture in enumerate(pictures, 1):
            if loaded is None or loaded.source.name != picture["model"]:
                loaded = loading.load(loading.find_model(picture["model"]))
                mine, lacks = fitting(loaded, todo)
                reasons |= lacks
            image = read_picture(picture["file"])
            inputs = loading.model_inputs(loaded, [image], picture["question"])
            status(f"{Path(picture['file']).name}: full model")
            asked.append(AnsweredPicture(picture, *answering.run_jobs(loaded, mine, inputs, LONGEST, bar)))
            bar.at(bar.done + len(todo) - len(mine))
            drawn.append(folder / f"{number}-{Path(picture['file']).stem}.png")
            save(drawn[-1], loaded, asked[-1], image)

    show(as_table(asked))
    for why in reasons.values():
        print(f"-: {why}")
    print(f"\n{CLOSING}\n\nWhat was kept:")
    for path in drawn:
        print(f"  {path}")


def fitting(loaded: Loaded, todo: Sequence[Job]) -> tuple[list[Job], dict[str, str]]:
    """The jobs that fit a model, and for the methods of the others why they do not."""
    from vlmprune.runtime import answering

    reasons: dict[str, str] = {}
    for job in todo:
        if job.method not in reasons:
            try:
                answering.check(loaded, [job])
            except UserError as error:
                reasons[job.method] = brief(error)
    return [job for job in todo if job.method not in reasons], reasons


def as_table(asked: list[AnsweredPicture]) -> str:
    """One block of rows per picture, one row per method, and how many answers were right."""
    from vlmprune.runtime.tables import table

    header = ["picture", "question", "expected", "full model", "method", *(f"{keep:.0%} kept" for keep in KEEPS)]
    rows = [row for one in asked for row in rows_of(one)]
    start = ["right answers", f"of {len(asked)}", "", str(sum(one.right(one.plain) for one in asked))]
    rows += block(start, {method: totals([one.rights(method) for one in asked]) for method in METHODS})
    return table(header, rows) + "\n\nIn brackets: visual tokens left after the last cut, newlines included."


def rows_of(one: AnsweredPicture) -> list[list[str]]:
    """The rows about one picture, and an empty one."""
    before = one.outcomes[0].total
    whole = one.cell(one.plain, before["patches_before"] + before["newlines_before"])
    start = [Path(one.picture["file"]).name, one.picture["question"], one.expected, whole]
    return [*block(start, {method: one.cells(method) for method in METHODS}), []]


def totals(rights: list[list[bool]]) -> list[str]:
    """How many answers of a method were right, budget by budget, and out of how many where it did not answer all."""
    given = [each for each in rights if each]
    out_of = f" of {len(given)}" if len(given) < len(rights) else ""
    return [f"{sum(each)}{out_of}" for each in zip(*given, strict=True)] or ["-"] * len(KEEPS)


def block(start: list[str], cells: dict[str, list[str]]) -> list[list[str]]:
    """A row per method, the first of them with what holds for all."""
    return [[*(start if i == 0 else [""] * len(start)), name, *mine] for i, (name, mine) in enumerate(cells.items())]


def save(target: Path, loaded: Loaded, asked: AnsweredPicture, image: Image.Image) -> None:
    """Draw one row of panels per budget, one panel per method."""
    from vlmprune.runtime import draw
    from vlmprune.runtime.pictures import write_picture

    rows = []
    for keep in KEEPS:
        mine = [outcome for outcome in asked.outcomes if outcome.job.options["keep"] == keep]
        said = [(o.job.label, o.trace, o.answer + ("" if asked.right(o.answer) else " (wrong)")) for o in mine]
        rows += draw.answer_panels(image, loaded.processor, asked.plain, said, longest=LARGEST)
    write_picture(draw.sheet(rows, heading=f"{asked.picture['question']}   ({asked.expected})"), target)
