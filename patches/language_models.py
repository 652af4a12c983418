"""Kinds of decoder layers: how each makes norm, queries, keys and window, by its own modules.

A kind is chosen by the class of the layer, so that a model whose config says one thing and whose layers are another
cannot be misread. Modules are called and their weights never read: LoRA, 8 bit and offload stay right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.patches.layers import HostLayer, kind_of

__all__ = [
    "LANGUAGE_MODELS",
    "RECURRENT",
    "NormedRotaryLayer",
    "RotaryLayer",
    "attention_mask",
    "counted",
    "decoder_layer",
    "is_recurrent",
    "rotary_of",
    "sliding_window",
    "window_of",
]

#: `model_type` of the language models whose taps were compared with their own eager attention.
LANGUAGE_MODELS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "cohere2",
    "gemma",
    "gemma3_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "glm4v_text",
    "qwen3_5_text",
)

#: What `window_of` says of a recurrent layer, which has no attention and no window.
RECURRENT = "recurrent"


@dataclass(frozen=True)
class RotaryLayer(HostLayer):
    """A decoder layer of Llama's build, with `q_proj`, `k_proj` and `v_proj`."""

    names = ("self_attn", "mlp", "input_layernorm")

    @property
    def index(self) -> int:
        return self.attention.layer_idx

    @property
    def scale(self) -> float:
        return self.attention.scaling

    @property
    def window(self) -> int | None:
        return sliding_window(self.attention)

    @property
    def far_sighted(self) -> tuple[int, ...]:
        """The layers without a window, where a model has both kinds and methods had better look there."""
        return ()

    def queries(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.rotated(self.heads(self.attention.q_proj(rows)), cos, sin)

    def keys(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.rotated(self.heads(self.attention.k_proj(rows)), cos, sin)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        return self.heads(self.attention.v_proj(rows))

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """With the rotary embedding, by the function of the attention's own module."""
        rotate: Callable = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb
        return rotate(x, x[:, :1], cos, sin)[0]


@dataclass(frozen=True)
class NormedRotaryLayer(RotaryLayer):
    """Of Qwen3's build: queries and keys go through a norm, head by head, before they are rotated."""

    def queries(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.rotated(self.attention.q_norm(self.heads(self.attention.q_proj(rows))), cos, sin)

    def keys(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.rotated(self.attention.k_norm(self.heads(self.attention.k_proj(rows))), cos, sin)


@dataclass(frozen=True)
class Cohere2Layer(RotaryLayer):
    """One of Cohere 2's, where layers without a window know no positions."""

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x if self.window is None else super().rotated(x, cos, sin)


@dataclass(frozen=True)
class ClosedRotaryLayer(RotaryLayer):
    """Of GLM-4V's build: what a block writes goes through a norm before it is added."""

    @property
    def feed_forward(self) -> nn.Module:
        raise UnsupportedError(
            "this patch watches what attention and feed-forward blocks of a decoder layer write, and "
            f"{type(self.module).__name__} puts that through norms before it is added: take a method that does not "
            "watch blocks."
        )


@dataclass(frozen=True)
class Gemma3Layer(ClosedRotaryLayer, NormedRotaryLayer):
    """One of Gemma 3's, most of which see a short window, and all of which have norms behind their blocks."""

    @property
    def far_sighted(self) -> tuple[int, ...]:
        kinds = self.attention.config.layer_types
        return tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")


@dataclass(frozen=True)
class GatedRotaryLayer(NormedRotaryLayer):
    """Of Qwen3.5's build: beside a head's queries its projection makes a gate, and most layers are recurrent."""

    @property
    def attention(self) -> nn.Module:
        return self.module.linear_attn if is_recurrent(self.module) else self.module.self_attn

    def queries(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = self.heads(self.attention.q_proj(rows))[:, ::2]  # behind each stands its gate
        return self.rotated(self.attention.q_norm(heads), cos, sin)


LAYERS: dict[str, type[RotaryLayer]] = {
    "LlamaDecoderLayer": RotaryLayer,
    "MistralDecoderLayer": RotaryLayer,
    "Qwen2DecoderLayer": RotaryLayer,
    "Qwen3DecoderLayer": NormedRotaryLayer,
    "Cohere2DecoderLayer": Cohere2Layer,
    "GemmaDecoderLayer": RotaryLayer,
    "Gemma3DecoderLayer": Gemma3Layer,
    "Qwen2VLDecoderLayer": RotaryLayer,
    "Qwen2_5_VLDecoderLayer": RotaryLayer,
    "Qwen3VLTextDecoderLayer": NormedRotaryLayer,
    "Qwen3VLMoeTextDecoderLayer": NormedRotaryLayer,
    "Glm4vTextDecoderLayer": ClosedRotaryLayer,
    "Qwen3_5DecoderLayer": GatedRotaryLayer,
}


def decoder_layer(module: nn.Module) -> RotaryLayer:
    """What is known of a decoder layer.

    Raises:
        UnsupportedError: a layer of another class.
    """
    way = "cuts before the language model without looking at its layers"
    return kind_of(LAYERS, module, "decoder layers", way)(module)


def sliding_window(attention: nn.Module) -> int | None:
    """The window of a decoder layer's attention in tokens, or None (Mistral keeps it in its config alone)."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def attention_mask(
    layer: nn.Module,
    index: int,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Any,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The causal mask of decoder layer `index` as the host would build it for these `(batch, length, dim)` inputs.

    `mask` is the 2-D padding mask over everything the layer has cached and `hidden`. Position ids are left out on
    purpose: gaps in them would be read as packed sequences.

    Args:
        blocks: of `Family.blocks`, for these inputs; the cache holds nothing in front of them then.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    if is_recurrent(layer):  # which wants the padding of these inputs alone
        return None if mask is None else mask[:, -hidden.shape[1] :]
    attention = layer.self_attn
    if blocks is not None:
        return blockwise_mask(attention, index, hidden, mask, cache, blocks)
    make = create_causal_mask if sliding_window(attention) is None else create_sliding_window_causal_mask
    # asking whether the padding mask could be skipped would wait for the device
    return make(attention.config, hidden, mask, cache, layer_idx=index, allow_is_causal_skip=mask is None)


def blockwise_mask(
    attention: nn.Module, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any, blocks: torch.Tensor
) -> torch.Tensor:
    """The mask of a layer where every block sees itself in both directions, as far as the layer's window reaches."""
    from transformers.masking_utils import blockwise_overlay, create_causal_mask, sliding_window_overlay

    columns = hidden.shape[1] if cache is None else sum(map(int, cache.get_mask_sizes(hidden.shape[1], index)))
    # a static cache has columns for what is to come
    blocks = nn.functional.pad(blocks, (0, columns - blocks.shape[1]), value=-1)
    window = sliding_window(attention)
    within = {} if window is None else {"and_mask_function": sliding_window_overlay(window)}
    joined = blockwise_overlay(blocks)
    return create_causal_mask(attention.config, hidden, mask, cache, layer_idx=index, or_mask_function=joined, **within)


def rotary_of(layer: nn.Module, rotary_emb: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """(cos, sin) for a decoder layer, of whose kind a host's embedding may want to know."""
    if hasattr(rotary_emb, "layer_types"):
        return rotary_emb(hidden, position_ids, layer.self_attn.layer_type)
    return rotary_emb(hidden, position_ids=position_ids)


def counted(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """The `(batch, length)` position ids that count columns, or None where there are none.

    Where the rotary embedding has three axes, `(3, batch, length)` says where a token stands in a picture; in
    `(4, batch, length)` the first row counts.
    """
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a decoder layer has a state instead of attention over what came before."""
    return hasattr(layer, "linear_attn")


def window_of(layer: nn.Module) -> int | str | None:
    """The window of a decoder layer in tokens, None where it sees all, or `RECURRENT`: layers alike get one mask."""
    return RECURRENT if is_recurrent(layer) else sliding_window(layer.self_attn)
