"""What one prefill needs besides time, counted while it runs: floating-point operations, memory, bytes in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlmprune.eval.bench.workload import Workload
from vlmprune.patches.towers import tower_layer

__all__ = ["count", "kv_bytes", "peak_bytes"]

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
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given:  # a view of what was there before is nothing new
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def storages(values: Any) -> list[Any]:
    """The memory of all tensors in nested values, as far as they have some."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]


@contextmanager
def tower_tokens(work: Workload) -> Iterator[dict[int, list[int]]]:
    """The tokens per view of every tower layer's attention and feed-forward block, which merging can tell apart.

    Known once a prefill has run inside; a patch must be there before.
    """
    family, seen = work.family, {}

    def look(index: int, args: tuple, kwargs: dict) -> None:
        # packed towers have no dimension of views, or an empty one
        seen.setdefault(index, []).append((args[0] if args else kwargs["hidden_states"]).shape[-2])

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


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """The most bytes above those there before while something runs: the allocator's on a GPU, all tensors' on a CPU."""
    if device.type != "cuda":
        with AliveBytes() as alive:
            call()
        return alive.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def count(work: Workload, prefill: Callable[[], Any]) -> dict[str, Any]:
    """Run a prefill once and return `flops` by torch's counter, `peak_bytes` above the weights and `tower_tokens`.

    The counter sees matrix products, convolutions and attention (whole squares, though attention is causal), two
    operations per multiply-add, and what vlmprune's own operators multiply by their formulas. Peak memory is the
    allocator's on a GPU, and on a CPU the bytes of all tensors that exist at one time.
    """
    device = work.model.device
    cuda = device.type == "cuda"
    peak = peak_bytes(device, prefill) if cuda else 0
    counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flops})
    with tower_tokens(work) as seen, counter:
        if cuda:
            prefill()
        else:
            peak = peak_bytes(device, prefill)
    tokens = [tuple(blocks) for blocks in seen.values()]
    return {"flops": counter.get_total_flops(), "peak_bytes": peak, "tower_tokens": tokens}


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache really holds."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
