"""Time of a vision tower that merges tokens over the same tower unmerged, interleaved, at CLIP-L/336's shape.

    python scripts/tower_ratio.py                        # two minutes on two cores
    python scripts/tower_ratio.py --methods pitome --keep 0.25 --runs 15

The tower has random weights: 24 layers of width 1024 on 577 tokens. Their attention is even, and FlowCut, which asks
how even it is, leaves all patches to the last cut then: `--peak 100` makes it less so. Every figure is a ratio of
neighbouring runs, and `mid-depth` is the share of the tokens that is left after half of the layers.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune

OPTIONS = {name: (name, {}) for name in ("flowcut", "tome", "pitome")} | {"tome weigh": ("tome", {"weigh": True})}


def build(width: int = 1024) -> LlavaForConditionalGeneration:
    """CLIP-L/14 at 336 pixels, or a narrower one, before a language model too small to matter."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=24, num_attention_heads=width // 64,
            image_size=336, patch_size=14, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
        image_token_index=5, image_seq_length=576,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def main() -> None:
    """Measure and print one line per method and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1], help="fraction of the patches that is left")
    parser.add_argument("--width", type=int, default=1024, help="of the tower, a multiple of 64")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on queries: less even attention")
    parser.add_argument("--runs", type=int, default=7, help="pairs per line")
    args = parser.parse_args()
    model, picture = build(args.width), torch.randn(1, 3, 336, 336)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data *= args.peak
    lengths: list[int] = []
    # what the second half's first attention reads: 12 layers have run, whatever they merged, inside or behind them
    half = model.model.vision_tower.encoder.layers[12].self_attn.q_proj
    half.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.model.get_image_features(pixel_values=picture)
        return time.perf_counter() - start

    print(f"tower of 24 layers, width {args.width}, 577 tokens, float32, {torch.get_num_threads()} threads")
    print(f"{'method':<12} {'keep':>5} {'mid-depth':>10} {'time / unmerged':>16} {'min':>6} {'max':>6}")
    for name in args.methods:
        method, options = OPTIONS[name]
        for keep in args.keep:
            with vlmprune.patch(model, method, keep=keep, **options) as handle:
                ratios = []
                for run in range(args.runs + 1):  # the first pair warms up
                    with handle.disabled():
                        plain = seconds()
                    merged = seconds()
                    if run:
                        ratios.append(merged / plain)
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(
                f"{name:<12} {keep:>5} {lengths[-1] / 577:>10.2f} {middle:>16.3f} {low:>6.3f} {high:>6.3f}", flush=True
            )


if __name__ == "__main__":
    main()
