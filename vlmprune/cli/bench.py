"""`vlmprune bench`: where the time of a pruned model goes, and how near it comes to what is possible."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import Any

from vlmprune.cli import bench_files
from vlmprune.cli.bench_run import Replaced, measured
from vlmprune.cli.bench_settings import (
    DEFAULTS,
    QUICK,
    check_least,
    effective_kernels,
    refuse_idle_flags,
    settings_of,
)
from vlmprune.cli.flags import VALUES

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
        "--keep",
        metavar="N[,N]",
        help="patches per image (64, the default), a fraction (0.1, 10%%), or none: the method's own schedule",
    )
    budget.add_argument("--average", metavar="N[,N]", help="the same as a mean over all decoder layers")
    add(
        "--option",
        action="append",
        metavar="KEY=VALUE",
        help=f"an option of the methods that have it; may be repeated; {VALUES}",
    )
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
    add(
        "--sizes", type=int, metavar="N", help="draw N picture sizes too, and tell what a new one costs (default: none)"
    )
    add(
        "--kernels",
        choices=("auto", "torch", "triton", "cuda"),
        help="implementation of the operators (default: auto, or what VLMPRUNE_KERNELS says)",
    )
    add("--quick", action="store_true", help="fewer runs: 5 pairs, 5 unpruned, 1 with stamps, 16 new tokens")
    add("--json", metavar="FILE", help="write everything as JSON, after each cell")
    add("--resume", action="store_true", help="measure only what the file of --json lacks")
    add("--csv", metavar="FILE", help="write one line per cell")
    add("--plot", metavar="FILE", help="draw time against tokens, with the oracle's line")
    add("--compare", metavar="OLD.json", help="show what changed; settings not given are those of that file")
    add("--from", dest="source", metavar="FILE.json", help="take results from a file and measure nothing")
    add("--selection", action="store_true", help="time greedy selection alone against published loops")
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Measure or read results; print, write, draw and compare them."""
    refuse_idle_flags(args)
    bench_files.check_paths(args)
    if args.selection:
        return run_selection(args)

    from vlmprune.cli import bench_report

    old = bench_files.read_results(args.compare) if args.compare else None
    if args.source:
        results = bench_files.read_results(args.source)
    else:
        asked = settings_of(args, old)
        with use(asked["kernels"]):
            results = measured(args, asked, old)
    print(bench_report.as_text(results))
    bench_files.write_extras(args, results)
    if old is not None:
        from vlmprune.eval.bench import compare

        changes, differing = compare.changes(old, results), compare.differing_settings(old, results)
        print(f"\nChanges since {args.compare}\n\n{bench_report.changes_text(changes, differing)}")


def use(kernels: str) -> AbstractContextManager:
    """Force an implementation of the operators inside a `with` statement."""
    from vlmprune import kernels as ops

    return ops.use(kernels)


def run_selection(args: argparse.Namespace) -> None:
    """Time greedy selection alone and print it."""
    from vlmprune.cli import bench_report
    from vlmprune.eval.bench import results, selection
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import status

    pairs = (QUICK if args.quick else DEFAULTS)["pairs"] if args.pairs is None else args.pairs
    check_least({"pairs": pairs})
    device, kernels = loading.pick_device(args.device or "auto"), effective_kernels(args.kernels)
    status("timing selection")
    replaced = Replaced()
    with use(kernels):
        found = answering.guarded(
            lambda: [
                one
                for size in selection.SIZES
                for one in selection.compare_selection(*size, device=device, pairs=pairs)
            ]
        )
    status()
    print(bench_report.selection_text(found))
    document = {"selection": found, "machine": results.describe_machine(device), "kernels": kernels}
    document["replaced"] = replaced.tell()
    if args.json:
        bench_files.write(args.json, lambda path: results.write_json(document, path))
