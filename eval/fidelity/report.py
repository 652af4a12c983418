"""What `vlmprune fidelity` writes: a page (Markdown, self-contained HTML), sheets of the worst pictures, and JSON."""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.eval import statistics
from vlmprune.eval.fidelity.costs import EntryCosts
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import Scored, StudyEntry, StudyLine, StudyRow, stretches, summarise
from vlmprune.eval.fidelity.positions import AnswerPart, along
from vlmprune.eval.report import render
from vlmprune.eval.report.chart import Chart, Mark
from vlmprune.eval.report.document import Block, Bullets, Captioned, Cards, Heading, Table, Text, repeat
from vlmprune.eval.statistics import Estimate
from vlmprune.runtime import draw, fewer_pixels
from vlmprune.runtime.files import write_whole
from vlmprune.runtime.tables import counted

__all__ = ["Card", "Study", "as_json", "in_words", "table_of", "write"]

SIDE = 256  # pixels of a picture's longer side on a card
GAP = 6
WRAP = 30  # characters of a line on a sheet
SAID = 3  # lines of an answer on a sheet; the page has all of it
LONG = 4  # tokens; of longer answers the page tells how they change along the way

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
    ("unpruned score", "how right the unpruned model's answers are by the labels, in per cent"),
    ("score", "how right the pruned model's answers are"),
    ("score - unpruned", "the difference of the two in percentage points, paired prompt by prompt"),
)
SCORES = ("unpruned score", "score", "score - unpruned")
#: Columns of what was timed, and what they are.
COSTS = {
    "speed-up first": "how many times as soon as the unpruned model's the first token is there, in pairs run in turns "
    "on this machine; in brackets the 95 % interval of the median",
    "speed-up answer": "the same for a whole answer, as long for both models",
    "memory": "bytes above the weights while the prompt is read, as a share of the unpruned model's",
    "cache": "bytes that the cache holds behind the prompt, as a share of the unpruned model's",
}
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


@dataclass(frozen=True)
class Card:
    """One of the worst pictures: its row, the picture as it is and with what was kept, and what was right."""

    row: StudyRow
    plain: draw.Panel
    kept: draw.Panel
    right: Sequence[str] = ()


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


def table_of(
    lines: Sequence[StudyLine], costs: Mapping[str, EntryCosts] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of a study; columns that would be empty are left out."""
    costs = costs or {}
    header = ["method", "budget", "entering", "layer average", "first token", "answer", "KL first", "KL answer"]
    compared = any(line.over_random is not None for line in lines)
    labelled = any(line.score is not None for line in lines)
    rows = []
    for line in lines:
        seeds = f" ({len(line.entry.seeds)} seeds)" if len(line.entry.seeds) > 1 else ""
        measured = line.measures
        row = [
            f"{line.entry.method}{smaller(line)}{seeds}",
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
        if labelled:
            row += score_cells(line.score)
        if costs:
            row += cost_cells(costs.get(line.entry.label))
        rows.append(row)
    more = ["answer - random"] * compared + list(SCORES) * labelled + list(COSTS) * bool(costs)
    return header + more, rows


def score_cells(score: Scored) -> list[str]:
    """The cells of the columns `SCORES`."""
    both = [spread(one, ".1f", 100) for one in (score.unpruned, score.pruned)]
    return [*both, spread(score.change, "+.1f", 100)]


def smaller(line: StudyLine) -> str:
    """What stands beside `downsample` where it made the pictures themselves smaller."""
    made = line.entry.method == "downsample" and line.tokens_after < line.tokens_before
    return f" ({fewer_pixels.SAID})" if made else ""


def cost_cells(costs: EntryCosts | None) -> list[str]:
    """The cells of the columns `COSTS`."""
    if costs is None:
        return [""] * len(COSTS)
    fast = [f"{one['median']:.2f}x [{one['low']:.2f}, {one['high']:.2f}]" for one in (costs.first, costs.answer)]
    return [*fast, *(f"{100 * part[1] / part[0]:.0f} %" for part in (costs.peak, costs.kv))]


def in_words(line: StudyLine, pictures: int) -> str:
    """One sentence about an entry and `random`."""
    same = spread(line.measures["answer_agrees"], ".1f", 100)
    told = f"{line.entry.label}: {same} % of the answers stay the same"
    few = f" (only {counted(pictures, 'picture')}: trust neither numbers nor intervals much)"
    few = few if pictures < statistics.FEW_CLUSTERS else ""
    few += "" if line.score is None else f". {score_in_words(line.score)}"
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


def score_in_words(score: Scored) -> str:
    """What became of the score."""
    verdicts = {
        "better": "better than the unpruned model's",
        "worse": "worse than the unpruned model's",
        "noise": "which cannot be told from the unpruned model's",
        "equal": "prompt by prompt the unpruned model's",
        None: "beside the unpruned model's, and one picture gives no interval",
    }
    change = spread(score.change, "+.1f", 100)
    return f"The score is {spread(score.pruned, '.1f', 100)} %, {verdicts[score.verdict]} ({change} points)"


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
    axes = {"layer_average": "visual tokens, mean over layers"}
    if study.costs:
        axes |= {"first": "first token, times as fast", "answer": "answer, times as fast", "cache": "cache, % of all"}
    panels = {"agreement": "same answers, %"} | ({} if study.labels is None else {"score": "score, %"})
    points = [made for line in study.lines for made in points_of(line, study.costs.get(line.entry.label))]
    before = max(line.tokens_before for line in study.lines)
    plain = {"layer_average": before} | ({"first": 1.0, "answer": 1.0, "cache": 100.0} if study.costs else {})
    tops = [100.0] if study.labels is None else [100.0, 100 * study.lines[0].score.unpruned.value]
    points += [Mark("", "unpruned", plain, top, panel=i, full=True) for i, top in enumerate(tops)]
    return Chart(axes, panels, points, {line.entry.method for line in study.lines if line.entry.control})


def points_of(line: StudyLine, costs: EntryCosts | None) -> list[Mark]:
    """An entry in every panel of `overview`."""
    x = {"layer_average": line.layer_average}
    if costs is not None:
        x |= {
            "first": costs.first["median"],
            "answer": costs.answer["median"],
            "cache": 100 * costs.kv[1] / costs.kv[0],
        }
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
    names = [line.entry.label for line in study.lines]
    header, rows = ["method and budget", "tokens", "prompts", "next token", "same so far", "KL"], []
    for name in names:
        for one in study.along[name]:
            shares = [spread(x, ".1f", 100) for x in (one.next_agrees, one.same_so_far)]
            rows.append([name, span(one), str(one.prompts), *shares, spread(one.kl, ".3f")])
    kinds = ["start" if i % most == 0 else "" for i in range(len(rows))]
    panels = {"next token": "next token, %", "same so far": "same so far, %", "KL": "KL, nats per token"}
    points = [
        Mark(name, f"{name}, tokens {span(one)}", {"position": one.last}, *scaled(value, scale), panel=i)
        for name in names
        for one in study.along[name]
        for i, (value, scale) in enumerate(((one.next_agrees, 100), (one.same_so_far, 100), (one.kl, 1)))
    ]
    chart = Chart(
        {"position": "position in the answer, up to this token"}, panels, points,
        {line.entry.label for line in study.lines if line.entry.control},
    )  # fmt: skip
    return [
        Heading("Along the answer"),
        Text(ALONG),
        chart.block(folder / "along.svg", "Agreement along the answer. Bars are 95 % intervals; controls grey."),
        Table(header, rows, range(2), kinds),
    ]


def span(stretch: AnswerPart) -> str:
    """`5 to 8`."""
    return f"{stretch.first} to {stretch.last}" if stretch.first < stretch.last else str(stretch.first)


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


def sheet_of(label: str, cards: Sequence[Card]) -> Image.Image:
    """The worst pictures of an entry as one picture with text, two of them in a row; of strips of videos one."""
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
            {"label": line.entry.label}
            | asdict(line.entry)
            | {k: v for k, v in asdict(line).items() if k != "entry"}
            | {"along": [asdict(one) for one in study.along[line.entry.label]]}
            | ({"costs": asdict(study.costs[line.entry.label])} if line.entry.label in study.costs else {})
            for line in study.lines
        ],
        "metric": None if study.labels is None else study.labels.metric,
        "rows": [row.as_json() | scores_json(row, study.labels) for row in study.rows],
    }


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
    sheets = {
        label: folder / f"worst-{re.sub(r'[^A-Za-z0-9.]+', '-', label)}.png"
        for label, cards in study.cards.items()
        if cards
    }
    for old in folder.glob("*.svg"):
        old.unlink()
    files = render.pages(build(study, sheets, folder), title(study), folder)
    told = json.dumps(as_json(study), indent=1, ensure_ascii=False) + "\n"
    files["results.json"] = told.encode(errors=render.ESCAPED)
    for label, path in sheets.items():
        made = io.BytesIO()
        sheet_of(label, study.cards[label]).save(made, "PNG")
        files[path.name] = made.getvalue()
    for name, content in files.items():
        write_whole(folder / name, content)
    for old in folder.glob("worst-*.png"):
        if old.name not in files:
            old.unlink()
    return [*(folder / name for name in files), *sorted(folder.glob("*.svg"))]
