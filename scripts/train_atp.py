"""Trains ATP's modules for a model, which stays frozen.

    python scripts/train_atp.py --model llava-hf/llava-1.5-7b-hf --data questions.jsonl --average 0.25 --out atp-25
    accelerate launch --num_processes 2 scripts/train_atp.py ...      (the same options; add --cpu for CPU processes)
    python scripts/train_atp.py --model scene-llava --data testbed --average 0.37 --out atp-scene --steps 300

DATA is a JSON list or JSON lines (one object a line) of image, question and answer; image is a path, relative to the
file or to --images:

    {"image": "pictures/0001.png", "question": "What colour is the cat?", "answer": "black"}

`testbed` draws fresh pictures for the embedded models instead. The same command on the same folder resumes. Afterwards:

    vlmprune.patch(model, "atp", weights="atp-25")
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch


def number(text: str) -> int | float:
    """An int stays an int: tokens instead of a fraction."""
    return int(text) if text.isdecimal() else float(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id, or the name of an embedded model")
    parser.add_argument("--data", required=True, help="JSON or JSONL file, or 'testbed'")
    parser.add_argument("--images", type=Path, help="folder of the images, where that is not the file's")
    parser.add_argument("--prompt", help="template with <image> and {question}, for models without a chat template")
    parser.add_argument(
        "--average", type=number, required=True, help="tokens per image, or a fraction, over all layers"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, state, log and plot")
    parser.add_argument("--steps", type=int, help="default: one pass over the data; 500 for testbed")
    parser.add_argument("--batch", type=int, default=16, help="questions a step, over all processes (default 16)")
    parser.add_argument("--lr", type=float, default=1e-4, help="default 1e-4")
    parser.add_argument("--warmup", type=int, default=100, help="steps (default 100)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 14, 24], help="of 32, scaled (default 4 14 24)")
    parser.add_argument("--form", choices=("pooled", "means"), default="pooled")
    parser.add_argument("--pool", type=int, default=64, help="numbers a score is pooled to (pooled form; default 64)")
    parser.add_argument("--hidden", type=int, default=256, help="width of a module (default 256)")
    parser.add_argument(
        "--strides", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12, 24], metavar="PATCHES",
        help="distances of the nested grids of the spatial score (default 2 3 4 6 8 12 24)",
    )  # fmt: skip
    parser.add_argument("--score-norm", choices=("minmax", "none", "logits"), default="minmax")
    parser.add_argument("--mean-over", choices=("layers", "modules"), default="layers", help="what the average is over")
    parser.add_argument("--depth-weight", type=float, default=0.01)
    parser.add_argument("--target-weight", type=float, default=2.0)
    parser.add_argument("--raw-target", action="store_true", help="budget loss in tokens (with --target-weight 0.2)")
    parser.add_argument("--temperature", type=float, nargs=2, default=[10, 1000], metavar=("START", "END"))
    parser.add_argument("--dtype", default="auto", help="of the frozen model: auto, float32, bfloat16 ...")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=64, help="questions to look at afterwards (default 64)")
    return parser.parse_args()


def main() -> None:
    """Train, then say what the modules do."""
    args = parse()
    from accelerate import Accelerator
    from testbed.atp_questions import SceneQuestions
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmprune.eval import testbed
    from vlmprune.methods.atp import data as atp_data
    from vlmprune.methods.atp import training
    from vlmprune.methods.atp.method import Atp
    from vlmprune.methods.atp.modules import AtpConfig

    accelerator = Accelerator()
    path = testbed.path(args.model) if args.model in testbed.NAMES else args.model
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if dtype == "auto" and accelerator.device.type == "cpu":
        dtype = torch.float32  # half precision is slow or unsupported there
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(path)
    scenes = args.data == "testbed"
    steps = args.steps or 500
    data = SceneQuestions(steps * args.batch, args.seed) if scenes else atp_data.Questions(args.data, args.images)
    if not scenes and args.steps is None:
        steps = max(1, len(data) // args.batch)
    config = AtpConfig.of(
        training.facts_of(model), args.average, args.layers,
        form=args.form, hidden=args.hidden, pool=args.pool, score_norm=args.score_norm, strides=tuple(args.strides),
        mean_over=args.mean_over,
    )  # fmt: skip
    options = training.Training(
        steps=steps, batch=args.batch, lr=args.lr, warmup=args.warmup, depth_weight=args.depth_weight,
        target_weight=args.target_weight, raw_target=args.raw_target, temperature=tuple(args.temperature),
        save_every=args.save_every, seed=args.seed,
    )  # fmt: skip
    thresholds = training.train(
        model, processor, data, config, args.out, options,
        template=args.prompt, workers=args.workers, accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process and args.check > 0:
        rows = SceneQuestions(args.check, args.seed + 1) if scenes else data
        rows = [rows[i] for i in range(min(args.check, len(rows)))]
        found = training.survey(model, processor, Atp(thresholds=thresholds), rows, template=args.prompt)
        print(f"{args.out}: aimed at an average of {config.average}, on {len(rows)} questions:")
        print(f"  average {found['average'].mean():.3f} of the visual tokens, from {found['average'].min():.3f} to "
              f"{found['average'].max():.3f}, standard deviation {found['average'].std():.3f}")  # fmt: skip
        for cut, layer in enumerate(config.layers):
            told = [
                f"{k} {found[k][:, cut].mean():.3f} (sd {found[k][:, cut].std():.4f})" for k in ("theta_r", "theta_s")
            ]
            print(f"  after layer {layer}: {found['shares'][:, cut].mean():.3f} left, {', '.join(told)}")
        if all(found[k].std(0).max() < 1e-3 for k in ("theta_r", "theta_s")):
            warnings.warn(
                "the thresholds hardly differ between questions: train longer, or with a higher --lr.", stacklevel=1
            )


if __name__ == "__main__":
    main()
