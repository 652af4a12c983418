"""Tokens of every layer, read off a dwarf: the model's own classes with as many layers and patches, but narrow ones.

It is built of random numbers in no time, and the engine prunes it as it would the model: whatever a method looks at is
there. A method whose counts hang on what it sees has no cost that is known beforehand, and is refused by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlmprune.engine import install as engine
from vlmprune.engine.compile import compile_plan
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.parts.cuts import AnyCut, Cut, Stay, TowerCut, Vision
from vlmprune.parts.facts import ModelFacts
from vlmprune.patches import family_of

__all__ = ["Dwarf", "LayerTokens"]

HEADS, WIDE = 2, 8  # of every layer, and of every head
TEXT = 4  # text tokens of its prompt, on either side of the picture


@dataclass(frozen=True)
class LayerTokens:
    """What the layers of a model see of one picture.

    Attributes:
        tower: tokens per view of every tower layer's attention, and of its feed-forward block.
        decoder: visual tokens of every decoder layer, newlines included.
    """

    tower: list[tuple[int, int]]
    decoder: list[int]


class Dwarf:
    """A narrow model of the same depth.

    Args:
        model: of a supported family, whose tower has a picture size of its own.
        size: (height, width) of the picture.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        self.family, self.size = family_of(model), size
        self.model = narrow(model)
        inner = self.family.inner(self.model)
        self.facts: ModelFacts = self.family.facts(inner)
        self.visual = self.family.image_grid(inner, size).tokens
        self.inputs = self.prompt(inner)

    def prompt(self, inner: nn.Module) -> dict[str, Any]:
        """A random picture between some text tokens."""
        tile, generator = inner.config.vision_config.image_size, torch.Generator().manual_seed(0)
        views, _ = self.family.grid(inner, self.size)
        image = self.family.token(inner)
        text = [token for token in range(2 * TEXT + 1) if token != image][: 2 * TEXT]
        ids = torch.tensor([[*text[:TEXT], *[image] * self.visual, *text[TEXT:]]])
        shape = (1, *((views,) if self.family.views else ()), 3, tile, tile)
        inputs = {"input_ids": ids, "pixel_values": torch.randn(shape, generator=generator)}
        return inputs | ({"image_sizes": torch.tensor([self.size])} if self.family.needs_sizes else {})

    @torch.no_grad()
    def tokens(self, methods: Sequence[Method]) -> LayerTokens:
        """What the layers see under some methods.

        Raises:
            UnsupportedError: a count hangs on the picture, or the model or such pictures are refused.
            ValueError: a budget that such a picture cannot meet.
        """
        plan, merged = compile_plan(methods, self.family, self.facts), {}
        plan.cuts = [(name, watched(name, cut, merged)) for name, cut in plan.cuts]
        engine.install(self.model, plan)
        try:
            self.model(**self.inputs, use_cache=True)
        finally:
            engine.remove(self.model)
        return LayerTokens(self.tower(merged), [length - 2 * TEXT for length in plan.trace.kv_lengths])

    def tower(self, merged: dict[Vision, int]) -> list[tuple[int, int]]:
        """Tokens of the tower's layers, by what was left where something was merged."""
        now, layers = self.facts.view_patches + self.facts.has_cls, []
        for layer in range(self.facts.tower_layers):
            attention = merged.get(Vision(layer), now)
            now = merged.get(Vision(layer, inside=True), attention)
            layers.append((attention, now))
        return layers


def narrow(model: nn.Module) -> nn.Module:
    """A model of the same class and depth with narrow layers; the random numbers of others stay as they were."""
    config = deepcopy(model.config)
    for part in (config.text_config, config.vision_config):
        part.hidden_size = part.intermediate_size = HEADS * WIDE
        part.num_attention_heads = HEADS
        for name, value in (("num_key_value_heads", HEADS), ("head_dim", WIDE)):
            if getattr(part, name, None) is not None:
                setattr(part, name, value)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        made = type(model)(config).eval()
    return made.to(torch.float32)


def watched(name: str, cut: AnyCut, merged: dict[Vision, int]) -> AnyCut:
    """A cut that says how many tokens it leaves in the tower, and refuses to let the picture decide."""
    if isinstance(cut, TowerCut):
        return replace(cut, reduce=Merging(name, cut.reduce, cut.at, merged))
    return replace(cut, reduce=Known(name, cut.reduce, cut.at.layer)) if isinstance(cut, Cut) else cut


@dataclass
class Merging:
    """Notes what a cut in the tower leaves, and refuses counts that hang on the picture."""

    name: str
    reduce: Callable
    at: Vision
    merged: dict[Vision, int]

    def __call__(self, *seen: Any) -> Any:
        made = self.reduce(*seen)
        if isinstance(made, Stay) and made.keep is None:
            return made
        if made.count is None:
            raise unknown(self.name, f"tower layer {self.at.layer}")
        self.merged[self.at] = made.count
        return made


@dataclass
class Known:
    """Refuses counts that hang on the picture."""

    name: str
    reduce: Callable
    layer: int

    def __call__(self, *seen: Any) -> Any:
        made = self.reduce(*seen)
        if made.counts is None:
            raise unknown(self.name, f"decoder layer {self.layer}")
        return made


def unknown(name: str, where: str) -> UnsupportedError:
    """What to say where the picture decides how many tokens stay."""
    return UnsupportedError(
        f"how many tokens {name} keeps at {where} hangs on the picture: what it costs is not known before it has seen "
        "one (`vlmprune tune` measures it)."
    )
