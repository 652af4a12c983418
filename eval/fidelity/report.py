"""What `vlmprune fidelity` writes: a page (Markdown, self-contained HTML), sheets of the worst pictures, and JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmprune.eval import statistics
from vlmprune.eval.fidelity.cards import Card, captioned, sheet_of
from vlmprune.eval.fidelity.costs import AXES, UNPRUNED, EntryCosts
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import StudyEntry, StudyLine, StudyRow, stretches, summarise
from vlmprune.eval.fidelity.positions import AnswerPart, along
from vlmprune.eval.fidelity.tables import COSTS, DEFINITIONS, in_words, spread, table_of
from vlmprune.eval.report import render
from vlmprune.eval.report.chart import Chart, Mark
from vlmprune.eval.report.document import Block, Bullets, Cards, Heading, Table, Text, repeat
from vlmprune.eval.statistics import Estimate
from vlmprune.runtime.files import write_all
from vlmprune.runtime.tables import counted

__all__ = ["Study", "as_json", "write"]

LONG = 4  # tokens; of longer answers the page tells how they change along the way

INTERVALS = (
    f"In brackets: 95 % intervals, from drawing whole pictures with replacement ({statistics.DRAWS} times), since "
    "prompts about one picture are not independent. Where all pictures have the same share the interval is the exact "
    "one of Clopper and Pearson, and where all have the same KL there is none."
)
CAVEAT = (
    "Agreement says what pruning changes, not whether the unpruned model was right: a changed answer may be a better "
    "one. It is worth what it is worth beside the controls, which look at nothing."
)
ALONG = (
    "Next token: how often the pruned model's likeliest token is the unpruned answer's, which it has read up to there. "
    "Same so far: how many answers, each going its own way, are the same up to the last of these tokens or to their "
    "end. In per cent; KL in nats per token, as next token."
)
ALONG_HEADER = ("method and budget", "tokens", "prompts", "next token", "same so far", "KL")
ALONG_PANELS = {"next token": "next token, %", "same so far": "same so far, %", "KL": "KL, nats per token"}


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
        costs: time and memory by label, where they were measured.
        labels: right answers, where there are some.
    """

    about: dict[str, Any]
    entries: Sequence[StudyEntry]
    rows: Sequence[StudyRow]
    skipped: Sequence[tuple[str, str]]
    cards: dict[str, list[Card]]
    planned: int
    costs: Mapping[str, EntryCosts] = field(default_factory=dict)
    labels: Labels | None = None

    @cached_property
    def lines(self) -> list[StudyLine]:
        """The sums."""
        return summarise(self.entries, self.rows, self.labels)

    @cached_property
    def along(self) -> dict[str, list[AnswerPart]]:
        """Agreement by position in the answer, by label."""
        return along(self.rows)

    @property
    def prompts(self) -> int:
        """Prompts that were measured."""
        return len({(row.picture, row.prompt) for row in self.rows})

    @property
    def pictures(self) -> int:
        """Pictures that were measured."""
        return len({row.picture for row in self.rows})

    @property
    def controls(self) -> set[str]:
        """The labels of those that look at nothing."""
        return {entry.label for entry in self.entries if entry.control}

    @property
    def asked(self) -> str:
        """`8 prompts about 4 pictures`; a pair of a picture and a question is a prompt."""
        return f"{counted(self.prompts, 'prompt')} about {counted(self.pictures, 'picture')}"


# The page


def title(study: Study) -> str:
    """The page's title."""
    return f"Fidelity of {study.about['model']}"


def build(study: Study, sheets: Mapping[str, Path], folder: Path) -> list[Block]:
    """The whole report; `sheets` are the files of the worst pictures by label, plots are drawn into `folder`."""
    labels = study.labels
    told = "Nothing was labelled." if labels is None else f"Answers are scored by {labels.metric!r}."
    blocks: list[Block] = [
        Heading(title(study), 1),
        Text(
            f"{study.asked}; the reference is the unpruned model's own greedy answer (at most "
            f"{study.about['max_new_tokens']} tokens). {told}"
        ),
        *troubles(study),
        *numbers(study, folder),
        *positions(study, folder),
    ]
    for label in (entry.label for entry in study.entries if not entry.control):
        blocks += [Heading(f"Worst pictures: {label}"), *worst_pictures(study, label, sheets)]
    facts = {name: value for name, value in study.about.items() if name != "command"}
    return blocks + left_out(study) + repeat(facts, study.about["command"])


def numbers(study: Study, folder: Path) -> list[Block]:
    """The table, in words and as a picture too, and how to read it."""
    lines, (header, rows) = study.lines, table_of(study.lines, study.costs)
    kinds = ["control" if line.entry.control else "" for line in lines]
    return [
        Heading("In short"),
        Bullets([in_words(line, study.pictures) for line in lines if not line.entry.control]),
        overview(study).block(folder / "agreement.svg", "What stays the same. Bars are 95 % intervals; controls grey."),
        Heading("Numbers"),
        Table(header, rows, range(2), kinds),
        Text(INTERVALS),
        Text(CAVEAT),
        Heading("What the columns are"),
        Bullets([f"{name}: {text}" for name, text in (*DEFINITIONS, *COSTS.items()) if name in header]),
    ]


def overview(study: Study) -> Chart:
    """Agreement, and the score where there is one, against what a budget leaves and what was timed."""
    axes, panels = {"layer_average": "visual tokens, mean over layers"}, {"agreement": "same answers, %"}
    plain, tops = {"layer_average": max(line.tokens_before for line in study.lines)}, [100.0]
    if study.costs:
        axes, plain = axes | AXES, plain | UNPRUNED
    if study.labels is not None:
        panels["score"] = "score, %"
        tops.append(100 * study.lines[0].score.unpruned.value)
    points = [made for line in study.lines for made in points_of(line, study.costs.get(line.entry.label))]
    points += [Mark("", "unpruned", plain, top, panel=i, full=True) for i, top in enumerate(tops)]
    return Chart(axes, panels, points, {entry.method for entry in study.entries if entry.control})


def points_of(line: StudyLine, costs: EntryCosts | None) -> list[Mark]:
    """An entry in every panel of `overview`."""
    x = {"layer_average": line.layer_average} | ({} if costs is None else costs.place)
    shown = [line.measures["answer_agrees"]] + ([] if line.score is None else [line.score.pruned])
    return [
        Mark(line.entry.method, line.entry.label, x, *scaled(estimate, 100), panel=i)
        for i, estimate in enumerate(shown)
    ]


def scaled(estimate: Estimate, scale: float = 1.0) -> list[float | None]:
    """Value, low and high."""
    return [None if x is None else scale * x for x in (estimate.value, estimate.low, estimate.high)]


def positions(study: Study, folder: Path) -> list[Block]:
    """How answers of some length change along the way; nothing where all are short."""
    most = max((len(found) for found in study.along.values()), default=0)
    if most <= len(stretches(LONG)):
        return []
    parts = [(line.entry.label, one) for line in study.lines for one in study.along[line.entry.label]]
    points = [mark for name, one in parts for mark in part_marks(name, one)]
    kinds = ["start" if one.first == 1 else "" for _, one in parts]
    chart = Chart({"position": "position in the answer, up to this token"}, ALONG_PANELS, points, study.controls)
    return [
        Heading("Along the answer"),
        Text(ALONG),
        chart.block(folder / "along.svg", "Agreement along the answer. Bars are 95 % intervals; controls grey."),
        Table(ALONG_HEADER, [part_cells(*part) for part in parts], range(2), kinds),
    ]


def part_cells(name: str, one: AnswerPart) -> list[str]:
    """A row of the table along the answer."""
    shares = [spread(x, ".1f", 100) for x in (one.next_agrees, one.same_so_far)]
    return [name, span(one), str(one.prompts), *shares, spread(one.kl, ".3f")]


def part_marks(name: str, one: AnswerPart) -> list[Mark]:
    """A stretch of the answer in every panel."""
    values = scaled(one.next_agrees, 100), scaled(one.same_so_far, 100), scaled(one.kl)
    label, place = f"{name}, tokens {span(one)}", {"position": one.last}
    return [Mark(name, label, place, *value, panel=i) for i, value in enumerate(values)]


def span(stretch: AnswerPart) -> str:
    """`5 to 8`."""
    return f"{stretch.first} to {stretch.last}" if stretch.first < stretch.last else str(stretch.first)


def few_pictures(pictures: int) -> str:
    """What too few pictures mean."""
    few = "1 picture is one case" if pictures == 1 else f"{pictures} pictures are few"
    return f"{few}: below {statistics.FEW_CLUSTERS} the intervals are too narrow to trust."


def troubles(study: Study) -> list[Block]:
    """What a reader must know before the numbers."""
    said = []
    if left := study.planned - study.about["prompts_skipped"] - study.prompts:
        were = "was" if left == 1 else "were"
        said.append(f"Interrupted: {left} of {counted(study.planned, 'prompt')} {were} not measured.")
    if study.pictures < statistics.FEW_CLUSTERS:
        said.append(few_pictures(study.pictures))
    return [Text(text, warning=True) for text in said]


def left_out(study: Study) -> list[Block]:
    """The section about pictures that could not be read, if there are any."""
    if not study.skipped:
        return []
    told = Bullets([f"{name}: {why}" for name, why in study.skipped])
    return [Heading(f"Left out: {counted(len(study.skipped), 'picture')}"), told]


def worst_pictures(study: Study, label: str, sheets: Mapping[str, Path]) -> list[Block]:
    """What the section of one entry holds."""
    if not study.cards.get(label):
        return [Text("Every picture got the same answer and the same distributions.")]
    told = (
        "Changed answers first, then by KL answer; of a picture with several prompts the worst one is shown. Dark is "
        "what was dropped."
    )
    told = told if study.labels is None else f"What lost score first. {told}"
    return [Text(told), Cards([captioned(card) for card in study.cards[label]], sheets[label], label)]


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
        "summary": [line_in_json(study, line) for line in study.lines],
        "metric": None if study.labels is None else study.labels.metric,
        "rows": [row.as_json() | scores_json(row, study.labels) for row in study.rows],
    }


def line_in_json(study: Study, line: StudyLine) -> dict[str, Any]:
    """One entry in sum, with how it goes along the answer and what it costs."""
    label, told = line.entry.label, asdict(line)
    told = {"label": label} | told.pop("entry") | told
    told["along"] = [asdict(one) for one in study.along[label]]
    return told | ({"costs": asdict(study.costs[label])} if label in study.costs else {})


def scores_json(row: StudyRow, labels: Labels | None) -> dict[str, Any]:
    """What labels say of a row."""
    if labels is None:
        return {}
    unpruned, pruned = labels.scores(row)
    return {"right": list(labels.right(row)), "unpruned_score": unpruned, "pruned_score": pruned}


def write(folder: Path, study: Study) -> list[Path]:
    """Write everything into `folder` (which exists), each file at once or not at all.

    Pictures of an older report there go, since nothing points to them any more.

    Returns:
        The files, the page to look at first.

    Raises:
        OSError: no room or no permission.
    """
    names = {label: f"worst-{re.sub(r'[^A-Za-z0-9.]+', '-', label)}.png" for label, some in study.cards.items() if some}
    for old in folder.glob("*.svg"):
        old.unlink()
    sheets = {label: folder / name for label, name in names.items()}
    files = render.pages(build(study, sheets, folder), title(study), folder)
    files["results.json"] = render.data(as_json(study))
    files |= {name: sheet_of(label, study.cards[label]) for label, name in names.items()}
    written = write_all(folder, files)
    for old in {*folder.glob("worst-*.png")} - {*written}:
        old.unlink()
    return [*written, *sorted(folder.glob("*.svg"))]
