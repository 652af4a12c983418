"""Stage 1 of the embedded models: trains the vision tower, supervised, from nothing.

    python scripts/train_tower.py --minutes 38 --out .train/tower

Rerunning the same command resumes from the last checkpoint. The learning rate follows the minutes trained (or, with
--steps, the steps done), so the schedule ends when the budget does, whatever the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from vlmprune.eval.testbed import scenes, targets, tower


class Views(IterableDataset):
    """Endless batches of tower views; batch i depends on (seed, i) alone."""

    def __init__(self, seed: int, start: int, size: int) -> None:
        self.seed, self.start, self.size = seed, start, size

    def __iter__(self):
        step = self.start
        while True:
            dense = max(0.3, 0.8 - step / 1500)  # full pictures first: they teach what the objects are
            pixels, patches, cls = targets.tower_batch(self.seed * 10_000_000 + step, self.size, dense)
            yield torch.from_numpy(pixels), torch.from_numpy(patches), torch.from_numpy(cls)
            step += 1


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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = tower.SupervisedTower()
    hidden = [p for n, p in model.tower.encoder.named_parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    step, spent = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        print("resumed at step", step, flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(state | {"step": step, "spent": spent}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    losses_of = torch.compile(model) if args.compile else model
    loader = iter(DataLoader(Views(args.seed, step, args.batch), batch_size=None, num_workers=1, prefetch_factor=4))
    log = (args.out / "log.jsonl").open("a")
    sums: dict[str, float] = {}
    last, start = time.time(), step
    while True:
        done = step / args.steps if args.steps else spent / (60 * args.minutes)
        if done >= 1:
            break
        rate = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1, done))) + 0.01
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
        pixels, patches, cls = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(tower.normalise(pixels), patches, cls)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        step += 1
        now = time.time()
        spent, last = spent + (now - last), now
        if step % 50 == 0:
            count = min(50, step - start)
            record = {"step": step, "spent": round(spent), "lr": args.lr * rate}
            record |= {k: round(v / count, 4) for k, v in sums.items()}
            sums.clear()
            if step % 250 == 0:
                record["report"] = report(model)
                save()
            print(json.dumps(record), flush=True)
            log.write(json.dumps(record) + "\n")
            log.flush()
    save()
    print(json.dumps({"step": step, "spent": round(spent), "report": report(model, 6)}), flush=True)
    model.tower.half().save_pretrained(args.out / "tower")


if __name__ == "__main__":
    main()
