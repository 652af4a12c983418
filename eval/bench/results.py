"""What a benchmark found, as one JSON document and as CSV, and a run that stores it cell by cell."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmprune.eval.bench.schema import RESULTS, fault
from vlmprune.runtime.files import write_whole

__all__ = [
    "SCHEMA",
    "absorb",
    "cells_by_key",
    "describe_machine",
    "read",
    "rows",
    "run_grid",
    "write_csv",
    "write_json",
]

SCHEMA = 1


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on, by generic names."""
    import transformers

    from vlmprune._version import __version__

    made = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "vlmprune": __version__,
    }
    if device.startswith("cuda"):
        made["gpu"] = torch.cuda.get_device_name(device)
    return made


def processor() -> str:
    """The processor's name as it tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def key(cell: dict[str, Any]) -> tuple:
    """What tells one cell from another: method, its options, batch."""
    return cell["method"], json.dumps(cell["options"], sort_keys=True), cell["batch"]


def cells_by_key(results: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    """The cells of results, by method, options and batch."""
    return {key(cell): cell for cell in results["cells"]}


def read(path: str | Path) -> dict[str, Any]:
    """Results from a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = results["bench"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} holds no results of `vlmprune bench` (its --json writes them).") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} was written in format {schema}, and this version reads {SCHEMA}: measure anew.")
    if said := fault(results, RESULTS):
        raise ValueError(f"{path} is damaged: {said}.")
    if alone := {cell["batch"] for cell in results["cells"]} - {one["batch"] for one in results["unpruned"]}:
        raise ValueError(f"{path} is damaged: no unpruned model at batch {min(alone)}.")
    return results


def absorb(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Add to `found`, in place, the cells that another run of the same kind has measured and it lacks."""
    have, batches = cells_by_key(found), {one["batch"] for one in found["unpruned"]}
    found["cells"] += [cell for name, cell in cells_by_key(other).items() if name not in have]
    found["unpruned"] += [one for one in other["unpruned"] if one["batch"] not in batches]
    replaced = [*found["settings"].get("replaced", []), *other["settings"].get("replaced", [])]
    found["settings"]["replaced"] = sorted(set(replaced))


def write_json(results: dict[str, Any], path: str | Path) -> None:
    """Write results so that a reader never sees half of them."""
    write_whole(Path(path), f"{json.dumps(results, indent=1)}\n".encode())


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dictionaries as one, names joined by dots; lists become text."""
    if isinstance(value, dict):
        return {
            k: v for part, inner in value.items() for k, v in flat(inner, f"{name}.{part}" if name else part).items()
        }
    return {name: json.dumps(value) if isinstance(value, list) else value}


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per cell, with the unpruned model's stages of its batch beside it and the settings."""
    base = {one["batch"]: one for one in results["unpruned"]}
    settings = {k: v for k, v in results["settings"].items() if not isinstance(v, dict | list)}
    made = []
    for cell in results["cells"]:
        mine = dict(cell)
        # one prefill column per stretch would differ from method to method
        mine["stages_ms"] = cell["stages_ms"] | {"prefill": [part["median"] for part in cell["stages_ms"]["prefill"]]}
        made.append(flat(settings, "") | flat(mine, "") | flat(plain(base[cell["batch"]]), "unpruned"))
    return made


def plain(unpruned: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a cell of the unpruned model."""
    beside = {name: unpruned[name] for name in ("kv_bytes", "peak_bytes", "flops")}
    stages = {name: s["median"] for name, s in unpruned["stages_ms"].items() if name != "prefill"}
    stages["prefill"] = sum(part["median"] for part in unpruned["stages_ms"]["prefill"])
    return beside | {"stages_ms": stages}


def write_csv(results: dict[str, Any], path: str | Path) -> None:
    """One line per cell; a column that a cell lacks is empty there."""
    lines = rows(results)
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(lines)
    write_whole(Path(path), text.getvalue().encode())


def run_grid(
    found: dict[str, Any],
    wanted: Sequence[tuple],
    unpruned: Callable[[int], dict[str, Any]],
    measure: Callable[[Any, int, dict[str, Any]], dict[str, Any]],
    store: Callable[[dict[str, Any]], None],
) -> None:
    """Fill `found` with the cells that it lacks, storing it after each.

    Args:
        found: results so far; changed in place.
        wanted: `(job, batch)` pairs, those of one batch together.
        unpruned: measures the unpruned model at a batch size.
        measure: measures one job.
    """
    for job, batch in wanted:
        name = {"method": job.method, "options": job.options, "batch": batch}
        if key(name) in cells_by_key(found):  # anew for each: `store` may add what another run has measured
            continue
        base = next((one for one in found["unpruned"] if one["batch"] == batch), None)
        if base is None:
            base = unpruned(batch)
            found["unpruned"].append(base)
        found["cells"].append(name | {"budget": job.budget} | measure(job, batch, base))
        store(found)
