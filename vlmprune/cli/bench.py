"""`vlmprune bench`: where the time of a pruned model goes, and how near it comes to what is possible."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.cli.errors import CommandError, UserError, brief

if TYPE_CHECKING:
    from vlmprune.cli.loading import Loaded

__all__ = ["add_to"]

EXAMPLES = """\
examples:
  vlmprune bench --quick                                    two methods on a small random model, a minute or two
  vlmprune bench --shape llava-1.5-7b --device cuda --method fopru,random --keep 64,128 --batch 1,8
  vlmprune bench --model llava-hf/llava-v1.6-mistral-7b-hf --device cuda --json new.json --plot new.png
  vlmprune bench --compare old.json                         the same again: what changed?
  vlmprune bench --from new.json --compare old.json         two files, nothing is run
  vlmprune bench --selection                                greedy selection alone

shapes, with random weights made on the device (no download): llava-1.5-7b, llava-next-7b, llava-onevision-7b,
scene-llava, small (the default: a 0.3 B language model for two CPU cores), small-next (the same with five views).
Prompts are random text around one random picture: times do not depend on what it shows.
"""

#: What a run does if neither a flag nor the file of --compare says otherwise.
DEFAULTS: dict[str, Any] = {
    "method": "fopru,random",
    "keep": "64",
    "batch": "1",
    "prompt_tokens": 60,
    "new_tokens": 32,
    "device": "auto",
    "dtype": "auto",
    "pairs": 15,
    "plain_runs": 3,
    "stage_runs": 3,
}
QUICK = {"pairs": 5, "plain_runs": 1, "stage_runs": 1, "new_tokens": 16}


def add_to(verbs: Any) -> None:
    """Add this verb's parser."""
    made = verbs.add_parser(
        "bench",
        help="time, memory and FLOPs of pruned models, stage by stage, beside what is possible",
        description=(
            "Measure the first token and the decoding of pruned models, stage by stage, in interleaved runs beside the "
            "unpruned model and an oracle that knows beforehand which tokens stay."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    what = made.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="NAME", help="embedded model, folder or hub id")
    what.add_argument("--shape", metavar="NAME", help="an architecture with random weights (default: small)")
    add("--method", metavar="NAME[,NAME]", help=f"methods (default: {DEFAULTS['method']})")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep", metavar="N[,N]", help="patches per image (64), or a fraction (0.1, 10%%); default: 64"
    )
    budget.add_argument("--average", metavar="N[,N]", help="the same as a mean over all decoder layers")
    add("--option", action="append", metavar="KEY=VALUE", help="an option of the methods that have it; may be repeated")
    add("--batch", metavar="N[,N]", help="prompts at a time (default: 1)")
    add("--prompt-tokens", type=int, metavar="N", help="text tokens of a prompt (default: 60)")
    add("--new-tokens", type=int, metavar="N", help="tokens of an answer, 1 for the first alone (default: 32)")
    add("--device", help="cpu, cuda, cuda:N or auto (the default)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on a CPU; on a GPU the checkpoint's own, bfloat16 for shapes (the default)",
    )
    add("--pairs", type=int, metavar="N", help="pairs of (pruned, oracle) first tokens (default: 15)")
    add("--plain-runs", type=int, metavar="N", help="unpruned first tokens among them (default: 3)")
    add("--stage-runs", type=int, metavar="N", help="runs with stamps (default: 3)")
    add("--quick", action="store_true", help="fewer runs: 5 pairs, 1 unpruned, 1 with stamps, 16 new tokens")
    add("--json", metavar="FILE", help="write everything as JSON, after each cell")
    add("--resume", action="store_true", help="measure only what the file of --json lacks")
    add("--csv", metavar="FILE", help="write one line per cell")
    add("--plot", metavar="FILE", help="draw time against tokens, with the oracle's line")
    add("--compare", metavar="OLD.json", help="show what changed; settings not given are those of that file")
    add("--from", dest="source", metavar="FILE.json", help="take results from a file and measure nothing")
    add("--selection", action="store_true", help="time greedy selection alone (2880 -> 320) against the textbook loop")
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Measure or read results; print, write, draw and compare them."""
    for name in ("json", "csv", "plot"):
        check_writable(getattr(args, name), f"--{name}")
    if args.selection:
        return run_selection(args)
    if args.resume and not args.json:
        raise UserError("--resume needs the --json file to go on with.")
    if args.source and args.json:
        raise UserError("--from measures nothing: there is nothing to write to --json.")

    from vlmprune.cli import bench_report

    old = read_results(args.compare) if args.compare else None
    results = read_results(args.source) if args.source else measured(args, settings_of(args, old))
    print(bench_report.as_text(results))
    write_extras(args, results)
    if old is not None:
        from vlmprune.eval.bench import compare

        changes, differing = compare.changes(old, results), compare.differing_settings(old, results)
        print(f"\nChanges since {args.compare}\n\n{bench_report.changes_text(changes, differing)}")


def settings_of(args: argparse.Namespace, old: dict[str, Any] | None) -> dict[str, Any]:
    """All settings: the flags given, else those of the old results, else the defaults.

    Raises:
        UserError: a number out of range.
    """
    settings = DEFAULTS | {"shape": "small", "model": None, "average": None, "option": []}
    settings |= QUICK if args.quick else {}
    if old is not None:
        settings |= {name: value for name, value in old["asked"].items() if name in settings}
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    for one, other in (("model", "shape"), ("shape", "model"), ("keep", "average"), ("average", "keep")):
        if one in given:
            settings[other] = None
    settings |= given
    least = {"prompt_tokens": 2, "new_tokens": 1, "pairs": 1, "plain_runs": 1, "stage_runs": 1}
    for name, low in least.items():
        if settings[name] < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}.")
    for name in ("plain_runs", "stage_runs"):  # they stand beside pairs
        settings[name] = min(settings[name], settings["pairs"])
    return settings


def measured(args: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    """Build or load the model and measure every cell that is wanted."""
    from vlmprune.cli import answering, loading
    from vlmprune.cli.run import parse_budget, parse_option, words_of
    from vlmprune.cli.status import note, status

    word = "keep" if asked["average"] is None else "average"
    budgets = [{word: parse_budget(text, word)} for text in words_of(asked[word], f"--{word}")]
    options = dict(parse_option(text) for text in asked["option"])
    batches = [batch_size(text) for text in words_of(asked["batch"], "--batch")]
    device = loading.pick_device(asked["device"])
    todo = answering.jobs(words_of(asked["method"], "--method"), budgets, options)

    from vlmprune.eval.bench import results as store
    from vlmprune.eval.bench.measure import Effort, measure_method, measure_unpruned
    from vlmprune.eval.bench.workload import make_workload

    loaded = subject(asked, device)
    answering.check(loaded, todo)
    effort = Effort(asked["pairs"], asked["plain_runs"], asked["stage_runs"], asked["new_tokens"])
    works = {batch: make_workload(loaded.model, batch, asked["prompt_tokens"]) for batch in batches}
    visual = works[batches[0]].visual
    check_length(loaded, works[batches[0]].length + asked["new_tokens"])
    found = {
        "bench": store.SCHEMA,
        "asked": asked,
        "settings": {
            "model": loaded.source.name,
            "device": device,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "prompt_tokens": asked["prompt_tokens"],
            "new_tokens": asked["new_tokens"],
        },
        "machine": store.describe_machine(device),
        "model": {
            "description": loaded.description.partition("), ")[0] + ")",
            "random_weights": asked["model"] is None,
            "visual": visual,
        },
        "unpruned": [],
        "cells": [],
    }
    if args.resume and Path(args.json).expanduser().exists():
        found = resumed(found, args.json)

    def tell(who: str) -> Callable[[str], None]:
        return lambda text: status(f"{who}: {text}")

    def unpruned(batch: int) -> dict[str, Any]:
        return answering.guarded(measure_unpruned, works[batch], effort, tell(f"batch {batch}"))

    def one(job: answering.Job, batch: int, base: dict[str, Any]) -> dict[str, Any]:
        handle = answering.patch(loaded, job)
        cell = answering.guarded(
            measure_method, works[batch], handle, base, effort, tell(f"{job.label}, batch {batch}")
        )
        over, first = cell["overhead"], cell["first_token_ms"]
        note(
            f"{job.label}, batch {batch}: {first['unpruned']['median']:.0f} -> {first['pruned']['median']:.0f} ms, "
            f"overhead {over['median']:.3f}"
        )
        return cell

    def save(now: dict[str, Any]) -> None:
        if args.json:
            write(args.json, lambda path: store.write_json(now, path))

    store.run_grid(found, [(job, batch) for batch in batches for job in todo], unpruned, one, save)
    status()
    save(found)
    return found


def subject(asked: dict[str, Any], device: str) -> Loaded:
    """The model to measure: a loaded one, or a shape with random weights."""
    from vlmprune.cli import loading
    from vlmprune.cli.status import note, quiet

    if asked["model"] is not None:
        return loading.load(loading.find_model(asked["model"]), device, asked["dtype"])

    import torch

    from vlmprune.errors import UnsupportedError
    from vlmprune.eval.bench import shapes

    dtype = asked["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        shape = shapes.find_shape(asked["shape"])
        note(f"building {shape.name} ({shape.what}) with random weights on {device} ...")
        with quiet():
            model = shapes.build(shape, device, getattr(torch, dtype))
    except (ValueError, UnsupportedError, FileNotFoundError) as error:
        raise UserError(brief(error)) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CommandError(brief(error)) from None
    return loading.Loaded(loading.Source(shape.name, "", local=True), model, None)


def batch_size(text: str) -> int:
    """A batch size of --batch."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch {text!r} is not a whole number of at least 1.")
    return int(text)


def check_length(loaded: Loaded, tokens: int) -> None:
    """Refuse prompts that are longer than the model's positions."""
    most = getattr(loaded.model.config.text_config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise UserError(f"prompt and answer have {tokens} tokens, and {loaded.source.name} has {most} positions.")


def resumed(found: dict[str, Any], path: str) -> dict[str, Any]:
    """The results of an interrupted run, checked to be of this run's kind."""
    from vlmprune.eval.bench.compare import differing_settings

    old = read_results(path)
    effort = {name: (old["asked"][name], found["asked"][name]) for name in ("pairs", "plain_runs", "stage_runs")}
    other = differing_settings(old, found) | {name: both for name, both in effort.items() if both[0] != both[1]}
    if other:
        said = "; ".join(f"{name} {was} there and {now} here" for name, (was, now) in other.items())
        raise UserError(f"{path} cannot be gone on with: {said}. Name another file, or leave --resume out.")
    return old | {"asked": found["asked"]}


def run_selection(args: argparse.Namespace) -> None:
    """Time greedy selection alone and print it."""
    from vlmprune.cli import bench_report, loading
    from vlmprune.cli.status import status

    if args.csv or args.plot or args.source or args.compare or args.resume:
        raise UserError("--selection writes --json alone.")
    from vlmprune.eval.bench import results, selection

    pairs = args.pairs or (QUICK if args.quick else DEFAULTS)["pairs"]
    device = loading.pick_device(args.device or "auto")
    status("timing selection")
    found = selection.compare_selection(device=device, pairs=pairs)
    status()
    print(bench_report.selection_text(found))
    if args.json:
        document = {"selection": found, "machine": results.describe_machine(device)}
        write(args.json, lambda path: results.write_json(document, path))


def read_results(path: str) -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        UserError: no such file, or no results in it.
    """
    from vlmprune.eval.bench import results

    try:
        return results.read(Path(path).expanduser())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(brief(error)) from None


def check_writable(path: str | None, flag: str) -> None:
    """Find out before the work whether a file can be written."""
    if path is None:
        return
    target = Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{flag} {path} is a folder: name a file.")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} to write {target.name} in.")
    if flag == "--plot":
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install 'vlmprune[plot]'.") from None
        endings = FigureCanvasBase.get_supported_filetypes()
        if target.suffix.lstrip(".").lower() not in endings:
            raise UserError(f"--plot {path}: name it .png, .svg or .pdf.")


def write(path: str, how: Callable[[Path], None]) -> None:
    """Write one file and say what failed."""
    try:
        how(Path(path).expanduser())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {brief(error)}") from None


def write_extras(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The table and the picture that were asked for."""
    from vlmprune.eval.bench.plot import plot
    from vlmprune.eval.bench.results import write_csv

    for path, how in ((args.csv, write_csv), (args.plot, plot)):
        if path:
            write(path, lambda target, how=how: how(results, target))
            print(f"written: {path}", file=sys.stderr)
