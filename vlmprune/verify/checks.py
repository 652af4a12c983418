"""The checks: what a patched model did, against what the unpatched model's parts do by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.verify.evidence import SIDES, Evidence, Plain, attempt, same_so_far, steps_of
from vlmprune.verify.runs import FORCED, Hand, Run, by_hand, dropped_by, masked, of_images, without
from vlmprune.verify.ties import CLOSE_CALL, differing
from vlmprune.verify.verdict import Line, judge, largest, relative, worst, worst_logits

__all__ = ["LINES", "judged", "left_behind", "raised", "restore_line", "syncs", "syncs_line"]

UNPRUNED = "this budget prunes nothing"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def settled(made: Any) -> Any:
    """What a run left, unless it raised: then that is raised again."""
    if isinstance(made, Exception):
        raise made
    return made


def rows_line(e: Evidence) -> Line:
    """Every kept row's last hidden state, and the logits after the prompt."""
    length = e.rows.ids.shape[1]
    if e.twin is None:
        return Line("rows", "-", UNPRUNED)

    def off(hand: Hand) -> float:
        columns = [c for c in hand.columns[-1] if c < length]
        states = worst(e.pruned.run.hidden[0, columns], hand.hidden)
        return max(states, worst_logits(e.pruned.run.logits[0, :1], hand.logits[:1]))

    return judge("rows", off(e.hand), e.plain.noise("rows"), off(e.twin), e.dtype, e.behind)


def wrong_lengths(e: Evidence) -> str:
    """Where the physical cache is not as the trace and the rows kept promise, in words."""
    length, run = e.rows.ids.shape[1], e.pruned.run
    for layer, found, values in zip(run.layers, run.lengths, e.hand.values, strict=True):
        kept, promised = sum(c < length for c in e.hand.columns[layer]), e.pruned.trace.kv_lengths[layer]
        most = values.shape[-2]  # a sliding layer caches its window alone
        if kept != promised:
            return f"layer {layer}: the trace promises {promised} entries and {kept} tokens were kept"
        if found != min(promised, most):
            return f"layer {layer} caches {found} entries for the {promised} promised ({length} tokens in the prompt)"
    for layer, got, want in zip(run.layers, run.values, e.hand.values, strict=True):
        if got[0].shape != want.shape:
            there, due = got.shape[-2], want.shape[-2]
            return f"layer {layer} caches {there} entries after {FORCED} decoded tokens, and {due} were due"
    return ""


def doubled(e: Evidence) -> float | None:
    """How far off the cache would be if an entry stood in its neighbour's place, where that shows least.

    Rows that enter equal (words, newlines, a token that a method repeats) are no mistake in each other's place.
    """
    entry, found = {column: i for i, column in enumerate(e.hand.columns[0])}, []
    for layer, values in zip(e.pruned.run.layers, e.hand.values, strict=True):
        columns = e.hand.columns[layer]
        entered = e.hand.entered[[entry[column] for column in columns[-values.shape[-2] :]]]
        differ = (entered[1:] != entered[:-1]).any(-1)
        apart = relative(values[:, :-1], values[:, 1:]).max(0).values[differ]
        found += [float(apart.min())] if len(apart) else []
    return min(found, default=None)


def cache_line(e: Evidence) -> Line:
    """Physical lengths, and the value rows of the prompt in every layer."""
    if told := wrong_lengths(e):
        return Line("cache", "FAIL", told)
    # what is decoded later depends on all that is cached before it, and is judged as decoding
    pairs = [(a[0, :, :-FORCED], b[:, :-FORCED]) for a, b in zip(e.pruned.run.values, e.hand.values, strict=True)]
    off, worst_one = largest([worst(a, b) for a, b in pairs])
    by_entry = relative(*pairs[worst_one]).max(0).values
    layer = e.pruned.run.layers[worst_one]
    failed = f"layer {layer}, entry {int(by_entry.argmax())} of {len(by_entry)} is not the kept token's"
    lengths = sorted(set(e.pruned.run.lengths), reverse=True)
    told = f"{', '.join(map(str, lengths))} entries for {e.rows.ids.shape[1]} tokens"
    return judge("cache", off, e.plain.noise("cache"), doubled(e), e.dtype, told, failed)


def positions_line(e: Evidence) -> Line:
    """Every key row of every layer: a key is turned by its position."""
    if e.moved is None:
        return Line("positions", "-", "no cut in the language model")
    if wrong_lengths(e):
        return Line("positions", "?", "the cache has other entries than it should: see cache")

    def off(hand: Hand) -> tuple[float, int]:
        return largest([worst(a[0], b) for a, b in zip(e.pruned.run.keys, hand.keys, strict=True)])

    found, number = off(e.hand)
    layer = e.pruned.run.layers[number]
    told = ", ".join(dict.fromkeys(cut.positions for cut in e.pruned.trace.cuts))
    return judge(
        "positions", found, e.plain.noise("positions"), off(e.moved)[0], e.dtype, told, f"{told}; layer {layer}"
    )


def decode_line(e: Evidence) -> Line:
    """Logits of the forced tokens against the masked whole sequence; the mistake is to decode at other positions."""
    if e.mistake is None:
        return Line("decode", "-", UNPRUNED)
    cuts, forced, wrong = e.pruned.trace.cuts, e.pruned.forced, dropped_by(e.pruned.trace)
    right, twin = (masked(e.family, e.model, e.rows, cuts, forced, astray)[1:] for astray in (0, wrong))
    got = e.pruned.run.logits[0, 1:]
    off, other = worst_logits(got, right), worst_logits(got, twin)
    return judge("decode", off, e.plain.noise("decode"), other, e.dtype, e.behind)


def generate_line(e: Evidence) -> Line:
    """A greedy answer against that by hand, and with a static cache; the mistake is that of `decode_line`."""
    answer, static = settled(e.pruned.answer), settled(e.pruned.static)
    off = worst_logits(answer.logits, e.hand.logits)
    if e.astray is None:
        return Line("generate", "-", UNPRUNED)
    twin = worst_logits(answer.logits, e.astray.logits)
    told = "no static cache" if static is None else ""
    coarse = max(e.dtype, answer.logits.dtype, key=lambda kind: torch.finfo(kind).eps)  # `generate` has float32 logits
    lines = [judge("generate", off, e.plain.noise("generate"), twin, coarse, told, "with and without a cache")]
    if static is not None:
        same = same_so_far(answer, static)
        apart = worst_logits(static.logits[:same], answer.logits[:same])
        failed = "a static cache gives another answer"
        lines.append(judge("generate", apart, e.plain.noise("static"), twin, coarse, "", failed))
    return severest(lines)


def severest(lines: Sequence[Line]) -> Line:
    """The line that says most against the model, and of several such the one that has something to tell."""
    return max(lines, key=lambda line: (["pass", "?", "!", "FAIL"].index(line.outcome), bool(line.told), line.off or 0))


def batch_line(e: Evidence) -> Line:
    """Every row of the padded batches against its prompt alone: the worst of them."""
    return severest([row_line(e, side, row) for side in SIDES for row in range(len(e.pruned.singles))])


def row_line(e: Evidence, side: str, row: int) -> Line:
    """One row of a batch that is padded on one side."""
    (ran, trace), steps = settled(e.pruned.batches[side]), steps_of(e.family, e.model, side)
    single, alone = settled(e.pruned.singles[row])
    where, noise = f"row {row}, padded {side}", e.plain.noise(f"batch {row}")
    twin = worst_logits(settled(e.pruned.intruded[row]).logits[0, :steps], single.logits[0, :steps])
    mine = [i for i, sample in enumerate(trace.sample) if sample == row]
    together = [of_images(cut, mine) for cut in trace.cuts] if mine else []
    want, told = single.logits[0], ""
    if other := differing([] if alone is None else alone.cuts, together, len(mine)):
        told = f"{where}: {other.told}"
        if not other.tie(noise, e.dtype) or e.behind:
            few = Line("batch", "?", f"{told}; {CLOSE_CALL}")
            return few if other.few else Line("batch", "FAIL", told)
        told += f"; their scores tie but for rounding ({other.gap:.2g} apart)"
        want = by_hand(e.family, e.model, e.rows_of(row), together, e.pruned.forced).logits
    off = worst_logits(ran.logits[row, :steps], want[:steps])
    return judge("batch", off, noise, twin, e.dtype, told, where)


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


def syncs(model: nn.Module, prompt: dict[str, Any]) -> int | None:
    """How often CUDA says that a prefill waited for the device; None for a model that is on none."""
    if model.device.type != "cuda":
        return None
    mode = torch.cuda.get_sync_debug_mode()
    inputs = without(prompt, "attention_mask")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs, use_cache=True, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    # setting the mode warns too
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def syncs_line(plain: int | Exception | None, pruned: int | Exception | None, promised: int) -> Line:
    """Waits of a pruned prefill against those of the plain one, one read of counts and what the methods promise.

    Args:
        plain, pruned: of `syncs`, or what it raised.
    """
    for waits in (plain, pruned):
        if isinstance(waits, Exception):
            return raised("syncs", waits)
        if waits is None:
            return Line("syncs", "-", "no GPU")
    told = f"{pruned} waits where the plain model has {plain} and {promised} more are promised"
    return Line("syncs", "pass" if pruned <= plain + promised else "FAIL", told)


def ours(thing: object) -> bool:
    """Whether a hook or attribute is made of this package's code."""
    kind = thing if callable(thing) and hasattr(thing, "__qualname__") else type(thing)
    return (getattr(kind, "__module__", None) or "").partition(".")[0] == "vlmprune"


def left_behind(model: nn.Module) -> list[str]:
    """Every hook and instance attribute of this package that is on a model, by its own search."""
    return [found for name, module in model.named_modules() for found in ours_on(name or "model", module)]


def ours_on(name: str, module: nn.Module) -> list[str]:
    """`left_behind` of one module."""
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    found = [f"{name}: {type(hook).__name__}" for hook in filter(ours, hooks)]
    return found + [f"{name}.{attribute}" for attribute, value in vars(module).items() if ours(value)]


def restore_line(plain: Plain, again: Run | Exception, pruned: Run | Exception, left: Sequence[str]) -> Line:
    """The unpatched model against itself before; `left` is what `left_behind` found."""
    if isinstance(again, Exception):
        return raised("restore", again)
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
