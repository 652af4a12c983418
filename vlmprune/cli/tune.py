"""`vlmprune tune`: which method, which budget, for a user's own pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from vlmprune.cli import flags
from vlmprune.cli.fidelity import about_run, check_prompts, entries_of, held, refuse_nothing, setting_of, worst_cards
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.prompts import Pair, read_pairs

if TYPE_CHECKING:
    from vlmprune.eval.tune.report import Result
    from vlmprune.runtime.loading import Loaded
    from vlmprune.spec import Job

__all__ = ["verb"]

KEEP = "0.5,0.35,0.25,0.15,0.1"
LEFT_OUT = ("atp", "downsample")  # for one there are no weights of most models; the other makes nothing faster
EXAMPLES = """\
examples:
  vlmprune tune                                    on pictures and questions that come with vlmprune, a few minutes
  vlmprune tune --images photos --prompts prompts.txt --model llava-hf/llava-1.5-7b-hf --speedup 2 --max-loss 1%
  vlmprune tune --images photos --data data.jsonl --metric anls --speed-of first --methods fopru,vtc_cls,random

--data has one JSON object a line: {"image": "cat.jpg", "prompt": "what is this ?", "answer": "a cat"} (or a list of
answers that count as right): a loss is then of the score by --metric. With --prompts it is of answers that changed.

Hopeless candidates stop after few pictures. Everything is kept as it comes: Ctrl-C stops and reports, and --resume goes
on, with other methods, budgets and pictures too. It ends in report.html, results.json and recipe.yaml, which
vlmprune.patch(model, "recipe.yaml") and --recipe of run, bench, check, eval, fidelity and serve take.

exit codes: 0 done, whatever was found, 1 failed, 2 wrong usage, 130 interrupted
"""


def verb(
    images: Annotated[
        str | None, Option(metavar="DIR", help="folder of pictures, or a pattern (default: those of vlmprune)")
    ] = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help="one prompt a line, or JSON lines")] = None,
    data: Annotated[str | None, Option(metavar="FILE", help="JSON lines with image, prompt and answer")] = None,
    model: flags.Model = "scene-llava",
    speedup: Annotated[float, Option(metavar="X", help="how many times as fast it is to be")] = 2.0,
    max_loss: Annotated[str, Option(metavar="SHARE", help="what may be lost at most (1% or 0.01)")] = "1%",
    speed_of: Annotated[
        Literal["answer", "first"], Option(help="what is to be faster: a whole answer, or the first token")
    ] = "answer",
    metric: Annotated[
        Literal["exact", "contains", "anls", "choice"], Option(help="how answers are compared with those of --data")
    ] = "exact",
    methods: Annotated[
        str, Option(metavar="NAME[,NAME]", help="what is tried; all: whatever fits the model (controls too)")
    ] = "all",
    keep: Annotated[str, Option(metavar="N[,N]", help="budgets that are tried, beside published schedules")] = KEEP,
    option: flags.Options = [],  # noqa: B006
    minutes: Annotated[float, flags.number("end with what there is after so many")] = 30,
    limit: flags.Limit = None,
    repeats: Annotated[int, flags.number("timed pairs of a candidate and the unpruned model", 1)] = 5,
    max_new_tokens: flags.Longest = 64,
    batch: Annotated[int, flags.number("prompts at a time, in timing too", 1)] = 1,
    worst: Annotated[int, flags.number("pictures shown that lost most", 0)] = 6,
    out: Annotated[str, Option(metavar="FOLDER", help="folder for report and recipe")] = "tune-out",
    resume: Annotated[bool, Option("--resume", help="go on with the search in that folder")] = False,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
    as_json: flags.Json = False,
) -> None:
    """Find the method and budget for your own pictures, at a speed and a loss you name.

    Tries methods at budgets on your pictures, few pictures first, and ends in a statement with statistics behind it,
    and a recipe.
    """
    args = SimpleNamespace(**locals())
    flags.one_of(prompts=prompts, data=data)
    if not speedup > 0 or not minutes > 0:
        raise UserError(f"--{'minutes' if speedup > 0 else 'speedup'} must be above 0.")
    args.loss = flags.share_of(max_loss, "--max-loss", whole=False)
    with held(out, "tune", resume) as folder:
        tune(args, folder)


def tune(args: SimpleNamespace, folder: Path) -> None:
    """Check everything that can be checked early, load the model, search, report."""
    budgets, _ = flags.budgets_of(args.keep, None, KEEP)
    options = flags.options_of(args.option)
    names = None if args.methods.strip() == "all" else flags.words_of(args.methods, "--methods")
    pairs = asked(args, folder)
    scored = bool(pairs[0].answers)
    if odd := next((pair for pair in pairs if bool(pair.answers) != scored), None):
        raise UserError(f"{args.data or args.prompts}, line {odd.line}: give an answer to every prompt, or to none.")

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.eval.tune import report
    from vlmprune.eval.tune.run import Goal, Tuning
    from vlmprune.runtime import loading
    from vlmprune.runtime.status import note

    with user_mistakes():
        todo = jobs_of(names, budgets, options)
    loaded = loading.open_model(args.model, args.device, args.dtype)
    entries = list(entries_of(fitting(loaded, todo, named=names is not None), False, 1))
    check_prompts(loaded, pairs, args.data or args.prompts or "the prompts")
    goal = Goal(args.speedup, args.loss, args.speed_of, args.metric)
    search = Tuning(
        loaded, folder, setting_of(loaded, args), pairs, goal, args.batch, args.max_new_tokens, 60 * args.minutes,
        args.repeats,
    )  # fmt: skip
    candidates = search.costs(entries)
    finalists = search.search(candidates)
    if not finalists:
        if search.skipped:
            refuse_nothing(search.skipped, search.interrupted)
        raise UserError("there was no time to measure anything: give more --minutes, fewer --methods or --limit.")
    complete = not search.over and len(candidates) == len(entries)
    about = about_run(loaded, "tune", args, **{"pairs of timed runs": args.repeats})
    result = report.Result(about, goal, scored, candidates, finalists, search.skipped, complete)
    tell(result, loaded, pairs, folder, args)
    if search.interrupted:
        raise KeyboardInterrupt
    if not complete:
        note("time was over before all was measured: --resume goes on")


def asked(args: SimpleNamespace, folder: Path) -> list[Pair]:
    """The prompts about the user's pictures, or about those that come with the model.

    Raises:
        UserError: pictures without prompts, or prompts without pictures.
    """
    file = args.data or args.prompts
    if args.images is None and file is None and args.model == "scene-llava":
        return drawn(folder, args.limit)
    if args.images is None or file is None:
        raise UserError(
            "name --images and --prompts (one a line), or --data with answers; without any the model scene-llava is "
            "tried on pictures that come with it."
        )
    return read_pairs(args.images, file, args.limit)


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


def jobs_of(names: list[str] | None, budgets: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[Job]:
    """The methods at the budgets, and their own published schedules."""
    from vlmprune import registry, spec

    tried = [name for name in registry.names() if name not in LEFT_OUT] if names is None else names
    jobs = spec.jobs(tried, budgets, options, named=False)
    own = [
        name for name in tried if all(getattr(registry.find(part), "optional", False) for part in spec.names_of(name))
    ]
    return [*jobs, *(spec.jobs(own, [{}], options, named=False) if own else [])]


def fitting(loaded: Loaded, todo: Sequence[Job], named: bool) -> list[Job]:
    """The jobs that fit the model; where methods were named, all of them must.

    Raises:
        UserError: one does not, or none does.
    """
    from vlmprune.runtime import answering

    left, why = [], ""
    for job in todo:
        try:
            answering.check(loaded, [job])
            left.append(job)
        except UserError as error:
            if named:
                raise
            why = str(error)
    if not left:
        raise UserError(f"nothing fits the model: {why}")
    return left


def tell(result: Result, loaded: Loaded, pairs: Sequence[Pair], folder: Path, args: SimpleNamespace) -> None:
    """Write report, results and recipe, and print."""
    import io

    from vlmprune.eval.fidelity.report import captioned, sheet_of
    from vlmprune.eval.report import render
    from vlmprune.eval.tune import report
    from vlmprune.runtime.files import write_whole
    from vlmprune.runtime.tables import table

    path, best = folder / "recipe.yaml", result.best
    lines = [report.python_line(result), report.command_line(result), f'vlmprune.patch(model, "{path}")']
    cards = worst_cards(loaded, best.entry, best.rows, pairs, args.worst)
    title = f"Tuning of {result.about['model']}"
    blocks = report.build(result, title, lines, [captioned(card) for card in cards], folder / "worst.png")
    files = render.pages(blocks, title, folder)
    files["results.json"] = (json.dumps(report.as_json(result), indent=1, ensure_ascii=False) + "\n").encode(
        errors=render.ESCAPED
    )
    files[path.name] = report.recipe(result, date.today().isoformat()).text().encode()
    if cards:
        made = io.BytesIO()
        sheet_of(best.label, cards).save(made, "PNG")
        files["worst.png"] = made.getvalue()
    for name, content in files.items():
        write_whole(folder / name, content)
    if args.as_json:
        print(json.dumps(report.as_json(result), indent=2))
        print(f"report: {folder / 'report.html'}", file=sys.stderr)
        return
    header, rows = report.table_of(result)
    print(table(header, rows[: len(result.finalists)], header[2:]))
    print(f"\n{report.verdict_line(result)}\n{report.statement(result, best)}\n")
    print("\n".join(lines))
    print(f"\nreport: {folder / 'report.html'}\nrecipe: {path}")
