"""`vlmprune bench`: where the time of a pruned model goes, and how near it comes to what is possible."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from vlmprune import spec
from vlmprune.cli import bench_serving, flags
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.files import check_writable, has_content, write_whole

if TYPE_CHECKING:
    from vlmprune.spec import Job

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune bench --quick                                    two methods on a small random model, a minute or two
  vlmprune bench --shape llava-1.5-7b --device cuda --method fopru,random --keep 64,128 --batch 1,8
  vlmprune bench --model llava-hf/llava-v1.6-mistral-7b-hf --device cuda --json new.json --html new.html
  vlmprune bench --compare old.json                         the same again: what changed?
  vlmprune bench --from new.json --compare old.json         two files, nothing is run
  vlmprune bench --selection                                greedy selection alone
  vlmprune bench --engine vllm --method vtc_cls --keep 144,64 --concurrency 1,8,32      requests served by vLLM

shapes, with random weights made on the device (no download): llava-1.5-7b, llava-next-7b, llava-onevision-7b,
qwen2.5-vl-7b, qwen3-vl-8b, internvl3.5-8b, scene-llava, small (the default: a 0.3 B language model for two CPU cores),
small-half (half of that, the default of --engine), small-next (small with five views), small-half-next (small-half with
five views of fewer patches), and small-qwen2.5-vl, small-qwen3-vl and small-internvl (0.2 B language models).
Prompts are random text around one random picture: times do not depend on what it shows.
"""


CELLS = ("method", "keep", "average", "option", "batch")  # the flags that say which cells there are
WRITTEN = ("json", "csv", "plot", "html")
#: Flags that say that no model is measured, what happens instead, and the flags that count then.
INSTEAD = {
    "selection": ("times greedy selection alone", {"json", "device", "pairs", "quick", "kernels"}),
    "source": ("measures nothing", {"csv", "plot", "html", "compare"}),
    "engine": ("serves requests", bench_serving.USED),
}


def file(text: str) -> Any:
    """A flag that takes a file."""
    return Option(metavar="FILE", help=text)


def verb(
    model: Annotated[str | None, flags.MODEL] = None,
    shape: Annotated[
        str | None, Option(metavar="NAME", help="an architecture with random weights (default: small)")
    ] = None,
    method: flags.SomeMethods = None,
    keep: Annotated[
        str | None,
        Option(
            metavar="N[,N]",
            help="patches per image (64, the default), a fraction (0.1, 10%), or none: the method's own schedule",
        ),
    ] = None,
    average: flags.Average = None,
    option: flags.Options = [],  # noqa: B006
    recipe: flags.Recipe = None,
    batch: Annotated[str | None, Option(metavar="N[,N]", help="prompts at a time (default: 1)")] = None,
    prompt_tokens: Annotated[int | None, flags.number("text tokens of a prompt (default: 60)", 2)] = None,
    new_tokens: Annotated[
        int | None, flags.number("tokens of an answer, 1 for the first alone (default: 32)", 1)
    ] = None,
    device: Annotated[str | None, flags.DEVICE] = None,
    dtype: Annotated[flags.DTypes | None, flags.DTYPE] = None,
    pairs: Annotated[int | None, flags.number("pairs of (pruned, oracle) first tokens (default: 15)", 1)] = None,
    plain_runs: Annotated[int | None, flags.number("unpruned first tokens among them (default: 3)", 1)] = None,
    stage_runs: Annotated[int | None, flags.number("runs with stamps (default: 3)", 1)] = None,
    sizes: Annotated[
        int | None, flags.number("draw N picture sizes too, and tell what a new one costs (default: none)", 1)
    ] = None,
    kernels: Annotated[
        Literal["auto", "torch", "triton", "cuda"] | None,
        Option(help="implementation of the operators (default: auto, or what VLMPRUNE_KERNELS says)"),
    ] = None,
    quick: Annotated[
        bool, Option("--quick", help="fewer runs: 5 pairs, 5 unpruned, 1 with stamps, 16 new tokens")
    ] = False,
    json: Annotated[str | None, file("write everything as JSON, after each cell")] = None,
    resume: Annotated[bool, Option("--resume", help="measure only what the file of --json lacks")] = False,
    csv: Annotated[str | None, file("write one line per cell")] = None,
    plot: Annotated[str | None, file("draw time against tokens, with the oracle's line")] = None,
    html: Annotated[str | None, file("write a page: in words, as a plot, in tables that sort")] = None,
    compare: Annotated[
        str | None, file("show what changed since these results; settings not given are those of that file")
    ] = None,
    source: Annotated[
        str | None, Option("--from", metavar="FILE", help="take results from a file and measure nothing")
    ] = None,
    selection: Annotated[
        bool, Option("--selection", help="time greedy selection alone against published loops")
    ] = False,
    engine: Annotated[Literal["vllm"] | None, Option(help="serve requests in an engine instead")] = None,
    concurrency: Annotated[
        str | None, Option(metavar="N[,N]", help="with --engine: requests in flight (default: 1,8,32)")
    ] = None,
) -> None:
    """Measure time, memory and FLOPs of pruned models, stage by stage, beside what is possible.

    The first token and the decoding, in interleaved runs beside the unpruned model and an oracle that knows beforehand
    which tokens stay. Without --method: fopru,random; on a GPU shapes are bfloat16.
    """
    args = SimpleNamespace(**locals())
    args.family = None
    flags.one_of(model=model, shape=shape)
    flags.one_of(keep=keep, average=average)
    if made := flags.alone(recipe, method=method, keep=keep, average=average, option=option):
        say_recipe(args, made)
    refuse_idle_flags(args)
    check_paths(args)
    if selection:
        return time_selection(args)
    if engine:
        return bench_serving.time_serving(args)

    from vlmprune import kernels as ops
    from vlmprune.eval.bench import asked as settings
    from vlmprune.eval.bench import run

    old = run.read_results(compare) if compare else None
    if source:
        found = run.read_results(source)
    else:
        names = None if args.method is None else flags.words_of(args.method, "--method")
        asked = settings.settings_of(given_by(args), old, quick, names)
        with ops.use(asked["kernels"]):
            found = run.measured(wanted(args, asked, old), asked, json, sizes)
    tell(args, found, old)


def tell(args: SimpleNamespace, found: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Print what was found and what changed, and write the files that were asked for."""
    from vlmprune.eval.bench import compare, page, plot, report, results, run
    from vlmprune.eval.bench.asked import asked_in
    from vlmprune.runtime.status import show

    show(report.as_text(found))
    for path, how in ((args.csv, results.write_csv), (args.plot, plot.plot)):
        if path:
            run.write(path, lambda target, how=how: how(found, target), told=True)
    changed = None
    if old is not None:
        changed = args.compare, compare.changes(old, found), compare.differing_settings(old, found)
        print(f"\nChanges since {args.compare}\n\n{report.changes_text(*changed[1:])}")
    if args.html:
        told = page.page(found | {"asked": asked_in(found)}, changed)
        run.write(args.html, lambda target: write_whole(target, told), told=True)


def time_selection(args: SimpleNamespace) -> None:
    """Time greedy selection alone and print it."""
    from vlmprune.eval.bench import asked, report, results, run, selection
    from vlmprune.runtime import loading
    from vlmprune.runtime.status import show

    usual = (asked.QUICK if args.quick else asked.DEFAULTS)["pairs"]
    device, kernels = loading.pick_device(args.device or "auto"), asked.known_kernels(args.kernels)
    found = selection.measured(device, args.pairs or usual, kernels)
    show(report.selection_text(found["selection"]))
    if args.json:
        run.write(args.json, lambda path: results.write_json(found, path))


def say_recipe(args: SimpleNamespace, made: Job) -> None:
    """Put the flags that mean a recipe in its place: results keep what they were asked for in flags."""
    from vlmprune.eval.bench.asked import option_texts

    budgets = {word: str(made.options[word]) for word in spec.BUDGETS if word in made.options}
    vars(args).update({"keep": None if budgets else "none"} | budgets)
    args.method, args.option = made.method, option_texts(made.options)
    args.recipe, args.family = None, made.family


def given_by(args: SimpleNamespace) -> dict[str, Any]:
    """The flags that somebody typed."""
    return {k: v for k, v in vars(args).items() if v is not None and v is not False and v != []}


def refuse_idle_flags(args: SimpleNamespace) -> None:
    """Refuse flags that would have no effect.

    Raises:
        UserError: there are some.
    """
    given = given_by(args)
    for mode, (what, used) in INSTEAD.items():
        idle = sorted(set(given) - used - {mode})
        if mode in given and idle:
            raise UserError(f"{flags.flag(mode)} {what}: {', '.join(map(flags.flag, idle))} would have no effect.")
    if args.concurrency and not args.engine:
        raise UserError("--concurrency is of --engine vllm.")
    if args.resume and not args.json:
        raise UserError("--resume needs the --json file to go on with.")


def wanted(args: SimpleNamespace, asked: dict[str, Any], old: dict[str, Any] | None) -> list[tuple[Job, int]]:
    """Jobs and batch sizes, those of one batch together: the cells of the old results unless a flag names others.

    Methods without a budget are one job each, unless a budget was named for them alone.

    Raises:
        UserError: an unknown method or option, or a bad value.
    """
    from vlmprune.eval.bench.asked import again, word_of

    if old is not None and old["cells"] and not set(CELLS) & set(given_by(args)):
        return again(old["cells"])
    word = word_of(asked)
    methods = flags.words_of(asked["method"], "--method")
    budgets = [budget_of(text, word) for text in flags.words_of(asked[word], f"--{word}")]
    options = flags.options_of(asked["option"])
    batches = flags.whole_numbers(asked["batch"], "--batch")
    with user_mistakes():
        todo = spec.jobs(methods, budgets, options, named=False)
        if getattr(args, word) is not None and idle(budgets, word, todo):
            todo = spec.jobs(methods, budgets, options)  # says whose budget this cannot be
    return [(replace(job, family=args.family), batch) for batch in batches for job in todo]


def idle(budgets: list[dict[str, Any]], word: str, todo: list[Job]) -> bool:
    """Whether there are budgets, and no job has one of them."""
    amounts = [budget[word] for budget in budgets if budget]
    return bool(amounts) and not any(job.options.get(word) in amounts for job in todo)


def budget_of(text: str, word: str) -> dict[str, Any]:
    """A budget of --keep or --average; `none` is the method's own."""
    with user_mistakes():
        return {} if text == "none" else {word: spec.read_budget(text, word)}


def paths_of(args: SimpleNamespace, names: Sequence[str]) -> dict[str, str]:
    """What was given of some flags that name files."""
    return {flags.flag(name): getattr(args, name) for name in names if getattr(args, name) is not None}


def real(path: str) -> str:
    """Where a path leads."""
    return os.path.realpath(Path(path).expanduser())


def check_paths(args: SimpleNamespace) -> None:
    """Find out before the work whether the files can be written, and that none takes the place of another.

    Raises:
        UserError: they cannot, or results are there already and nobody said --resume.
    """
    taken = {real(path): flag for flag, path in paths_of(args, ("source", "compare")).items()}
    for flag, path in paths_of(args, WRITTEN).items():
        check_writable(path, flag)
        if (other := taken.setdefault(real(path), flag)) != flag:
            raise UserError(f"{other} and {flag} name the same file, {path}.")
    if args.plot:
        from vlmprune.eval.bench.plot import check_plot

        check_plot(args.plot)
    if args.json and not args.resume and has_content(args.json):
        way = "" if args.selection else "--resume goes on with it, or "
        raise UserError(f"{args.json} exists, and nothing is overwritten: {way}name another file.")
