"""Measuring for `vlmprune bench`: from settings to results, stored cell by cell."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmprune.cli import bench_files
from vlmprune.cli.bench_settings import wanted
from vlmprune.runtime.errors import CommandError, UserError, brief

if TYPE_CHECKING:
    from vlmprune.eval.bench.workload import Workload
    from vlmprune.runtime.loading import Loaded
    from vlmprune.spec import Job

__all__ = ["Replaced", "measured"]


def measured(args: argparse.Namespace, asked: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """Build or load the model and measure every cell that is wanted.

    Args:
        args: the flags.
        asked: of `settings_of`.
        old: results of --compare, whose cells are measured again.
    """
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import note, status

    pairs = wanted(args, asked, old)
    device = loading.pick_device(asked["device"])
    found = empty(asked, device)
    there = bench_files.previous(args.json)
    if there is not None:
        bench_files.check_same(there, found, args.json)

    from vlmprune.eval.bench import results as store
    from vlmprune.eval.bench.measure import Effort, measure_method, measure_unpruned
    from vlmprune.eval.bench.sizes import measure_sizes
    from vlmprune.eval.bench.workload import make_workload

    loaded = subject(asked, device)
    answering.check(loaded, [job for job, _ in pairs])
    effort = Effort(asked["pairs"], asked["plain_runs"], asked["stage_runs"], asked["new_tokens"])
    works = {
        batch: answering.guarded(make_workload, loaded.model, batch, asked["prompt_tokens"])
        for batch in dict.fromkeys(batch for _, batch in pairs)
    }
    first = next(iter(works.values()))
    check_length(loaded, first.length + asked["new_tokens"])
    tell_idle(pairs, first, effort)
    found["settings"]["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    found["model"] = {
        "description": loaded.description.partition("), ")[0] + ")",
        "random_weights": asked["model"] is None,
        "visual": first.visual,
    }
    if there is not None:
        bench_files.check_same(there, found, args.json)
        found = there | {"asked": asked, "settings": there["settings"] | found["settings"]}
    if args.sizes is not None:
        status(f"{args.sizes} picture sizes")
        found["sizes"] = answering.guarded(measure_sizes, loaded.model, args.sizes)
    replaced = Replaced()

    def tell(who: str) -> Callable[[str], None]:
        return lambda text: status(f"{who}: {text}")

    def unpruned(batch: int) -> dict[str, Any]:
        return answering.guarded(measure_unpruned, works[batch], effort, tell(f"batch {batch}"))

    def one(job: Job, batch: int, base: dict[str, Any]) -> dict[str, Any]:
        handle = answering.patch(loaded, job)
        cell = answering.guarded(
            measure_method, works[batch], handle, base, effort, tell(f"{job.label}, batch {batch}")
        )
        over, first = cell["overhead"], cell["first_token_ms"]
        note(
            f"{job.label}, batch {batch}: {first['unpruned']['median']:.0f} -> {first['pruned']['median']:.0f} ms, "
            f"overhead {over['median']:.3f}"
        )
        return cell

    def save(now: dict[str, Any]) -> None:
        now["settings"]["replaced"] = sorted({*now["settings"].get("replaced", []), *replaced.tell()})
        if args.json:
            bench_files.save(now, args.json)

    try:
        store.run_grid(found, pairs, unpruned, one, save)
        status()
        save(found)
    except (KeyboardInterrupt, CommandError):
        if args.json and found["cells"]:
            note(f"{args.json} has {len(found['cells'])} cells: the same call with --resume goes on.")
        raise
    return found


class Replaced:
    """What plain torch stood in for, of what --kernels asks for; the warnings of the operators are kept away here."""

    def __init__(self) -> None:
        from vlmprune.kernels import choice

        self.told = choice.told
        self.told.clear()
        self.said: list[str] = []

    def tell(self) -> list[str]:
        """All of it, each printed once."""
        from vlmprune.runtime.status import note

        for name, op, _, why in sorted(self.told):
            text = f"{op}: not on {name}, since {why}"
            if text not in self.said:
                self.said.append(text)
                note(f"{text}: plain torch instead.")
        return self.said


def empty(asked: dict[str, Any], device: str) -> dict[str, Any]:
    """Results without cells; the dtype is None where only the checkpoint knows it."""
    from vlmprune.eval.bench import results

    return {
        "bench": results.SCHEMA,
        "asked": asked,
        "settings": {
            "model": asked["model"] or asked["shape"],
            "device": device,
            "dtype": dtype_of(asked, device),
            "prompt_tokens": asked["prompt_tokens"],
            "new_tokens": asked["new_tokens"],
            "kernels": asked["kernels"],
        },
        "machine": results.describe_machine(device),
        "model": {},
        "unpruned": [],
        "cells": [],
    }


def dtype_of(asked: dict[str, Any], device: str) -> str | None:
    """The dtype that "auto" means, None where only the checkpoint knows it."""
    if asked["dtype"] != "auto":
        return asked["dtype"]
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if asked["model"] is None else None


def subject(asked: dict[str, Any], device: str) -> Loaded:
    """The model to measure: a loaded one, or a shape with random weights."""
    from vlmprune.runtime import loading
    from vlmprune.runtime.status import note, quiet

    if asked["model"] is not None:
        return loading.load(loading.find_model(asked["model"]), device, asked["dtype"])

    import torch

    from vlmprune.errors import UnsupportedError
    from vlmprune.eval.bench import shapes

    try:
        shape = shapes.find_shape(asked["shape"])
        note(f"building {shape.name} ({shape.what}) with random weights on {device} ...")
        with quiet():
            model = shapes.build(shape, device, getattr(torch, dtype_of(asked, device)))
    except (ValueError, UnsupportedError, FileNotFoundError) as error:
        raise UserError(brief(error)) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CommandError(brief(error)) from None
    return loading.Loaded(loading.Source(shape.name, "", local=True), model, None)


def check_length(loaded: Loaded, tokens: int) -> None:
    """Refuse prompts that are longer than the model's positions."""
    most = getattr(loaded.model.config.text_config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise UserError(f"prompt and answer have {tokens} tokens, and {loaded.source.name} has {most} positions.")


def tell_idle(pairs: list[tuple[Job, int]], work: Workload, effort: Any) -> None:
    """Say what will not be measured although it was asked for."""
    from vlmprune.runtime.status import note

    for budget in dict.fromkeys(job.options.get("keep", job.options.get("average", 0)) for job, _ in pairs):
        if budget >= (1.0 if isinstance(budget, float) else work.patches):
            note(f"a budget of {budget} keeps all {work.patches} patches: nothing is pruned there.")
    if effort.new_tokens == 2:
        note("--new-tokens 2: the one step after the first token only warms up and is not measured; 3 or more are.")
