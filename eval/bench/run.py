"""A whole benchmark: from settings to results, stored cell by cell, and the files they are in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.eval.bench import measure, results, shapes
from vlmprune.eval.bench.compare import differing_settings
from vlmprune.eval.bench.measure import Effort
from vlmprune.eval.bench.sizes import check_sizes, measure_sizes
from vlmprune.eval.bench.workload import Workload, make_workload
from vlmprune.kernels import choice
from vlmprune.runtime import answering, loading
from vlmprune.runtime.errors import CommandError, UserError, brief, user_mistakes
from vlmprune.runtime.files import has_content
from vlmprune.runtime.status import Bar, note, quiet, status

if TYPE_CHECKING:
    from vlmprune.spec import Job

__all__ = ["Replaced", "measured", "read_results", "write"]

EFFORT = ("pairs", "plain_runs", "stage_runs")


def measured(
    pairs: list[tuple[Job, int]], asked: dict[str, Any], json: str | None, sizes: int | None
) -> dict[str, Any]:
    """Build or load the model and measure every cell that is wanted.

    Args:
        pairs: jobs and their batch sizes.
        asked: all settings by the names of their flags.
        json: the file that results are stored in, after every cell, and gone on with.
        sizes: how many picture sizes to time too.
    """
    device = loading.pick_device(asked["device"])
    found = empty(asked, device)
    there = previous(json)
    if there is not None:
        check_same(there, found, json)
    loaded = subject(asked, device)
    answering.check(loaded, [job for job, _ in pairs])
    if sizes is not None:
        with user_mistakes():
            check_sizes(loaded.model)
    effort = Effort(asked["pairs"], asked["plain_runs"], asked["stage_runs"], asked["new_tokens"])
    works = workloads(loaded, dict.fromkeys(batch for _, batch in pairs), asked["prompt_tokens"])
    first = next(iter(works.values()))
    check_length(loaded, first.length + asked["new_tokens"])
    tell_idle(pairs, first, effort)
    found["settings"]["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    found["model"] = described(loaded, first) | {"random_weights": asked["model"] is None}
    if there is not None:
        check_same(there, found, json)
        found = there | {"asked": asked, "settings": there["settings"] | found["settings"]}
    if sizes is not None:
        status(f"{sizes} picture sizes")
        found["sizes"] = answering.guarded(measure_sizes, loaded.model, sizes)
    with Bar(len(pairs)) as bar:
        fill(found, pairs, CellMeasurer(loaded, works, effort, bar), json)
    return found


def workloads(loaded: loading.Loaded, batches: Iterable[int], prompt_tokens: int) -> dict[int, Workload]:
    """The prompts of every batch size."""
    return {batch: answering.guarded(make_workload, loaded.model, batch, prompt_tokens) for batch in batches}


def fill(found: dict[str, Any], pairs: list[tuple[Job, int]], cells: CellMeasurer, json: str | None) -> None:
    """Measure the cells that results lack, which are stored after each."""
    replaced = Replaced()

    def save(now: dict[str, Any]) -> None:
        now["settings"]["replaced"] = sorted({*now["settings"].get("replaced", []), *replaced.tell()})
        if json:
            store(now, json)

    try:
        results.run_grid(found, pairs, cells.unpruned, cells.pruned, save)
        save(found)
    except (KeyboardInterrupt, CommandError):
        if json and found["cells"]:
            note(f"{json} has {len(found['cells'])} cells: the same call with --resume goes on.")
        raise


def described(loaded: loading.Loaded, work: Workload) -> dict[str, Any]:
    """The model, as results hold it."""
    return {"description": loaded.description.partition("), ")[0] + ")", "visual": work.visual}


@dataclass
class CellMeasurer:
    """Measures cells of one model, by batch size."""

    loaded: loading.Loaded
    works: dict[int, Workload]
    effort: Effort
    bar: Bar

    def unpruned(self, batch: int) -> dict[str, Any]:
        """What stands beside all cells of a batch size."""
        return self.run(measure.measure_unpruned, f"batch {batch}", self.works[batch])

    def pruned(self, job: Job, batch: int, base: dict[str, Any]) -> dict[str, Any]:
        """One cell."""
        who = f"{job.label}, batch {batch}"
        cell = self.run(measure.measure_method, who, self.works[batch], answering.patch(self.loaded, job), base)
        over, first = cell["overhead"], cell["first_token_ms"]
        note(
            f"{who}: {first['unpruned']['median']:.0f} -> {first['pruned']['median']:.0f} ms, "
            f"overhead {over['median']:.3f}"
        )
        self.bar.step()
        return cell

    def run(self, how: Callable, who: str, *what: Any) -> dict[str, Any]:
        """Measure, and show what is going on."""
        return answering.guarded(how, *what, self.effort, lambda text: status(f"{who}: {text}"))


class Replaced:
    """What plain torch stood in for, of what --kernels asks for; the warnings of the operators are kept away here."""

    def __init__(self) -> None:
        self.told = choice.told
        self.told.clear()
        self.said: list[str] = []

    def tell(self) -> list[str]:
        """All of it, each printed once."""
        for name, op, _, why in sorted(self.told):
            text = f"{op}: not on {name}, since {why}"
            if text not in self.said:
                self.said.append(text)
                note(f"{text}: plain torch instead.")
        return self.said


def empty(asked: dict[str, Any], device: str) -> dict[str, Any]:
    """Results without cells; the dtype is None where only the checkpoint knows it."""
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


def subject(asked: dict[str, Any], device: str) -> loading.Loaded:
    """The model to measure: a loaded one, or a shape with random weights."""
    if asked["model"] is not None:
        return loading.load(loading.find_model(asked["model"]), device, asked["dtype"])

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


def check_length(loaded: loading.Loaded, tokens: int) -> None:
    """Refuse prompts that are longer than the model's positions."""
    most = getattr(loaded.model.config.text_config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise UserError(f"prompt and answer have {tokens} tokens, and {loaded.source.name} has {most} positions.")


def tell_idle(pairs: list[tuple[Job, int]], work: Workload, effort: Any) -> None:
    """Say what will not be measured although it was asked for."""
    for budget in dict.fromkeys(job.options.get("keep", job.options.get("average", 0)) for job, _ in pairs):
        if budget >= (1.0 if isinstance(budget, float) else work.patches):
            note(f"a budget of {budget} keeps all {work.patches} patches: nothing is pruned there.")
    if effort.new_tokens == 2:
        note("--new-tokens 2: the one step after the first token only warms up and is not measured; 3 or more are.")


def previous(path: str | None) -> dict[str, Any] | None:
    """What the file of --json holds so far, None without one."""
    return read_results(path) if path is not None and has_content(path) else None


def check_same(old: dict[str, Any], new: dict[str, Any], path: str) -> None:
    """Refuse to put results of two kinds into one file; what `new` does not know yet is not compared.

    Raises:
        UserError: other settings, machine, versions or numbers of runs.
    """
    found = differing_settings(old, new)
    found |= {name: (old["asked"][name], new["asked"][name]) for name in EFFORT}
    skipped = {"replaced"} | ({"dtype"} if new["settings"]["dtype"] is None else set())
    other = {name: both for name, both in found.items() if both[0] != both[1] and name not in skipped}
    if other:
        said = "; ".join(f"{name} {was} there and {now} here" for name, (was, now) in other.items())
        raise UserError(f"{path} cannot be gone on with: {said}. Name another file.")


def read_results(path: str) -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        UserError: no such file, or no results in it.
    """
    try:
        return results.read(Path(path).expanduser())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(brief(error)) from None


def store(found: dict[str, Any], path: str) -> None:
    """Write results, together with what another run has put into the file meanwhile."""
    if (there := previous(path)) is not None:
        check_same(there, found, path)
        results.absorb(found, there)
    write(path, lambda target: results.write_json(found, target))


def write(path: str, how: Callable[[Path], None], told: bool = False) -> None:
    """Write one file and say what failed, or, if `told`, that it is there."""
    try:
        how(Path(path).expanduser())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {brief(error)}") from None
    if told:
        print(f"written: {path}", file=sys.stderr)
