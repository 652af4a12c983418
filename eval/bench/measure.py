"""Interleaved measurement of one method on one workload, against its oracle and the unpruned model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmprune.api import Handle
from vlmprune.cost.flops import formula_flops, language_flops
from vlmprune.engine.install import install, remove
from vlmprune.engine.plan import Plan
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.counting import count, kv_bytes
from vlmprune.eval.bench.oracle import Oracle, PlainRun, Stretch
from vlmprune.eval.bench.stages import STAGES, stage_seconds
from vlmprune.eval.bench.stats import ratio, spread
from vlmprune.eval.bench.workload import Workload
from vlmprune.trace import Trace

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

    run: PlainRun
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
    clock, run = Clock(work.model.device), PlainRun(work)
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
        "flops": flops_of(work, counted, tokens),
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


@dataclass
class Rounds:
    """What interleaved runs of a pruned model, its oracle and the unpruned model measured.

    Attributes:
        pruned, oracle, plain: with the seconds of their runs.
        stages: seconds by stage, one per run with stamps.
        beside: the seconds of pruned and oracle runs beside unpruned ones; of runs with stamps, the number of the
            unpruned run that is nearest.
    """

    pruned: Contender
    oracle: Contender
    plain: Contender
    stages: list[dict[str, Any]] = field(default_factory=list)
    beside: dict[str, list] = field(default_factory=lambda: defaultdict(list))

    def run(self, work: Workload, plan: Plan, clock: Clock, effort: Effort, tell: Callable[[str], None]) -> None:
        """Run the pairs."""
        for i in range(effort.pairs):
            tell(f"pair {i + 1}/{effort.pairs}")
            order = [self.oracle, self.pruned] if i % 2 else [self.pruned, self.oracle]
            if effort.due(i, effort.plain):
                self.run_with_plain([*order, self.plain], effort, tell)
            else:
                for contender in order:
                    contender.prefill()
            for contender in (*order, self.plain):
                contender.run.cache = None
            if effort.due(i, effort.stages):
                tell("stages")
                self.stages.append(stage_seconds(work, clock, plan, self.oracle.run.stretches))
                self.beside["stages"].append(i * effort.plain // effort.pairs)

    def run_with_plain(self, order: list[Contender], effort: Effort, tell: Callable[[str], None]) -> None:
        """One pair and the unpruned model beside it, decoding too where there is something to decode."""
        tokens = [contender.prefill() for contender in order]
        self.beside["pruned"].append(self.pruned.first[-1])
        self.beside["oracle"].append(self.oracle.first[-1])
        if effort.new_tokens > 2 and len(self.plain.decode) < effort.pairs:
            tell("decoding")
            decode(order, tokens, effort.new_tokens)

    def spreads(self, what: str) -> dict[str, Any]:
        """Spreads of the seconds of `what` ("first", "decode") by contender."""
        who = {"unpruned": self.plain, "pruned": self.pruned, "oracle": self.oracle}
        return {name: spread(getattr(contender, what)) for name, contender in who.items()}


def run_method(
    work: Workload,
    plan: Plan,
    clock: Clock,
    unpruned: dict[str, Any],
    effort: Effort,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    pruned = Contender(PlainRun(work), clock, plan)
    tell("counting")
    pruned.ready()
    counted = count(work, pruned.run.prefill)
    cached, logits, trace = kv_bytes(pruned.run.cache), pruned.run.logits, plan.trace
    if trace is None:
        raise RuntimeError("the patched model ran and left no trace.")
    oracle = Contender(Oracle(work, trace), clock)
    oracle.prefill()
    merged = plan.in_vision or any(cut.merged for cut in trace.cuts)
    difference = float((logits - oracle.run.logits).abs().max() / logits.abs().max())
    oracle.first.clear()

    rounds = Rounds(pruned, oracle, Contender(PlainRun(work), clock))
    rounds.run(work, plan, clock, effort, tell)
    return {
        "tokens": tokens_of(work, trace),
        "stretches": stretches_of(oracle.run.stretches, len(trace.kv_lengths)),
        "same_as_oracle": None if merged else difference,
        **first_tokens(rounds),
        "amdahl": amdahl(work, unpruned["stages_ms"], trace.kv_lengths),
        "stages_ms": stage_spreads(rounds.stages),
        "kv_bytes": cached,
        "peak_bytes": counted["peak_bytes"],
        "flops": flops_of(work, counted, trace.kv_lengths),
        **(answers(rounds, effort.new_tokens) if rounds.plain.decode else {}),
    }


def flops_of(work: Workload, counted: dict[str, Any], kv_lengths: list[int]) -> dict[str, int | None]:
    """FLOPs of a batch by torch's counter and by formula, None where that is of towers of another build."""
    if not work.family.by_formula:
        return {"counted": counted["flops"], "formula": None}
    formula = formula_flops(work.model.config, kv_lengths, counted["tower_tokens"], work.views)
    return {"counted": counted["flops"], "formula": work.batch * formula}


def tokens_of(work: Workload, trace: Trace) -> dict[str, Any]:
    """Visual tokens before and after, in the mean over the batch."""
    images = range(len(trace.grids))
    return {
        "visual": work.visual,
        "entering": sum(trace.entering(i) for i in images) / work.batch,
        "layer_average": sum(trace.layer_average(i) for i in images) / work.batch,
        "kv_lengths": trace.kv_lengths,
    }


def stretches_of(parts: Sequence[Stretch], layers: int) -> list[dict[str, int]]:
    """The runs of layers with the same columns."""
    ends = [*(part.first for part in parts[1:]), layers]
    return [
        {"first_layer": part.first, "layers": end - part.first, "columns": part.index.shape[1]}
        for part, end in zip(parts, ends, strict=True)
    ]


def first_tokens(rounds: Rounds) -> dict[str, Any]:
    """Times of the first token, and their ratios."""
    cost = [sum(run[name] for name in DROP) for run in rounds.stages]
    nearest = [rounds.plain.first[number] for number in rounds.beside["stages"]]
    return {
        "first_token_ms": rounds.spreads("first"),
        "overhead": ratio(rounds.pruned.first, rounds.oracle.first),
        "speedup": ratio(rounds.plain.first, rounds.beside["pruned"]),
        "oracle_speedup": ratio(rounds.plain.first, rounds.beside["oracle"]),
        "cost_share": ratio(cost, nearest),
    }


def answers(rounds: Rounds, new_tokens: int) -> dict[str, Any]:
    """Times of a decode step, their ratios, and that of whole answers."""
    made = {"first_token_ms": rounds.spreads("first"), "decode_ms": rounds.spreads("decode")}
    return {
        "decode_ms": made["decode_ms"],
        "decode_overhead": ratio(rounds.pruned.decode, rounds.oracle.decode),
        "decode_speedup": ratio(rounds.plain.decode, rounds.pruned.decode),
        "answer_speedup": answer_speedup(made, new_tokens),
    }


def amdahl(work: Workload, stages_ms: dict[str, Any], kv_lengths: list[int]) -> dict[str, float]:
    """Bounds of the speed-up of the first token from the unpruned model's stages.

    "bound": the decoder layers shrink as their FLOPs do, everything else stays; "limit": they cost nothing at all.
    """
    total = stages_ms["total"]["median"]
    layers = sum(part["median"] for part in stages_ms["prefill"])
    config, whole = work.model.config, [work.length] * len(kv_lengths)
    left = language_flops(config, kv_lengths) / language_flops(config, whole)
    return {"bound": total / (total - layers * (1 - left)), "limit": total / (total - layers)}


def answer_speedup(made: dict[str, Any], new_tokens: int, who: str = "pruned") -> float:
    """How much sooner than the unpruned model's an answer of `new_tokens` is there: first token, then so many decode
    steps less one. `who` is "pruned" or "oracle"."""
    first, step = made["first_token_ms"], made["decode_ms"]
    unpruned, mine = (first[one]["median"] + (new_tokens - 1) * step[one]["median"] for one in ("unpruned", who))
    return unpruned / mine
