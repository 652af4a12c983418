"""What changed between two benchmarks."""

from __future__ import annotations

from typing import Any

from vlmprune.eval.bench.results import cells_by_key

__all__ = ["FIGURES", "changes", "differing_settings"]

#: What is compared: (name, path in a cell, whether more is better).
FIGURES = (
    ("first token ms", ("first_token_ms", "pruned"), False),
    ("overhead", ("overhead",), False),
    ("speed-up", ("speedup",), True),
    ("token ms", ("decode_ms", "pruned"), False),
    ("token overhead", ("decode_overhead",), False),
    ("KV bytes", ("kv_bytes",), False),
    ("peak bytes", ("peak_bytes",), False),
)


ABSENT = {"kernels": "auto", "replaced": []}  # settings that older files lack


def figure(cell: dict[str, Any], path: tuple[str, ...]) -> tuple[float, float, float] | None:
    """(value, low, high) of one figure; None where the cell lacks it."""
    value: Any = cell
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return None
    return (value["median"], value["low"], value["high"]) if isinstance(value, dict) else (value, value, value)


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings and machine facts that two results do not share, old and new: times then say little."""
    made = {}
    for part in ("settings", "machine"):
        for name in {**old[part], **new[part]}:
            was, now = (results[part].get(name, ABSENT.get(name)) for results in (old, new))
            if was != now:
                made[name] = (was, now)
    return made


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of the cells that both results have.

    Returns:
        Dictionaries of `method`, `budget`, `batch`, `figure`, `old`, `new`, `change` (new / old - 1) and `verdict`:
        "better" or "worse" where the two intervals (quartiles of times, 95 % of ratios) are apart, else "".
    """
    before, made = cells_by_key(old), []
    for key, cell in cells_by_key(new).items():
        if key not in before:
            continue
        for name, path, more in FIGURES:
            was, now = figure(before[key], path), figure(cell, path)
            if was is None or now is None:
                continue
            made.append({word: cell[word] for word in ("method", "budget", "batch")} | change(name, was, now, more))
    return made


def change(name: str, was: tuple[float, ...], now: tuple[float, ...], more: bool) -> dict[str, Any]:
    """What became of one figure, of which more is better or less."""
    apart = now[1] > was[2] or now[2] < was[1]
    verdict = ("better" if (now[0] > was[0]) == more else "worse") if apart else ""
    ratio = now[0] / was[0] - 1 if was[0] else 0.0
    return {"figure": name, "old": was[0], "new": now[0], "change": ratio, "verdict": verdict}
