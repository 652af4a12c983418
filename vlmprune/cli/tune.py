"""`vlmprune tune`: which method, which budget, for a user's own pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import date
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from vlmprune.cli import flags
from vlmprune.cli.fidelity import (
    about_run,
    asked,
    check_prompts,
    entries_of,
    held,
    refuse_nothing,
    setting_of,
    worst_cards,
)
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.prompts import Pair, labelled
from vlmprune.runtime.tables import counted

if TYPE_CHECKING:
    from vlmprune.eval.fidelity.measure import StudyEntry
    from vlmprune.eval.tune.calibrate import Trial
    from vlmprune.eval.tune.report import Result
    from vlmprune.eval.tune.run import Tuning
    from vlmprune.parts.options import Range
    from vlmprune.runtime.loading import Loaded
    from vlmprune.spec import Job

__all__ = ["verb"]

KEEP = "0.5,0.35,0.25,0.15,0.1"
OWN = "0.25"  # of --method
#: What methods look at (`Method.looks_at`), in the order in which they are tried, should time be short.
ORDER = ("tower", "nothing", "features", "question", "decoder", "")
#: What --methods all does not try, and why; who names them gets them.
LEFT_OUT = {
    "atp": "its modules are trained for one model: --methods atp --option weights=FOLDER.",
    "downsample": "on most models it takes detail away and no token: --methods downsample tries it all the same.",
}
EXAMPLES = """\
examples:
  vlmprune tune --minutes 5                        on pictures and questions that come with vlmprune
  vlmprune tune --images photos --prompts prompts.txt --model llava-hf/llava-1.5-7b-hf --speedup 2 --max-loss 1%
  vlmprune tune --images photos --data data.jsonl --metric anls --speed-of first --methods fopru,vtc_cls,random

  vlmprune tune --method vflowopt --average 0.25 --images photos --prompts prompts.txt         its own options
                                                                             (pip install 'vlmprune[tune]')
--data has one JSON object a line: {"image": "cat.jpg", "prompt": "what is this ?", "answer": "a cat"} (or a list of
answers that count as right): a loss is then of the score by --metric. With --prompts it is of answers that changed.

Hopeless candidates stop after few pictures. Everything is kept as it comes: Ctrl-C stops and reports, and --resume goes
on, with other methods, budgets and pictures too. It ends in report.html, results.json and recipe.yaml, which
vlmprune.patch(model, "recipe.yaml") and --recipe of run, bench, check, eval, fidelity and serve take.

exit codes: 0 done, whatever was found, 1 failed, 2 wrong usage, 130 interrupted
"""


def verb(
    images: flags.Images = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help="one prompt a line, or JSON lines")] = None,
    data: flags.Data = None,
    model: flags.Model = "scene-llava",
    speedup: Annotated[float, Option(metavar="X", help="how many times as fast it is to be")] = 2.0,
    max_loss: Annotated[str, Option(metavar="SHARE", help="what may be lost at most (1% or 0.01)")] = "1%",
    speed_of: Annotated[
        Literal["answer", "first"], Option(help="what is to be faster: a whole answer, or the first token")
    ] = "answer",
    metric: flags.Metric = "exact",
    methods: Annotated[
        str | None,
        Option(metavar="NAME[,NAME]", help="what is tried; all (the default): whatever fits the model, controls too"),
    ] = None,
    method: Annotated[
        str | None, Option(metavar="NAME", help="search this method's own options instead, those that have a range")
    ] = None,
    trials: Annotated[int, flags.number("how many of them --method tries at each budget", 1)] = 40,
    keep: Annotated[
        str | None,
        Option(metavar="N[,N]", help=f"budgets that are tried, beside published schedules (default: {KEEP})"),
    ] = None,
    average: flags.Average = None,
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
    flags.one_of(methods=methods, method=method)
    if not speedup > 0 or not minutes > 0:
        raise UserError(f"--{'minutes' if speedup > 0 else 'speedup'} must be above 0.")
    args.loss = flags.share_of(max_loss, "--max-loss")
    with held(out, "tune", resume) as folder:
        tune(args, folder)


def tune(args: SimpleNamespace, folder: Path) -> None:
    """Check everything that can be checked early, load the model, search, report."""
    options = flags.options_of(args.option)
    names = None if (args.methods or "all").strip() == "all" else flags.words_of(args.methods, "--methods")
    pairs = asked(args, folder)
    scored = labelled(pairs, args.data or args.prompts)

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.eval.tune import report
    from vlmprune.eval.tune.run import Goal, Tuning
    from vlmprune.runtime import loading
    from vlmprune.runtime.status import note

    with user_mistakes():
        if args.method is None:
            budgets, _ = flags.budgets_of(args.keep, args.average, KEEP)
            todo, refused = jobs_of(names, budgets, options)
        else:
            searched, todo, refused = *searched_of(args, options), {}
    loaded = loading.open_model(args.model, args.device, args.dtype)
    entries = list(
        entries_of(fitting(loaded, todo, refused, named=names is not None or args.method is not None), False, 1)
    )
    check_prompts(loaded, pairs, args.data or args.prompts or "the prompts")
    goal = Goal(args.speedup, args.loss, args.speed_of, args.metric)
    search = Tuning(
        loaded, folder, setting_of(loaded, args), pairs, goal, args.batch, args.max_new_tokens, 60 * args.minutes,
        args.repeats,
    )  # fmt: skip
    trials: list[Trial] = []
    if args.method is None:
        candidates = search.costs(entries)
        finalists = search.search(candidates)
    else:
        trials, entries, pictures = calibrated(search, entries, searched, args.trials)
        candidates = search.costs(entries)
        search.measure(candidates, pictures, 1)
        finalists = search.judged(candidates)
    if not finalists:
        if search.interrupted:
            raise KeyboardInterrupt
        if search.skipped:
            refuse_nothing(search.skipped, search.interrupted)
        raise UserError("there was no time to measure anything: give more --minutes, fewer --methods or --limit.")
    complete = not search.over and not search.untimed and len(trials) in (0, len(todo) * (1 + args.trials))
    about = about_run(loaded, "tune", args, **{"pairs of timed runs": args.repeats})
    for name, why in search.refused.items():
        refused.setdefault(name, []).extend(why)
    result = report.Result(about, goal, scored, candidates, finalists, search.skipped, refused, complete, trials)
    tell(result, loaded, pairs, folder, args)
    if search.interrupted:
        raise KeyboardInterrupt
    if not complete:
        few = f", {counted(len(search.untimed), 'candidate')} not tried at all" if search.untimed else ""
        note(f"time was over before all was measured{few}: --resume goes on")


def searched_of(args: SimpleNamespace, options: dict[str, Any]) -> tuple[dict[str, Range], list[Job]]:
    """The options of --method that are searched, and the method at its budgets: an average, which holds the cost.

    Raises:
        UserError: it has none that are not given.
    """
    from vlmprune import registry, spec
    from vlmprune.eval.tune.calibrate import optuna
    from vlmprune.parts.options import ranges

    cls = registry.find(args.method)
    found = {name: one for name, one in ranges(cls).items() if name not in options}
    if not found:
        some = [name for name, other in registry.registered().items() if ranges(other)]
        raise UserError(f"{args.method} has no option with a range left to search. Who has some: {', '.join(some)}.")
    optuna()  # or what is missing
    own = {"keep": args.keep, "average": args.average}
    if args.keep is None and args.average is None:
        own["average" if "average" in registry.options(cls) else "keep"] = OWN
    return found, spec.jobs([args.method], flags.budgets_of(**own, default=OWN)[0], options)


def calibrated(
    search: Tuning, entries: Sequence[StudyEntry], searched: dict[str, Range], count: int
) -> tuple[list[Trial], list[StudyEntry], Sequence[str]]:
    """The trials of every budget, the best of them, and the pictures to judge them by."""
    from vlmprune.eval.tune.calibrate import best, calibrate, split

    seen, others = split(search.pictures)
    trials, chosen = [], []
    for entry in entries:
        if found := calibrate(search, entry, searched, count, seen):
            trials += found
            chosen += best(found)
    return trials, chosen, others


def jobs_of(
    names: list[str] | None, budgets: Sequence[dict[str, Any]], options: dict[str, Any]
) -> tuple[list[Job], dict[str, list[str]]]:
    """The methods at the budgets and their own published schedules; and of all methods those left out, with reasons."""
    from vlmprune import registry, spec

    if names is not None:
        return of_methods(names, budgets, options), {}
    jobs, classes, refused = {}, {}, {name: [why] for name, why in LEFT_OUT.items()}
    for name in registry.names():
        try:
            classes[name] = registry.find(name)
        except ValueError as error:  # of another package
            refused[name] = [str(error)]
    spec.check_known(options, {name: {name: cls} for name, cls in classes.items()})
    for name, cls in sorted(classes.items(), key=lambda item: (*ORDER, item[1].looks_at).index(item[1].looks_at)):
        mine = {key: value for key, value in options.items() if spec.takers(key, {name: cls})}
        try:
            jobs[name] = of_methods([name], budgets, mine) if name not in LEFT_OUT else []
        except (TypeError, ValueError, FileNotFoundError) as error:  # it needs an option, or a file
            refused[name] = [str(error)]
    by_budget = zip_longest(*jobs.values())  # should time be short, all methods were tried at some
    return [job for some in by_budget for job in some if job is not None], refused


def of_methods(names: Sequence[str], budgets: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[Job]:
    """The jobs of methods."""
    from vlmprune import registry, spec

    jobs = spec.jobs(names, budgets, options, named=False)
    own = [
        name for name in names if all(getattr(registry.find(part), "optional", False) for part in spec.names_of(name))
    ]
    return [*jobs, *(spec.jobs(own, [{}], options, named=False) if own else [])]


def fitting(loaded: Loaded, todo: Sequence[Job], refused: dict[str, list[str]], named: bool) -> list[Job]:
    """The jobs that fit the model; where methods were named, all of them must.

    Args:
        refused: gets the methods of the others, and why.

    Raises:
        UserError: one does not, or none does.
    """
    from vlmprune.runtime import answering
    from vlmprune.runtime.status import note

    left = []
    for job in todo:
        try:
            answering.check(loaded, [job])
            left.append(job)
        except UserError as error:
            if named:
                raise
            told = refused.setdefault(job.method, [])
            if (why := str(error)) not in told:
                told.append(why)
    if not left:
        raise UserError(f"nothing fits the model: {list(refused.values())[-1][-1]}")
    for name, why in refused.items():
        note(f"left out: {name}: {' '.join(why)}")
    return left


def tell(result: Result, loaded: Loaded, pairs: Sequence[Pair], folder: Path, args: SimpleNamespace) -> None:
    """Write report, results and recipe, and print."""
    import io

    from vlmprune.eval.fidelity.labels import Labels
    from vlmprune.eval.fidelity.report import captioned, sheet_of
    from vlmprune.eval.report import render
    from vlmprune.eval.tune import report
    from vlmprune.runtime.files import write_whole
    from vlmprune.runtime.tables import OVERHEAD, table

    path, best = folder / "recipe.yaml", result.best
    lines = [report.python_line(result), report.command_line(result), f'vlmprune.patch(model, "{path}")']
    labels = Labels.of(pairs, args.metric)
    cards = worst_cards(loaded, best.entry, best.rows, pairs, args.worst, labels)
    title = f"Tuning of {result.about['model']}"
    blocks = report.build(result, title, lines, [captioned(card) for card in cards], folder)
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
    if loaded.source.embedded:
        print(f"\n{OVERHEAD}")
    print(f"\nreport: {folder / 'report.html'}\nrecipe: {path}")
