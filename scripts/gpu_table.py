"""The table of everything at the end of gpu_check.sh, targets beside. Quick to start: it imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: How far an operator may be from the plain one, by what is in its name.
LIMITS = {"mass": 1e-5, "merge": 1e-2}
#: Of a cell of `vlmprune bench`: what is judged, how it is written, and its target.
BENCH = {
    "overhead": ("pruned / oracle", ".3f", "<= 1.03", 1.03),
    "cost_share": ("taps + selection + gather", ".2%", "<= 1 %", 0.01),
    "decode_overhead": ("token / oracle's", ".3f", "<= 1.02", 1.02),
}


def main() -> int:
    """Print the table; 1 if a step failed or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=Path, required=True)
    args = parser.parse_args()
    return table(args.folder, args.steps)


class Row(NamedTuple):
    """One line: what was looked at, what was found, and what it had to be; `met` is None where nothing is asked."""

    what: str
    value: str
    target: str = ""
    met: bool | None = None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        return (self.what, self.value, self.target, {None: "", True: "met", False: "MISSED"}[self.met])


def judged(what: str, value: str, target: str, met: bool, when: bool) -> Row:
    """A row with a target, if it is one here."""
    return Row(what, value, target, met) if when else Row(what, value)


def table(folder: Path, steps: Path) -> int:
    """Print what the steps found, targets beside; 1 if a step failed or a target is missed."""
    found = read(folder / "kernels.json")
    gpu = found.get("device") == "cuda"
    rows = [row.cells for row in [*step_rows(steps), *trial_rows(folder), *kernel_rows(found, gpu)]]
    rows += [row.cells for row in [*sync_rows(found, gpu), *profile_rows(folder), *bench_rows(folder, gpu)]]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    machine = found.get("machine", {})
    print(f"\n{machine.get('gpu', machine.get('processor', 'no kernels.json'))}, torch {machine.get('torch', '?')}")
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip())
    (folder / "table.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return int(any(row[3] == "MISSED" for row in rows))


def read(path: Path) -> dict[str, Any]:
    """What a step wrote; nothing where it did not come so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def step_rows(steps: Path) -> Iterator[Row]:
    """Which steps of the script passed."""
    for line in steps.read_text().splitlines():
        name, status, took = line.split("\t")
        yield Row(f"step {name}", f"exit {status}, {took} s", "exit 0", status == "0")


def trial_rows(folder: Path) -> Iterator[Row]:
    """Whether the kernels passed their own trial, without the CUDA toolkit too."""
    for part, key in (("no_toolkit", "no_toolkit"), ("trial", "tried")):
        for name, verdict in read(folder / f"{part}.json").get(key, {}).items():
            yield Row(f"{part}: {name}", verdict["reason"] or "passed", "passed", verdict["reason"] is None)


def kernel_rows(found: dict[str, Any], gpu: bool) -> Iterator[Row]:
    """What the operators compute, and how fast."""
    for case, one in found.get("first_use_in_capture", {}).items():
        good = one["refused"] and one["apart"] is None
        yield Row(f"first use in a CUDA graph: {case}", "plain torch, the same" if good else str(one), "the same", good)
    for case, one in found.get("capture", {}).items():
        good = one["same"] and not one["replaced"]
        yield Row(f"in a CUDA graph: {case}", "the same" if good else str(one), "the same", good)
    for what, number in (found.get("greedy_parts", {}) | found.get("host", {})).items():
        yield Row(f"{'gather' if 'columns' in what else 'greedy'}: {what}", f"{number:.3f}")
    for why in found.get("replaced", []):
        yield Row("replaced by plain torch", why)
    for name, error in found.get("agreement", {}).items():
        limit = next((limit for word, limit in LIMITS.items() if word in name), 0)
        yield Row(f"against the plain one: {name}", f"{error:.2g}", f"<= {limit:g}", error <= limit)
    yield from gather_rows(found["gather"], gpu) if "gather" in found else ()
    for name, ms in found.get("mass", {}).items():
        yield Row(f"attention mass: {name}", f"{ms:.3f} ms")
    for one in found.get("greedy", []):
        value, counts = one["speedup"]["median"], gpu and one["dtype"] == "bfloat16"  # what the shapes compute in
        what = f"greedy {one['objective']} {one['tokens']} -> {one['keep']}, {one['dtype']}: published / ours"
        yield judged(what, f"{value:.1f}", ">= 2", value >= 2, counts)


def gather_rows(gather: dict[str, Any], gpu: bool) -> Iterator[Row]:
    """How near the gathers come to a plain copy; the first in the order that is marked must be among the fastest."""
    yield Row("device copy", f"{gather['copy_gb_s']:.0f} GB/s")
    rates = {name: rate for name, rate in gather.items() if isinstance(rate, dict)}
    default = next((name for name in gather["order"] if f"{name} marked" in rates), "")
    best = max((rate["of_copy"] for name, rate in rates.items() if name.endswith("marked")), default=0)
    for name, rate in rates.items():
        value, enough = f"{rate['gb_s']:.0f} GB/s, {rate['of_copy']:.0%} of a copy", max(0.8, 0.97 * best)
        counts = gpu and name == f"{default} marked"
        yield judged(f"gather at batch 8: {name}", value, ">= 80 %, the fastest", rate["of_copy"] >= enough, counts)


def sync_rows(found: dict[str, Any], gpu: bool) -> Iterator[Row]:
    """How often a prefill waits for the device, and gathers; a CPU reads where a GPU checks on the device."""
    syncs = found.get("syncs", {})
    plain = syncs.get("plain", {}).get("waits", 0)
    for name, seen in syncs.items():
        if name == "plain":
            continue
        more, waits, gathers = 1 + seen["found"], seen["waits"], seen["gathers"]  # counts that a method finds are read
        value, target = f"{waits} (unpruned {plain})", f"<= unpruned + {more}"
        yield judged(f"waits of a prefill: {name}", value, target, waits <= plain + more, gpu)
        if gpu:
            yield Row(f"launches of the gather: {name}", str(gathers), f"1 to {more}", 1 <= gathers <= more)


def profile_rows(folder: Path) -> Iterator[Row]:
    """What a first token costs the host."""
    for who, one in read(folder / "profile.json").get("profiles", {}).items():
        value = f"{one['ms']:.2f} ms, {one['operators']} operators, {one['waits']} waits"
        yield Row(f"first token, {who}", value)


def bench_rows(folder: Path, gpu: bool) -> Iterator[Row]:
    """The cells of `vlmprune bench`; the targets of the first token are about cuts before the language model."""
    for path in sorted(folder.glob("bench-*.json")):
        for cell in json.loads(path.read_text()).get("cells", []):
            who = f"{path.stem[6:]}: {cell['method']} {cell['budget']} of {cell['tokens']['visual']}"
            who += f", batch {cell['batch']}"
            for name, (what, form, target, most) in BENCH.items():
                if name in cell:
                    value, first = cell[name]["median"], name != "decode_overhead"
                    counts = gpu and not (first and len(cell["stretches"]) != 1)
                    yield judged(f"{who}: {what}", format(value, form), target, value <= most, counts)


if __name__ == "__main__":
    sys.exit(main())
