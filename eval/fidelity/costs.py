"""What an entry costs on a user's own prompts, interleaved with the unpruned model: time, memory, cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from vlmprune.api import Handle
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.counting import kv_bytes, peak_bytes
from vlmprune.eval.bench.stats import ratio

__all__ = ["EntryCosts", "measure_costs"]


@dataclass(frozen=True)
class EntryCosts:
    """What a batch costs, unpruned and pruned.

    Attributes:
        first_ms, answer_ms: (unpruned, pruned) medians: through the first token, and of a whole answer of `tokens`.
        first, answer: unpruned / pruned, the median over pairs with its 95 % interval (`bench.stats.ratio`).
        peak, kv: bytes above the weights while it is prefilled, and in the cache behind it: (unpruned, pruned).
        tokens: of the timed answer, the same for both.
        batch: prompts.
    """

    first_ms: tuple[float, float]
    answer_ms: tuple[float, float]
    first: dict[str, float]
    answer: dict[str, float]
    peak: tuple[int, int]
    kv: tuple[int, int]
    tokens: int
    batch: int


@contextmanager
def only(handle: Handle, plain: bool) -> Iterator[None]:
    """The unpruned model, or the pruned one."""
    with handle.disabled() if plain else nullcontext():
        yield


@torch.no_grad()
def measure_costs(
    handle: Handle, inputs: dict[str, Any], tokens: int, pairs: int, clock: Clock | None = None
) -> EntryCosts:
    """Run pairs of the unpruned and the pruned model, in turns, after one of each that is not counted.

    Args:
        handle: of the patched model.
        inputs: a batch.
        tokens: of an answer; both models write as many.
        pairs: how often.
        clock: of the model's device, by default.
    """
    model = handle.model
    clock = clock or Clock(model.device)
    cache: dict[bool, int] = {}

    def prefill(plain: bool) -> None:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        cache[plain] = kv_bytes(out.past_key_values)

    def answer(plain: bool) -> None:
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1)

    took: dict[Callable, list[tuple[float, float]]] = {prefill: [], answer: []}
    for number in range(pairs + 1):
        for call, times in took.items():
            one: dict[bool, float] = {}
            for plain in (True, False) if number % 2 else (False, True):
                with only(handle, plain):
                    one[plain] = clock.time(lambda call=call, plain=plain: call(plain))[1]
            if number:
                times.append((one[True], one[False]))
    peaks = []
    for plain in (True, False):
        with only(handle, plain):
            peaks.append(peak_bytes(model.device, lambda plain=plain: prefill(plain)))
    told = {}
    for call, name in ((prefill, "first"), (answer, "answer")):
        above, below = zip(*took[call], strict=True)
        told |= {name: ratio(above, below), f"{name}_ms": (1e3 * median(above), 1e3 * median(below))}
    batch = inputs["input_ids"].shape[0]
    return EntryCosts(**told, peak=tuple(peaks), kv=(cache[True], cache[False]), tokens=tokens, batch=batch)
