"""`vlmprune fidelity`: what pruning changes on the user's own pictures, with and without labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.eval.fidelity import asking
from vlmprune.eval.fidelity.least import Least
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.prompts import Pair, labelled

if TYPE_CHECKING:
    from vlmprune.eval.fidelity.report import Study
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
#: What a run does not hang on; `loss` is another flag's value, read.
NOT_REPEATED = ("as_json", "out", "resume", "loss")


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
    flags.one_of(prompts=prompts, data=data)
    flags.one_of(images=images, video=video)
    args = SimpleNamespace(**locals())
    with asking.held(flags.folder(out), "fidelity", resume) as folder:
        study(args, folder)


def study(args: SimpleNamespace, folder: Path) -> None:
    """Check everything that can be checked early, load the model, measure, report."""
    least, frames = least_of(args), frames_of(args)
    wanted = flags.wanted(args.method, args.keep, args.average, args.option, args.recipe)
    pairs, file = asked(args, folder, frames), file_of(args)
    if not labelled(pairs, file) and (args.data or least.loss is not None):
        raise UserError(f'{file} has no answers: scores need --data with an "answer" in every line.')

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.eval.fidelity import report
    from vlmprune.eval.fidelity import run as fidelity_run
    from vlmprune.eval.fidelity.cards import worst_cards
    from vlmprune.eval.fidelity.costs import CostBook
    from vlmprune.eval.fidelity.journal import Journal, setting_of
    from vlmprune.eval.fidelity.labels import Labels
    from vlmprune.eval.fidelity.measure import entries_of
    from vlmprune.runtime import answering, loading

    todo = wanted.jobs()
    beside = controls_of(args.controls, wanted, todo)
    methods, controls = entries_of(todo, False, args.seeds), entries_of(beside, True, args.seeds)
    loaded = loading.open_model(args.model, args.device, args.dtype, videos=args.video is not None)
    answering.check(loaded, [*todo, *beside])
    asking.check_prompts(loaded, pairs, file)
    labels = Labels.of(pairs, args.metric)

    journal = Journal(folder, setting_of(loaded, args.max_new_tokens, flags.versions(), frames))
    journal.tell_damaged()
    plan = fidelity_run.Todo(journal, [*methods, *controls], pairs)
    skipped: dict[str, str] = {}
    interrupted = fidelity_run.measure(loaded, plan, args.batch, args.max_new_tokens, skipped)
    rows = plan.rows()
    if not rows:
        asking.refuse_nothing(skipped, interrupted)
    book = CostBook(loaded, journal, pairs, args.batch, args.max_new_tokens, args.repeats, skipped)
    costs = {} if interrupted or not args.repeats else book.of_all([*methods, *controls])
    cards = {entry.label: worst_cards(loaded, entry, rows, pairs, args.worst, labels) for entry in methods}
    about = about_run(loaded, "fidelity", args, prompts_skipped=sum(pair.picture in skipped for pair in pairs))
    told = report.Study(about, [*methods, *controls], rows, [*skipped.items()], cards, len(pairs), costs, labels)
    show(told, report.write(folder, told), args.as_json)
    asking.left_out(list(skipped))
    if interrupted:
        raise KeyboardInterrupt
    least.check(told)


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


def frames_of(args: SimpleNamespace) -> int | None:
    """How many frames are read of every video; None where pictures are asked about.

    Raises:
        UserError: frames of pictures.
    """
    if args.video is None and args.frames is not None:
        raise UserError("--frames is of videos: name some (--video).")
    if args.video is None:
        return None
    from vlmprune.runtime.videos import FRAMES

    return args.frames or FRAMES


def file_of(args: SimpleNamespace) -> str:
    """What messages call the file of the prompts."""
    return args.data or args.prompts or "the prompts"


def asked(args: SimpleNamespace, folder: Path, frames: int | None = None) -> list[Pair]:
    """The prompts about pictures, or about videos of so many frames."""
    file = args.data or args.prompts
    if frames is not None:
        return asking.of_videos(args.video, file, args.limit, frames)
    return asking.of_pictures(args.images, file, args.limit, folder, args.model)


def about_run(loaded: Loaded, verb: str, args: SimpleNamespace, **more: Any) -> dict[str, Any]:
    """What somebody else needs to repeat a run of a verb."""
    from vlmprune.eval.report.document import command

    given = {name: value for name, value in vars(args).items() if name not in NOT_REPEATED}
    return {
        **loaded.about,
        "versions": flags.versions(),
        "command": command(verb, given),
        "max_new_tokens": args.max_new_tokens,
        "batch": args.batch,
        **more,
    }


def show(told: Study, files: Sequence[Path], as_json: bool) -> None:
    """Print the table, or JSON."""
    from vlmprune.eval.fidelity.report import as_json as in_json
    from vlmprune.eval.fidelity.tables import in_words, table_of
    from vlmprune.runtime.tables import table

    if as_json:
        print(json.dumps(in_json(told), indent=2))
        print(f"report: {files[0]}", file=sys.stderr)
        return
    header, rows = table_of(told.lines, told.costs)
    print(f"{told.about['model']}: {told.asked}\n")
    print(table(header, rows, header[2:]))
    scores = "" if told.labels is None else f"scores by {told.labels.metric} in per cent, "
    print(f"\nAgreement in per cent, {scores}KL in nats (per token); in brackets 95 % intervals over pictures.")
    for line in told.lines:
        if not line.entry.control:
            print(in_words(line, told.pictures))
    print(f"\nreport: {files[0]}")
