"""What one prefill needs besides time: floating-point operations, memory, and bytes in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlmprune.eval.bench.flops import prefill_flops
from vlmprune.eval.bench.workload import Workload
from vlmprune.patches.towers import tower_layer

__all__ = ["count", "formula_flops", "kv_bytes", "language_flops"]

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unknown to torch's counter


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of attention by its operands' shapes."""
    return sdpa_flop_count(query, key, value)


class AliveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside had at one time; what a kernel needs in its inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # a view of what was there before is nothing new
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@contextmanager
def tower_tokens(work: Workload) -> Iterator[dict[int, list[int]]]:
    """The tokens per view of every tower layer's attention and feed-forward block, which merging can tell apart.

    Known once a prefill has run inside; a patch must be there before.
    """
    family, seen = work.family, {}

    def look(index: int, args: tuple, kwargs: dict) -> None:
        seen.setdefault(index, []).append((args[0] if args else kwargs["hidden_states"]).shape[1])

    layers = family.tower_layers(family.towers(family.inner(work.model))[0])
    handles = [
        block.register_forward_pre_hook(lambda _, *given, i=i: look(i, *given), with_kwargs=True)
        for i, layer in enumerate(map(tower_layer, layers))
        for block in (layer.attention, layer.feed_forward)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def count(work: Workload, prefill: Callable[[], Any]) -> dict[str, Any]:
    """Run a prefill once and return `flops` by torch's counter, `peak_bytes` above the weights and `tower_tokens`.

    The counter sees matrix products, convolutions and attention (whole squares, though attention is causal), two
    operations per multiply-add, and what vlmprune's own operators multiply by their formulas. Peak memory is the
    allocator's on a GPU, and on a CPU the bytes of all tensors that exist at one time.
    """
    device, alive = work.model.device, AliveBytes()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        prefill()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flops})
    with tower_tokens(work) as seen, counter:
        if cuda:
            prefill()
        else:
            with alive:
                prefill()
            peak = alive.peak
    tokens = [tuple(blocks) for blocks in seen.values()]
    return {"flops": counter.get_total_flops(), "peak_bytes": peak, "tower_tokens": tokens}


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache really holds."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def language_flops(work: Workload, tokens: list[int]) -> int:
    """FLOPs of the decoder layers by formula, `tokens` of every layer: 2 n (2 d² + 2 d k + 2 n d + 3 d m) per layer and
    row, with d the hidden size, k the width of keys and m that of the feed-forward. `tokens` are those of the cache.
    """
    text = work.model.config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = head * text.num_key_value_heads
    return 2 * work.batch * prefill_flops(tokens, text.hidden_size, text.intermediate_size, kv_hidden=kv)


def formula_flops(work: Workload, tokens: list[int], tower_tokens: list[tuple[int, int]]) -> int:
    """FLOPs of a whole prefill by formula: tower, projector, decoder layers, head on the last token.

    The tower: per view 2 (P p d + sum over layers of 4 T d² + 2 T² d + 2 F d m), with P its patches of p values each, T
    the tokens of that layer's attention and F those of its feed-forward, which merging makes fewer. The projector: two
    matrices, on all patches of all views. Norms, activations, taps and decisions are left out.

    Args:
        work: the workload.
        tokens: of every decoder layer, those of the cache.
        tower_tokens: T and F of every tower layer, per view (of `count`).
    """
    config = work.model.config
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    d, m = vision.hidden_size, vision.intermediate_size
    tower = patches * 3 * vision.patch_size**2 * d
    tower += prefill_flops([attention for attention, _ in tower_tokens], d, 0)
    tower += 2 * d * m * sum(ffn for _, ffn in tower_tokens)
    layers = config.vision_feature_layer
    wide = d * (1 if isinstance(layers, int) else len(layers))
    projector = patches * (wide + text.hidden_size) * text.hidden_size
    head = text.hidden_size * text.vocab_size
    return 2 * work.batch * (work.views * (tower + projector) + head) + language_flops(work, tokens)
