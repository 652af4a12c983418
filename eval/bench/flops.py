"""The FLOP formula of publications, so that published totals can be recomputed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["prefill_flops"]


def prefill_flops(
    tokens: Sequence[int], hidden: int, ffn: int, ffn_matrices: int = 3, kv_hidden: int | None = None
) -> int:
    """Multiply-adds of a prefill, counting each as one: sum over layers of 4 n d² + 2 n² d + f n d m.

    Args:
        tokens: n of every layer. The TransPrune and FastV papers count visual tokens alone, ToDRE the whole input.
        hidden: d; ffn: m.
        ffn_matrices: f, 3 for Llama's gated feed-forward (TransPrune, arXiv 2507.20630), 2 in ToDRE's formula
            (arXiv 2505.18757), which undercounts Llama.
        kv_hidden: k, the width of keys and values where grouped queries make it less than d (4 n d² is then
            2 n d² + 2 n d k); the papers have none.
    """
    projections = 2 * hidden * (hidden + (hidden if kv_hidden is None else kv_hidden))
    return sum(n * projections + 2 * n**2 * hidden + ffn_matrices * n * hidden * ffn for n in tokens)
