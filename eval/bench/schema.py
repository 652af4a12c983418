"""What results in a file must look like for everything that reads them."""

from __future__ import annotations

from typing import Any

__all__ = ["RESULTS", "fault"]

NUMBER = (int, float)
SPREAD = dict.fromkeys(("median", "low", "high", "runs"), NUMBER)
RATIO = dict.fromkeys(("median", "low", "high", "pairs"), NUMBER)
TIMES = dict.fromkeys(("unpruned", "pruned", "oracle"), SPREAD)
STAGES = dict.fromkeys(("tower", "projector", "taps", "selection", "gather", "rest", "total"), SPREAD)
NEEDS = {
    "batch": int,
    "stages_ms": STAGES | {"prefill": [SPREAD]},
    "kv_bytes": NUMBER,
    "peak_bytes": NUMBER,
    "flops": {"counted": NUMBER, "formula": (*NUMBER, type(None))},
}
CELL = NEEDS | {
    "method": str,
    "budget": str,
    "options": dict,
    "tokens": {"visual": NUMBER, "layer_average": NUMBER},
    "stretches": [{"first_layer": int}],
    "first_token_ms": TIMES,
    "overhead": RATIO,
    "speedup": RATIO,
    "oracle_speedup": RATIO,
    "amdahl": {"bound": NUMBER},
    "cost_share": RATIO,
    "same_as_oracle": (*NUMBER, type(None)),
    "?": {"decode_ms": TIMES, "decode_overhead": RATIO, "answer_speedup": NUMBER},
}
#: The keys that are read, with the types of their values. Those under "?" may be missing all together; a list has one
#: pattern for all that is in it.
RESULTS: dict[str, Any] = {
    "asked": dict.fromkeys(("pairs", "plain_runs", "stage_runs"), int),
    "settings": {"model": str, "dtype": str, "prompt_tokens": int, "new_tokens": int, "?": {"replaced": [str]}},
    "machine": {"processor": str, "threads": int, "cores": (int, type(None)), "torch": str, "transformers": str},
    "model": {"description": str, "visual": int},
    "unpruned": [NEEDS],
    "cells": [CELL],
    "?": {"sizes": {"sizes": int, "layouts": int, **dict.fromkeys(("new_ms", "packed_ms", "known_ms"), SPREAD)}},
}


def fault(value: Any, pattern: Any, where: str = "") -> str | None:
    """What `value` lacks of `pattern`, in words; None if nothing."""
    if isinstance(pattern, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(filter(None, (fault(v, pattern[0], f"{where}[{i}]") for i, v in enumerate(value))), None)
    if isinstance(pattern, dict):
        if not isinstance(value, dict):
            return f"{where or 'the document'} is no object"
        return next(filter(None, (fault_at(value, name, inner, where) for name, inner in pattern.items())), None)
    right = isinstance(value, pattern) and not isinstance(value, bool)
    return None if right else f"{where} is {value!r}"[:80]


def fault_at(value: dict[str, Any], name: str, pattern: Any, where: str) -> str | None:
    """What the value called `name` in `value` lacks of its pattern."""
    at = f"{where}.{name}" if where else name
    if name == "?":
        return fault(value, pattern, where) if any(key in value for key in pattern) else None
    return fault(value[name], pattern, at) if name in value else f"{at} is missing"
