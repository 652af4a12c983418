"""Taps of the decoder that look at keys and states: how long, how far apart, how much a layer changed them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

from vlmprune.parts.attention import last_rows, take_rows, upcast
from vlmprune.parts.layers import DecoderLayer, Scene
from vlmprune.parts.layout import upload
from vlmprune.parts.taps import BlockTap, DecoderTap

__all__ = ["PIVOTS", "BesidePivots", "KeyLengths", "Transition", "TransitionMode", "transition"]

PIVOTS = 4  # of the text, in what `BesidePivots` shows
TransitionMode = Literal["official", "paper"]


@dataclass(frozen=True)
class KeyLengths(DecoderTap):
    """L1 length of a decoder layer's keys, heads together, by column of the prompt: `(batch, prompt)`, 0 if gone."""

    attends = True

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        left = scene.sequence
        lengths = upcast(layer.keys(layer.normed(hidden), *left.rotary)).abs().sum((1, 3))
        lengths = torch.where(left.asked(), lengths, 0)
        return lengths.new_zeros(len(lengths), left.prompt).scatter_add(1, left.columns, lengths)


@dataclass(frozen=True)
class BesidePivots(DecoderTap):
    """Unit vectors `(images, tokens + PIVOTS, dim)` at a decoder layer's input behind the model's last norm.

    Those of the visual tokens, and those of the text tokens behind the last image (the last token where there is none)
    with the longest keys in the layer before, the longest first; fewer than `PIVOTS` repeat.
    """

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        unit = normalize(upcast(scene.final_norm(hidden)), dim=-1)
        rows, weight = last_rows(scene.sequence.asked(), *scene.text_after)
        lengths = scene.seen[KeyLengths(self.layer - 1)].gather(1, scene.sequence.columns.gather(1, rows))
        order = lengths.masked_fill(weight == 0, -1).sort(dim=1, descending=True, stable=True).indices
        turn = torch.arange(PIVOTS, device=rows.device) % (weight > 0).sum(1, keepdim=True)
        text = take_rows(unit, rows.gather(1, order.gather(1, turn)))
        visual = unit.flatten(0, 1)[scene.flat_index()]
        return torch.cat((visual, text[upload(scene.layout.sample, text.device)]), 1)


def transition(before: torch.Tensor, after: torch.Tensor, among: torch.Tensor, mode: TransitionMode) -> torch.Tensor:
    """Token transition variation of one block: softmax of the direction term times |after| / |before|.

    Args:
        before, after: `(..., tokens, dim)` what the block read and wrote (without the residual).
        among: `(..., tokens)` bool, the tokens the softmax runs over.
        mode: the direction term is 1 - cos ("official") or 1 - |cos| ("paper").

    Returns:
        `(..., tokens)`, 0 outside `among`.
    """
    before, after = upcast(before), upcast(after)
    norm = torch.linalg.vector_norm
    magnitude = norm(after, dim=-1) / norm(before, dim=-1)
    cosine = cosine_similarity(after, before, dim=-1)
    direction = 1 - cosine if mode == "official" else 1 - cosine.abs()
    weight = direction.masked_fill(~among, -torch.inf).softmax(-1)
    return torch.where(among, weight * magnitude, 0)


@dataclass(frozen=True)
class Transition(BlockTap):
    """Transition variation of visual tokens, `(images, tokens)` float32, summed over a layer's two blocks.

    The softmax runs over every real token of the sample ("official") or over the image's tokens ("paper").
    """

    mode: TransitionMode = "official"

    def measure(self, before: torch.Tensor, after: torch.Tensor, scene: Scene) -> torch.Tensor:
        at = scene.flat_index()
        if self.mode == "official":
            return transition(before, after, scene.sequence.asked(), self.mode).flatten()[at]
        return transition(before.flatten(0, 1)[at], after.flatten(0, 1)[at], scene.layout.alive, self.mode)
