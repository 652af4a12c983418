"""Scores an embedded model on the shipped questions, per category, and compares methods with paired intervals.

python scripts/eval_testbed.py --gate                                  # the numbers the models' card is about
python scripts/eval_testbed.py --split sparse --by-hand random cls received maxmin --keep 0.1 0.25
python scripts/eval_testbed.py --split sparse --methods random vtc_cls fopru --keep 0.1      # through vlmprune
python scripts/eval_testbed.py --model scene-llava-next --split next --methods random vtc_cls --keep 0.1
python scripts/eval_testbed.py --model scene-qwen --gate      # random, fopru, todre,pivot=mean and fastv at 10 %
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from testbed import scoring

import vlmprune
from vlmprune import spec
from vlmprune.eval import testbed
from vlmprune.runtime import loading

#: The split that a model's gate is about.
OF = {"scene-llava": "sparse", "scene-llava-next": "next", "scene-qwen": "qwen"}


def load(name: str, folder: Path | None):
    """Model (float32) and processor of a shipped or another folder."""
    loaded = loading.load(loading.find_model(str(folder or name)), dtype="float32")
    return loaded.model, loaded.processor


def show(label: str, records: list[testbed.Question], correct: np.ndarray) -> dict:
    """Prints one line of per-category percentages and returns them with the interval of the whole."""
    table = scoring.by_category(records, correct)
    low, high = scoring.interval(records, correct)
    cells = "  ".join(f"{k} {100 * v:.1f}" for k, v in table.items())
    print(f"{label:36s} {cells}  [95 %: {100 * low:.1f} .. {100 * high:.1f}]", flush=True)
    return table | {"low": low, "high": high}


def versus(label: str, records: list[testbed.Question], ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Prints and returns the paired difference of two runs."""
    low, high = scoring.interval(records, ours - theirs)
    mean = float((ours - theirs).mean())
    print(f"{label:36s} {100 * mean:+.1f}  [95 %: {100 * low:+.1f} .. {100 * high:+.1f}]", flush=True)
    return {"difference": mean, "low": low, "high": high}


def compare(model, processor, records, budgets, by_hand, methods, seeds) -> dict:
    """Whole model, then every method at every budget, each against `random` at the same budget.

    A budget is a word ("keep" or "average") and a fraction; a method that cannot meet one says why, and is left out.
    """
    result: dict = {}
    whole = scoring.right(records, scoring.answer(model, processor, records))
    result["whole"] = show("whole", records, whole)
    seen = scoring.looks(model, processor, records) if by_hand else {}
    for word, share in budgets:
        bases: dict[str, np.ndarray] = {}
        for kind, name in [*(("by hand", n) for n in by_hand if word == "keep"), *(("vlmprune", n) for n in methods)]:
            runs = []
            for seed in range(seeds if name == "random" else 1):
                if kind == "by hand":
                    choose = scoring.BY_HAND[name]
                    said = scoring.answer_by_hand(model, processor, records, choose, share, seen=seen, seed=seed)
                else:
                    method, *given = name.split(",")
                    options = dict(map(spec.read_option, given)) | ({"seed": seed} if method == "random" else {})
                    try:
                        handle = vlmprune.patch(model, method, **{word: share}, **options)
                    except ValueError as error:
                        print(f"{name} {word} {share}: {error}", flush=True)
                        break
                    with handle:
                        said = scoring.answer(model, processor, records)
                runs.append(scoring.right(records, said))
            if not runs:
                continue
            correct = np.mean(runs, 0)
            row = show(f"{name} {word} {share} ({kind})", records, correct)
            row["loss"] = versus(f"    {name} - whole", records, correct, whole)
            if name == "random":
                bases[kind] = correct
            elif kind in bases:
                row["versus_random"] = versus(f"    {name} - random", records, correct, bases[kind])
            result[f"{name}@{word}={share} ({kind})"] = row
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=testbed.NAMES, default="scene-llava")
    parser.add_argument("--folder", type=Path, help="another model folder than the shipped one")
    parser.add_argument("--split", choices=testbed.SPLITS, help="default: the model's own")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.1, 0.25])
    parser.add_argument("--average", type=float, nargs="*", default=[], help="budgets as a mean over decoder layers")
    parser.add_argument("--by-hand", nargs="*", default=[], choices=sorted(scoring.BY_HAND))
    parser.add_argument("--methods", nargs="*", default=[], help="vlmprune's, as NAME,OPTION=VALUE; random first")
    parser.add_argument("--seeds", type=int, default=3, help="runs of random, averaged")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--blind", action="store_true", help="also without the picture")
    parser.add_argument("--gate", action="store_true", help="all splits, blind, and the choices by hand")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, processor = load(args.model, args.folder)
    splits = [args.split or OF[args.model]]
    if args.gate:
        args.blind = True
        if args.model == "scene-llava":
            splits, args.by_hand = ["sparse", "crowded", "unseen"], ["random", "cls", "received", "maxmin"]
        elif args.model == "scene-llava-next":
            args.by_hand = ["random", "maxmin", "thumbnail", "crops"]
        else:
            args.keep = [0.1] if args.keep == parser.get_default("keep") else args.keep
            args.methods = args.methods or ["random", "fopru", "todre,pivot=mean", "fastv"]
    results: dict = {"version": testbed.VERSION, "model": args.model}
    for split in splits:
        records = testbed.questions(split)[: args.limit]
        start = time.time()
        print(f"== {args.model}, {split}: {len(records)} questions", flush=True)
        by_hand = args.by_hand if split != "unseen" else []
        budgets = [*(("keep", k) for k in args.keep), *(("average", a) for a in args.average)]
        results[split] = compare(model, processor, records, budgets, by_hand, args.methods, args.seeds)
        if args.blind and split == OF[args.model]:
            said = scoring.answer(model, processor, records, blind=True)
            results[split]["blind"] = show("blind", records, scoring.right(records, said))
        print(f"({time.time() - start:.0f} s)")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
