"""What a method is: a small frozen dataclass of hyperparameters that says where it cuts and what it wants to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.parts.budget import check_keep, count
from vlmprune.parts.cuts import (
    AnyCut,
    Clusters,
    Cut,
    Decoder,
    Merge,
    Pick,
    Positions,
    ProjectorCut,
    Reduction,
    TowerCut,
    Vision,
)
from vlmprune.parts.facts import ModelFacts, need_patches
from vlmprune.parts.layout import Layout, Views
from vlmprune.parts.merging import first_of_cluster, spread_evenly
from vlmprune.parts.options import Layers, Ratios, checked, hints
from vlmprune.parts.schedules import Schedule, decoder_cuts
from vlmprune.parts.selection import AnyNewlines, Keep, Newlines, Scope, candidates, contest, keep_patches, select
from vlmprune.parts.taps import ClusterOf, Kept, Seen, Tap
from vlmprune.parts.templates import QuestionMarks, question_of, told_question

if TYPE_CHECKING:
    import torch

__all__ = ["LOOKS_AT", "REGISTERED", "Asking", "BeforeLLM", "BehindTower", "Budgeted", "InTower", "Method", "Pruner"]
__all__ += ["Staged", "TowerMerging", "register"]
# the words of every method's contract, which come with its base class
__all__ += ["AnyCut", "AnyNewlines", "Cut", "Decoder", "Layout", "Merge", "ModelFacts", "Newlines", "Pick"]
__all__ += ["Positions", "Reduction", "Seen", "Tap", "UnsupportedError"]

KINDS = ("image", "video", "shrunk", "single")  # of inputs that a method may refuse

#: What a method may look at (`Method.looks_at`), in the order in which they are listed, with a heading for each.
LOOKS_AT = {
    "tower": "what the vision tower attends to",
    "features": "how much tokens are alike",
    "question": "what was asked, before the language model",
    "decoder": "what happens inside the language model",
    "nothing": "nothing: controls, what a method must beat",
    "": "others",
}

REGISTERED: dict[str, type[Method]] = {}  # what `register` has seen in this process, by name


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method known under `name`.

    Raises:
        ValueError: another class has the name already.
    """

    def add(cls: type[Method]) -> type[Method]:
        known = REGISTERED.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a method named {name!r} is registered already: {known.__module__}.{known.__qualname__}.")
        cls.name = name
        REGISTERED[name] = cls
        return cls

    return add


@dataclass(frozen=True)
class Method:
    """Base class of all methods.

    Class attributes describe the method for `vlmprune ls methods`; fields are its options, and their types say what is
    allowed (`parts.options`).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "nothing"
    looks_at: ClassVar[str] = ""  # one of `LOOKS_AT`, under whose heading it is listed
    stage: ClassVar[str] = "before the LLM"
    syncs: ClassVar[int] = 0  # device syncs a cut adds beyond the host read of the placeholder counts
    training: ClassVar[str] = "none"
    served_with: ClassVar[dict[str, Any]] = {}  # options without which vLLM cannot be given it
    plain_with: ClassVar[dict[str, Any]] = {}  # options that spare it what is no part of a model
    refuses: ClassVar[dict[str, str]] = {}  # options that a user may expect, and why the method has none
    # inputs that the engine refuses for the method, and why: "image" (a still one), "video", "shrunk" (packing
    # blends neighbouring patches), "single" (an image without crops)
    refuses_inputs: ClassVar[dict[str, str]] = {}

    @property
    def known_as(self) -> str:
        """What errors and traces call it: the registered name, else that of the class."""
        return self.name or type(self).__name__

    def __post_init__(self) -> None:
        self.check_fields()

    def check_fields(self) -> None:
        """Check every option by the type of its field, and the budgets `keep` and `average`; lists become tuples.

        `spec.build`, through which every method gets onto a model, calls it too: a subclass with a `__post_init__` of
        its own need not think of it.

        Raises:
            TypeError, ValueError: as `options.checked`, and as `budget.check_keep` for budgets, where None is allowed
                if it is the default.
        """
        types = hints(type(self))
        for field in (field for field in fields(self) if field.init):
            value = checked(field.name, types[field.name], getattr(self, field.name))
            if field.name in ("keep", "average") and not (value is None and field.default is None):
                value = check_keep(value, field.name)
            object.__setattr__(self, field.name, value)

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
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
            "image": any(not grid.frames for grid in layout.grids),
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


@dataclass(frozen=True)
class Pruner(Budgeted):
    """A method with a budget that takes tokens out of the prompt. Subclasses give other defaults, or types.

    Args:
        positions: "contiguous" closes the gaps that a cut makes in the position ids, "original" leaves them; None is
            the family's own: contiguous, and original where positions lie on several axes (M-RoPE), which have no gaps
            to close.
        newlines: newline tokens of anyres images: "all" stay, those in the "row" of a kept patch do, or "none".
    """

    positions: Positions | None = None
    newlines: Newlines = "all"

    def in_stages(
        self,
        layers: list[int],
        see: Callable[[int], tuple[Tap, ...]],
        reduce: Callable[..., Reduction],
        positions: Positions | None = None,
    ) -> list[AnyCut]:
        """A cut at the input of each of some decoder layers: what it sees, and `reduce` told its number as `stage`."""
        positions = positions or self.positions
        return [
            Cut(Decoder(layer), see(layer), partial(reduce, stage=stage), positions)
            for stage, layer in enumerate(layers)
        ]

    def among(self, layout: Layout) -> torch.Tensor:
        """Who competes by the method's rule for newlines: `(images, tokens)` bool."""
        return candidates(layout, self.newlines)[0]

    def contest(self, layout: Layout, keep: Keep | None = None) -> tuple[torch.Tensor, list[int], list[int] | None]:
        """`parts.contest` for the method's budget, or another one."""
        return contest(layout, self.budget if keep is None else keep, self.newlines)

    def best(self, scores: torch.Tensor, layout: Layout, keep: Keep | None = None, scope: Scope = "image") -> Reduction:
        """`parts.select` by the method's budget, or another one."""
        return select(scores, self.budget if keep is None else keep, layout, self.newlines, scope)

    def kept(
        self,
        mask: torch.Tensor,
        layout: Layout,
        counts: list[int] | None,
        scores: torch.Tensor | None = None,
        merge: Merge | None = None,
    ) -> Reduction:
        """`parts.keep_patches` by the method's rule for newlines."""
        return keep_patches(mask, layout, counts, self.newlines, scores, merge)


@dataclass(frozen=True)
class BeforeLLM(Pruner):
    """A method with a single cut, before the language model: `see` says what it looks at, `reduce` what stays."""

    sees: ClassVar[tuple[Tap, ...]] = ()

    @property
    def reorders(self) -> bool:
        """Whether `reduce` writes tokens in an order of its own (`Cut.reorders`)."""
        return False

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        """The taps that `reduce` gets, in this order: `sees`, where they do not hang on the model; raises as `cuts`."""
        return self.sees

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        see = tuple(dict.fromkeys(self.see(facts)))
        return [Cut(Decoder(0), see, self.reduce, self.positions, self.reorders)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: what was seen in, decision out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Asking(Pruner):
    """A method that looks for the question in a prompt.

    Args:
        question: how a chat template marks it: a processor, which the command and the evaluation ask. None takes all
            text behind the last picture for it.
    """

    question: Annotated[QuestionMarks | None, told_question] = None

    def told_by(self, processor: Any) -> Self:
        return self if self.question is not None else replace(self, question=question_of(processor))


@dataclass(frozen=True)
class InTower(Pruner):
    """A method that makes the vision tower's own layers shorter, so that its time falls too.

    All views keep as many patches. The rest of the model finds a token at every original position (what it became, or
    zeros), and what is left over is dropped where the sequence is cut.
    """

    stage = "vision tower, then before the LLM"
    refuses_inputs: ClassVar[dict[str, str]] = {
        "shrunk": "merges patches inside the tower, and tokens that blend several patches (a shrunken canvas, pooled "
        "frames) belong to no single cluster"
    }

    def left(self, facts: ModelFacts) -> int:
        """Patches of a view that are left behind the tower.

        Raises:
            UnsupportedError: tokens are no patches, or images have views and the budget is no fraction.
        """
        need_patches(self.known_as, facts)
        if facts.views and isinstance(self.budget, int):
            raise UnsupportedError(
                f"{self.known_as} treats all views alike, and images differ in their views: give a fraction as "
                f"{self.word}."
            )
        return count(self.budget, facts.view_patches)

    @property
    def word(self) -> str:
        """The word in which the budget was given."""
        return "average" if self.keep is None else "keep"

    def stays(self, keep: torch.Tensor, layout: Layout, left: int) -> Reduction:
        """Keep what `(images, tokens)` marks, of every view as many."""
        # where packing cuts padding off, what is left of a view hangs on the picture
        whole = all(p == math.prod(grid.side) for grid in layout.grids for p in grid.patches_per_view)
        counts = [left * grid.views for grid in layout.grids] if whole else None
        return self.kept(keep & layout.patches, layout, counts)


@dataclass(frozen=True)
class TowerMerging(InTower):
    """A method that merges tokens in every tower layer up to the feature layer, and keeps one of every cluster.

    Args:
        weigh: proportional attention: later layers count a token as often as the patches it stands for.
    """

    stage = "vision tower, every layer"
    needs = "the tower's keys or hidden states"
    looks_at = "features"

    weigh: bool = False

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        layers, left = facts.feature_layer + 1, facts.view_patches
        cuts: list[AnyCut] = []
        for layer, removed in enumerate(self.schedule(left, self.left(facts), layers)):
            if removed > left // 2:
                raise ValueError(
                    f"{self.word}={self.budget} would merge {removed} of {left} tokens in one layer, at most half can "
                    f"go: raise {self.word} (this tower has {layers} layers to merge in)."
                )
            if removed:
                at, see, match = self.matching(layer, facts)
                match = partial(self.match, by=partial(match, removed=removed, has_cls=facts.has_cls))
                cuts.append(TowerCut(at, (see,), match, self.weigh))
            left -= removed
        return [*cuts, Cut(Decoder(0), (ClusterOf(),), partial(self.reduce, clusters=left), self.positions)]

    def schedule(self, patches: int, target: int, layers: int) -> list[int]:
        """Tokens to merge away in each layer, to get from `patches` to `target`."""
        return spread_evenly(patches - target, layers)

    def matching(self, layer: int, facts: ModelFacts) -> tuple[Vision, Tap, Callable[..., Clusters]]:
        """Where in tower layer `layer`, or at its end, it merges, by what, and how it is matched."""
        raise NotImplementedError

    def match(self, seen: Seen, sizes: torch.Tensor, by: Callable[[torch.Tensor], Clusters]) -> Clusters:
        """Pure: `(views, tokens, dim)` keys or hidden states in, clusters out."""
        (metric,) = seen.values()
        return by(metric)

    def reduce(self, seen: Seen, layout: Layout, clusters: int) -> Reduction:
        """Pure: cluster numbers in, one token per cluster stays."""
        (cluster,) = seen.values()
        return self.stays(first_of_cluster(cluster, layout), layout, clusters)


@dataclass(frozen=True)
class BehindTower(Pruner):
    """A method that picks and merges patches of every view between tower and projector (`merge`).

    What it kept stays at the cut before the LLM. Views share the budget in proportion to their patches; without one the
    picture says how many stay, where a method allows that.
    """

    stage = "between tower and projector, then before the LLM"
    refuses_inputs: ClassVar[dict[str, str]] = {
        "shrunk": "merges patches, and tokens that blend several of them belong to no single cluster"
    }

    newlines: AnyNewlines = "all"

    def behind(self, *see: Tap) -> list[AnyCut]:
        """The two cuts of a method that sees some taps."""
        return [ProjectorCut(see, self.merge), Cut(Decoder(0), (Kept(),), self.drop, self.positions)]

    def merge(self, seen: Seen, views: Views) -> Pick:
        """Pure: what was seen of every view in, what anchors become out."""
        raise NotImplementedError

    def drop(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: keep what was kept behind the tower."""
        self.check_inputs(layout)
        (kept,) = seen.values()
        free = self.keep is None and self.average is None
        counts = None if free else [sum(Views([grid]).shares(self.budget)) for grid in layout.grids]
        return self.kept(kept & layout.patches, layout, counts)


@dataclass(frozen=True)
class Staged(Pruner):
    """A method that cuts at several decoder layers.

    Args:
        keep: visual tokens per image left after the last cut, or a fraction; without a budget the published schedule
            runs, another value stretches what it removes so that it ends there.
        average: the mean over all layers, met in the same way.
        prune_layers: 1-based, of a 32-layer decoder; at another depth they scale by max(previous + 1, round(p L / 32)).
        keep_ratios: of the tokens that entered the LLM, one per cut, floored, but never fewer than 1 of an image that
            has tokens.
    """

    optional = True

    prune_layers: Layers = (8, 16, 24)
    keep_ratios: Ratios = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.keep_ratios) != len(self.prune_layers):
            raise ValueError(
                f"keep_ratios has {len(self.keep_ratios)} entries, prune_layers {len(self.prune_layers)}: one per cut."
            )
        if self.keep_ratios[-1] == 1 and (self.keep, self.average) != (None, None):
            raise ValueError(
                f"keep_ratios={self.keep_ratios} remove nothing that keep= or average= could stretch: lower the last."
            )

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        depth = facts.decoder_layers
        layers = decoder_cuts("prune_layers", self.prune_layers, depth)
        schedule = Schedule.at(layers, depth, self.keep_ratios, self.keep, self.average)
        return self.in_stages(layers, partial(self.see, facts=facts), partial(self.reduce, schedule=schedule))

    def see(self, layer: int, facts: ModelFacts) -> tuple[Tap, ...]:
        """The taps that the cut at the input of decoder layer `layer` gets."""
        raise NotImplementedError

    def score(self, seen: Seen, layout: Layout) -> torch.Tensor:
        """Pure: what was seen in, `(images, tokens)` out, of which the highest stay."""
        raise NotImplementedError

    def reduce(self, seen: Seen, layout: Layout, stage: int, schedule: Schedule) -> Reduction:
        """Pure: keep the best."""
        return self.best(self.score(seen, layout), layout, partial(schedule.left, stage=stage))
