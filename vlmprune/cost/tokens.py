"""Tokens of every layer, read off what methods decide about noise: no weights, no picture.

A method whose counts hang on what it sees has no cost that is known beforehand, and is refused by that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import vlmprune.kernels  # noqa: F401 - registers torch.ops.vlmprune
from vlmprune.engine.plan import Plan
from vlmprune.errors import UnsupportedError
from vlmprune.parts.cuts import Cut, Decoder, Vision
from vlmprune.parts.layout import ImageGrid, Layout, Views
from vlmprune.parts.taps import BlockKeys, ClusterOf, CrossShare, Hidden, Kept, ReceivedAttention, Tap, TowerTap

__all__ = ["LayerTokens", "tokens_of"]

DIM = 8  # of the noise that stands for vectors


@dataclass(frozen=True)
class LayerTokens:
    """What the layers of a model see of one picture.

    Attributes:
        tower: tokens per view of every tower layer's attention, and of its feed-forward block.
        decoder: visual tokens of every decoder layer, newlines included.
    """

    tower: list[tuple[int, int]]
    decoder: list[int]


class TapNoise:
    """Numbers in the shapes of what cuts see of one picture."""

    def __init__(self, grid: ImageGrid, has_cls: bool):
        self.grid, self.has_cls = grid, has_cls
        self.generator = torch.Generator().manual_seed(0)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator)

    def vectors(self, tokens: int) -> torch.Tensor:
        """Of the tower, `(views, tokens, DIM)`."""
        return self.rand(self.grid.views, tokens, DIM)

    def tower(self, tap: Tap) -> torch.Tensor:
        """A tower tap where the tower is done: `(views, patches)`."""
        views, patches = self.grid.views, self.grid.encoded // self.grid.views
        if isinstance(tap, Hidden | BlockKeys):
            return self.vectors(patches + self.has_cls)
        if isinstance(tap, ClusterOf):
            return torch.zeros(views, patches, dtype=torch.long)
        return self.rand(views, patches)

    def decoder(self, tap: Tap) -> torch.Tensor:
        """A tap of the language model."""
        tokens = self.grid.tokens
        if isinstance(tap, CrossShare):
            return self.rand(1, 2)
        more = (DIM,) if isinstance(tap, Hidden) else (2,) if isinstance(tap, ReceivedAttention) else ()
        return self.rand(1, tokens, *more)


@torch.no_grad()
def tokens_of(plan: Plan, grid: ImageGrid) -> LayerTokens:
    """What the layers see of a picture of some layout under a plan.

    Raises:
        UnsupportedError: a count hangs on the picture, or a method refuses such pictures.
        ValueError: a budget that such a picture cannot meet.
    """
    noise = TapNoise(grid, plan.facts.has_cls)
    tower, cluster = tower_tokens(plan, noise)
    return LayerTokens(tower, decoder_tokens(plan, noise, cluster))


def tower_tokens(plan: Plan, noise: TapNoise) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Tokens of the tower's layers, and the cluster that every token ends in, `(views, tokens)`."""
    views, now = noise.grid.views, noise.grid.encoded // noise.grid.views + noise.has_cls
    sizes, place = torch.ones(views, now), torch.arange(now).expand(views, -1)
    layers: list[tuple[int, int]] = []

    def merge(at: Vision) -> int:
        nonlocal sizes, place
        for cut in (cut for cut in plan.tower_cuts if cut.at == at):
            made = cut.reduce({tap: noise.vectors(sizes.shape[1]) for tap in cut.see}, sizes)
            sizes = sizes.new_zeros(views, made.count).scatter_add(1, made.into, sizes)
            place = made.into.gather(1, place)
        return sizes.shape[1]

    for layer in range(plan.facts.tower_layers):
        attention = merge(Vision(layer))
        layers.append((attention, merge(Vision(layer, inside=True))))
    merge(Vision(plan.facts.tower_layers))  # behind the last
    return layers, place


def decoder_tokens(plan: Plan, noise: TapNoise, cluster: torch.Tensor) -> list[int]:
    """Visual tokens of the decoder's layers, newlines included."""
    grid = noise.grid
    seen = {tap: noise.tower(tap) for tap in plan.measured}
    for cut in plan.projector_cuts:
        picked = cut.reduce({tap: seen.get(tap, noise.tower(tap)) for tap in cut.see}, Views([grid]))
        seen[Kept()] = picked.keep
    seen[ClusterOf()] = cluster[:, int(noise.has_cls) :]
    layout = Layout.alone([grid])
    for method in plan.methods:
        method.check_inputs(layout)
    layers = [grid.tokens] * plan.facts.decoder_layers
    for name, cut in plan.decoder_cuts:
        values = {
            tap: layout.from_tower(seen[tap]) if isinstance(tap, TowerTap) else noise.decoder(tap) for tap in cut.see
        }
        layout = after(name, cut, cut.reduce(values, layout), layout)
        layers[cut.at.layer :] = layout.alive_counts * (len(layers) - cut.at.layer)
    return layers


def after(name: str, cut: Cut, reduction, layout: Layout) -> Layout:
    """The layout behind a cut."""
    if reduction.counts is None:
        raise UnsupportedError(
            f"how many tokens {name} keeps at decoder layer {cut.at.layer} hangs on the picture: what it costs is not "
            "known before it has seen one (`vlmprune tune` measures it)."
        )
    keep, counts, patches = reduction.keep & layout.alive, reduction.counts, reduction.patches
    if patches is None and not layout.newlines:
        patches = counts
    layout = replace(layout, alive=keep, alive_counts=counts, alive_patches=patches)
    return replace(layout, entered=counts, entered_patches=patches) if cut.at == Decoder(0) else layout
