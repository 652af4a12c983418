"""Trains scene-qwen from nothing, in one single-threaded process: the tower, where it looks, the language model.

    python scripts/train_qwen.py tower --minutes 12
    python scripts/train_qwen.py look --minutes 4 --warm 10 --lr 4e-3 --batch 8
    python scripts/train_qwen.py lm --minutes 40 --batch 8 --micro 4 --start .train/scene-qwen/look.pt

Rerunning the same command resumes. The learning rate follows the minutes spent. Every step draws fresh pictures, so the
accuracies it logs are those of pictures never seen before.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from _training import TrainingRun
from testbed import anyres, asking, packed
from torch.nn import functional

from vlmprune.eval.testbed import words


class TowerLesson:
    """Every token is taught what it shows and where it is."""

    def __init__(self, host: torch.nn.Module, args: argparse.Namespace) -> None:
        self.module = anyres.SupervisedTower(host.model.visual)
        self.blocks = host.model.visual.blocks

    def __call__(self, rng: np.random.Generator, size: int, progress: float) -> tuple[torch.Tensor, Counter, Counter]:
        """Loss of one microbatch, what was right, and out of how many."""
        rows, columns = anyres.draw_grid(rng)
        draw = anyres.full_scene if rng.random() < max(0.35, 0.9 - progress) else anyres.scene
        scenes = [draw(rng, rows, columns) for _ in range(size)]
        wanted = torch.from_numpy(np.stack([anyres.targets(s, rows, columns) for s in scenes]))
        pixels = torch.from_numpy(np.stack([s.pixels for s in scenes]))
        with torch.autocast("cpu", torch.bfloat16):
            losses, right = self.module(anyres.patches(pixels), anyres.grids(size, rows, columns), wanted)
        things = wanted.flatten(0, 1)[:, 0] != anyres.NO_COLOUR
        hits, total = Counter(), Counter()
        for name, mine, column in (
            ("colour", things, 0),
            ("value", things, 1),
            ("background", ~things, 0),
            ("row", things, 2),
            ("column", things, 3),
        ):
            hits[name], total[name] = int(right[mine, column].sum()), int(mine.sum())
        return sum(losses.values()), hits, total


def visual_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of the tower in a checkpoint of any stage."""
    state = torch.load(checkpoint, weights_only=True)["model"]
    heads = ("tower.", "model.visual.")
    found = {k.removeprefix(head): v for head in heads for k, v in state.items() if k.startswith(head)}
    return found or state


class LookLesson:
    """The last layer, which sees all of a picture, is taught to look at every object, and to make the same tokens.

    What a patch needs to tell its own object stands within its window: nothing else asks that layer to look anywhere,
    and the attention received there would be chance. A [CLS] token would have been taught by what it must tell.
    """

    def __init__(self, host: torch.nn.Module, args: argparse.Namespace) -> None:
        self.module, self.before = host.model.visual, deepcopy(host.model.visual)
        for tower in (self.module, self.before):
            tower.load_state_dict(visual_of(args.start))
            tower.requires_grad_(False)
        self.last = len(self.module.blocks) - 1
        self.blocks = self.module.blocks[self.last].requires_grad_(True)

    def __call__(self, rng: np.random.Generator, size: int, progress: float) -> tuple[torch.Tensor, Counter, Counter]:
        """Loss of one microbatch, objects found among a tenth of the tokens, and out of how many."""
        rows, columns = anyres.draw_grid(rng)
        scenes = [anyres.scene(rng, rows, columns) for _ in range(size)]
        pixels = anyres.patches(torch.from_numpy(np.stack([s.pixels for s in scenes])))
        grid, hits, total = anyres.grids(size, rows, columns), Counter(), Counter()
        with torch.autocast("cpu", torch.bfloat16):
            looked, merged = anyres.received(self.module, self.last, pixels, grid)
            with torch.no_grad():
                wanted = self.before(pixels, grid_thw=grid).pooler_output
        same = (merged.float() - wanted.float()).square().mean() / wanted.float().var()
        shares = []
        for mine, scene in zip(looked, scenes, strict=True):
            owner = torch.from_numpy(anyres.owners(scene, rows, columns))
            top = mine.topk(round(0.1 * len(mine))).indices
            for thing in range(1, len(scene.things) + 1):
                shares.append(mine[owner == thing].sum())
                hits["found"], total["found"] = hits["found"] + int((owner[top] == thing).any()), total["found"] + 1
        hits["same"], total["same"] = float(same.detach()), 1
        return 5 * same - (torch.stack(shares) + 1e-6).log().mean(), hits, total


class LanguageLesson:
    """A caption and many questions behind one picture; of the tower only the merger still learns."""

    def __init__(self, host: torch.nn.Module, args: argparse.Namespace) -> None:
        host.model.visual.load_state_dict(visual_of(args.start))
        host.model.visual.requires_grad_(False)
        host.model.visual.merger.requires_grad_(True)
        self.module, self.questions = host, args.questions
        self.blocks = host.model.language_model.layers

    def __call__(self, rng: np.random.Generator, size: int, progress: float) -> tuple[torch.Tensor, Counter, Counter]:
        """Loss of one microbatch, what was right, and out of how many."""
        rows, columns = anyres.draw_grid(rng)
        most = 3 if progress < 0.06 else 5
        scenes = [anyres.scene(rng, rows, columns, count=int(rng.integers(1, most))) for _ in range(size)]
        captions = [[packed.encode_turn(words.CAPTION, asking.caption(s), packed.CAPTION_LENGTH)] for s in scenes]
        pairs = [asking.training_questions(rng, s, self.questions, 1) for s in scenes]
        asked = [[packed.encode_turn(q, a, packed.QUESTION_LENGTH) for q, a in some] for some in pairs]
        captions, asked = torch.tensor(captions), torch.tensor(asked)  # (B, n, 2, L)
        pixels = torch.from_numpy(np.stack([s.pixels for s in scenes]))
        shift = int(rng.integers(0, 32)) if rng.random() < 0.5 else 0
        with torch.autocast("cpu", torch.bfloat16):
            states = self.module.model.visual(
                anyres.patches(pixels), grid_thw=anyres.grids(size, rows, columns)
            ).pooler_output.unflatten(0, (size, -1))
            said = anyres.logits(self.module, states, rows, columns, [captions[:, :, 0], asked[:, :, 0]], shift)
        told, answered = captions[:, :, 1], asked[:, :, 1]
        loss = functional.cross_entropy(said[1].flatten(0, 2), answered.flatten())
        loss = loss + 0.5 * functional.cross_entropy(said[0].flatten(0, 2), told.flatten())
        right = ((said[1].argmax(-1) == answered) | (answered == packed.IGNORE)).all(-1)
        hits, total = Counter(), Counter()
        for i, some in enumerate(pairs):
            for j, (question, _) in enumerate(some):
                name = words.CATEGORIES[asking.category_of(question)]
                hits[name], total[name] = hits[name] + int(right[i, j]), total[name] + 1
        hits["all"], total["all"] = int(right.sum()), right.numel()
        tokens = told != packed.IGNORE
        hits["caption"], total["caption"] = int((said[0].argmax(-1) == told)[tokens].sum()), int(tokens.sum())
        return loss, hits, total


def main() -> None:
    """Trains, resumes, logs a JSON line now and then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tower", "look", "lm"])
    parser.add_argument("--out", type=Path, default=Path(".train/scene-qwen"))
    parser.add_argument("--start", type=Path, help="checkpoint with the tower to start from; default OUT/tower.pt")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8, help="pictures of one size, computed at once")
    parser.add_argument("--questions", type=int, default=28)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warm", type=int, default=60, help="steps until the rate is full")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--every", type=int, default=20, help="steps between two log lines")
    args = parser.parse_args()
    args.start = args.start or args.out / "tower.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    host = anyres.model()
    lesson = {"tower": TowerLesson, "look": LookLesson, "lm": LanguageLesson}[args.stage](host, args)
    files = args.out / f"{args.stage}.pt", args.out / f"{args.stage}.jsonl"
    run = TrainingRun(lesson.module, lesson.blocks, (args.lr, args.lr / 2), *files)
    hits, total, losses, saved = Counter(), Counter(), [], run.spent
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(run.save()))
    while (done := run.spent / (60 * args.minutes)) < 1:
        # Constant, then a cosine down: the run can be prolonged while the rate is constant.
        decay = 1.0 if done < 0.5 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
        rate = min(1, (run.step + 1) / args.warm) * decay
        for index in range(args.batch // args.micro):
            rng = np.random.default_rng([args.seed, args.stage == "lm", run.step, index])
            loss, right, out_of = lesson(rng, args.micro, done)
            (loss * args.micro / args.batch).backward()
            losses.append(loss.item())
            hits.update(right)
            total.update(out_of)
        run.update(rate)
        if run.step % args.every == 0:
            shares = {name: round(hits[name] / max(total[name], 1), 3) for name in total}
            run.write(rate=round(rate, 4), loss=round(np.mean(losses), 4), **shares)
            hits, total, losses = Counter(), Counter(), []
        if run.spent - saved > 120:
            saved = run.spent
            run.save()
    run.save()


if __name__ == "__main__":
    main()
