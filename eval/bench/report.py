"""What `vlmprune bench` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from vlmprune.runtime.tables import table

__all__ = ["Grid", "as_text", "changes_text", "selection_text"]

#: Header and rows of a table; its first column is flush left.
Grid = tuple[list[str], list[list[str]]]

SPEED = """\
First token: vision tower to first token. Tokens: visual ones, mean over decoder layers.
Speed-up: unpruned / pruned, {plain}; its ceilings are the oracle's (the same
tower and projector, then the language model on the kept rows, known beforehand) and Amdahl's bound (the unpruned
stages, only the decoder layers shrunk, as their FLOPs are). Overhead: pruned / oracle, {pairs}.
Milliseconds are medians of all runs, so their quotient may differ from the median of paired ratios{fewer}.
{spread}."""
DECODE = """\
Token: one decode step, of the unpruned model, the pruned one and the oracle. Overhead: {pairs}.
Answer: speed-up of {new_tokens} new tokens from these medians, and the oracle's."""
STAGES = """\
Milliseconds of separate runs with stamps, {runs}. Gather: all the patch does besides taps and selection.
Rest: packing, embedding, masks, norm, head. Drop: taps + selection + gather as a share of the unpruned first token."""
NEEDS = """\
KV: bytes in the cache after the prefill. Peak: above the weights{how}.
FLOPs of the first token: by torch's counter, and by formula (docs/performance.md), which leaves out taps and the
decisions of methods, and knows towers of LLaVA's build alone."""
VERDICTS = "better, worse: the intervals (quartiles of times, 95 % of ratios) are apart."
SPREAD = "±: half the distance between the quartiles"


def laid(grid: Grid, left: int = 1) -> str:
    """A table as text."""
    header, rows = grid
    return table(header, rows, header[left:])


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118)


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ms(times: dict[str, float]) -> str:
    """A median with half its quartiles' distance, `7017 ±3%`; alone where there was one run."""
    median = times["median"]
    if times["runs"] < 2 or not median:
        return number(median)
    return f"{number(median)} ±{(times['high'] - times['low']) / 2 / median:.0%}"


def interval(ratio: dict[str, float], digits: int = 3, unit: str = "") -> str:
    middle = f"{ratio['median']:.{digits}f}{unit}"
    return f"{middle} [{ratio['low']:.{digits}f}, {ratio['high']:.{digits}f}]" if ratio["pairs"] > 1 else middle


def behind(ratio: dict[str, float]) -> str:
    """What stands behind a ratio and its interval."""
    pairs = ratio["pairs"]
    if pairs == 1:
        return "of one interleaved pair alone"
    return f"median of {pairs} interleaved pairs with {'its 95 % interval' if pairs > 5 else 'their range'}"


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
        + "".join(f"\nplain torch instead of a kernel: {why}" for why in settings.get("replaced", []))
    )


def as_text(results: dict[str, Any]) -> str:
    """Tables: the first token and its ceilings, tokens after it, stages, memory and operations."""
    if not results["cells"]:
        return f"{head(results)}\nnothing was measured"
    parts = [speed_text(results), decode_text(results), stages_text(results), needs_text(results)]
    parts += [sizes_text(results["sizes"])] if results.get("sizes") else []
    return "\n\n".join([head(results), *filter(None, parts)]) + "".join(f"\n{line}" for line in unlike(results))


def speed_text(results: dict[str, Any]) -> str:
    """The first token and its ceilings."""
    return f"{laid(speed_grid(results['cells']))}\n\n{paragraph(speed_legend(results))}"


def speed_legend(results: dict[str, Any]) -> str:
    """What the columns of the first token are."""
    first = results["cells"][0]
    return SPEED.format(
        plain=behind(first["speedup"]),
        pairs=behind(first["overhead"]),
        fewer=", of which there are fewer" * (first["speedup"]["pairs"] < first["overhead"]["pairs"]),
        spread=SPREAD,
    )


def decode_text(results: dict[str, Any]) -> str:
    """Tokens after the first; empty where none were measured."""
    if not (decoded := decoded_in(results)):
        return ""
    grid = decode_grid(decoded, results["settings"]["new_tokens"])
    return f"{laid(grid)}\n\n{paragraph(decode_legend(results, decoded))}"


def decoded_in(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells in which tokens after the first were measured."""
    return [cell for cell in results["cells"] if "decode_ms" in cell]


def decode_legend(results: dict[str, Any], decoded: Sequence[dict[str, Any]]) -> str:
    """What the columns of the tokens after the first are."""
    return DECODE.format(pairs=behind(decoded[0]["decode_overhead"]), new_tokens=results["settings"]["new_tokens"])


def stages_text(results: dict[str, Any]) -> str:
    """Stage by stage."""
    return f"{laid(stage_grid(results))}\n\n{paragraph(stage_legend(results))}"


def stage_legend(results: dict[str, Any]) -> str:
    """What the stages are."""
    runs = results["cells"][0]["stages_ms"]["total"]["runs"]
    return STAGES.format(runs=f"medians of {runs}" if runs > 1 else "one each")


def needs_text(results: dict[str, Any]) -> str:
    """Memory and operations."""
    return f"{laid(needs_grid(results))}\n\n{paragraph(needs_legend(results))}"


def needs_legend(results: dict[str, Any]) -> str:
    """What memory and operations are."""
    return NEEDS.format(how=", the allocator's" if results["machine"].get("gpu") else ", all tensors alive at one time")


def unlike(results: dict[str, Any]) -> list[str]:
    """A warning for every cell whose oracle may not have computed the same."""
    return [
        f"WARNING: {cell['method']} {cell['budget']}: the oracle's logits differ by {cell['same_as_oracle']:.1e} "
        "of the largest one, so the two may not have computed the same."
        for cell in results["cells"]
        if (cell["same_as_oracle"] or 0) > tolerance(results)
    ]


def sizes_text(sizes: dict[str, Any]) -> str:
    """What a new picture size costs."""
    parts = {
        "packed_ms": "where no earlier size packs alike",
        "alike_ms": "where one does",
        "known_ms": "for a known size",
    }
    told = ", ".join(f"{ms(sizes[name])} {what}" for name, what in parts.items() if sizes.get(name) is not None)
    return paragraph(
        f"A new picture size costs {ms(sizes['new_ms'])} ms of host time, once ({told}); {sizes['sizes']} random sizes "
        f"have {sizes['layouts']} layouts. The cells above run one size, so they do not hold it."
    )


def tolerance(results: dict[str, Any]) -> float:
    """How far logits of the same computation may be apart, relative to the largest."""
    return {"float32": 1e-4, "float16": 0.02}.get(results["settings"]["dtype"], 0.1)


def label(cell: dict[str, Any]) -> list[str]:
    """The first columns of a cell's row."""
    return [cell["method"], cell["budget"], str(cell["batch"])]


def speed_grid(cells: Sequence[dict[str, Any]]) -> Grid:
    """The first token, one row per cell."""
    columns = ["method", "keep", "batch", "tokens", "first token ms", "speed-up", "oracle", "Amdahl", "overhead"]
    rows = []
    for cell in cells:
        first = cell["first_token_ms"]
        rows.append(
            [
                *label(cell),
                f"{cell['tokens']['layer_average']:.0f}",
                f"{ms(first['unpruned'])} -> {ms(first['pruned'])}",
                interval(cell["speedup"], 2, "x"),
                f"{cell['oracle_speedup']['median']:.2f}x",
                f"{cell['amdahl']['bound']:.2f}x",
                interval(cell["overhead"]),
            ]
        )
    return columns, rows


def decode_grid(cells: Sequence[dict[str, Any]], new_tokens: int) -> Grid:
    """The tokens after the first, one row per cell in which they were measured."""
    from vlmprune.eval.bench.measure import answer_speedup

    columns = ["method", "keep", "batch", "token ms", "oracle ms", "token overhead", "answer", "oracle"]
    rows = []
    for cell in cells:
        step = cell["decode_ms"]
        rows.append(
            [
                *label(cell),
                f"{ms(step['unpruned'])} -> {ms(step['pruned'])}",
                ms(step["oracle"]),
                interval(cell["decode_overhead"]),
                *(f"{answer_speedup(cell, new_tokens, who):.2f}x" for who in ("pruned", "oracle")),
            ]
        )
    return columns, rows


def stage_grid(results: dict[str, Any]) -> Grid:
    """Stages of the unpruned model and of every cell."""
    names = ["tower", "projector", "taps", "selection", "gather"]
    columns = ["method", "keep", "batch", *names, "prefill", "rest", "total", "drop"]

    def row(who: str, budget: str, batch: int, stages: dict[str, Any], share: str) -> list[str]:
        prefill = " + ".join(ms(part) for part in stages["prefill"])
        cells = [ms(stages[name]) for name in names]
        return [who, budget, str(batch), *cells, prefill, *(ms(stages[n]) for n in ("rest", "total")), share]

    rows = []
    for one in results["unpruned"]:
        rows.append(row("unpruned", "-", one["batch"], one["stages_ms"], ""))
        for cell in (c for c in results["cells"] if c["batch"] == one["batch"]):
            share = f"{cell['cost_share']['median']:.1%}"
            rows.append(row(cell["method"], cell["budget"], cell["batch"], cell["stages_ms"], share))
    return columns, rows


def needs_grid(results: dict[str, Any]) -> Grid:
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
                    "-" if flops["formula"] is None else scaled(flops["formula"], 1e9),
                ]
            )
    return columns, rows


def changes_text(found: Sequence[dict[str, Any]], differing: dict[str, tuple[Any, Any]]) -> str:
    """What changed since an earlier benchmark."""
    if lines := unlike_settings(differing):
        lines = ["The two were not measured alike; absolute times may say nothing:", *(f"  {x}" for x in lines), ""]
    if not found:
        return "\n".join([*lines, "The two have no cell in common (method, options and batch)."])
    lines += [table(*(grid := changes_grid(found)), grid[0][4:7]), ""]
    lines.append(VERDICTS)
    return "\n".join(lines)


def unlike_settings(differing: dict[str, tuple[Any, Any]]) -> list[str]:
    """`threads: 1 -> 2`."""
    return [f"{name}: {was} -> {now}" for name, (was, now) in differing.items()]


def changes_grid(found: Sequence[dict[str, Any]]) -> Grid:
    """What changed, one row per figure."""
    columns = ["method", "keep", "batch", "figure", "old", "new", "change", ""]

    def figure(value: float) -> str:
        return f"{value:.4g}" if value < 1e5 else f"{value:.0f}"

    rows = [
        [*label(c), c["figure"], figure(c["old"]), figure(c["new"]),
         f"{c['change']:+.1%}", c["verdict"]]
        for c in found
    ]  # fmt: skip
    return columns, rows


def selection_text(found: Sequence[dict[str, Any]]) -> str:
    """Greedy selection alone."""
    columns = ["objective", "tokens", "published ms", "vlmprune ms", "times faster", "same picks"]
    rows = [
        [
            one["objective"],
            f"{one['tokens']} -> {one['keep']}",
            ms(one["published_ms"]),
            ms(one["ours_ms"]),
            interval(one["speedup"], 1),
            f"{one['same_picks']:.1%}",
        ]
        for one in found
    ]
    note = (
        "The published loops are those of DivPrune (max_min), CDPruner (log_det), SCOPE and MMTok (coverage). "
        f"Times faster: {behind(found[0]['speedup'])}; vectors of {found[0]['dim']} numbers.\n{SPREAD}."
    )
    return table(columns, rows, columns[1:]) + "\n\n" + note
