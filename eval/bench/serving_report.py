"""What `vlmprune bench --engine vllm` prints."""

from __future__ import annotations

from typing import Any

from vlmprune.eval.bench.report import interval
from vlmprune.runtime.tables import table

__all__ = ["as_text"]

NOTE = """\
In flight: requests at a time, each with a picture and a text of its own; a new one follows where one ends. Unpruned:
vLLM's own class. Ceiling: the same, fed embeddings of as many rows as are kept, without tower and choice. All take
turns, round by round; speed-up is the median over rounds, in brackets its 95 % interval (below six rounds the range).
First token: median and 95th percentile of what a request waits. Blocks: of keys and values that a request holds."""


def as_text(found: dict[str, Any]) -> str:
    """Tables for a person."""
    head = ("in flight", "who", "keep", "prompt", "blocks", "requests/s", "tokens/s", "first token s", "speed-up")
    rows = [
        (
            str(one["in_flight"]), one["runner"], "" if one["keep"] is None else str(one["keep"]), str(one["prompt"]),
            str(one["blocks"]), f"{one['requests_per_second']:.2f}", f"{one['tokens_per_second']:.1f}",
            f"{one['first_median']:.2f}, {one['first_95']:.2f}", interval(one["speedup"], 2),
        )
        for one in found["rows"]
    ]  # fmt: skip
    costs = [f"{one['keep']}: {interval(one['cost'])}" for one in found["embed_multimodal"]]
    pictures = found["embed_multimodal"][0]["pictures"]
    return "\n".join(
        (
            table(head, rows, right=("in flight", "keep", "prompt", "blocks", "requests/s", "tokens/s")),
            f"\nembed_multimodal of {pictures} pictures, pruned over vLLM's own: {'; '.join(costs)}\n",
            NOTE,
        )
    )
