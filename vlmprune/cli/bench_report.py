"""What `vlmprune bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmprune.cli.tables import table

__all__ = ["as_text", "changes_text", "selection_text"]

SPEED = """\
First token: vision tower to first token, medians of interleaved runs. Tokens: visual ones, mean over decoder layers.
Speed-up: unpruned / pruned; its ceilings are the oracle's (the same tower and projector, then the language model on the
kept rows, known beforehand) and Amdahl's bound (the unpruned stages, only the decoder layers shrunk, as their FLOPs
are). Overhead: pruned / oracle, median of {pairs} interleaved pairs with {interval}. Token: one decode step;
answer: speed-up of {new_tokens} new tokens."""
STAGES = """\
Milliseconds of separate runs with stamps (medians). Gather: all the patch does besides taps and selection. Rest:
packing, embedding, masks, norm, head. Drop: taps + selection + gather as a share of the unpruned first token."""
NEEDS = """\
KV: bytes in the cache after the prefill. Peak: above the weights{how}.
FLOPs of the first token: by torch's counter, and by formula (docs/performance.md), which leaves taps out."""


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def interval(ratio: dict[str, float], digits: int = 3) -> str:
    return f"{ratio['median']:.{digits}f} [{ratio['low']:.{digits}f}, {ratio['high']:.{digits}f}]"


def scaled(value: float, unit: float) -> str:
    return f"{value / unit:.4g}"


def head(results: dict[str, Any]) -> str:
    """What was measured on what."""
    settings, machine = results["settings"], results["machine"]
    threads = machine["threads"]
    where = machine.get("gpu") or f"{machine['processor']}, {threads} thread{'s' * (threads > 1)}"
    return (
        f"{results['model']['description']}, {settings['dtype']} on {where}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}\n"
        f"{results['model']['visual']} visual tokens per prompt, {settings['prompt_tokens']} text tokens"
    )


def as_text(results: dict[str, Any]) -> str:
    """Three tables: speed and its ceilings, stages, memory and operations."""
    parts = [head(results)]
    if not results["cells"]:
        return "\n".join([*parts, "nothing was measured"])
    pairs = results["cells"][0]["overhead"]["pairs"]
    interval_name = "its 95 % interval" if pairs > 5 else "their range"
    new = results["settings"]["new_tokens"]
    how = ", the allocator's" if results["machine"].get("gpu") else ", all tensors alive at one time"
    parts += ["", speed_table(results["cells"]), "", SPEED.format(pairs=pairs, interval=interval_name, new_tokens=new)]
    parts += ["", stage_table(results), "", STAGES, "", needs_table(results), "", NEEDS.format(how=how)]
    strange = [c for c in results["cells"] if (c["same_as_oracle"] or 0) > tolerance(results)]
    for cell in strange:
        parts.append(
            f"WARNING: {cell['method']} {cell['budget']}: the oracle's logits differ by {cell['same_as_oracle']:.1e} "
            "of the largest one, so the two may not have computed the same."
        )
    return "\n".join(parts)


def tolerance(results: dict[str, Any]) -> float:
    """How far logits of the same computation may be apart, relative to the largest."""
    return {"float32": 1e-4, "float16": 0.02}.get(results["settings"]["dtype"], 0.1)


def speed_table(cells: Sequence[dict[str, Any]]) -> str:
    """One row per cell."""
    columns = ["method", "keep", "batch", "tokens", "first token ms", "speed-up", "oracle", "Amdahl", "overhead"]
    decoded = any("decode_ms" in cell for cell in cells)
    columns += ["token ms", "token overhead", "answer"] if decoded else []
    rows = []
    for cell in cells:
        first = cell["first_token_ms"]
        row = [
            cell["method"],
            cell["budget"],
            str(cell["batch"]),
            f"{cell['tokens']['layer_average']:.0f}",
            f"{ms(first['unpruned']['median'])} -> {ms(first['pruned']['median'])}",
            f"{cell['speedup']['median']:.2f}x",
            f"{cell['oracle_speedup']['median']:.2f}x",
            f"{cell['amdahl']['bound']:.2f}x",
            interval(cell["overhead"]),
        ]
        if decoded:
            step = cell.get("decode_ms")
            row += (
                [
                    f"{ms(step['unpruned']['median'])} -> {ms(step['pruned']['median'])}",
                    interval(cell["decode_overhead"]),
                    f"{cell['answer_speedup']:.2f}x",
                ]
                if step
                else ["", "", ""]
            )
        rows.append(row)
    return table(columns, rows, columns[1:])


def stage_table(results: dict[str, Any]) -> str:
    """Stages of the unpruned model and of every cell."""
    names = ["tower", "projector", "taps", "selection", "gather"]
    columns = ["method", "keep", "batch", *names, "prefill", "rest", "total", "drop"]

    def row(who: str, budget: str, batch: int, stages: dict[str, Any], share: str) -> list[str]:
        prefill = " + ".join(ms(part["median"]) for part in stages["prefill"])
        cells = [ms(stages[name]["median"]) for name in names]
        return [who, budget, str(batch), *cells, prefill, *(ms(stages[n]["median"]) for n in ("rest", "total")), share]

    rows = []
    for one in results["unpruned"]:
        rows.append(row("unpruned", "-", one["batch"], one["stages_ms"], ""))
        for cell in (c for c in results["cells"] if c["batch"] == one["batch"]):
            share = f"{cell['cost_share']['median']:.1%}"
            rows.append(row(cell["method"], cell["budget"], cell["batch"], cell["stages_ms"], share))
    return table(columns, rows, columns[1:])


def needs_table(results: dict[str, Any]) -> str:
    """Memory and operations."""
    columns = ["method", "keep", "batch", "KV MB", "peak MB", "GFLOPs counted", "by formula"]
    rows = []
    for one in results["unpruned"]:
        mine = [c for c in results["cells"] if c["batch"] == one["batch"]]
        for cell in [{"method": "unpruned", "budget": "-"} | one, *mine]:
            flops = cell["flops"]
            rows.append(
                [
                    cell["method"],
                    cell["budget"],
                    str(cell["batch"]),
                    scaled(cell["kv_bytes"], 1e6),
                    scaled(cell["peak_bytes"], 1e6),
                    scaled(flops["counted"], 1e9),
                    scaled(flops["formula"], 1e9),
                ]
            )
    return table(columns, rows, columns[1:])


def changes_text(found: Sequence[dict[str, Any]], differing: dict[str, tuple[Any, Any]]) -> str:
    """What changed since an earlier benchmark."""
    lines = [f"{name}: {was} -> {now}" for name, (was, now) in differing.items()]
    if lines:
        lines = ["The two were not measured alike; absolute times may say nothing:", *(f"  {x}" for x in lines), ""]
    if not found:
        return "\n".join([*lines, "The two have no cell in common (method, options and batch)."])
    columns = ["method", "keep", "batch", "figure", "old", "new", "change", ""]

    def number(value: float) -> str:
        return f"{value:.4g}" if value < 1e5 else f"{value:.0f}"

    rows = [
        [c["method"], c["budget"], str(c["batch"]), c["figure"], number(c["old"]), number(c["new"]),
         f"{c['change']:+.1%}", c["verdict"]]
        for c in found
    ]  # fmt: skip
    lines += [table(columns, rows, columns[4:7]), ""]
    lines.append("better, worse: the intervals (quartiles of times, 95 % of ratios) are apart.")
    return "\n".join(lines)


def selection_text(found: Sequence[dict[str, Any]]) -> str:
    """Greedy selection alone."""
    columns = ["objective", "tokens", "textbook ms", "vlmprune ms", "times faster", "same picks"]
    rows = [
        [
            one["objective"],
            f"{one['tokens']} -> {one['keep']}",
            ms(one["textbook_ms"]["median"]),
            ms(one["ours_ms"]["median"]),
            interval(one["speedup"], 1),
            f"{one['same_picks']:.1%}",
        ]
        for one in found
    ]
    note = (
        "The textbook loop computes all distances to all picks at each step. Medians of "
        f"{found[0]['speedup']['pairs']} interleaved pairs, 95 % interval; vectors of {found[0]['dim']} numbers."
    )
    return table(columns, rows, columns[1:]) + "\n\n" + note
