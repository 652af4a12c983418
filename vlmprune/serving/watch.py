"""What methods see of vLLM's vision tower: measured by hooks on its layers as they run.

vLLM's tower projects queries, keys and values in one module, whose output is all that a tap asks of a layer: no tap
costs a projection of its own. Under tensor parallelism a rank has its share of the heads, and what was measured is
averaged over the ranks; all of them then choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.attention import split_heads
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.taps import Tap, TowerTap

if TYPE_CHECKING:
    from vlmprune.patches import Family
    from vlmprune.serving.merge import Tower

__all__ = ["AttentionWatcher", "TowerWatcher", "built_for", "look_only"]

Mean = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Projected:
    """What taps ask of a tower layer, answered from `qkv` `(views, tokens, 3 * dim)`, this rank's share of it."""

    qkv: torch.Tensor
    head_dim: int
    scale: float

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the projection stand for rows of the normed input, of which taps only take parts."""
        return self.qkv

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(rows.chunk(3, dim=-1)[0], self.head_dim)

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(rows.chunk(3, dim=-1)[1], self.head_dim)


class TowerWatcher:
    """Measures tower taps; `take` hands over what was seen since the last time.

    Args:
        layers: of the tower, as many as vLLM built.
        taps: to be measured, each once.
        keys: layers whose keys somebody wants.
        mean: averages a tensor over the ranks that share a layer's heads.

    Attributes:
        tower: who changes tokens in this call, if somebody does (`serving.merge`): keys are for them.
    """

    def __init__(
        self, layers: Sequence[nn.Module], taps: Sequence[TowerTap], keys: Iterable[int], facts: ModelFacts, mean: Mean
    ):
        self.taps, self.has_cls, self.mean = taps, facts.has_cls, mean
        self.seen: dict[Tap, list[torch.Tensor]] = {}
        self.tower: Tower | None = None
        self.hidden: torch.Tensor | None = None
        for index in sorted({*(tap.layer for tap in taps), *keys}):
            if index < len(layers):
                self.look_into(index, layers[index])
            else:
                self.end(layers).register_forward_hook(self.behind(index))

    def look_into(self, index: int, layer: nn.Module) -> None:
        """Put hooks where a layer gets its input, and where it makes queries and keys."""
        layer.register_forward_pre_hook(self.before)
        layer.self_attn.qkv_proj.register_forward_hook(self.projected(index, layer.self_attn))

    def end(self, layers: Sequence[nn.Module]) -> nn.Module:
        """The module whose output is what leaves the tower."""
        return layers[-1]

    def before(self, module: nn.Module, args: tuple) -> None:
        """Pre-hook of a layer, or of its first norm: its input, for taps that look at it."""
        self.hidden = args[0]

    def projected(self, index: int, attention: nn.Module) -> Callable[..., None]:
        """Hook of the projection of a layer: measures all that is to be seen of it."""

        def hook(module: nn.Module, args: tuple, output: tuple) -> None:
            layer = Projected(output[0], attention.head_dim, attention.scale)
            for tap in self.taps:
                if tap.layer == index:
                    self.note(tap, self.over_ranks(tap.measure(layer, self.hidden, self.has_cls), attention))
            if self.tower is not None and index in self.tower.plan.key_layers:
                self.tower.keys[index] = self.over_ranks(layer.keys(output[0]).mean(1), attention)
            self.hidden = None

        return hook

    def over_ranks(self, value: torch.Tensor, attention: nn.Module) -> torch.Tensor:
        """The mean of what the ranks see, each of its own heads."""
        # vLLM's reduction on a CPU works in place and does not heed strides: never hand it a view
        return self.mean(value.contiguous()) if getattr(attention, "tp_size", 1) > 1 else value

    def behind(self, index: int) -> Callable[..., None]:
        """Hook of the last layer, for taps behind it."""

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            for tap in self.taps:
                if tap.layer == index:
                    self.note(tap, self.by_token(tap.measure(None, hidden, self.has_cls)))

        return hook

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """What was measured of patches, `(views, patches, ...)`, by token: these are the same in towers of LLaVA."""
        return values

    def note(self, tap: Tap, value: torch.Tensor) -> None:
        """Keep what was measured until somebody takes it."""
        self.seen.setdefault(tap, []).append(value)

    def take(self) -> dict[Tap, torch.Tensor]:
        """What was measured in the views that were encoded since the last time, `(views, patches, ...)` by tap."""
        seen, self.seen = self.seen, {}
        return {tap: torch.cat(values) for tap, values in seen.items()}


class AttentionWatcher(TowerWatcher):
    """The same in towers that turn or norm what they project: hooks on attention itself, which gets what it compares.

    Args:
        tower: with these layers in it.
        family: knows how patches become tokens, and which of them see each other.

    Attributes:
        sizes: of the pictures that are being encoded (`Family.sizes`).
    """

    def __init__(
        self,
        tower: nn.Module,
        layers: Sequence[nn.Module],
        taps: Sequence[TowerTap],
        family: Family,
        facts: ModelFacts,
        mean: Mean,
    ):
        self.whole, self.family, self.unit, self.sizes = tower, family, facts.unit, []
        super().__init__(layers, taps, (), facts, mean)

    def look_into(self, index: int, layer: nn.Module) -> None:
        # a layer that may be compiled calls no hooks of its own; what is in it does
        norm, attention = (layer.norm1, layer.attn) if self.family.packed else (layer.layernorm_before, layer.attention)
        norm.register_forward_pre_hook(self.before)
        attention.attn.register_forward_pre_hook(self.attending(index, attention), with_kwargs=True)

    def end(self, layers: Sequence[nn.Module]) -> nn.Module:
        return self.whole

    def attending(self, index: int, attention: nn.Module) -> Callable[..., None]:
        """Pre-hook of what attends, `(batch, length, dim)` or `(batch, length, heads, head dim)` of each."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            qkv = torch.cat([given[name].flatten(2) for name in ("query", "key", "value")], -1)
            hidden, self.hidden = self.hidden, None
            views = [(qkv, hidden)]
            if self.family.packed:  # (patches of all, 1, dim) reach the layer
                parts = self.family.view_sizes(self.sizes)
                views = list(zip(equal_views(qkv[0], parts), equal_views(hidden[:, 0], parts), strict=True))
            for tap in self.taps:
                if tap.layer == index:
                    found = [
                        tap.measure(Projected(rows, module.head_size, module.scale), inputs, self.has_cls)
                        for rows, inputs in views
                    ]
                    self.note(tap, self.over_ranks(self.of_views(found), attention))

        return hook

    def of_views(self, found: list[torch.Tensor]) -> torch.Tensor:
        """Measured `(views, patches, ...)` by token; `(tokens of all, 1, ...)` of a tower that reads all as one."""
        if not self.family.packed:
            return self.by_token(found[0])
        return self.by_token(torch.cat([each.flatten(0, 1) for each in found])[None]).transpose(0, 1)

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        return self.family.tokens_of(self.whole, values, self.sizes, self.unit)


def equal_views(rows: torch.Tensor, patches: Iterable[int]) -> list[torch.Tensor]:
    """`(patches of all, dim)` of views of several sizes as `(views, patches, dim)` of equal neighbours, in order."""
    found, start = [], 0
    for size, equal in groupby(patches):
        count = len(list(equal))
        found.append(rows[start : start + count * size].unflatten(0, (count, size)))
        start += count * size
    return found


def built_for(taps: Sequence[TowerTap], facts: ModelFacts, built: int) -> int:
    """How many tower layers must exist for these taps; vLLM builds `built`, up to the one that makes the features.

    Raises:
        UnsupportedError: a tap that lies deeper than the layer behind them.
    """
    deepest = max((tap.layer for tap in taps if tap.layer < facts.tower_layers), default=-1)
    if deepest > built:
        raise UnsupportedError(
            f"a method looks at tower layer {deepest}, and vLLM builds {built} layers, which make the features: at "
            f"most layer {built} can be looked at."
        )
    return max(built, deepest + 1)


class LooksOnly:
    """Mixin of a tower layer behind the features: projects what attention would be computed from, changes nothing."""

    bare: bool  # whether the layer returns its output alone

    def forward(self, hidden_states: torch.Tensor) -> Any:
        self.self_attn.qkv_proj(self.layer_norm1(hidden_states))
        return hidden_states if self.bare else (hidden_states, None)


def look_only(layer: type[nn.Module], bare: bool) -> type[nn.Module]:
    """The class of a layer that only looks; its weights load under the names of a whole one."""
    return type(f"LooksOnly{layer.__name__}", (LooksOnly, layer), {"bare": bare})
