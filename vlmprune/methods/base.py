"""What a method is: a small frozen dataclass of hyperparameters that says where it cuts and what it wants to see."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.parts.budget import check_keep
from vlmprune.parts.cuts import Cut
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout

__all__ = ["Budgeted", "Method", "check_layer", "check_seed", "check_share", "need_cls", "tower_layer"]

KINDS = ("video", "shrunk", "single")  # of inputs that a method may refuse


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
    # inputs that the engine refuses for the method, and why: "video", "shrunk" (packing blends neighbouring patches),
    # "single" (an image without crops)
    refuses_inputs: ClassVar[dict[str, str]] = {}

    @property
    def known_as(self) -> str:
        """What errors and traces call it: the registered name, else that of the class."""
        return self.name or type(self).__name__

    def __post_init__(self) -> None:
        self.check_fields()

    def check_fields(self) -> None:
        """Check what means the same for all methods: the fields `keep` and `average`, and those that are switches.

        `spec.build`, through which every method gets onto a model, calls it too: a subclass with a `__post_init__` of
        its own need not think of it.

        Raises:
            TypeError, ValueError: as `budget.check_keep`, where None is allowed if it is the default; or a switch that
                is neither True nor False.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("keep", "average") and not (value is None and field.default is None):
                object.__setattr__(self, field.name, check_keep(value, field.name))
            if field.type in (bool, "bool") and not isinstance(value, bool):
                raise TypeError(f"{field.name}={value!r} must be True or False.")

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        """The cuts this method makes in a model.

        Raises:
            UnsupportedError: the model lacks something the method needs.
            ValueError: an option does not fit the model.
        """
        raise NotImplementedError

    def told_by(self, processor: Any) -> Method:
        """This method with what only a model's processor knows filled in, where no option says it."""
        return self

    def check_refusals(self) -> None:
        """Raise ValueError if `refuses_inputs` names a kind of input that nobody knows."""
        if unknown := [kind for kind in self.refuses_inputs if kind not in KINDS]:
            raise ValueError(
                f"{self.known_as}.refuses_inputs: {unknown[0]!r} is no kind of input; known: {', '.join(KINDS)}."
                + did_you_mean(unknown[0], KINDS)
            )

    def check_inputs(self, layout: Layout) -> None:
        """Raise UnsupportedError if the batch has an input of `refuses_inputs`."""
        found: dict[str, bool] = {
            "video": any(grid.frames for grid in layout.grids),
            "shrunk": any(grid.blend is not None for grid in layout.grids),
            "single": any(grid.views == 1 and not grid.frames for grid in layout.grids),
        }
        for kind, why in self.refuses_inputs.items():
            if found[kind]:
                raise UnsupportedError(f"{self.known_as} {why}.")


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
        self.check_fields()

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
