"""Stage 1 of the embedded models: trains the vision tower, supervised, from nothing.

    python scripts/train_tower.py --minutes 38 --out .train/tower

Rerunning the same command resumes from the last checkpoint. The learning rate follows the minutes trained (or, with
--steps, the steps done), so the schedule ends when the budget does, whatever the machine.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from _parallel import Workers
from _training import TrainingRun
from testbed import scenes, targets, tower

LOSSES = (
    "colour",
    "colour_background",
    "value",
    "value_background",
    "row",
    "column",
    "place",
    "middle",
    "last",
    "total",
)


def make_micro(model: tower.SupervisedTower, args: argparse.Namespace):
    """A worker's function: draws one microbatch, leaves its gradient, returns its losses."""
    losses_of = torch.compile(model) if args.compile else model

    def micro(step: int, index: int, progress: float) -> torch.Tensor:
        dense = max(0.3, 0.8 - step / 1500)  # full pictures first: they teach what the objects are
        seed = (args.seed * 10_000_000 + step) * 100 + index
        pixels, patches, cls = (torch.from_numpy(x) for x in targets.tower_batch(seed, args.micro, dense))
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(tower.normalise(pixels), patches, cls)
        losses["total"].backward()
        return torch.tensor([losses[k].item() for k in LOSSES], dtype=torch.float64)

    return micro


@torch.no_grad()
def report(model: tower.SupervisedTower, batches: int = 2) -> dict[str, float]:
    """Accuracies and CLS recall on sparse scenes never trained on."""
    from_seed = 999_000_000
    sums: dict[str, list[float]] = {}

    def note(name: str, values: torch.Tensor) -> None:
        sums.setdefault(name, []).extend(values.float().flatten().tolist())

    for b in range(batches):
        views = []
        for i in range(50):
            scene = scenes.quadrant_scene(np.random.default_rng(from_seed + b * 50 + i))
            views.append((scene.pixels, *targets.view_targets(scene, scene.owner), scenes.patch_owner(scene.owner)))
        pixels, patches, cls, owners = (torch.from_numpy(np.stack(c)) for c in zip(*views, strict=True))
        x = tower.normalise(pixels)
        out = model.logits(x)
        k = targets.NO_COLOUR + 1
        objects = owners > 0
        note("colour", (out["patch"][..., :k].argmax(-1) == patches[:, 0])[objects])
        value = out["patch"][..., k:].argmax(-1) == patches[:, 1]
        note("value", value[objects])
        note("digit", value[objects & (patches[:, 1] >= 4)])
        note("background", (out["patch"][..., :k].argmax(-1) == patches[:, 0])[~objects])
        for head in ("middle", "last"):
            right = (out[head][..., :k].argmax(-1) == cls[:, 0]) & (out[head][..., k:].argmax(-1) == cls[:, 1])
            note("cls_" + head, right[cls[:, 0] < targets.NO_COLOUR])
        depth = len(model.tower.encoder.layers)
        for name, layer in (("L-2", depth - 2), ("L-1", depth - 1)):
            attention = tower.cls_attention(model.tower, x, layer)
            top = torch.zeros_like(objects).scatter_(1, attention.topk(25).indices, True)
            note(f"recall_{name}", top[objects])
            for j in range(1, 5):
                mine = owners == j
                present = mine.any(1)
                share = (top & mine).sum(1)[present] / mine.sum(1)[present]
                note(f"found1_{name}", share > 0)
                note(f"half_{name}", share >= 0.5)
    return {name: round(float(np.mean(v)), 3) for name, v in sums.items()}


def main() -> None:
    """Trains, resumes, logs one JSON line every 50 steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".train/tower"))
    parser.add_argument("--minutes", type=float, default=38)
    parser.add_argument("--steps", type=int, help="stop after so many steps instead of minutes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--micro", type=int, default=16, help="pictures a worker takes at once")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = tower.SupervisedTower()
    run = TrainingRun(
        model, model.tower.encoder, (args.lr, args.lr), args.out / "checkpoint.pt", args.out / "log.jsonl"
    )
    workers = Workers(make_micro, model, args, args.workers, len(LOSSES))
    micros = args.batch // args.micro
    sums, window = torch.zeros(len(LOSSES), dtype=torch.float64), 0
    run.start()
    while (done := run.step / args.steps if args.steps else run.spent / (60 * args.minutes)) < 1:
        rate = min(1, (run.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1, done))) + 0.01
        sums += workers.step(run.step, micros, done) / micros
        run.update(rate)
        window += 1
        if run.step % 50 == 0:
            record = {k: round(v / window, 4) for k, v in zip(LOSSES, sums.tolist(), strict=True)}
            sums.zero_()
            window = 0
            if run.step % 250 == 0:
                record["report"] = report(model)
                run.save()
            run.write(lr=args.lr * rate, **record)
    workers.stop()
    run.save()
    print(json.dumps({"step": run.step, "spent": round(run.spent), "report": report(model, 6)}), flush=True)
    model.tower.half().save_pretrained(args.out / "tower")


if __name__ == "__main__":
    main()
