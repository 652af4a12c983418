"""Thousands of generations in one process, with changing methods, families and batch shapes: nothing may pile up.

    python scripts/soak.py [--generations 2000]

Every generation patches one of a few tiny random models, asks it, and unpatches it (or lets the next patch replace this
one). One round runs everything once. After some rounds of warm-up and at the end it counts what lives: tensors,
objects that the garbage collector knows, and the process's memory. It fails if tensors or objects have grown by more
than one in two rounds, if memory has by more than a bound, or if after a round any hook or attribute of ours is left.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # tiny models live there
import tiny

import vlmprune
from vlmprune.engine import install as engine

FAMILIES = {
    "llava": {}, "llava_next": {"family": "llava_next"},
    "llava_onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
}  # fmt: skip
METHODS = {
    "fopru": {"keep": 5}, "fastv": {"keep": 0.3}, "random": {"keep": 7}, "pool": {"keep": 4}, "grid": {"keep": 0.5},
    "transprune": {"keep": 0.4}, "tome": {"keep": 0.5},
}  # fmt: skip
WARM = 3  # rounds until every cache (grids, fonts of code, lazily made hooks of transformers) is filled
SLACK = 8 << 20  # bytes by which memory may grow: the allocator's own noise


@dataclass(frozen=True)
class Living:
    """What lives after a round."""

    tensors: int
    objects: int
    memory: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.objects} objects, {self.memory / 2**20:.1f} MiB"


def living() -> Living:
    """Count, after everything that can go has gone."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    objects = gc.get_objects()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return Living(tensors, len(objects), pages * 4096)


def workload() -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
    """One round: (family, model, method, inputs), each method on each family, batches and prompts of several shapes."""
    shapes = itertools.cycle([1, 2, 3])
    for family, options in FAMILIES.items():
        model = tiny.shared(**options)
        for number, method in enumerate(METHODS):
            rows = [
                tiny.prompt(model, [2 + i + number % 3, "image", 3], [((24, 24), (40, 24), (20, 60))[i]], seed=i)
                for i in range(next(shapes))
            ]
            yield family, model, method, tiny.batch(rows)


def ours(model: Any) -> int:
    """Hooks and attributes of ours on a model."""
    hooks = [h for m in model.modules() for hs in (m._forward_hooks, m._forward_pre_hooks) for h in hs.values()]
    bound = [v for m in model.modules() for v in vars(m).values() if type(v).__module__.startswith("vlmprune")]
    return sum(map(engine.is_hook, hooks)) + len(bound)


def generate(model: Any, method: str, inputs: dict[str, Any], replace: bool) -> None:
    """One generation; `replace` leaves the patch for the next one to take off."""
    handle = vlmprune.patch(model, method, **METHODS[method])
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    if not handle.trace.cuts:
        raise RuntimeError(f"{method} pruned nothing")
    if not replace:
        handle.unpatch()


def soak(generations: int, tell: Any = lambda line: None) -> list[str]:
    """Run whole rounds until there were as many generations; returns what is wrong."""
    done, rounds, wrong = 0, 0, []
    first: Living | None = None
    start = time.monotonic()
    todo = list(workload())
    tell(f"{len(todo)} generations a round, {WARM} to warm up: {len(FAMILIES)} families x {len(METHODS)} methods")
    while done < generations or rounds <= WARM:
        for number, (_, model, method, inputs) in enumerate(todo):
            generate(model, method, inputs, replace=(rounds + number) % 3 == 0)
            done += 1
        for options in FAMILIES.values():
            model = vlmprune.unpatch(tiny.shared(**options))
            if left := ours(model):
                wrong.append(f"round {rounds}: {left} hooks or attributes are left on {type(model).__name__}")
        rounds += 1
        if rounds == WARM or rounds % 12 == 0:
            now = living()
            first = first or now
            tell(f"after {done} generations ({time.monotonic() - start:.0f} s): {now}")
    last, since = living(), rounds - WARM
    for name in ("tensors", "objects"):
        grown = getattr(last, name) - getattr(first, name)
        tell(f"{name}: {grown:+d} in {since * len(todo)} generations since the warm-up")
        if grown > since / 2:
            wrong.append(f"{grown} {name} more than after the warm-up, {since * len(todo)} generations ago")
    grown = last.memory - first.memory
    tell(f"memory: {grown / 2**20:+.1f} MiB")
    if grown > SLACK:
        wrong.append(f"memory grew by {grown / 2**20:.1f} MiB since the warm-up")
    return wrong


def main() -> int:
    """Soak, print, and say whether all is well."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--generations", type=int, default=2000)
    args = made.parse_args()
    torch.set_num_threads(1)
    wrong = soak(args.generations, lambda line: print(line, flush=True))
    for line in wrong:
        print(f"WRONG: {line}")
    print("ok" if not wrong else "not ok")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
