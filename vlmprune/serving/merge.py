"""Merging in vLLM's vision tower and behind it: hooks hand its layers fewer tokens.

What is merged goes back to its old places at the tower's end: all behind it sees the numbers that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vlmprune.engine.decided import whose
from vlmprune.engine.tower import TowerFrame, means, spread
from vlmprune.errors import UnsupportedError
from vlmprune.parts.cuts import Stay, TowerCut, Vision
from vlmprune.parts.layout import ImageGrid
from vlmprune.parts.taps import BlockKeys, ClusterOf, Tap
from vlmprune.serving.choice import Choice
from vlmprune.serving.rule import DROPS
from vlmprune.serving.watch import TowerWatcher

__all__ = ["Tower", "install"]


class Tower(TowerFrame):
    """One call of the tower, for pictures of one budget.

    Attributes:
        grids: layouts of the pictures.
        real: input of the layer that is running, where there is a cut between its two blocks. The layer itself gets a
            row of zeros, to which it adds what its attention returns: the merged sum of both.
    """

    def __init__(self, choice: Choice, grids: Sequence[ImageGrid]):
        super().__init__(choice.plan, tower=None, call=None)  # of transformers, none of which is asked here
        self.choice, self.grids, self.real = choice, list(grids), None

    def inside_of(self, index: int) -> Any:
        """The cut between the two blocks of a layer, or None."""
        return next((cut for cut in self.plan.tower_cuts if cut.at == Vision(index, inside=True)), None)

    def before_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a layer gets for its input `(views, tokens, dim)`."""
        hidden = self.merge(Vision(index), hidden)
        if self.inside_of(index) is None:
            return hidden
        self.real = hidden
        return hidden.new_zeros(len(hidden), 1, hidden.shape[-1])

    def drop(self, cut: TowerCut, stay: Stay) -> Any:
        """Refuse what transformers' towers alone follow: views of which fewer tokens are left need a mask."""
        raise UnsupportedError(f"{whose(self.plan, cut)}: reduce dropped tokens inside the tower: {DROPS}.")

    def after_attention(self, index: int, attended: torch.Tensor) -> torch.Tensor:
        """What a layer goes on with instead of what its attention made."""
        whole, self.real = self.real + attended, None
        return means(whole, *self.decide(self.inside_of(index), whole))

    def end(self, hidden: torch.Tensor, layers: int, seen: dict[Tap, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        """The tower's output `(views, tokens, dim)` as the rest of the model knows it, and what later cuts see."""
        views, tokens = len(hidden), hidden.shape[1]
        if self.plan.tower_cuts:
            hidden = spread(self.merge(Vision(layers), hidden), self.place)
        place = torch.arange(tokens, device=hidden.device).expand(views, -1) if self.place is None else self.place
        keys = {BlockKeys(layer): values for layer, values in self.keys.items()}
        hidden, kept = self.choice.pick(hidden, seen | keys, self.grids)
        return hidden, kept | {ClusterOf(): place[:, int(self.has_cls) :]}


def install(encoder: nn.Module, watcher: TowerWatcher) -> None:
    """Put the hooks on the layers of a tower, which act in calls where the watcher has a `Tower`."""
    for index, layer in enumerate(encoder.layers):
        layer.register_forward_pre_hook(before_layer(watcher, index))
        layer.self_attn.register_forward_pre_hook(before_attention(watcher, layer), with_kwargs=True)
        layer.self_attn.register_forward_hook(after_attention(watcher, index))
    encoder.register_forward_hook(at_end(watcher, len(encoder.layers)))


def before_layer(watcher: TowerWatcher, index: int) -> Callable[..., Any]:
    """Pre-hook of a layer."""

    def hook(module: nn.Module, args: tuple) -> tuple | None:
        return None if watcher.tower is None else (watcher.tower.before_layer(index, args[0]), *args[1:])

    return hook


def before_attention(watcher: TowerWatcher, layer: nn.Module) -> Callable[..., Any]:
    """Pre-hook of a layer's attention: hands it the layer's real input."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if watcher.tower is None or watcher.tower.real is None:
            return None
        return (), {"hidden_states": layer.layer_norm1(watcher.tower.real)}

    return hook


def after_attention(watcher: TowerWatcher, index: int) -> Callable[..., Any]:
    """Hook of a layer's attention: merges."""

    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if watcher.tower is None or watcher.tower.real is None:
            return None
        return watcher.tower.after_attention(index, output[0]), *output[1:]

    return hook


def at_end(watcher: TowerWatcher, layers: int) -> Callable[..., Any]:
    """Hook of the stack of layers."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if watcher.tower is None:
            return None
        output, kept = watcher.tower.end(output, layers, watcher.take())
        for tap, value in kept.items():
            watcher.note(tap, value)
        return output

    return hook
