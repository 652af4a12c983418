"""Turns a training checkpoint into a shipped model folder: fp16 safetensors, config, processor.

python scripts/export_testbed.py scene-llava
python scripts/export_testbed.py scene-qwen --checkpoint .train/scene-qwen/lm.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from testbed import anyres, models

from vlmprune.eval import testbed


def main() -> None:
    """Writes the folder and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=testbed.NAMES)
    parser.add_argument("--checkpoint", type=Path, help="default .train/MODEL/checkpoint.pt")
    parser.add_argument("--out", type=Path, help="default: the package's own folder")
    args = parser.parse_args()
    checkpoint = args.checkpoint or Path(".train") / args.model / "checkpoint.pt"
    out = args.out or Path(testbed.__file__).parent / args.model
    state = torch.load(checkpoint, weights_only=True)
    if args.model == "scene-qwen":
        model = anyres.model()
    else:
        text = models.text_config(
            hidden_size=state["width"], intermediate_size=3 * state["width"], num_hidden_layers=state["layers"]
        )
        model = models.llava_next(text) if args.model == "scene-llava-next" else models.llava(text)
    model.load_state_dict(state["model"])
    model.generation_config.max_new_tokens = 30
    model.half().save_pretrained(out)
    if args.model == "scene-qwen":
        anyres.save_processor(out)
    else:
        made = models.llava_next_processor() if args.model == "scene-llava-next" else models.llava_processor()
        made.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size / 2**20
    print(f"{out}: step {state['step']}, {state['spent'] / 60:.0f} minutes, {size:.1f} MiB")


if __name__ == "__main__":
    main()
