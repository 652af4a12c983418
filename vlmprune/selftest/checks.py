"""The checks: what a patched model did, against what the unpatched model's parts do by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.selftest.evidence import SIDES, Evidence, Plain, attempt, same_so_far, steps_of
from vlmprune.selftest.runs import FORCED, Hand, Run, masked
from vlmprune.selftest.verdict import Line, judge, largest, relative, tolerance, worst, worst_logits
from vlmprune.trace import CutTrace

__all__ = ["LINES", "judged", "left_behind", "raised", "restore_line", "syncs", "syncs_line"]

UNPRUNED = "this budget prunes nothing"


def rows_line(e: Evidence) -> Line:
    """Every kept row's last hidden state, and the logits after the prompt."""
    length = e.rows.ids.shape[1]
    if e.twin is None:
        return Line("rows", "-", UNPRUNED)

    def off(hand: Hand) -> float:
        columns = [c for c in hand.columns[-1] if c < length]
        states = worst(e.pruned.run.hidden[0, columns], hand.hidden[: len(columns)])
        return max(states, worst_logits(e.pruned.run.logits[0, :1], hand.logits[:1]))

    return judge("rows", off(e.hand), e.plain.noise, off(e.twin), e.dtype, e.behind)


def wrong_lengths(e: Evidence) -> str:
    """Where the physical cache is not as the trace and the rows kept promise, in words."""
    length = e.rows.ids.shape[1]
    for layer, (found, columns) in enumerate(zip(e.pruned.run.lengths, e.hand.columns, strict=True)):
        kept, promised = sum(c < length for c in columns), e.pruned.trace.kv_lengths[layer]
        most = e.hand.values[layer].shape[-2]  # a sliding layer caches its window alone
        if kept != promised:
            return f"layer {layer}: the trace promises {promised} entries and {kept} tokens were kept"
        if found != min(promised, most):
            return f"layer {layer} caches {found} entries for the {promised} promised ({length} tokens in the prompt)"
    for layer, (got, want) in enumerate(zip(e.pruned.run.values, e.hand.values, strict=True)):
        if got[0].shape != want.shape:
            there, due = got.shape[-2], want.shape[-2]
            return f"layer {layer} caches {there} entries after {FORCED} decoded tokens, and {due} were due"
    return ""


def doubled(e: Evidence) -> float:
    """How far off the cache would be if an entry stood in its neighbour's place, where that shows least.

    Equal words, and newlines, are equal where they enter: in each other's place they are no mistake.
    """
    kind: list[Any] = [*e.rows.ids[0].tolist(), *e.pruned.forced]
    for image, grid in zip(e.rows.images, e.pruned.trace.grids, strict=True):
        for column, newline in zip(image, grid.newline, strict=True):
            kind[column] = "newline" if newline else ("patch", column)
    found = []
    for columns, values in zip(e.hand.columns, e.hand.values, strict=True):
        tail = columns[-values.shape[-2] :]
        pairs = [i for i in range(1, len(tail)) if kind[tail[i]] != kind[tail[i - 1]]]
        apart = relative(values[:, [i - 1 for i in pairs]], values[:, pairs])  # (heads, pairs)
        found.append(float(apart.max(0).values.min()))
    return min(found)


def cache_line(e: Evidence) -> Line:
    """Physical lengths, and every value row of every layer."""
    if told := wrong_lengths(e):
        return Line("cache", "FAIL", told)
    off, layer = largest([worst(a[0], b) for a, b in zip(e.pruned.run.values, e.hand.values, strict=True)])
    by_entry = relative(e.pruned.run.values[layer][0], e.hand.values[layer]).max(0).values
    failed = f"layer {layer}, entry {int(by_entry.argmax())} of {len(by_entry)} is not the kept token's"
    lengths = sorted(set(e.pruned.run.lengths), reverse=True)
    told = f"{', '.join(map(str, lengths))} entries for {e.rows.ids.shape[1]} tokens"
    return judge("cache", off, e.plain.noise, doubled(e), e.dtype, told, failed)


def positions_line(e: Evidence) -> Line:
    """Every key row of every layer: a key is turned by its position."""
    if e.moved is None:
        return Line("positions", "-", "no cut in the language model")
    if wrong_lengths(e):
        return Line("positions", "?", "the cache has other entries than it should: see cache")

    def off(hand: Hand) -> tuple[float, int]:
        return largest([worst(a[0], b) for a, b in zip(e.pruned.run.keys, hand.keys, strict=True)])

    found, layer = off(e.hand)
    told = ", ".join(dict.fromkeys(cut.positions for cut in e.pruned.trace.cuts))
    return judge("positions", found, e.plain.noise, off(e.moved)[0], e.dtype, told, f"{told}; layer {layer}")


def decode_line(e: Evidence) -> Line:
    """Logits of the forced tokens against the masked whole sequence."""
    if e.mistake is None:
        return Line("decode", "-", UNPRUNED)
    asked = (e.rows, e.pruned.trace.cuts), e.mistake
    right, twin = (masked(e.family, e.model, rows, cuts, e.pruned.forced) for rows, cuts in asked)
    got = e.pruned.run.logits[0, 1:]
    off, other = worst_logits(got, right[1:]), worst_logits(got, twin[1:])
    return judge("decode", off, e.plain.noise, other, e.dtype, e.behind)


def generate_line(e: Evidence) -> Line:
    """A greedy answer with a cache against one without, and with a static cache."""
    answer, static = e.pruned.answer, e.pruned.static
    for made in (answer, static):
        if isinstance(made, Exception):
            raise made
    off = worst_logits(answer.logits, e.hand.logits)
    if e.twin is None:
        return Line("generate", "-", UNPRUNED)
    twin = worst_logits(answer.logits, e.twin.logits)
    told = "no static cache" if static is None else ""
    noise = e.plain.noise
    if static is not None:
        same = same_so_far(answer, static)
        apart = worst_logits(static.logits[:same], answer.logits[:same])
        if apart > tolerance(noise, e.dtype):
            return Line("generate", "FAIL", "a static cache gives another answer", apart, noise, twin)
        off = max(off, apart)
    return judge("generate", off, noise, twin, e.dtype, told, "with and without a cache")


def kept_by_row(cuts: Sequence[CutTrace], images: Sequence[int]) -> list[list[int]]:
    return [cut.tokens(image) for cut in cuts for image in images]


def batch_line(e: Evidence) -> Line:
    """Every row of the padded batches against its prompt alone."""
    singles, worst_so_far = e.pruned.singles, (0.0, "")
    if isinstance(singles, Exception):
        raise singles
    if isinstance(e.pruned.intruded, Exception):
        raise e.pruned.intruded
    twin = worst_logits(e.pruned.intruded.logits, singles[0][0].logits)
    for side in SIDES:
        made = e.pruned.batches[side]
        if isinstance(made, Exception):
            raise made
        ran, trace = made
        steps = steps_of(e.family, e.model, side)
        for row, (single, cuts) in enumerate(singles):
            mine = [i for i, sample in enumerate(trace.sample) if sample == row]
            there, here = kept_by_row(trace.cuts if mine else [], mine), kept_by_row(cuts, range(len(mine)))
            total = sum(map(len, here))
            swapped = sum(len(set(a) - set(b)) for a, b in zip(here, there, strict=True))
            sizes = [len(a) for a in here] == [len(b) for b in there]
            where = f"row {row}, padded {side}"
            if swapped or not sizes:
                told = f"{where}: {swapped} of {total} kept tokens are others than alone"
                few = swapped <= max(1, 0.05 * total)
                return Line("batch", "?" if few else "FAIL", told + ("; scores may be too close to call" * few))
            off = worst_logits(ran.logits[row, :steps], single.logits[0, :steps])
            worst_so_far = max(worst_so_far, (off, where))
    off, where = worst_so_far
    return judge("batch", off, e.plain.noise, twin, e.dtype, "", where)


LINES: dict[str, Callable[[Evidence], Line]] = {
    "rows": rows_line,
    "batch": batch_line,
    "cache": cache_line,
    "decode": decode_line,
    "positions": positions_line,
    "generate": generate_line,
}


def judged(check: str, evidence: Evidence) -> Line:
    """One line; an exception on the way is a failure."""
    made = attempt(lambda: LINES[check](evidence))
    return raised(check, made) if isinstance(made, Exception) else made


def raised(check: str, error: Exception) -> Line:
    """The line of a check that could not be finished: a refusal in its own words, and else a failure."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, UnsupportedError):
        return Line(check, "-", f"refused: {text}")
    return Line(check, "FAIL", f"raised {type(error).__name__}: {text}")


def syncs(model: nn.Module, prompt: dict[str, Any]) -> int:
    """How often CUDA says that a prefill waited for the device."""
    inputs = {name: value for name, value in prompt.items() if name != "attention_mask"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs, use_cache=True, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def syncs_line(plain: int, pruned: int, promised: int) -> Line:
    """Waits of a pruned prefill against those of the plain one, one read of counts and what the methods promise."""
    told = f"{pruned} waits where the plain model has {plain} and {promised} more are promised"
    return Line("syncs", "pass" if pruned <= plain + promised else "FAIL", told)


def ours(thing: object) -> bool:
    """Whether a hook or attribute is made of this package's code."""
    kind = thing if callable(thing) and hasattr(thing, "__qualname__") else type(thing)
    return (getattr(kind, "__module__", None) or "").partition(".")[0] == "vlmprune"


def left_behind(model: nn.Module) -> list[str]:
    """Every hook and instance attribute of this package that is on a model, by its own search."""
    found = []
    for name, module in model.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found += [f"{name or 'model'}: {type(h).__name__}" for h in getattr(module, kind).values() if ours(h)]
        found += [f"{name or 'model'}.{attribute}" for attribute, value in vars(module).items() if ours(value)]
    return found


def restore_line(plain: Plain, again: Run, pruned: Run | Exception, left: Sequence[str]) -> Line:
    """The unpatched model against itself before; `left` is what `left_behind` found."""
    if left:
        return Line("restore", "FAIL", f"left on the model: {', '.join(left[:3])}" + (", ..." * (len(left) > 3)))
    first = plain.run
    if not (torch.equal(first.hidden, again.hidden) and torch.equal(first.logits, again.logits)):
        if not plain.repeats:
            return Line("restore", "?", "the plain model itself does not give the same bits twice")
        off = max(worst(again.hidden, first.hidden), worst_logits(again.logits, first.logits))
        return Line("restore", "FAIL", "other bits than before", off)
    if isinstance(pruned, Run) and torch.equal(pruned.hidden, first.hidden):
        return Line("restore", "?", "the pruned model computed the same bits, so nothing was to be restored")
    return Line("restore", "pass")
