"""What trained ATP modules do on the shipped questions, beside `random` at the same average number of tokens.

python scripts/eval_atp.py eval/testbed/atp-scene-llava
python scripts/eval_atp.py .train/atp-25 .train/atp-37 .train/atp-50 --limit 600 --json atp.json

For every folder of weights: accuracy, tokens per image as a mean over all layers and their spread, the
paired difference to `random` (mean of several seeds), and ablations: each threshold alone, and both thresholds fixed at
their mean over the questions (if that changed nothing, the modules would have learned constants).
"""

from __future__ import annotations

import argparse
import json
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from eval_testbed import load, show, versus

import vlmprune
from vlmprune import atp_training
from vlmprune.eval import testbed
from vlmprune.eval.testbed import scoring
from vlmprune.methods.atp import Atp


def fixed(method: Atp, found: dict[str, torch.Tensor]) -> Atp:
    """The same method with every threshold at its mean."""
    thresholds = deepcopy(method.thresholds)
    for number, cut in enumerate(thresholds.cuts):
        for head, name in ((cut.r, "theta_r"), (cut.s, "theta_s")):
            head.weight.zero_()
            head.bias.fill_(torch.logit(found[name][:, number].mean()))
    return Atp(thresholds=thresholds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--model", choices=testbed.NAMES, default="scene-llava")
    parser.add_argument("--folder", type=Path, help="another model folder than the shipped one")
    parser.add_argument("--split", choices=testbed.SPLITS, default="sparse")
    parser.add_argument("--seeds", type=int, default=2, help="runs of random, averaged")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, processor = load(args.model, args.folder)
    records = testbed.questions(args.split)[: args.limit]
    rows = [(r.image, r.question, r.answer) for r in records]

    def accuracy(*patch, **options) -> np.ndarray:
        with vlmprune.patch(model, *patch, **options):
            return scoring.right(records, scoring.answer(model, processor, records))

    print(f"== {args.model}, {args.split}: {len(records)} questions", flush=True)
    whole = scoring.right(records, scoring.answer(model, processor, records))
    results: dict = {"version": testbed.VERSION, "whole": show("whole", records, whole)}
    for folder in args.weights:
        method = Atp(weights=folder)
        total = method.thresholds.config.model["view_patches"]
        kinds = {"both": method}
        first = atp_training.survey(model, processor, method, rows)
        if not args.no_ablations:
            kinds |= {use: Atp(weights=folder, use=use) for use in ("redundancy", "spatial")}
            kinds |= {"fixed": fixed(method, first)}
        for name, kind in kinds.items():
            found = first if name == "both" else atp_training.survey(model, processor, kind, rows)
            tokens = found["average"] * total
            correct, label = accuracy(kind), f"{folder.name} {name}"
            told = show(f"{label} ({tokens.mean():.1f} tokens)", records, correct)
            told |= {"tokens": float(tokens.mean()), "tokens_sd": float(tokens.std())}
            told |= {"tokens_min": float(tokens.min()), "tokens_max": float(tokens.max())}
            print(f"    tokens {tokens.mean():.1f}, sd {tokens.std():.2f}, {tokens.min():.1f} .. {tokens.max():.1f}")
            if name == "both":
                told["shares"] = found["shares"].mean(0).tolist()
                for theta in ("theta_r", "theta_s"):
                    told[theta], told[f"{theta}_sd"] = (x.tolist() for x in (found[theta].mean(0), found[theta].std(0)))
                    pairs = zip(told[theta], told[f"{theta}_sd"], strict=True)
                    print(f"    {theta} after each cut: " + ", ".join(f"{m:.3f} (sd {s:.4f})" for m, s in pairs))
                base = correct
            else:
                told["versus_both"] = versus(f"    {name} - both", records, correct, base)
            keep = max(1, round(float(tokens.mean())))
            runs = [accuracy("random", keep=keep, seed=seed) for seed in range(args.seeds)]
            told["random"] = show(f"    random, {keep} tokens", records, np.mean(runs, 0))
            told["versus_random"] = versus(f"    {name} - random", records, correct, np.mean(runs, 0))
            results[label] = told
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
