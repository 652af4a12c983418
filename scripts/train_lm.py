"""Stage 2 of the embedded models: trains projector and language model on questions; the tower stays frozen.

    python scripts/train_lm.py scene-llava --minutes 50
    python scripts/train_lm.py scene-llava-next --minutes 34 --init .train/scene-llava --micro 2 --batch 24 --lr 2e-3
    python scripts/train_lm.py scene-llava --long --init eval/testbed/scene-llava --out .train/scene-llava-long ...

Rerunning the same command resumes; `--init eval/testbed/scene-llava` goes on from the shipped fp16 weights instead.
Each step draws fresh pictures, so the accuracies it logs are those of pictures never seen before (handwriting excepted:
only the evaluation uses held-out digits).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from _parallel import Workers
from _training import TrainingRun
from testbed import asking, models, packed, scenes, tower
from torch.nn import functional
from transformers import AutoModelForImageTextToText, CLIPVisionModel

from vlmprune.eval.testbed import words

#: Tile grids (rows, columns) of scene-llava-next's training batches, and how often each comes.
LAYOUTS = (((1, 2), 0.45), ((2, 1), 0.45), ((2, 2), 0.1))


def training_scene(rng: np.random.Generator, rows: int, columns: int, progress: float) -> scenes.Scene:
    """One scene to be asked about: few objects at the very beginning, then one to four alike; some crowded."""
    count = int(rng.integers(1, 3 if progress < 0.06 else 5))
    if rows:
        size = (11, 17) if rng.random() < 0.8 else (17, 26)
        return scenes.quadrant_scene(
            rng, count=count, size=size, width=scenes.TILE * columns, height=scenes.TILE * rows
        )
    if rng.random() < 0.12 and progress >= 0.06:
        return scenes.crowded_scene(rng)
    return scenes.quadrant_scene(rng, count=count, size=(17, 25))


def views_of(scene: scenes.Scene, rows: int, columns: int) -> np.ndarray:
    """The tiles the processor would cut: (1, 128, 128, 3), or thumbnail and crops (1 + rows * columns, ...)."""
    if not rows:
        return scene.pixels[None]
    tile = scenes.TILE
    thumbnail = np.asarray(scene.image().resize((tile, tile), 3))
    crops = scene.pixels.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4).reshape(-1, tile, tile, 3)
    return np.concatenate([thumbnail[None], crops])


def lesson(args: argparse.Namespace, step: int, index: int, progress: float):
    """Draws one microbatch: pixels, captions and questions (ids and labels), categories, grid, position changes."""
    rng = np.random.default_rng((args.seed * 10_000_000 + step) * 100 + index)
    rows, columns = 0, 0
    if args.model == "scene-llava-next":
        choice = np.random.default_rng(step).choice(len(LAYOUTS), p=[p for _, p in LAYOUTS])
        rows, columns = LAYOUTS[choice][0]
    pixels, captions, asked, kinds = [], [], [], []
    for _ in range(args.micro):
        scene = training_scene(rng, rows, columns, 1.0 if args.init else progress)
        pixels.append(views_of(scene, rows, columns))
        if args.long:
            prompt, told, length = words.DESCRIBE, asking.description(scene), packed.LONG_LENGTH
        else:
            prompt, told, length = words.CAPTION, asking.caption(scene), packed.CAPTION_LENGTH
        captions.append([packed.encode_turn(prompt, told, length)])
        pairs = asking.training_questions(rng, scene, args.questions)
        asked.append([packed.encode_turn(q, a, packed.QUESTION_LENGTH) for q, a in pairs])
        kinds.append([asking.category_of(q) for q, _ in pairs])
    shift = int(rng.integers(0, 48)) if rng.random() < 0.5 else 0
    squeeze = float(rng.uniform(0.05, 1)) if rng.random() < args.squeeze else 1.0
    arrays = torch.from_numpy(np.stack(pixels)), torch.tensor(captions), torch.tensor(asked), torch.tensor(kinds)
    return *arrays, (rows, columns), (torch.tensor(shift), torch.tensor(squeeze))


def make_micro(llava: torch.nn.Module, args: argparse.Namespace):
    """A worker's function: one microbatch forward and backward.

    It returns the loss, the right answers of each category and right caption tokens, and how many there were.
    """
    model = packed.PackedModel(llava)
    eyes = llava.model.vision_tower

    def look(pixels: torch.Tensor) -> torch.Tensor:
        hidden_states = eyes.pre_layrnorm(eyes.embeddings(tower.normalise(pixels)))
        for layer in eyes.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, None)
        return hidden_states[:, 1:]

    plain = model
    if args.compile:
        model, look = torch.compile(model, dynamic=False), torch.compile(look, dynamic=False)

    def micro(step: int, index: int, progress: float) -> torch.Tensor:
        pixels, captions, asked, kinds, (rows, columns), (shift, squeeze) = lesson(args, step, index, progress)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = look(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
            # The largest grid is rare: compiling for it would cost more than it saves.
            run = plain if rows * columns > 2 else model
            said = run(features, [captions[:, :, 0], asked[:, :, 0]], shift, rows, columns, squeeze)
        labels = [captions[:, :, 1], asked[:, :, 1]]
        losses = [functional.cross_entropy(x.flatten(0, 2), y.flatten()) for x, y in zip(said, labels, strict=True)]
        (losses[1] + 0.5 * losses[0]).backward()
        with torch.no_grad():
            counted = torch.zeros(2, 8, dtype=torch.float64)
            hit = (said[1].argmax(-1) == labels[1]) | (labels[1] == packed.IGNORE)
            correct = hit.all(-1).flatten().double()
            for c in range(len(words.CATEGORIES)):
                mine = kinds.flatten() == c
                counted[0, c], counted[1, c] = correct[mine].sum(), mine.sum()
            tokens = labels[0] != packed.IGNORE
            counted[0, 7] = (said[0].argmax(-1) == labels[0])[tokens].sum()
            counted[1, 7] = tokens.sum()
        return torch.cat([torch.tensor([losses[1].item()], dtype=torch.float64), counted.flatten()])

    return micro


def build(args: argparse.Namespace) -> torch.nn.Module:
    """The model with the trained tower, and with the other model's language model for --init."""
    text = models.text_config(hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=args.layers)
    llava = models.llava_next(text) if args.model == "scene-llava-next" else models.llava(text)
    if args.init:
        shipped = args.init / "model.safetensors"
        if shipped.exists():  # fp16 weights, no optimizer state
            source = AutoModelForImageTextToText.from_pretrained(args.init, dtype=torch.float32).state_dict()
        else:
            source = torch.load(args.init / "checkpoint.pt", weights_only=True)["model"]
        missing = llava.load_state_dict(source, strict=False)
        assert not missing.unexpected_keys, missing
        assert set(missing.missing_keys) <= {"model.image_newline"}, missing
        if missing.missing_keys:
            llava.model.image_newline.data.normal_(0, 0.02)
    else:
        trained = CLIPVisionModel.from_pretrained(args.tower, dtype=torch.float32)
        llava.model.vision_tower.load_state_dict(trained.state_dict())
    llava.model.vision_tower.requires_grad_(False)
    return llava


def main() -> None:
    """Trains, resumes, logs one JSON line every 50 steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["scene-llava", "scene-llava-next"])
    parser.add_argument("--out", type=Path, help="default .train/MODEL")
    parser.add_argument("--tower", type=Path, default=Path(".train/tower/tower"))
    parser.add_argument("--init", type=Path, help="training folder, or exported model, to start from")
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--steps", type=int, help="stop after so many steps instead of minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--squeeze", type=float, default=0.0, help="share of batches with squeezed visual positions")
    parser.add_argument("--long", action="store_true", help="teach long captions in the place of short ones")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--micro", type=int, default=4, help="pictures a worker takes at once")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--every", type=int, default=50, help="steps between two log lines")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.out = args.out or Path(".train") / args.model
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    llava = build(args)
    run = TrainingRun(
        llava, llava.model.language_model.layers, (args.lr, args.lr / 2), args.out / "checkpoint.pt",
        args.out / "log.jsonl", width=args.width, layers=args.layers,
    )  # fmt: skip
    workers = Workers(make_micro, llava, args, args.workers, 17)
    micros = args.batch // args.micro
    sums, window = torch.zeros(17, dtype=torch.float64), 0
    run.start()
    while (done := run.step / args.steps if args.steps else run.spent / (60 * args.minutes)) < 1:
        # Constant, then a cosine down: the run can be prolonged while the rate is constant.
        decay = 1.0 if done < 0.6 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.6) / 0.4))
        rate = min(1, (run.step + 1) / 100) * decay
        sums += workers.step(run.step, micros, done)
        run.update(rate)
        window += 1
        if run.step % args.every == 0:
            right, total = sums[1:].view(2, 8).numpy()
            record = {"rate": round(rate, 4), "loss": round(float(sums[0]) / window / micros, 4)}
            record |= {"all": round(float(right[:7].sum() / total[:7].sum()), 4)}
            share = (right / np.maximum(total, 1)).tolist()
            record |= {c: round(v, 3) for c, v in zip((*words.CATEGORIES, "caption"), share, strict=True)}
            sums.zero_()
            window = 0
            run.write(**record)
            if run.step % (4 * args.every) == 0:
                run.save()
    workers.stop()
    run.save()


if __name__ == "__main__":
    main()
