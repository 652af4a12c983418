"""One budget in all its words: patches kept, layer average, FLOPs, bytes in the cache, each as a share of the unpruned.

Of a prompt that stands for all: one picture of the tower's own size (twice that both ways where pictures are cut into
crops, as in the benchmark) and some text. FLOPs are those of a whole prefill: tower, projector, decoder layers, head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmprune.cost.flops import formula_flops, kv_width, language_flops
from vlmprune.cost.tokens import Dwarf, LayerTokens
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.patches import Family, family_of

__all__ = ["TEXT", "WORDS", "Costs", "PromptCost", "check_share", "solve"]

TEXT = 60  # text tokens of the prompt, as in the benchmark
#: What a budget may be given in besides `keep` and `average`, and what it is a share of.
WORDS = {"flops": "FLOPs of a prefill", "kv": "bytes in the cache after it"}


@dataclass(frozen=True)
class PromptCost:
    """What one prefill costs.

    Attributes:
        left: patches and newlines in the last decoder layer.
        layer_average: the same in the mean over all decoder layers.
        flops: of the whole prefill.
        language_flops: of the decoder layers alone, as publications count.
        kv: bytes that the cache holds.
    """

    left: int
    layer_average: float
    flops: int
    language_flops: int
    kv: int

    def over(self, whole: PromptCost) -> dict[str, float]:
        """As shares of another one."""
        return {name: getattr(self, name) / getattr(whole, name) for name in vars(self)}


class Costs:
    """What methods cost on a model.

    Args:
        model: of a supported family.
        text: text tokens of the prompt.

    Raises:
        UnsupportedError: a model that is none, or one whose tower and projector the formula does not know.
    """

    def __init__(self, model: nn.Module, text: int = TEXT):
        self.family: Family = family_of(model)
        inner = self.family.inner(model)
        self.config, self.facts, self.text = inner.config, self.family.facts(inner), text
        if not self.family.by_formula:
            raise UnsupportedError(
                f"what a prefill of {self.family.model_type} models costs is not computed: the formula knows towers "
                "and projectors of LLaVA's build alone. Give keep= or average=; `vlmprune tune` measures."
            )
        tile = self.config.vision_config.image_size
        self.size = (2 * tile, 2 * tile) if self.family.views else (tile, tile)
        self.grid = self.family.image_grid(inner, self.size)
        self.bytes = model.dtype.itemsize
        self.dwarf = Dwarf(model, self.size)
        whole = self.facts.view_patches + self.facts.has_cls
        layers = LayerTokens([(whole, whole)] * self.facts.tower_layers, [self.grid.tokens] * self.facts.decoder_layers)
        self.unpruned = self.cost(layers)

    def of(self, methods: Sequence[Method]) -> PromptCost:
        """What methods cost.

        Raises:
            UnsupportedError: what is not known before a picture was seen, or does not go with the model.
            ValueError: an option or a budget that does not fit the model.
        """
        return self.cost(self.dwarf.tokens(methods))

    def cost(self, layers: LayerTokens) -> PromptCost:
        """What layers cost that see so many tokens."""
        tokens = [self.text + n for n in layers.decoder]
        return PromptCost(
            left=layers.decoder[-1],
            layer_average=sum(layers.decoder) / len(layers.decoder),
            flops=formula_flops(self.config, tokens, layers.tower, self.grid.views),
            language_flops=language_flops(self.config, tokens),
            kv=2 * kv_width(self.config) * self.bytes * sum(tokens),
        )


def check_share(word: str, share: Any) -> float:
    """A share of the unpruned model.

    Raises:
        TypeError: no number.
        ValueError: not between 0 and 1.
    """
    rule = f"{word} is a share of the unpruned model's {WORDS.get(word, word)}: a number above 0, at most 1"
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{word}={share!r} is not a number: {rule}.")
    if not 0 < share <= 1:
        raise ValueError(f"{word}={share} is out of range: {rule}.")
    return float(share)


def solve(
    patches: int,
    build: Callable[[float], list[Method]],
    share: Callable[[list[Method]], float],
    target: float,
    told: str,
) -> float:
    """The largest fraction `keep` whose share of something is at most `target`.

    Args:
        patches: of the picture; one patch is the smallest step.
        build: methods of a fraction; where they cannot go as low, it or `share` raises a ValueError.
        share: what is asked about, which grows with the fraction.
        told: what is asked for, in words, such as `flops=0.5`.

    Raises:
        ValueError: the least that the methods can do is more.
    """
    # a mistake of another kind is told by building it
    found: dict[int, float | None] = {patches: share(build(1.0))}

    def at(kept: int) -> float | None:
        if kept not in found:
            try:
                found[kept] = share(build(kept / patches))
            except ValueError:
                found[kept] = None
        return found[kept]

    lowest = first(1, patches, lambda kept: at(kept) is not None)
    if at(lowest) > target:
        raise ValueError(f"{told} cannot be met: with keep={lowest / patches:.4g}, the least, it is {at(lowest):.3f}.")
    too_much = first(lowest, patches + 1, lambda kept: kept > patches or at(kept) > target)
    return (too_much - 1) / patches


def first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first number from `low` on for which something holds, which does for `high` and all between."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
