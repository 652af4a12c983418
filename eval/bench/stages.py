"""Where one prefill's time goes. Stamps are taken around modules and around what the patch does, by hooks on this model
that go away again; the run that takes them is not the run that is timed end to end.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from vlmprune.engine.install import install, remove
from vlmprune.engine.plan import Plan
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.oracle import PlainRun, Stretch
from vlmprune.eval.bench.workload import Workload
from vlmprune.parts.cuts import AnyCut, Cut, PixelCut
from vlmprune.parts.taps import BlockTap, Tap, TowerTap

__all__ = ["STAGES", "stage_seconds"]

#: What a prefill is divided into. `prefill` is a list, one entry per stretch between cuts.
STAGES = ("tower", "projector", "taps", "selection", "gather", "prefill", "rest")


class Spans:
    """Stamps by name; a name is open once at a time."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.open: dict[str, Any] = {}
        self.done: list[tuple[str, Any, Any]] = []

    def begin(self, name: str) -> None:
        self.open[name] = self.clock.now()

    def end(self, name: str) -> None:
        if name in self.open:
            self.done.append((name, self.open.pop(name), self.clock.now()))

    def around(self, name: str, call: Callable) -> Callable:
        """`call` between two stamps, with its own signature."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            result = call(*args, **kwargs)
            self.end(name)
            return result

        timed.__signature__ = inspect.signature(call)
        return timed

    def seconds(self) -> dict[str, float]:
        """Sum of each name's spans."""
        self.clock.wait()
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self.done:
            total[name] += self.clock.between(start, end)
        return total


def instrumented_plan(plan: Plan, spans: Spans) -> Plan:
    """A copy of a plan whose taps and decisions take stamps.

    Taps are equal by their fields, so an instance with a `measure` of its own stands for any other.
    """

    def tap(original: Tap) -> Tap:
        if not hasattr(original, "measure"):
            return original
        if isinstance(original, BlockTap):
            name = f"taps in layer {original.layer}"
        else:
            name = "taps in tower" if isinstance(original, TowerTap) else "taps before layers"
        copy = replace(original)
        object.__setattr__(copy, "measure", spans.around(name, original.measure))  # frozen: around its own guard
        return copy

    def cut(original: AnyCut) -> AnyCut:
        name = "selection before layers" if isinstance(original, Cut) else "selection in tower"
        made = replace(original, reduce=spans.around(name, original.reduce))
        return made if isinstance(made, PixelCut) else replace(made, see=tuple(tap(t) for t in made.see))

    return replace(plan, cuts=[(name, cut(c)) for name, c in plan.cuts])


@contextmanager
def stamps(work: Workload, spans: Spans) -> Iterator[None]:
    """Hooks that stamp the model's parts and, where there is a patch, what its hooks do at each place."""
    family, inner, handles = work.family, work.family.inner(work.model), []

    def stamp(register: Callable, action: Callable, name: str, first: bool) -> None:
        handles.append(register(lambda *_: action(name), prepend=first))

    def around(module: nn.Module, name: str, first: bool) -> None:
        stamp(module.register_forward_pre_hook, spans.begin, name, first)
        stamp(module.register_forward_hook, spans.end, name, False)

    def hooks(register: Callable, name: str) -> None:
        stamp(register, spans.begin, name, True)
        stamp(register, spans.end, name, False)

    around(family.towers(inner)[0], "tower", True)
    around(inner.get_submodule(family.projector), "projector", True)
    hooks(inner.register_forward_pre_hook, "before model")
    for index, layer in enumerate(family.decoder_layers(inner)):
        hooks(layer.register_forward_pre_hook, "before layers")
        around(layer, f"layer {index}", False)
    hooks(family.language_model(inner).register_forward_hook, "after layers")
    mine = inner.__dict__.get("get_image_features")
    inner.get_image_features = spans.around("encode", inner.get_image_features)
    try:
        yield
    finally:
        del inner.get_image_features
        if mine is not None:
            inner.get_image_features = mine
        for handle in handles:
            handle.remove()


def stamped(work: Workload, clock: Clock, plan: Plan | None) -> tuple[dict[str, float], float]:
    """The seconds of every span of one prefill, and of all of it."""
    spans = Spans(clock)
    remove(work.model)
    if plan is not None:
        install(work.model, instrumented_plan(plan, spans))
    try:
        with stamps(work, spans):
            _, total = clock.time(PlainRun(work).prefill)
    finally:
        remove(work.model)
    return spans.seconds(), total


def stage_seconds(
    work: Workload, clock: Clock, plan: Plan | None = None, parts: list[Stretch] | None = None
) -> dict[str, Any]:
    """Run one prefill with stamps and return the seconds of its stages, which add up to `total`.

    Args:
        plan: what is done to the model, or None for the unpruned one.
        parts: stretches of layers between cuts; all layers are one without.

    Returns:
        `STAGES` and `total`. "tower" and "projector" are theirs alone; "taps" is the measuring of what a method looks
        at, wherever that is; "selection" its decision; "gather" all else that the patch does (finding visual tokens,
        shortening, positions, masks, restoring lengths); "prefill" has one number per stretch of decoder layers; "rest"
        is the host's remainder: packing of crops, embedding, masks, norm and head.
    """
    took, total = stamped(work, clock, plan)
    count = len(work.family.decoder_layers(work.family.inner(work.model)))
    inside = work.family.projector.startswith(f"{work.family.trunk}.")
    tower = took["tower"] - took["projector"] * inside
    layers = [took[f"layer {i}"] - took[f"taps in layer {i}"] for i in range(count)]
    stages: dict[str, Any] = {
        "tower": tower - took["taps in tower"] - took["selection in tower"],
        "projector": took["projector"],
        "taps": sum(seconds for name, seconds in took.items() if name.startswith("taps")),
        "selection": took["selection in tower"] + took["selection before layers"],
        "gather": 0.0,
        "prefill": by_stretch(layers, parts),
    }
    if plan is not None:
        before = took["before layers"] - took["taps before layers"] - took["selection before layers"]
        stages["gather"] = took["before model"] - took["encode"] + before + took["after layers"]
    known = sum(value if isinstance(value, float) else sum(value) for value in stages.values())
    return stages | {"rest": total - known, "total": total}


def by_stretch(layers: list[float], parts: list[Stretch] | None) -> list[float]:
    """The seconds of every stretch of layers, of those of the layers."""
    firsts = [part.first for part in parts or []] or [0]
    return [sum(layers[a:b]) for a, b in zip(firsts, [*firsts[1:], len(layers)], strict=True)]
