"""The table of everything at the end of gpu_check.sh, targets beside. Quick to start: it imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Print the table; 1 if a step failed or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=Path, required=True)
    args = parser.parse_args()
    return table(args.folder, args.steps)


def table(folder: Path, steps: Path) -> int:
    """Print what the steps found, targets beside; 1 if a step failed or a target is missed."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, value: str, target: str = "", met: bool | None = None) -> None:
        rows.append((what, value, target, "" if met is None else "met" if met else "MISSED"))

    for line in steps.read_text().splitlines():
        name, status, took = line.split("\t")
        add(f"step {name}", f"exit {status}, {took} s", "exit 0", status == "0")
    found = json.loads((folder / "kernels.json").read_text()) if (folder / "kernels.json").exists() else {}
    gpu = found.get("device") == "cuda"
    for why in found.get("replaced", []):
        add("replaced by plain torch", why)
    for name, error in found.get("agreement", {}).items():
        limit = 1e-5 if "mass" in name else 1e-2 if "merge" in name else 0
        add(f"against the plain one: {name}", f"{error:.2g}", f"<= {limit:g}", error <= limit)
    if "gather" in found:
        add("device copy", f"{found['gather']['copy_gb_s']:.0f} GB/s")
        rates = {k: v for k, v in found["gather"].items() if isinstance(v, dict)}
        default = next((name for name in found["gather"]["order"] if name in rates), "")
        best = max((v["of_copy"] for v in rates.values()), default=0)
        for name, rate in rates.items():
            judged = gpu and name == default
            add(f"gather at batch 8: {name}", f"{rate['gb_s']:.0f} GB/s, {rate['of_copy']:.0%} of a copy",
                ">= 80 %, the fastest" if judged else "",
                rate["of_copy"] >= max(0.8, 0.97 * best) if judged else None)  # fmt: skip
    for name, ms in found.get("mass", {}).items():
        add(f"attention mass: {name}", f"{ms:.3f} ms")
    for one in found.get("greedy", []):
        value, judged = one["speedup"]["median"], gpu and one["dtype"] == "bfloat16"  # what the shapes compute in
        add(f"greedy {one['objective']} {one['tokens']} -> {one['keep']}, {one['dtype']}: textbook / ours",
            f"{value:.1f}", ">= 30" if judged else "", value >= 30 if judged else None)  # fmt: skip
    plain = found.get("syncs", {}).get("plain", {}).get("waits", 0)
    for name, seen in found.get("syncs", {}).items():
        if name != "plain":
            more = 1 + seen["found"]  # counts that a method finds out are read
            # a CPU reads where a GPU checks on the device
            add(f"waits of a prefill: {name}", f"{seen['waits']} (unpruned {plain})",
                f"<= unpruned + {more}" if gpu else "", seen["waits"] <= plain + more if gpu else None)  # fmt: skip
            if gpu:
                add(f"launches of the gather: {name}", str(seen["gathers"]), f"1 to {more}",
                    1 <= seen["gathers"] <= more)  # fmt: skip
    profile = json.loads((folder / "profile.json").read_text()) if (folder / "profile.json").exists() else {}
    for who, one in profile.get("profiles", {}).items():
        add(f"first token, {who}", f"{one['ms']:.2f} ms, {one['operators']} operators, {one['waits']} waits")
    for path in sorted(folder.glob("bench-*.json")):
        for cell in json.loads(path.read_text()).get("cells", []):
            who = f"{path.stem[6:]}: {cell['method']} {cell['budget']} of {cell['tokens']['visual']}"
            who += f", batch {cell['batch']}"
            judged = gpu and len(cell["stretches"]) == 1  # the targets are about cuts before the language model
            value = cell["overhead"]["median"]
            add(f"{who}: pruned / oracle", f"{value:.3f}", "<= 1.03" if judged else "",
                value <= 1.03 if judged else None)  # fmt: skip
            value = cell["cost_share"]["median"]
            add(f"{who}: taps + selection + gather", f"{value:.2%}", "<= 1 %" if judged else "",
                value <= 0.01 if judged else None)  # fmt: skip
            if "decode_overhead" in cell:
                value = cell["decode_overhead"]["median"]
                add(
                    f"{who}: token / oracle's", f"{value:.3f}", "<= 1.02" if gpu else "", value <= 1.02 if gpu else None
                )
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    machine = found.get("machine", {})
    print(f"\n{machine.get('gpu', machine.get('processor', 'no kernels.json'))}, torch {machine.get('torch', '?')}")
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip())
    (folder / "table.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return int(any(row[3] == "MISSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
