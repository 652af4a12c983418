"""`vlmprune tune`: which method, which budget, for a user's own pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from vlmprune.cli import flags
from vlmprune.cli.fidelity import about_run, asked, file_of
from vlmprune.eval.fidelity import asking
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.prompts import labelled
from vlmprune.runtime.tables import OVERHEAD, table

if TYPE_CHECKING:
    from vlmprune.eval.tune.candidates import Tried
    from vlmprune.eval.tune.report import Result

__all__ = ["verb"]

KEEP = "0.5,0.35,0.25,0.15,0.1"
OWN = "0.25"  # of --method
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
    flags.one_of(prompts=prompts, data=data)
    flags.one_of(methods=methods, method=method)
    if not speedup > 0 or not minutes > 0:
        raise UserError(f"--{'minutes' if speedup > 0 else 'speedup'} must be above 0.")
    args = SimpleNamespace(**locals())
    args.loss = flags.share_of(max_loss, "--max-loss")
    with asking.held(flags.folder(out), "tune", resume) as folder:
        tune(args, folder)


def tune(args: SimpleNamespace, folder: Path) -> None:
    """Check everything that can be checked early, load the model, search, report."""
    flags.options_of(args.option)
    pairs, file = asked(args, folder), file_of(args)
    scored = labelled(pairs, file)

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.eval.fidelity.journal import setting_of
    from vlmprune.eval.fidelity.measure import entries_of
    from vlmprune.eval.tune import report
    from vlmprune.eval.tune.calibrate import search_options
    from vlmprune.eval.tune.run import Goal, Tuning
    from vlmprune.runtime import loading
    from vlmprune.runtime.status import note

    with user_mistakes():
        tried = tried_of(args)
    loaded = loading.open_model(args.model, args.device, args.dtype)
    entries = entries_of(tried.fitting(loaded), False, 1)
    asking.check_prompts(loaded, pairs, file)
    goal = Goal(args.speedup, args.loss, args.speed_of, args.metric)
    setting = setting_of(loaded, args.max_new_tokens, flags.versions())
    search = Tuning(
        loaded, folder, setting, pairs, goal, args.batch, args.max_new_tokens, 60 * args.minutes, args.repeats
    )
    if tried.ranges:
        trials, candidates, finalists = search_options(search, entries, tried.ranges, args.trials)
    else:
        trials, candidates = [], search.costs(entries)
        finalists = search.search(candidates)
    if not finalists:
        search.refuse_nothing()
    tried.refuse_all(search.refused)
    complete = search.complete and len(trials) in (0, len(entries) * (1 + args.trials))
    about = about_run(loaded, "tune", args, **{"pairs of timed runs": args.repeats})
    found = report.Result(about, goal, scored, candidates, finalists, search.skipped, tried.refused, complete, trials)
    report.write(found, loaded, pairs, args.worst, folder)
    tell(found, folder, args.as_json, tiny=loaded.source.embedded)
    if search.interrupted:
        raise KeyboardInterrupt
    if not complete:
        note(f"time was over before all was measured{search.told_untimed()}: --resume goes on")


def tried_of(args: SimpleNamespace) -> Tried:
    """What the flags ask to try: all methods, some, or one with its options, at budgets.

    Raises:
        UserError, ValueError, TypeError: an unknown method or option, or a bad value.
    """
    from vlmprune import registry
    from vlmprune.eval.tune import candidates

    options, budgets = flags.options_of(args.option), {"keep": args.keep, "average": args.average}
    if args.method is None:
        amounts, _ = flags.budgets_of(**budgets, default=KEEP)
        names = (args.methods or "all").strip()
        if names == "all":
            return candidates.all_methods(amounts, options)
        return candidates.some_methods(flags.words_of(names, "--methods"), amounts, options)
    if args.keep is None and args.average is None:  # an average holds the cost
        word = "average" if "average" in registry.options(registry.find(args.method)) else "keep"
        budgets[word] = OWN
    return candidates.own_options(args.method, flags.budgets_of(**budgets, default=OWN)[0], options)


def tell(found: Result, folder: Path, as_json: bool, tiny: bool) -> None:
    """Print what was found, and where it lies."""
    from vlmprune.eval.tune import report

    page, recipe = folder / report.PAGE, folder / report.RECIPE
    if as_json:
        print(json.dumps(report.as_json(found), indent=2))
        print(f"report: {page}", file=sys.stderr)
        return
    header, rows = report.table_of(found)
    print(table(header, rows[: len(found.finalists)], header[2:]))
    print(f"\n{report.verdict_line(found)}\n{report.statement(found, found.best)}\n")
    print("\n".join(report.ways(found, recipe)))
    if tiny:
        print(f"\n{OVERHEAD}")
    print(f"\nreport: {page}\nrecipe: {recipe}")
