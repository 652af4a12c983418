"""What trained ATP modules do on the shipped questions, beside `random` at the same average number of tokens.

python scripts/eval_atp.py .train/atp-25
python scripts/eval_atp.py .train/atp-25 .train/atp-37 .train/atp-50 --limit 600 --json atp.json

For every folder of weights: accuracy, tokens per image as a mean over all layers and their spread; paired differences
to `random` before the LLM and to random tokens after the same layers in the same numbers (means of several seeds); and
ablations: each threshold alone, and both thresholds fixed at their mean over the questions (if that changed nothing,
they need not have been set anew for every sample).
"""

from __future__ import annotations

import argparse
import json
import os
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from eval_testbed import load, show, versus
from testbed import scoring

import vlmprune
from vlmprune.eval import testbed
from vlmprune.methods.atp import training as atp_training
from vlmprune.methods.atp.method import Atp
from vlmprune.methods.base import Method
from vlmprune.parts import Cut, Decoder, Layout, ModelFacts, Reduction, random_scores, select

ABLATIONS = ("redundancy", "spatial", "fixed")


@dataclass(frozen=True)
class RandomAfter(Method):
    """Random tokens, so many after each of some layers: ATP's schedule without its scores."""

    layers: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    seed: int = 0

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        pairs = zip(self.layers, self.counts, strict=True)
        return [Cut(Decoder(p), (), partial(self.reduce, n), "original") for p, n in pairs]

    def reduce(self, count: int, seen: dict, layout: Layout) -> Reduction:
        return select(random_scores(self.seed, layout), count, layout)


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
    parser.add_argument("--ablations", nargs="*", default=ABLATIONS, choices=ABLATIONS, help="default: all")
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
        for name in args.ablations:
            kinds[name] = fixed(method, first) if name == "fixed" else Atp(weights=folder, use=name)
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
            if name == "both":
                counts = tuple(max(1, round(float(s) * total)) for s in found["shares"].mean(0))
                layers = method.thresholds.config.layers
                runs = [accuracy(RandomAfter(layers, counts, seed)) for seed in range(args.seeds)]
                told["random_after"] = show(f"    random, {counts} after {layers}", records, np.mean(runs, 0))
                told["versus_random_after"] = versus(f"    {name} - random after", records, correct, np.mean(runs, 0))
            results[label] = told
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
