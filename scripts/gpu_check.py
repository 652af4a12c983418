"""The parts of gpu_check.sh that are not `vlmprune bench`: kernels against each other, and profiles of prefills."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import vlmprune
from vlmprune import kernels
from vlmprune.eval.bench.oracle import Oracle, PlainRun
from vlmprune.eval.bench.results import describe_machine
from vlmprune.eval.bench.selection import compare_selection
from vlmprune.eval.bench.shapes import build, find_shape
from vlmprune.eval.bench.workload import make_workload
from vlmprune.kernels import choice, reference, trial, triton_greedy
from vlmprune.kernels.cases import difference

ops = torch.ops.vlmprune
FOUND = {"todre": 1}  # cuts whose counts a method finds out itself: every one is read
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> int:
    """Measure one part and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("trial", "no_toolkit", "sanitize", "kernels", "profile"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine(args.device), "device": args.device}
    kernel_parts = (first_use_in_capture, agreement, gather, mass, greedy, greedy_parts, host, capture, syncs)
    alone = {"trial": tried, "no_toolkit": no_toolkit, "sanitize": sanitize, "profile": profiles}
    parts = kernel_parts if args.part == "kernels" else (alone[args.part],)
    for part in parts:
        found[part.__name__] = part(args.device)
        found["replaced"] = sorted({f"{op} on {name}: {why}" for name, op, _, why in choice.told})
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        print(part.__name__, json.dumps(found[part.__name__]), flush=True)
    return 0


def seconds(call: Callable[[], Any], device: str, runs: int = 30) -> float:
    """Median seconds of a call after a warm-up; on a GPU by events, over a queue that never runs dry."""
    for _ in range(3):
        call()
    if device == "cpu":
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda._sleep(100_000_000)  # the host gets ahead, so that launches are not what is measured
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def tried(device: str) -> dict[str, Any]:
    """The trial of every implementation of every op, each in a process of its own; on a CPU nothing has to be tried.

    Verdicts are kept for the steps that follow.
    """
    here, found = torch.device(device, 0), {}
    for op in kernels.OPS:
        for name in choice.ON_GPU[op] if device == "cuda" else ():
            begin = time.perf_counter()
            reason = trial.verdict(name, op, here)
            found[f"{op} [{name}]"] = {"reason": reason, "s": time.perf_counter() - begin}
    return found


def no_toolkit(device: str) -> dict[str, Any]:
    """CUDA C++ on a machine without nvcc and CUDA_HOME, as one is that has only wheels: by the driver alone."""
    assert not os.environ.get("CUDA_HOME"), "gpu_check.sh runs this part without it"
    found = {}
    for op in ("top_k", "select_gather") if device == "cuda" else ():
        found[op] = trial.examine("cuda", op, torch.device(device, 0))
        assert found[op]["reason"] is None, found[op]
    return found


def sanitize(device: str) -> dict[str, Any]:
    """All cases of the ops that are CUDA C++, for compute-sanitizer to watch."""
    return no_toolkit(device)


def names(op: str, device: str) -> list[str]:
    """Implementations that can run here."""
    here = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return ["torch"] + [n for n in ("triton", "cuda") if choice.why_not(n, op, here) is None]


def required(op: str, device: str) -> list[str]:
    """Implementations that have to run here: on a GPU all that are meant for one."""
    return ["torch", *choice.ON_GPU[op]] if device == "cuda" else names(op, device)


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
            for name in required(op, device):
                why = None if name == "torch" else choice.why_not(name, op, args[0].device)
                got = why or (getattr(reference, op)(*args) if name == "torch" else choice.attempt(name, op, args))
                if isinstance(got, str):  # it did not run, which is no agreement
                    worst[f"{case} [{name}]: {got.splitlines()[0]}"] = float("inf")
                    continue
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
    """Bytes that a gather at batch 8 must move, each read and written once, per second; beside a plain copy of them.

    Both go round four sets of tensors, so that neither finds its own in the device's cache.
    """
    batch, columns, dim, keep = (8, 2944, 4096, 384) if device == "cuda" else (2, 200, 64, 40)
    dtype, sets = torch.bfloat16, 4
    hidden = [torch.randn(batch, columns, dim, device=device, dtype=dtype) for _ in range(sets)]
    cos = [torch.randn(1, columns, 128, device=device, dtype=dtype).expand(batch, -1, -1) for _ in range(sets)]
    ids = torch.arange(columns, device=device).expand(batch, -1)
    marked = torch.zeros(batch, columns, dtype=torch.bool, device=device)
    for row in range(batch):
        marked[row, torch.randperm(columns)[:keep].to(device)] = True
    scores = torch.where(marked, 2.0, 1.0) + torch.rand(batch, columns, device=device) / 2
    counts = torch.full((batch,), keep, device=device)
    moved = 2 * batch * keep * (dim + 2 * 128) * 2
    plain = [torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device) for _ in range(sets)]
    target = [torch.empty_like(x) for x in plain]
    turn = itertools.count()
    late: deque = deque(maxlen=sets)  # results that still live have memory of their own

    def copied() -> None:
        i = next(turn) % sets
        target[i].copy_(plain[i])

    def gathered(chosen: torch.Tensor, counts: torch.Tensor | None) -> None:
        i = next(turn) % sets
        late.append(ops.select_gather(chosen, counts, None, hidden[i], ids, cos[i], cos[i], keep, False))

    copy = moved / seconds(copied, device)
    found: dict[str, Any] = {
        "bytes": moved,
        "copy_gb_s": copy / 1e9,
        "order": [*choice.ON_GPU["select_gather"], "torch"],
    }
    for name in names("select_gather", device):
        with kernels.use(name):
            for how, args in (("marked", (marked, None)), ("ranked", (scores, counts))):
                rate = moved / seconds(partial(gathered, *args), device)
                found[f"{name} {how}"] = {"gb_s": rate / 1e9, "of_copy": rate / copy}
    return found


def mass(device: str) -> dict[str, Any]:
    """Milliseconds of FoPru's tap (all rows of a tower layer) and of ATP's (all rows of a decoder layer)."""
    shapes = {"tower, 5 views": (5, 16, 577, 64), "decoder, causal": (1, 32, 2944, 128), "one row": (1, 32, 2944, 128)}
    shapes = shapes if device == "cuda" else {"tower": (1, 2, 50, 16)}
    found = {}
    for what, (batch, heads, rows, dim) in shapes.items():
        for dtype in (torch.bfloat16, torch.float32):
            query, key = torch.randn(2, batch, heads, rows, dim, device=device).to(dtype)
            at = torch.arange(rows, device=device).expand(batch, -1) if "causal" in what else None
            query = query[:, :, -1:] if what == "one row" else query
            for name in names("attention_mass", device):
                with kernels.use(name):
                    call = partial(ops.attention_mass, query, key, 0.1, at, None, 0, None, None)
                    found[f"{what}, {dtype} [{name}]"] = 1e3 * seconds(call, device, 10)
    return found


def greedy(device: str) -> Any:
    """The whole greedy loop against the published ones, on features of a model in bfloat16 and of one in float32."""
    size = (200, 20, 64, device, 3) if device == "cpu" else (2880, 320, 4096, device, 15)
    return [one for dtype in (torch.bfloat16, torch.float32) for one in compare_selection(*size, dtype=dtype)]


def greedy_parts(device: str) -> dict[str, float]:
    """Milliseconds of greedy selection: dot products and loop apart, by warps; log_det; a long video."""
    if device == "cpu":
        return {}
    found, size, dim = {}, triton_greedy.greedy_size, 4096
    for dtype in (torch.bfloat16, torch.float32):
        features = torch.randn(1, 2880, dim, device=device).to(dtype)
        every, first = (
            torch.ones(1, 2880, dtype=torch.bool, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        args = (first, torch.tensor([320], device=device), every)
        kind = str(dtype).removeprefix("torch.")
        found[f"dot products, {kind}"] = 1e3 * seconds(partial(triton_greedy.products_of, features), device)
        found[f"twins, {kind}"] = 1e3 * seconds(partial(triton_greedy.twins_of, features), device)
        for warps in (8, 16, 32):
            triton_greedy.greedy_size = lambda block, warps=warps: size(block) | {"num_warps": warps}
            call = partial(triton_greedy.greedy, features, *args, "max_min", 320)
            found[f"max_min, {kind}, {warps} warps"] = 1e3 * seconds(call, device, 10)
        triton_greedy.greedy_size = size
        for many, how in ((64, "a launch per pick"), (10**6, "one launch")):
            triton_greedy.MANY_STEPS = many
            call = partial(triton_greedy.greedy, features, *args, "log_det", 320)
            found[f"log_det, {kind}, {how}"] = 1e3 * seconds(call, device, 5)
        triton_greedy.MANY_STEPS = 64
    for tokens in (12_544, 20_000):
        features = torch.randn(1, tokens, 1024, device=device, dtype=torch.bfloat16)
        args = (first, torch.tensor([1250], device=device), torch.ones(1, tokens, dtype=torch.bool, device=device))
        call = partial(triton_greedy.greedy, features, *args, "max_min", 1250)
        found[f"max_min {tokens} -> 1250"] = 1e3 * seconds(call, device, 3)
    return found


def host(device: str) -> dict[str, float]:
    """Microseconds of the host per call of `select_gather` on a device that has nothing to do; at 46,000 columns too.

    With them the milliseconds of the device and the gigabytes that it moves a second.
    """
    found = {}
    for columns, batch in ((2944, 1), (46_000, 1)) if device == "cuda" else ((200, 1),):
        hidden = torch.randn(batch, columns, 1024, device=device, dtype=torch.bfloat16)
        cos, ids = hidden[..., :128].contiguous(), torch.arange(columns, device=device).expand(batch, -1)
        marked = torch.arange(columns, device=device).expand(batch, -1) % 8 == 0
        length = -(-columns // 8)
        for name in names("select_gather", device):
            with kernels.use(name), torch.no_grad():
                args = (marked, None, None, hidden, ids, cos, cos, length, False)
                call = partial(kernels.call, "select_gather", *args)  # as the package calls it
                took, moved = seconds(call, device), 2 * batch * length * (hidden.shape[-1] + 2 * cos.shape[-1]) * 2
                found[f"{columns} columns [{name}], ms"] = 1e3 * took
                found[f"{columns} columns [{name}], GB/s"] = moved / took / 1e9
                times = []
                for _ in range(50):
                    if device == "cuda":
                        torch.cuda.synchronize()
                    begin = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - begin)
                found[f"{columns} columns [{name}], host us"] = 1e6 * statistics.median(times)
    return found


def first_use_in_capture(device: str) -> dict[str, Any]:
    """Ops that nothing has loaded, called inside a CUDA graph: plain torch is captured, and a warning says so."""
    found: dict[str, Any] = {}
    for case, args in cases(device, 2).items() if device == "cuda" else ():
        op = case.partition(" ")[0]
        names(op, device)  # the trial, if none has been
        expected = getattr(reference, op)(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernels.call(op, *args)
        graph.replay()
        said = [why for _, other, _, why in choice.told if other == op]
        refused = any("inside a CUDA-graph capture" in why for why in said)
        found[case] = {"apart": difference(op, args, got, expected), "refused": refused, "said": said}
    choice.told.clear()  # what is replaced later on is another matter
    return found


def capture(device: str) -> dict[str, Any]:
    """Every op inside a CUDA graph, after one run outside, against itself without."""
    found: dict[str, Any] = {}
    for case, args in cases(device, 2).items() if device == "cuda" else ():
        op = getattr(ops, case.partition(" ")[0])
        before = len(choice.told)
        expected = op(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = op(*args)
        graph.replay()
        pairs = zip(*[(x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)], strict=True)
        same = all(torch.equal(a, b) or case.startswith("greedy") for a, b in pairs)
        found[case] = {"same": same, "replaced": len(choice.told) - before}
    return found


def syncs(device: str) -> dict[str, Any]:
    """How often a prefill waits for the device, and how many of our kernels it launches, by the profiler."""
    model = build(find_shape("scene-llava"), device, torch.float32 if device == "cpu" else torch.bfloat16)
    inputs = {k: v for k, v in make_workload(model, 1, 40).inputs.items() if k != "attention_mask"}

    def count() -> dict[str, int]:
        run = profiled(lambda: model(**inputs), device)
        seen = Counter(event.name for event in run.events())
        waits = waits_of(seen, device)
        return {"waits": waits, "gathers": sum(n for name, n in seen.items() if "select_gather" in name
                                               and not name.startswith("vlmprune::"))}  # fmt: skip

    found = {"plain": count()}
    for method in ("fopru", "vtc_cls", "fastv", "random", "pool", "todre"):
        with vlmprune.patch(model, method, keep=16):
            found[method] = count() | {"found": FOUND.get(method, 0)}
    return found


def profiled(call: Callable[[], Any], device: str) -> torch.profiler.profile:
    """A call under the profiler, after two of them without."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.no_grad():
        for _ in range(2):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        with profile(activities=activities) as run:
            call()
    return run


def waits_of(seen: Counter[str], device: str) -> int:
    """Waits for the device among the names of events (on a CPU what would be one); the profiler adds one at its end."""
    return sum(seen[name] for name in WAITS) if device == "cuda" else seen["aten::_local_scalar_dense"]


def profiles(device: str) -> dict[str, Any]:
    """Where a first token's time goes, unpruned, pruned and with the oracle: what explains a missed target."""
    shape, keep = ("llava-next-7b", 320) if device == "cuda" else ("scene-llava", 16)
    model = build(find_shape(shape), device, torch.float32 if device == "cpu" else torch.bfloat16)
    work = make_workload(model, 1, 60)
    found: dict[str, Any] = {}

    def take(who: str, call: Callable[[], Any]) -> None:
        run = profiled(call, device)
        seen = Counter(event.name for event in run.events())
        host = sum(event.self_cpu_time_total for event in run.key_averages()) / 1e3
        busy = sum(event.self_device_time_total for event in run.key_averages()) / 1e3
        found[who] = {
            "ms": 1e3 * seconds(call, device, 10),
            "host_ms_profiled": host,
            "device_ms_profiled": busy,
            "operators": sum(n for name, n in seen.items() if name.startswith(("aten::", "vlmprune::"))),
            "waits": waits_of(seen, device),
        }
        for key in ["self_cpu_time_total"] + ["self_device_time_total"] * (device == "cuda"):
            print(f"{who}, by {key}\n{run.key_averages().table(sort_by=key, row_limit=25)}", flush=True)

    take("unpruned", PlainRun(work).prefill)
    for method in ("fopru", "todre"):
        with vlmprune.patch(model, method, keep=keep) as handle:
            take(method, PlainRun(work).prefill)
            trace = handle.trace
        take(f"{method}'s oracle", Oracle(work, trace).prefill)
    return found


if __name__ == "__main__":
    sys.exit(main())
