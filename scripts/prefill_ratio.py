"""Prefill time of pruned models over the unpruned one, on a random model whose language model dominates.

    python scripts/prefill_ratio.py                       # 576 and 2880 visual tokens, about ten minutes on two cores
    python scripts/prefill_ratio.py --tokens 576 --runs 3

Runs are interleaved (plain, pruned, plain, ...) and every figure is a ratio of neighbours, so a drifting machine
cancels out. The ceiling beside it is the share of the language model's layer-tokens that is left (linear cost alone).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune

METHODS = {
    "fastv keep=0.25": ("fastv", {"keep": 0.25}),
    "fastv keep=0.1": ("fastv", {"keep": 0.1}),
    "transprune": ("transprune", {}),
    "transprune keep=0.05": ("transprune", {"keep": 0.05}),
    "todre keep=0.25": ("todre", {"keep": 0.25}),
    "todre keep=0.1": ("todre", {"keep": 0.1}),
    "fopru keep=0.1": ("fopru", {"keep": 0.1}),
}


def build(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """A LLaVA with 576 visual tokens per image, a small tower and a Llama of `layers` x `hidden`."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=192,
            patch_size=8, projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        ),
        image_token_index=5, image_seq_length=576,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def seconds(model: LlavaForConditionalGeneration, inputs: dict) -> float:
    """Wall time of one prefill with the logits of the last token."""
    start = time.perf_counter()
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print one line per method and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880], help="visual tokens, multiples of 576")
    parser.add_argument("--runs", type=int, default=5, help="pairs per method")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    model = build(args.hidden, args.layers)
    size = sum(p.numel() for p in model.model.language_model.parameters()) / 1e9
    print(f"language model of {size:.2f} B parameters, float32, {torch.get_num_threads()} threads")
    print(f"{'visual tokens':>13}  {'method':<22} {'time / unpruned':>15} {'min':>6} {'max':>6} {'layer-tokens':>12}")
    for tokens in args.tokens:
        images, text = tokens // 576, torch.randint(6, 1024, (1, 60))
        holes = torch.full((1, 576 * images), 5)
        ids = torch.cat((text[:, :30], holes, text[:, 30:]), 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = torch.randn(images, 3, 192, 192)
        for name in args.methods:
            method, options = METHODS[name]
            with vlmprune.patch(model, method, **options) as handle:
                ratios = []
                for run in range(args.runs + 1):  # the first pair warms up
                    with handle.disabled():
                        plain = seconds(model, inputs)
                    pruned = seconds(model, inputs)
                    if run:
                        ratios.append(pruned / plain)
                left = sum(handle.trace.kv_lengths) / (len(handle.trace.kv_lengths) * ids.shape[1])
            print(
                f"{tokens:>13}  {name:<22} {statistics.median(ratios):>15.3f} {min(ratios):>6.3f} {max(ratios):>6.3f} "
                f"{left:>12.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
