"""Interleaved measurement of one method on one workload, against its oracle and the unpruned model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmprune.api import Handle
from vlmprune.engine.install import install, remove
from vlmprune.engine.plan import Plan
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.counting import count, formula_flops, kv_bytes, language_flops
from vlmprune.eval.bench.oracle import Oracle, Plain
from vlmprune.eval.bench.stages import STAGES, stage_seconds
from vlmprune.eval.bench.stats import ratio, spread
from vlmprune.eval.bench.workload import Workload

__all__ = ["Effort", "measure_method", "measure_unpruned"]

DROP = ("taps", "selection", "gather")  # what pruning itself costs


@dataclass(frozen=True)
class Effort:
    """How often things are run.

    Attributes:
        pairs: (pruned, oracle) pairs of first tokens.
        plain: how many of them an unpruned run stands beside; answers are decoded after the first of these, after more
            where they are so short that fewer tokens than pairs would be timed.
        stages: runs with stamps, at most as many as pairs.
        new_tokens: tokens of an answer, the first included.
    """

    pairs: int = 15
    plain: int = 3
    stages: int = 3
    new_tokens: int = 32

    def due(self, number: int, times: int) -> bool:
        """Whether something that happens `times` times, evenly spaced, happens beside pair `number`."""
        return (number * times) // self.pairs != ((number + 1) * times) // self.pairs


@dataclass
class Contender:
    """One way of running the workload, and what it took."""

    run: Plain
    clock: Clock
    plan: Plan | None = None
    first: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def ready(self) -> None:
        """Put this contender's hooks on the model, and no others; never inside a timed path."""
        remove(self.run.work.model)
        if self.plan is not None:
            install(self.run.work.model, self.plan)

    def prefill(self) -> torch.Tensor:
        self.ready()
        token, seconds = self.clock.time(self.run.prefill)
        self.first.append(seconds)
        return token

    def step(self, token: torch.Tensor, number: int) -> torch.Tensor:
        self.ready()
        place = self.run.place(number)
        token, seconds = self.clock.time(lambda: self.run.step(token, place))
        self.decode.append(seconds)
        return token


def decode(contenders: list[Contender], tokens: list[torch.Tensor], new_tokens: int) -> None:
    """Decode an answer after every contender's prefill, token by token, the contenders taking turns.

    The first step is not counted: it warms up.
    """
    for number in range(new_tokens - 1):
        for i in sorted(range(len(contenders)), reverse=bool(number % 2)):
            tokens[i] = contenders[i].step(tokens[i], number)
    for contender in contenders:
        del contender.decode[-(new_tokens - 1)]


def stage_spreads(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per stage the spread over runs; "prefill" is a list of them, one per stretch of layers."""
    made: dict[str, Any] = {
        name: spread([run[name] for run in runs]) for name in (*STAGES, "total") if name != "prefill"
    }
    made["prefill"] = [spread(list(times)) for times in zip(*(run["prefill"] for run in runs), strict=True)]
    return made


def measure_unpruned(work: Workload, effort: Effort, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Stages, memory, cache and FLOPs of the unpruned model; its end-to-end times come with every method's."""
    clock, run = Clock(work.model.device), Plain(work)
    remove(work.model)
    tell("unpruned: counting")
    with torch.no_grad():
        counted = count(work, run.prefill)  # warms up too
        cached = kv_bytes(run.cache)
        run.cache = None
        stages = []
        for i in range(effort.stages):
            tell(f"unpruned: stages {i + 1}/{effort.stages}")
            stages.append(stage_seconds(work, clock))
    tokens = [work.length] * len(work.family.decoder_layers(work.family.inner(work.model)))
    return {
        "batch": work.batch,
        "tokens": {"visual": work.visual, "patches": work.patches, "prompt": work.length},
        "stages_ms": stage_spreads(stages),
        "kv_bytes": cached,
        "peak_bytes": counted["peak_bytes"],
        "flops": {"counted": counted["flops"], "formula": formula_flops(work, tokens, counted["tower_tokens"])},
    }


def measure_method(
    work: Workload,
    handle: Handle,
    unpruned: dict[str, Any],
    effort: Effort,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything about one method on one workload. The model is unpatched afterwards.

    Args:
        handle: what `vlmprune.patch` returned for the method on this model.
        unpruned: of `measure_unpruned`, for the same workload.
    """
    clock, plan = Clock(work.model.device), handle._plan
    try:
        with torch.no_grad():
            return run_method(work, plan, clock, unpruned, effort, tell)
    finally:
        remove(work.model)


def run_method(
    work: Workload,
    plan: Plan,
    clock: Clock,
    unpruned: dict[str, Any],
    effort: Effort,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    pruned = Contender(Plain(work), clock, plan)
    tell("counting")
    pruned.ready()
    counted = count(work, pruned.run.prefill)
    cached, logits, trace = kv_bytes(pruned.run.cache), pruned.run.logits, plan.trace
    if trace is None:
        raise RuntimeError("the patched model ran and left no trace.")
    oracle = Contender(Oracle(work, trace), clock)
    plain = Contender(Plain(work), clock)
    oracle.prefill()
    merged = plan.in_vision or any(cut.merged for cut in trace.cuts)
    difference = float((logits - oracle.run.logits).abs().max() / logits.abs().max())
    oracle.first.clear()

    stages: list[dict[str, Any]] = []
    beside: dict[str, list] = defaultdict(list)  # what stood beside the unpruned runs
    for i in range(effort.pairs):
        tell(f"pair {i + 1}/{effort.pairs}")
        order = [oracle, pruned] if i % 2 else [pruned, oracle]
        order += [plain] if effort.due(i, effort.plain) else []
        tokens = [contender.prefill() for contender in order]
        if plain in order:
            beside["pruned"].append(pruned.first[-1])
            beside["oracle"].append(oracle.first[-1])
            if effort.new_tokens > 2 and len(plain.decode) < effort.pairs:
                tell("decoding")
                decode(order, tokens, effort.new_tokens)
        for contender in order:
            contender.run.cache = None
        if effort.due(i, effort.stages):
            tell("stages")
            stages.append(stage_seconds(work, clock, plan, oracle.run.stretches))
            beside["stages"].append(i * effort.plain // effort.pairs)  # the unpruned run that is nearest

    cost = [sum(run[name] for name in DROP) for run in stages]
    nearest = [plain.first[number] for number in beside["stages"]]
    parts, layers = oracle.run.stretches, len(trace.kv_lengths)
    made: dict[str, Any] = {
        "tokens": {
            "visual": work.visual,
            "entering": sum(trace.entering(i) for i in range(work.batch)) / work.batch,
            "layer_average": sum(trace.layer_average(i) for i in range(work.batch)) / work.batch,
            "kv_lengths": trace.kv_lengths,
        },
        "stretches": [
            {"first_layer": part.first, "layers": end - part.first, "columns": part.index.shape[1]}
            for part, end in zip(parts, [*(p.first for p in parts[1:]), layers], strict=True)
        ],
        "same_as_oracle": None if merged else difference,
        "first_token_ms": {
            "unpruned": spread(plain.first),
            "pruned": spread(pruned.first),
            "oracle": spread(oracle.first),
        },
        "overhead": ratio(pruned.first, oracle.first),
        "speedup": ratio(plain.first, beside["pruned"]),
        "oracle_speedup": ratio(plain.first, beside["oracle"]),
        "amdahl": amdahl(work, unpruned["stages_ms"], trace.kv_lengths),
        "cost_share": ratio(cost, nearest),
        "stages_ms": stage_spreads(stages),
        "kv_bytes": cached,
        "peak_bytes": counted["peak_bytes"],
        "flops": {
            "counted": counted["flops"],
            "formula": formula_flops(work, trace.kv_lengths, counted["tower_tokens"]),
        },
    }
    if plain.decode:
        made["decode_ms"] = {
            "unpruned": spread(plain.decode),
            "pruned": spread(pruned.decode),
            "oracle": spread(oracle.decode),
        }
        made["decode_overhead"] = ratio(pruned.decode, oracle.decode)
        made["decode_speedup"] = ratio(plain.decode, pruned.decode)
        made["answer_speedup"] = answer_speedup(made, effort.new_tokens)
    return made


def amdahl(work: Workload, stages_ms: dict[str, Any], kv_lengths: list[int]) -> dict[str, float]:
    """Bounds of the speed-up of the first token from the unpruned model's stages.

    "bound": the decoder layers shrink as their FLOPs do, everything else stays; "limit": they cost nothing at all.
    """
    total = stages_ms["total"]["median"]
    layers = sum(part["median"] for part in stages_ms["prefill"])
    left = language_flops(work, kv_lengths) / language_flops(work, [work.length] * len(kv_lengths))
    return {"bound": total / (total - layers * (1 - left)), "limit": total / (total - layers)}


def answer_speedup(made: dict[str, Any], new_tokens: int, who: str = "pruned") -> float:
    """How much sooner than the unpruned model's an answer of `new_tokens` is there: first token, then so many decode
    steps less one. `who` is "pruned" or "oracle"."""
    first, step = made["first_token_ms"], made["decode_ms"]
    unpruned, mine = (first[one]["median"] + (new_tokens - 1) * step[one]["median"] for one in ("unpruned", who))
    return unpruned / mine
