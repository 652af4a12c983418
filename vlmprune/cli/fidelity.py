"""`vlmprune fidelity`: what pruning changes on the user's own pictures, with and without labels."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import CommandError, UserError, brief, printable, user_mistakes
from vlmprune.runtime.prompts import Pair, labelled, read_pairs
from vlmprune.runtime.tables import counted

if TYPE_CHECKING:
    from vlmprune.eval.fidelity.labels import Labels
    from vlmprune.eval.fidelity.measure import StudyEntry, StudyRow
    from vlmprune.eval.fidelity.report import Card, Study
    from vlmprune.runtime.loading import Loaded
    from vlmprune.spec import Job

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune fidelity --images photos --prompts prompts.txt --model llava-hf/llava-1.5-7b-hf --method fopru,todre \\
      --keep 64,128 --device cuda --batch 8
  vlmprune fidelity --images 'photos/**/*.jpg' --prompts pairs.jsonl --model llava-hf/llava-1.5-7b-hf --keep 25%

  vlmprune fidelity --video films --frames 16 --prompts prompts.txt --model Qwen/Qwen2.5-VL-3B-Instruct --keep 25%

with what comes in the package (drawn scenes with questions and answers, which the default model knows):
  vlmprune fidelity --method fopru,vtc_cls --keep 26 --limit 20

The prompts file has one prompt a line, each asked about every picture; or one JSON object a line, {"image": "cat.jpg",
"prompt": "what is this?"}, where image may be a pattern ("2024/*.jpg") and without one means every picture. --data
takes such lines with an "answer" too, a text or a list of those that count as right: answers are scored by --metric.
With --video the videos take the pictures' place, in the report too.

It writes report.html (self-contained), report.md with worst-*.png, and results.json with every row. What the measures
mean is told there. Every result is kept in rows.jsonl as it comes: Ctrl-C stops and reports on what is finished, and
--resume goes on, after a crash too, with other methods, budgets, pictures or prompts as well.

exit codes: 0 done, 1 failed, or not as good as --min-agreement, --min-speedup and --max-loss ask, 2 wrong usage, 130
interrupted
"""


def verb(
    images: flags.Images = None,
    video: Annotated[
        str | None, Option(metavar="FILE", help="instead of pictures: a video, a folder of videos, or a pattern")
    ] = None,
    frames: flags.Frames = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help="one prompt a line, or JSON lines (see below)")] = None,
    data: flags.Data = None,
    model: flags.Model = "scene-llava",
    method: flags.SomeMethods = None,
    keep: flags.Keep = None,
    average: flags.Average = None,
    option: flags.Options = [],  # noqa: B006
    recipe: flags.Recipe = None,
    controls: Annotated[
        str, Option(metavar="NAME[,NAME]", help="what methods are measured against at the same budgets, or none")
    ] = "random,grid,pool",
    seeds: Annotated[int, flags.number("seeds of `random`, averaged", 1)] = 3,
    limit: flags.Limit = None,
    worst: Annotated[int, flags.number("pictures shown per method and budget", 0)] = 10,
    repeats: Annotated[int, flags.number("timed pairs with the unpruned model, 0 for none", 0)] = 3,
    min_agreement: Annotated[
        str | None, Option(metavar="SHARE", help="fail (exit code 1) where fewer answers stay the same (0.98 or 98%)")
    ] = None,
    min_speedup: Annotated[
        float | None, Option(metavar="X", help="fail where the first token comes less than X times as fast")
    ] = None,
    metric: flags.Metric = "exact",
    max_loss: Annotated[
        str | None, Option(metavar="SHARE", help="with --data: fail where the score loses more (1% or 0.01)")
    ] = None,
    max_new_tokens: flags.Longest = 64,
    batch: Annotated[int, flags.number("prompts at a time; halved by itself where memory is short", 1)] = 4,
    out: Annotated[str, Option(metavar="FOLDER", help="folder for the report")] = "fidelity-out",
    resume: Annotated[
        bool, Option("--resume", help="go on with the run in that folder; what is there is not measured again")
    ] = False,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
    as_json: flags.Json = False,
) -> None:
    """Tell what pruning changes on your own pictures, labels or not.

    Asks the full model and pruned ones about your own pictures, and measures how often the first token and the greedy
    answer stay the same and how far the next-token distributions drift apart (KL), with intervals, beside controls that
    look at nothing; with --data also how much of the score is lost. The pictures that suffer most are shown. Without
    --method: fopru; without --keep and --average: a quarter of the patches.
    """
    args = SimpleNamespace(**locals())
    with held(out, "fidelity", resume) as folder:
        study(args, folder)


@contextmanager
def held(out: str, verb: str, resume: bool) -> Iterator[Path]:
    """The folder that a verb writes into, for this run alone.

    Raises:
        UserError: it is in use, or holds a run and nobody said `resume`.
        CommandError: it cannot be written into.
    """
    from vlmprune.eval.fidelity.journal import JournalError, refuse_second
    from vlmprune.eval.lmms.store import StoreError, locked

    folder = flags.folder(out)
    try:
        with locked(folder, verb, "--out FOLDER"):
            refuse_second(folder, resume, verb)
            yield folder
    except (StoreError, JournalError) as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise CommandError(f"cannot write into {folder}: {brief(error)}") from None


def study(args: SimpleNamespace, folder: Path) -> None:
    """Check everything that can be checked early, load the model, measure, report."""
    flags.one_of(prompts=args.prompts, data=args.data)
    flags.one_of(images=args.images, video=args.video)
    least = least_of(args)
    wanted = flags.wanted(args.method, args.keep, args.average, args.option, args.recipe)
    pairs, file = asked(args, folder), args.prompts or args.data or "the prompts"
    if not labelled(pairs, file) and (args.data or least.loss is not None):
        raise UserError(f'{file} has no answers: scores need --data with an "answer" in every line.')

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.eval.fidelity import report as fidelity_report
    from vlmprune.eval.fidelity import run as fidelity_run
    from vlmprune.eval.fidelity.costs import CostBook
    from vlmprune.eval.fidelity.journal import Journal
    from vlmprune.eval.fidelity.labels import Labels
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import note

    todo = wanted.jobs()
    beside = controls_of(args.controls, wanted, todo)
    entries = [*entries_of(todo, False, args.seeds), *entries_of(beside, True, args.seeds)]
    loaded = loading.open_model(args.model, args.device, args.dtype, videos=args.video is not None)
    answering.check(loaded, [*todo, *beside])
    check_prompts(loaded, pairs, file)
    labels = Labels.of(pairs, args.metric)

    journal = Journal(folder, setting_of(loaded, args))
    for line in journal.damaged:
        note(f"{journal.path}, line {line}: damaged, and measured again")
    plan = fidelity_run.Todo(journal, entries, pairs)
    skipped: dict[str, str] = {}
    interrupted = fidelity_run.measure(loaded, plan, args.batch, args.max_new_tokens, skipped)
    rows = plan.rows()
    if not rows:
        refuse_nothing(skipped, interrupted)
    book = CostBook(loaded, journal, pairs, args.batch, args.max_new_tokens, args.repeats, skipped)
    costs = {entry.label: book.of(entry) for entry in entries if args.repeats and not interrupted}
    cards = {
        entry.label: worst_cards(loaded, entry, rows, pairs, args.worst, labels)
        for entry in entries
        if not entry.control
    }
    unasked = sum(pair.picture in skipped for pair in pairs)
    about = about_run(loaded, "fidelity", args, prompts_skipped=unasked)
    told = fidelity_report.Study(about, entries, rows, list(skipped.items()), cards, len(pairs), costs, labels)
    show(told, fidelity_report.write(folder, told), args.as_json)
    if skipped:
        note(left_out(list(skipped)))
    if interrupted:
        raise KeyboardInterrupt
    refuse_worse(told, least)


def controls_of(names: str, wanted: flags.Wanted, todo: Sequence[Job]) -> list[Job]:
    """The controls of --controls at the methods' budgets, but for those that are methods here.

    Raises:
        UserError: an unknown one.
    """
    from vlmprune import spec

    controls = [] if names.strip() == "none" else flags.words_of(names, "--controls")
    budgets = wanted.budgets if wanted.recipe is None else [spec.budgets_in(wanted.recipe.options)]
    taken = {job.method for job in todo}
    with user_mistakes():
        return spec.jobs([name for name in controls if name not in taken], budgets, {}, named=False)


@dataclass(frozen=True)
class Least:
    """What a method must reach for exit code 0; None asks for nothing."""

    agreement: float | None
    speedup: float | None
    loss: float | None


def least_of(args: SimpleNamespace) -> Least:
    """What --min-agreement, --min-speedup and --max-loss ask for.

    Raises:
        UserError: no share, or a speed-up that nothing measures.
    """
    if args.min_speedup is not None and not args.repeats:
        raise UserError("--min-speedup needs times: give --repeats.")
    agreement, loss = args.min_agreement, args.max_loss
    return Least(
        None if agreement is None else flags.share_of(agreement, "--min-agreement", whole=True),
        args.min_speedup,
        None if loss is None else flags.share_of(loss, "--max-loss", zero=True),
    )


def refuse_worse(told: Study, least: Least) -> None:
    """Fail where a method (no control) is not as good as was asked for.

    Raises:
        CommandError: one is.
    """
    wrong = []
    for line in (line for line in told.lines if not line.entry.control):
        same = line.measures["answer_agrees"].value
        if least.agreement is not None and same < least.agreement:
            wrong.append(f"{line.entry.label}: {same:.3f} of the answers stay the same, under {least.agreement:g}")
        if least.loss is not None and (lost := -line.score.change.value) > least.loss:
            wrong.append(f"{line.entry.label}: the score loses {lost:.3f}, more than {least.loss:g}")
        fast = told.costs[line.entry.label].first["median"] if line.entry.label in told.costs else None
        if least.speedup is not None and fast is not None and fast < least.speedup:
            wrong.append(f"{line.entry.label}: the first token comes {fast:.2f} times as fast, under {least.speedup:g}")
    if wrong:
        raise CommandError("; ".join(wrong))


def asked(args: SimpleNamespace, folder: Path) -> list[Pair]:
    """The prompts about the user's pictures, or about those that come with the model.

    Raises:
        UserError: pictures (or videos) without prompts, or prompts without pictures.
    """
    file, video = args.data or args.prompts, getattr(args, "video", None)
    if video is None and getattr(args, "frames", None) is not None:
        raise UserError("--frames is of videos: name some (--video).")
    if video is not None:
        from vlmprune.runtime import videos

        videos.check_reader()
        if file is None:
            raise UserError("name --prompts (one a line), or --data with answers, to ask about the videos.")
        return read_pairs(video, file, args.limit, frames_of(args))
    if args.images is None and file is None and args.model == "scene-llava":
        return drawn(folder, args.limit)
    if args.images is None or file is None:
        raise UserError(
            "name --images and --prompts (one a line), or --data with answers; without any the model scene-llava is "
            "tried on pictures that come with it."
        )
    return read_pairs(args.images, file, args.limit)


def frames_of(args: SimpleNamespace) -> int:
    """How many frames are read of every video."""
    from vlmprune.runtime.videos import FRAMES

    return args.frames or FRAMES


def drawn(folder: Path, limit: int | None) -> list[Pair]:
    """Pictures with questions and answers that come with the package, written as a user's would be."""
    from vlmprune.eval import testbed

    pictures, lines = folder / "pictures", []
    pictures.mkdir(exist_ok=True)
    for question in testbed.questions("sparse"):
        file = pictures / f"{question.picture_id}.webp"
        if not file.is_file():
            file.write_bytes(question.picture)
        lines.append(json.dumps({"image": file.name, "prompt": question.question, "answer": question.answer}))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_pairs(str(pictures), str(data), limit)


def left_out(names: Sequence[str]) -> str:
    """What to say of pictures that could not be read."""
    few = ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"{counted(len(names), 'picture')} could not be read, and left out: {few}"


def refuse_nothing(skipped: dict[str, str], interrupted: bool) -> None:
    """End where no picture was measured."""
    if interrupted:
        raise KeyboardInterrupt
    name, why = next(iter(skipped.items()))
    raise UserError(f"none of the {counted(len(skipped), 'picture')} could be read, the first of them {name}: {why}")


def entries_of(todo: Sequence[Any], control: bool, seeds: int) -> Iterator[StudyEntry]:
    """One entry per job; `random` runs with several seeds unless one was asked for."""
    from vlmprune.eval.fidelity.measure import StudyEntry

    for job in todo:
        several = job.method == "random" and "seed" not in job.options
        yield StudyEntry(job.method, job.options, control, tuple(range(seeds)) if several else (None,))


def check_prompts(loaded: Loaded, pairs: Sequence[Pair], file: str) -> None:
    """Refuse prompts that place several pictures, and name words that an embedded model does not know."""
    from vlmprune.parts.templates import image_token
    from vlmprune.runtime.loading import unknown_words
    from vlmprune.runtime.status import note

    token, strange = image_token(loaded.processor), {}
    for pair in {pair.prompt: pair for pair in pairs}.values():
        if pair.prompt.count(token) > 1:
            raise UserError(
                f"{file}, line {pair.line}: the prompt has {token} more than once, and is about one picture."
            )
        if loaded.source.embedded:
            strange |= dict.fromkeys(unknown_words(loaded, pair.prompt))
    if strange:
        note(f"{loaded.source.name} does not know these words: {', '.join(strange)}")


def worst_cards(
    loaded: Loaded,
    entry: StudyEntry,
    rows: Sequence[StudyRow],
    pairs: Sequence[Pair],
    count: int,
    labels: Labels | None,
) -> list[Card]:
    """Prefill the worst pictures of an entry once more, each by itself, and draw what was kept."""
    from vlmprune.eval.fidelity.measure import worst
    from vlmprune.eval.fidelity.report import SIDE, Card
    from vlmprune.runtime import draw
    from vlmprune.runtime.answering import guarded, patch, seen_by
    from vlmprune.runtime.loading import model_inputs
    from vlmprune.runtime.status import status
    from vlmprune.runtime.videos import read_visual
    from vlmprune.spec import Job

    files = {pair.picture: (pair.path, pair.frames) for pair in pairs}
    cards = []
    for row in worst((row for row in rows if row.label == entry.label), count, labels):
        status(f"drawing {entry.label}: {printable(row.picture)}")
        image = read_visual(*files[row.picture])
        job = Job(entry.method, entry.seeded(row.seed))
        with patch(loaded, job) as handle:
            inputs = model_inputs(seen_by(loaded, job), [image], row.prompt)
            guarded(lambda inputs=inputs: loaded.model(**inputs, use_cache=True, logits_to_keep=1))
            part = draw.eyes(loaded.processor, handle.trace.grids[0])
            kept = draw.kept_panel(image, handle.trace, part, 0, "", (), SIDE)
        right = () if labels is None else tuple(labels.right(row))
        cards.append(Card(row, draw.plain_panel(image, "", (), SIDE), kept, right))
    status()
    return cards


def setting_of(loaded: Loaded, args: SimpleNamespace) -> dict[str, Any]:
    """What every result hangs on, beside picture, prompt and method."""
    from vlmprune.eval.lmms import fingerprints

    source, model = loaded.source, loaded.model
    return {
        "model": source.name,
        "weights": fingerprints.files(Path(source.place)) if source.local else model.config._commit_hash,
        "adapter": fingerprints.files(Path(source.adapter)) if source.adapter else None,
        "device": model.device.type,
        "dtype": loaded.about["dtype"],
        "max_new_tokens": args.max_new_tokens,
        "versions": flags.versions(),
        **({"frames": frames_of(args)} if getattr(args, "video", None) is not None else {}),
    }


def about_run(loaded: Loaded, verb: str, args: SimpleNamespace, **more: Any) -> dict[str, Any]:
    """What somebody else needs to repeat a run of a verb."""
    return {
        **loaded.about,
        "versions": flags.versions(),
        "command": " ".join(("vlmprune", verb, *quoted(args))),
        "max_new_tokens": args.max_new_tokens,
        "batch": args.batch,
        **more,
    }


def quoted(args: SimpleNamespace) -> Iterator[str]:
    """The flags that mean these arguments; `loss` is another one's value, read."""
    for name, value in vars(args).items():
        if name in ("as_json", "out", "resume", "loss") or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            yield f"--{name.replace('_', '-')} {shlex.quote(str(one))}"


def show(told: Study, files: Sequence[Path], as_json: bool) -> None:
    """Print the table, or JSON."""
    from vlmprune.eval.fidelity import report as fidelity_report
    from vlmprune.runtime.tables import table

    if as_json:
        print(json.dumps(fidelity_report.as_json(told), indent=2))
        print(f"report: {files[0]}", file=sys.stderr)
        return
    header, rows = fidelity_report.table_of(told.lines, told.costs)
    print(f"{told.about['model']}: {told.asked}\n")
    print(table(header, rows, header[2:]))
    scores = "" if told.labels is None else f"scores by {told.labels.metric} in per cent, "
    print(f"\nAgreement in per cent, {scores}KL in nats (per token); in brackets 95 % intervals over pictures.")
    for line in told.lines:
        if not line.entry.control:
            print(fidelity_report.in_words(line, told.pictures))
    print(f"\nreport: {files[0]}")
