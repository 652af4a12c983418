"""Trains many questions about one picture at the price of little more than one.

A training sequence is the image prefix followed by independent turns. Every turn sees the prefix and itself, and its
positions restart after the prefix, so each has exactly the inputs of a single-turn prompt at test time. Attention is
computed per part (prefix causally, turns against prefix and themselves): no score between two turns ever exists.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlmprune.eval.testbed.words import VOCABULARY

from .scenes import GRID

_INDEX = {word: i for i, word in enumerate(VOCABULARY)}
#: Longest training turn without its last token: a question with its answer, and the caption.
QUESTION_LENGTH, CAPTION_LENGTH = 10, 25
#: The same of a long caption (`asking.description`).
LONG_LENGTH = 100
IGNORE = -100


def encode_turn(prompt: str, answer: str, length: int) -> tuple[list[int], list[int]]:
    """Input ids and shifted labels of one turn, padded to `length`; labels cover the answer and </s> only."""
    question = [_INDEX[w] for w in (prompt + " assistant:").split()]
    words = question + [_INDEX[w] for w in answer.split()] + [_INDEX["</s>"]]
    labels = [IGNORE] * (len(question) - 1) + words[len(question) :]
    inputs = words[:-1]
    if len(inputs) > length:
        raise ValueError(f"turn of {len(inputs)} tokens, longest is {length}: {prompt} {answer}")
    padding = length - len(inputs)
    return inputs + [_INDEX["<pad>"]] * padding, labels + [IGNORE] * padding


def pack_next(features: torch.Tensor, newline: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Thumbnail and crops as LLaVA-NeXT lays them out: (B, 1 + rows * columns, 256, D) -> (B, N, D).

    Only for pictures which fill their tile grid exactly (no unpadding).
    """
    batch, _, _, width = features.shape
    crops = features[:, 1:].view(batch, rows, columns, GRID, GRID, width)
    crops = crops.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * GRID, columns * GRID, width)
    ends = newline.to(crops.dtype).expand(batch, rows * GRID, 1, width)
    return torch.cat([features[:, 0], torch.cat([crops, ends], 2).flatten(1, 2)], 1)


class PackedModel(nn.Module):
    """Wraps a Llava(Next)ForConditionalGeneration; shares its parameters and computes packed sequences."""

    def __init__(self, llava: nn.Module) -> None:
        super().__init__()
        self.llava = llava

    def prefix(self, features: torch.Tensor, rows: int = 0, columns: int = 0) -> torch.Tensor:
        """Embeddings of `<s> user: <image>...`.

        Args:
            features: (B, views, 256, tower width), one view without a grid, 1 + rows * columns with one.
            rows: tile rows, 0 for scene-llava.
            columns: tile columns, 0 for scene-llava.

        Returns:
            (B, 2 + visual tokens, D).
        """
        inner = self.llava.model
        visual = inner.multi_modal_projector(features)
        visual = pack_next(visual, inner.image_newline, rows, columns) if rows else visual[:, 0]
        start = inner.language_model.embed_tokens(torch.tensor([_INDEX["<s>"], _INDEX["user:"]]))
        return torch.cat([start.expand(len(visual), -1, -1).to(visual.dtype), visual], 1)

    def forward(
        self,
        features: torch.Tensor,
        turns: list[torch.Tensor],
        shift: torch.Tensor,
        rows: int = 0,
        columns: int = 0,
        squeeze: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Next-token logits of every turn.

        Args:
            features: see `prefix`.
            turns: groups of equally long turns, each (B, n, L) token ids.
            shift: () tensor, added to all positions of the turns (as an earlier turn would).
            rows: see `prefix`.
            columns: see `prefix`.
            squeeze: () tensor in (0, 1]: visual token i gets position 2 + floor(i * squeeze), and the turns follow. A
                language model that has only ever seen one prefix length takes distances for places.

        Returns:
            One (B, n, L, vocabulary) tensor a group.
        """
        language = self.llava.model.language_model
        hidden = self.prefix(features, rows, columns)
        batch, start, _ = hidden.shape
        squeeze = torch.ones(()) if squeeze is None else squeeze
        places = torch.cat([torch.arange(2), 2 + (torch.arange(start - 2) * squeeze).floor().long()])
        parts, positions = [hidden], [places]
        for group in turns:
            parts.append(language.embed_tokens(group).flatten(1, 2).to(hidden.dtype))
            positions.append((places[-1] + 1 + shift + torch.arange(group.shape[2])).repeat(group.shape[1]))
        hidden = torch.cat(parts, 1)
        rotary = language.rotary_emb(hidden, torch.cat(positions)[None])
        sizes = [start] + [g.shape[1] * g.shape[2] for g in turns]
        for layer in language.layers:
            normed = layer.input_layernorm(hidden)
            attention = layer.self_attn
            split = (batch, hidden.shape[1], -1, attention.head_dim)
            query = attention.q_proj(normed).view(split).transpose(1, 2)
            key = attention.k_proj(normed).view(split).transpose(1, 2)
            value = attention.v_proj(normed).view(split).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, *rotary)
            query = (query * attention.scaling).to(value.dtype)
            key = key.to(value.dtype)
            queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))
            blocked = torch.ones(start, start, dtype=torch.bool).triu(1)
            scores = (queries[0] @ keys[0].mT).masked_fill(blocked, -1e4)
            mixed = [scores.float().softmax(-1).to(value.dtype) @ values[0]]
            for i, group in enumerate(turns, 1):
                _, number, length = group.shape
                heads = queries[i].shape[1]
                inside = (batch, heads, number, length, -1)
                outer = queries[i] @ keys[0].mT
                blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
                own = (queries[i].view(inside) @ keys[i].view(inside).mT).masked_fill(blocked, -1e4)
                weights = torch.cat([outer, own.flatten(2, 3)], -1).float().softmax(-1).to(value.dtype)
                outer, own = weights.split([start, length], -1)
                own = own.reshape(batch, heads, number, length, length) @ values[i].view(inside)
                mixed.append(outer @ values[0] + own.flatten(2, 3))
            mixed = torch.cat(mixed, 2).transpose(1, 2).flatten(2)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = language.norm(hidden[:, start:])
        logits = self.llava.lm_head(hidden).float().split(sizes[1:], 1)
        return [x.unflatten(1, group.shape[1:]) for x, group in zip(logits, turns, strict=True)]
