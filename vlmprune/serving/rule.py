"""What vLLM can be given: the one rule, read off a method's cuts and what they decide. What is unknown is refused.

Nobody declares a method servable. vLLM writes the placeholders before anybody has seen the picture, encodes every
picture apart from its prompt, and keeps as many keys in every layer; so a method can be served if

- its cuts are of the kinds named here, before the language model, and look at the picture alone (`why_not`);
- how many tokens stay follows from the picture's size: it says so where there is nothing to see, and the same of any
  noise (`Choice.count`, `Choice.check_alone`);
- what stays is the same whatever else is in the prompt, and wherever the picture stands (`Choice.check_alone`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.attention import split_heads
from vlmprune.parts.cuts import AnyCut, Cut, PatchCut, PixelCut, ProjectorCut, TowerCut
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.taps import BlockFlow, BlockKeys, ClusterOf, Hidden, Kept, Tap, TowerTap
from vlmprune.serving.watch import Projected

__all__ = ["DROPS", "FAILURES", "averages_heads", "refusing", "why_not"]

#: What code that was written for tensors with values, and for another host, may raise without them.
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
DROPS = "vLLM's is merged in, not shortened view by view"
HEADS, HEAD_DIM, PATCHES = 2, 4, 9  # of the layer that taps are tried on


def why_not(name: str, cut: AnyCut, facts: ModelFacts) -> str | None:
    """Why vLLM cannot be given a cut of a method on a model, or None."""
    match cut:
        case PixelCut():
            return f"{name} changes the picture and leaves all its tokens: there is nothing to serve faster"
        case TowerCut() if cut.weigh:
            return f"{name} with weigh=True weighs the tower's attention, and vLLM's takes no weights"
        case PatchCut():
            return f"{name} lets pixels say how many tokens stay, which nobody has seen when placeholders are written"
        case TowerCut() if any(isinstance(tap, BlockFlow) for tap in cut.see):
            return f"{name} drops what little flows from inside the tower: {DROPS}"
        case TowerCut() if facts.views:
            return f"{name} merges views whole, and how much un-padding leaves of that is not known beforehand"
        case Cut() if cut.at.layer > 0:
            return (
                f"{name} cuts inside the language model (decoder layer {cut.at.layer}), and vLLM keeps as many keys in "
                "every layer: take a method that cuts before it"
            )
        case Cut() if cut.positions != "contiguous" and facts.axes == 1:
            return f"{name} has positions='original', and vLLM counts positions through: use positions='contiguous'"
        case Cut() if cut.reorders:
            return f"{name} writes its tokens in an order of its own: leave parity='released' away"
        case TowerCut() | ProjectorCut() | Cut():
            return next((f"{name} {why}" for tap in cut.see if (why := strange(tap, facts))), None)
    return f"{name} makes a {type(cut).__name__}, which serving does not know"


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what a method's code raises inside the block, of which nothing but the method is known, into a refusal.

    Raises:
        UnsupportedError: `what`, and what was raised; a refusal by the method itself, and ValueError, stay as they are.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except FAILURES as error:
        raise UnsupportedError(f"{what} ({type(error).__name__}: {error}).") from error


def strange(tap: Tap, facts: ModelFacts) -> str | None:
    """Why a tap cannot be seen in vLLM, or None."""
    if type(tap) in (Hidden, ClusterOf, Kept, BlockKeys):
        return None
    if not isinstance(tap, TowerTap) or tap.layer < 0:
        return f"looks at {tap}, which is not known before the language model"
    try:
        same = close(tried(tap, facts), tried(tap, facts, plain=True))
    except FAILURES as error:
        return f"looks at {tap}, which vLLM's tower does not show ({type(error).__name__}: {error})"
    return None if same else f"looks at {tap}, which vLLM's tower does not show: it comes out otherwise there"


def averages_heads(tap: Tap, facts: ModelFacts) -> bool:
    """Whether a tap is the mean of what ranks of tensor parallelism see, each of its own heads."""
    if not isinstance(tap, TowerTap) or tap.layer < 0 or tap.layer >= facts.tower_layers:
        return True  # of no heads
    parts = [tried(tap, facts, heads=slice(i, i + 1)) for i in range(HEADS)]
    return close(tried(tap, facts), sum(parts) / HEADS)


class SmallLayer:
    """A small layer as hosts have it, with all that `parts.layers.TowerLayer` promises."""

    scale = HEAD_DIM**-0.5

    def __init__(self, tokens: int):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(2, tokens, HEADS * HEAD_DIM, generator=generator)
        self.weights = torch.randn(3, HEADS * HEAD_DIM, HEADS * HEAD_DIM, generator=generator)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(hidden, hidden.shape[-1:])

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(rows @ self.weights[0], HEAD_DIM)

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(rows @ self.weights[1], HEAD_DIM)

    def projected(self, heads: slice) -> Projected:
        """The same as vLLM shows it to a rank with some of the heads."""
        rows = self.normed(self.hidden)
        parts = [split_heads(rows @ weight, HEAD_DIM)[:, heads].transpose(1, 2).flatten(2) for weight in self.weights]
        return Projected(torch.cat(parts, -1), HEAD_DIM, self.scale)


def tried(tap: TowerTap, facts: ModelFacts, heads: slice = slice(None), plain: bool = False) -> torch.Tensor:
    """A tap measured in a small layer: as vLLM shows it, or as other hosts do."""
    layer = SmallLayer(PATCHES + facts.has_cls)
    shown = layer if plain else layer.projected(heads)
    return tap.measure(None if tap.layer >= facts.tower_layers else shown, layer.hidden, facts.has_cls)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two measurements are one but for rounding."""
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)
