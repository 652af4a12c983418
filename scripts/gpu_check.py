"""The parts of gpu_check.sh that are not `vlmprune bench`: kernels, and the table of everything at the end."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmprune import kernels
from vlmprune.eval.bench.results import describe_machine
from vlmprune.eval.bench.selection import compare_selection
from vlmprune.kernels import choice, reference

ops = torch.ops.vlmprune
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> int:
    """Run one part; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    measure = parts.add_parser("kernels")
    measure.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    measure.add_argument("--json", type=Path, required=True)
    parts.add_parser("table").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.part == "table":
        return table(args.folder)
    found: dict[str, Any] = {"machine": describe_machine(args.device), "device": args.device}
    for name, part in (
        ("agreement", agreement), ("gather", gather), ("mass", mass), ("greedy", greedy), ("syncs", syncs),
    ):  # fmt: skip
        found[name] = part(args.device)
        found["replaced"] = sorted({f"{op} on {name}: {why}" for name, op, why in choice.told})
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found[name]), flush=True)
    return 0


def seconds(call: Callable[[], Any], device: str, runs: int = 30) -> float:
    """Median seconds of a call after a warm-up; on a GPU by events, over a queue that never runs dry."""
    for _ in range(3):
        call()
    if device == "cpu":
        import time

        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda._sleep(10_000_000)  # the host gets ahead, so that launches are not what is measured
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def names(op: str, device: str) -> list[str]:
    """Implementations that can run here."""
    here = torch.device(device)
    return ["torch"] + [n for n in ("triton", "cuda") if choice.why_not(n, op, here) is None]


def cases(device: str, seed: int) -> dict[str, tuple]:
    """Arguments of every op at real sizes (small ones on a CPU), fresh for every seed."""
    g = torch.Generator().manual_seed(seed)
    batch, columns, dim, keep = (4, 2944, 4096, 380) if device == "cuda" else (2, 120, 32, 20)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    hidden = torch.randn(batch, columns, dim, generator=g).to(dtype)
    ids = torch.randint(0, columns, (3, batch, columns), generator=g)
    cos, sin = torch.randn(2, batch, columns, 128, generator=g).to(dtype)
    scores = torch.randint(-50, 50, (batch, columns), generator=g).float() / 7
    real = torch.rand(batch, columns, generator=g) < 0.95
    counts = torch.randint(0, keep, (batch,), generator=g)
    marked = (torch.rand(batch, columns, generator=g) < keep / columns / 2) & real
    signs = torch.randint(0, 2, (batch, columns, 256), generator=g).to(dtype) * 2 - 1  # exact cosines
    query, key = torch.randn(2, batch, 8, columns, 64, generator=g).to(dtype)
    at = torch.arange(columns).expand(batch, -1)
    token = torch.arange(columns).expand(batch, -1) + torch.arange(batch)[:, None] * columns
    into = marked.long().argmax(1, keepdim=True).expand(-1, columns).contiguous()
    made = {
        "top_k": (scores.to(dtype), counts, real),
        "select_gather": (marked, None, real, hidden, ids, cos, sin, keep, True),
        "select_gather ranked": (scores.to(dtype), counts, real, hidden, ids, cos, sin, keep, False),
        "attention_mass": (query, key[:, :2], 0.125, at, real, 0, real.float(), None),
        "merge": (hidden, token, real, marked, into, torch.rand(batch, columns, generator=g) / columns, None),
    }
    for objective in ("max_min", "max_sum"):
        first = torch.zeros(batch, dtype=torch.long)
        made[f"greedy {objective}"] = (signs, first, counts, real, objective, int(counts.max()))
    return {n: tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in a) for n, a in made.items()}


def agreement(device: str) -> dict[str, Any]:
    """Largest error of every implementation against the plain one on the CPU, over three seeds and dtypes."""
    worst: dict[str, float] = {}
    for seed in range(3):
        for case, args in cases(device, seed).items():
            op = case.partition(" ")[0]
            home = [x.cpu() if isinstance(x, torch.Tensor) else x for x in args]
            expected = getattr(reference, op)(*home)
            for name in names(op, device):
                with kernels.use(name):
                    got = getattr(ops, op)(*args)
                pairs = zip(*[(x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)], strict=True)
                for i, (mine, theirs) in enumerate(pairs):
                    if op == "greedy" and i == 1:
                        continue  # orders are arbitrary past a count, and the picks say it all
                    scale = theirs.double().norm().clamp(min=1e-30)
                    error = float((mine.cpu().double() - theirs.double()).norm() / scale)
                    key = f"{case} [{name}]"
                    worst[key] = max(worst.get(key, 0.0), error if error == error else float("inf"))
    return worst


def gather(device: str) -> dict[str, Any]:
    """Bytes that a gather at batch 8 must move, each read and written once, per second; beside a plain copy of them."""
    batch, columns, dim, keep = (8, 2944, 4096, 384) if device == "cuda" else (2, 200, 64, 40)
    dtype = torch.bfloat16
    hidden = torch.randn(batch, columns, dim, device=device).to(dtype)
    cos = torch.randn(1, columns, 128, device=device).to(dtype).expand(batch, -1, -1)
    ids = torch.arange(columns, device=device).expand(batch, -1)
    marked = torch.zeros(batch, columns, dtype=torch.bool, device=device)
    for row in range(batch):
        marked[row, torch.randperm(columns)[:keep].to(device)] = True
    scores = torch.where(marked, 2.0, 1.0) + torch.rand(batch, columns, device=device) / 2
    counts = torch.full((batch,), keep, device=device)
    moved = 2 * batch * keep * (dim + 2 * 128) * 2
    plain = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(plain)
    copy = moved / seconds(lambda: target.copy_(plain), device)
    found: dict[str, Any] = {"bytes": moved, "copy_gb_s": copy / 1e9}
    for name in names("select_gather", device):
        with kernels.use(name):
            for how, args in (("marked", (marked, None)), ("ranked", (scores, counts))):
                rate = moved / seconds(
                    lambda args=args: ops.select_gather(*args, None, hidden, ids, cos, cos, keep, False), device
                )
                found[f"{name} {how}"] = {"gb_s": rate / 1e9, "of_copy": rate / copy}
    return found


def mass(device: str) -> dict[str, Any]:
    """Milliseconds of FoPru's tap (all rows of a tower layer) and of ATP's (all rows of a decoder layer)."""
    shapes = {"tower, 5 views": (5, 16, 577, 64), "decoder, causal": (1, 32, 2944, 128)}
    shapes = shapes if device == "cuda" else {"tower": (1, 2, 50, 16)}
    found = {}
    for what, (batch, heads, rows, dim) in shapes.items():
        query, key = torch.randn(2, batch, heads, rows, dim, device=device).to(torch.bfloat16)
        at = torch.arange(rows, device=device).expand(batch, -1) if "causal" in what else None
        for name in names("attention_mass", device):
            with kernels.use(name):
                call = lambda at=at: ops.attention_mass(query, key, 0.1, at, None, 0, None, None)  # noqa: B023, E731
                found[f"{what} [{name}]"] = 1e3 * seconds(call, device)
    return found


def greedy(device: str) -> Any:
    """The whole greedy loop against the textbook one."""
    if device == "cpu":
        return compare_selection(200, 20, 64, "cpu", 3)
    return compare_selection(2880, 320, 4096, "cuda", 15)


def syncs(device: str) -> dict[str, Any]:
    """How often a prefill waits for the device, and how many of our kernels it launches, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    import vlmprune
    from vlmprune.eval.bench.shapes import build, find_shape
    from vlmprune.eval.bench.workload import make_workload

    model = build(find_shape("scene-llava"), device, torch.float32 if device == "cpu" else torch.bfloat16)
    inputs = {k: v for k, v in make_workload(model, 1, 40).inputs.items() if k != "attention_mask"}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")

    def count() -> dict[str, int]:
        with torch.no_grad():
            for _ in range(2):
                model(**inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            with profile(activities=activities) as run:
                model(**inputs)
        seen = Counter(event.name for event in run.events())
        waits = sum(seen[name] for name in WAITS) if device == "cuda" else seen["aten::_local_scalar_dense"]
        # the profiler waits once itself when it ends, in every run alike
        return {"waits": waits, "gathers": sum(n for name, n in seen.items() if "select_gather" in name
                                               and not name.startswith("vlmprune::"))}  # fmt: skip

    found = {"plain": count()}
    for method in ("fopru", "vtc_cls", "fastv", "random", "pool"):
        with vlmprune.patch(model, method, keep=16):
            found[method] = count()
    return found


def table(folder: Path) -> int:
    """Print what the steps found, targets beside; 1 if a step failed or a target is missed."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, value: str, target: str = "", met: bool | None = None) -> None:
        rows.append((what, value, target, "" if met is None else "met" if met else "MISSED"))

    for line in (folder / "steps.tsv").read_text().splitlines():
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
        best = max((v["of_copy"] for k, v in rates.items() if k.endswith("marked")), default=0)
        for name, rate in rates.items():
            judged = gpu and name.endswith("marked") and rate["of_copy"] == best
            add(f"gather at batch 8: {name}", f"{rate['gb_s']:.0f} GB/s, {rate['of_copy']:.0%} of a copy",
                ">= 80 %" if judged else "", rate["of_copy"] >= 0.8 if judged else None)  # fmt: skip
    for name, ms in found.get("mass", {}).items():
        add(f"attention mass: {name}", f"{ms:.3f} ms")
    for one in found.get("greedy", []):
        value = one["speedup"]["median"]
        add(f"greedy {one['objective']} {one['tokens']} -> {one['keep']}: textbook / ours", f"{value:.1f}",
            ">= 30" if gpu else "", value >= 30 if gpu else None)  # fmt: skip
    plain = found.get("syncs", {}).get("plain", {}).get("waits", 0)
    for name, seen in found.get("syncs", {}).items():
        if name != "plain":
            add(f"waits of a prefill: {name}", f"{seen['waits']} (unpruned {plain})", "<= unpruned + 1",
                seen["waits"] <= plain + 1)  # fmt: skip
            if gpu:
                add(f"launches of the gather: {name}", str(seen["gathers"]), "1", seen["gathers"] == 1)
    for path in sorted(folder.glob("bench-*.json")):
        for cell in json.loads(path.read_text()).get("cells", []):
            who = f"{path.stem[6:]}: {cell['method']} {cell['budget']} of {cell['tokens']['visual']}"
            who += f", batch {cell['batch']}"
            value = cell["overhead"]["median"]
            add(f"{who}: pruned / oracle", f"{value:.3f}", "<= 1.03" if gpu else "", value <= 1.03 if gpu else None)
            value = cell["cost_share"]["median"]
            add(f"{who}: taps + selection + gather", f"{value:.2%}", "<= 1 %" if gpu else "",
                value <= 0.01 if gpu else None)  # fmt: skip
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
