"""FLOPs and bytes of a prefill by formula, from a model's config and the tokens of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmprune.errors import UnsupportedError

__all__ = ["formula_flops", "kv_width", "language_flops", "prefill_flops"]


def prefill_flops(
    tokens: Sequence[int],
    hidden: int,
    ffn: int,
    ffn_matrices: int = 3,
    kv_hidden: int | None = None,
    q_hidden: int | None = None,
) -> int:
    """Multiply-adds of a prefill, counting each as one: sum over layers of 4 n d² + 2 n² d + f n d m.

    The formula of publications, so that published totals can be recomputed.

    Args:
        tokens: n of every layer. The TransPrune and FastV papers count visual tokens alone, ToDRE the whole input.
        hidden: d; ffn: m.
        ffn_matrices: f, 3 for Llama's gated feed-forward (TransPrune, arXiv 2507.20630), 2 in ToDRE's formula
            (arXiv 2505.18757), which undercounts Llama.
        kv_hidden: k, the width of keys and values where grouped queries make it less than d (4 n d² is then
            2 n d² + 2 n d k); the papers have none.
        q_hidden: q, the width of all heads of queries where that is not d (4 n d² + 2 n² d is then 2 n d q + 2 n d k +
            2 n² q).
    """
    wide = hidden if q_hidden is None else q_hidden
    projections = 2 * hidden * (wide + (hidden if kv_hidden is None else kv_hidden))
    return sum(n * projections + 2 * n**2 * wide + ffn_matrices * n * hidden * ffn for n in tokens)


def kv_width(config: Any) -> int:
    """Numbers that a decoder layer caches as the keys (or the values) of one token; `config` is the model's."""
    text = config.text_config
    return head_width(text) * text.num_key_value_heads


def head_width(text: Any) -> int:
    """Numbers in one head of a language model with this config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def language_flops(config: Any, tokens: Sequence[int]) -> int:
    """FLOPs of the decoder layers for one prompt: 2 n (2 d q + 2 d k + 2 n q + 3 d m) per layer.

    d is the hidden size, q the width of queries (mostly d), k that of keys and m that of the feed-forward.

    Args:
        config: the model's.
        tokens: n of every layer, as the cache has them.

    Raises:
        UnsupportedError: layers with experts, of which a token sees some.
    """
    text = config.text_config
    if getattr(text, "num_experts", None):
        raise UnsupportedError(f"FLOPs of layers with experts, as {config.model_type} has them, are not computed.")
    wide = head_width(text) * text.num_attention_heads
    return 2 * prefill_flops(
        tokens, text.hidden_size, text.intermediate_size, kv_hidden=kv_width(config), q_hidden=wide
    )


def formula_flops(config: Any, tokens: Sequence[int], tower_tokens: Sequence[tuple[int, int]], views: int) -> int:
    """FLOPs of a whole prefill of one prompt: tower, projector, decoder layers, head on the last token.

    The tower: per view 2 (P p d + sum over layers of 4 T d² + 2 T² d + 2 F d m), with P its patches of p values each, T
    the tokens of that layer's attention and F those of its feed-forward, which merging makes fewer. The projector: two
    matrices, on all patches of all views. Norms, activations, taps and decisions are left out.

    Args:
        config: the model's.
        tokens: of every decoder layer, as the cache has them.
        tower_tokens: T and F of every tower layer, per view.
        views: tower inputs of the prompt's pictures.
    """
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    d, m = vision.hidden_size, vision.intermediate_size
    tower = patches * 3 * vision.patch_size**2 * d
    tower += prefill_flops([attention for attention, _ in tower_tokens], d, 0)
    tower += 2 * d * m * sum(ffn for _, ffn in tower_tokens)
    layers = config.vision_feature_layer
    wide = d * (1 if isinstance(layers, int) else len(layers))
    projector = patches * (wide + text.hidden_size) * text.hidden_size
    head = text.hidden_size * text.vocab_size
    return 2 * (views * (tower + projector) + head) + language_flops(config, tokens)
