"""What a method is: a small frozen dataclass of hyperparameters that says where it cuts and what it wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from vlmprune.errors import UnsupportedError
from vlmprune.parts.budget import check_keep
from vlmprune.parts.cuts import Cut
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout

__all__ = ["Budgeted", "Method", "check_layer", "check_seed", "check_share", "need_cls", "tower_layer"]


@dataclass(frozen=True)
class Method:
    """Base class of all methods.

    Class attributes describe the method for `vlmprune ls methods`; fields are its options.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "nothing"
    stage: ClassVar[str] = "before the LLM"
    syncs: ClassVar[int] = 0  # device syncs a cut adds beyond the host read of the placeholder counts
    training: ClassVar[str] = "none"
    refuses: ClassVar[dict[str, str]] = {}  # options that a user may expect, and why the method has none
    # inputs that the method cannot work on, and why: "video", or "shrunk" where packing blends neighbouring patches
    refuses_inputs: ClassVar[dict[str, str]] = {}

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        """The cuts this method makes in a model.

        Raises:
            UnsupportedError: the model lacks something the method needs.
            ValueError: an option does not fit the model.
        """
        raise NotImplementedError

    def check_inputs(self, layout: Layout) -> None:
        """Raise UnsupportedError if the batch has an input of `refuses_inputs`."""
        found = {
            "video": any(grid.frames for grid in layout.grids),
            "shrunk": any(grid.blend is not None for grid in layout.grids),
        }
        for kind, why in self.refuses_inputs.items():
            if found[kind]:
                raise UnsupportedError(f"{self.name} {why}.")


@dataclass(frozen=True)
class Budgeted(Method):
    """A method with a budget, given in one of two words.

    Args:
        keep: patches per image or per whole video (int), or a fraction of them, that enter the LLM or are left after
            the last cut.
        average: the same as a mean over all decoder layers; what it means for the cuts is solved by the method.
    """

    keep: int | float | None = None
    average: int | float | None = None

    optional: ClassVar[bool] = False  # whether the method has a published schedule of its own

    def __post_init__(self) -> None:
        if self.keep is not None and self.average is not None:
            raise ValueError(f"{self.name}: give keep= or average=, not both.")
        if self.keep is None and self.average is None and not self.optional:
            raise TypeError(f"{self.name} needs keep= (patches per image, or a fraction) or average=.")
        for word in ("keep", "average"):
            if getattr(self, word) is not None:
                object.__setattr__(self, word, check_keep(getattr(self, word), word))

    @property
    def budget(self) -> int | float:
        """The budget of a method whose only cut is before the LLM, where both words mean the same."""
        return self.average if self.keep is None else self.keep


def tower_layer(layer: int, facts: ModelFacts) -> int:
    """Scale tower layer `layer` of a 24-layer tower to this tower: round(layer * L / 24), at most L - 2."""
    return max(0, min(round(layer * facts.tower_layers / 24), facts.tower_layers - 2))


def need_cls(method: str, facts: ModelFacts, way_out: str) -> None:
    """Raise UnsupportedError if the tower has no [CLS] token; `way_out` names the documented fallback."""
    if not facts.has_cls:
        raise UnsupportedError(
            f"{method} reads the attention of the tower's [CLS] token, and this tower has none; {way_out}."
        )


def check_seed(seed: object) -> None:
    """Raise ValueError unless `seed` is a whole number of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a whole number of at least 0.")


def check_share(name: str, value: object, hint: str = "") -> None:
    """Raise ValueError unless `value` is a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a number between 0 and 1{hint}.")


def check_layer(name: str, layer: int, layers: int, lowest: int = 0) -> int:
    """Check a user's layer number (negative counts from the end) and return it as an index.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{name}={layer!r} must be an int.")
    index = layer + layers if layer < 0 else layer
    if not lowest <= index < layers:
        raise ValueError(f"{name}={layer} is out of range: this model allows {lowest}..{layers - 1}.")
    return index
