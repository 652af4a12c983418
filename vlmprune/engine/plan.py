"""What is done to one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from vlmprune.parts.cuts import AnyCut, Cut, PatchCut, PixelCut, ProjectorCut, TowerCut
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid
from vlmprune.parts.packing import Layouts
from vlmprune.parts.taps import BlockFlow, BlockKeys, BlockTap, DecoderTap, Tap, TowerTap
from vlmprune.patches import Family
from vlmprune.trace import Trace

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["Hook", "Plan", "handed"]

T = TypeVar("T")


@dataclass
class Plan:
    """What is done to one model: shared by its hooks, copied with them.

    Attributes:
        cuts: (name of the method, cut), in the order they run.
        methods: who wants them.
        plain: threads that are inside `handle.disabled()`, with the number of times they entered it.
        trace: what the last pruned prefill did.
        head: class of the model around the inner one that it is installed on; "" where that is patched alone, None
            before.
        before: the plan that this one took the place of, to be put back where a `with` block ends.
        told: methods of whose idle budget the user was told.
        entered, left: whether the `with` block of its handle is open, or over.
    """

    family: Family
    facts: ModelFacts
    cuts: list[tuple[str, AnyCut]]
    methods: Sequence[Method] = ()
    plain: dict[int, int] = field(default_factory=dict, repr=False)
    trace: Trace | None = None
    layouts: Layouts = field(default_factory=Layouts, repr=False)
    head: str | None = None
    before: Plan | None = field(default=None, repr=False)
    told: set[str] = field(default_factory=set, repr=False)
    entered: bool = False
    left: bool = False

    @property
    def tower_taps(self) -> list[TowerTap]:
        """What the cuts in the language model want to see of the vision tower, each once."""
        return wanted_taps((cut for _, cut in self.decoder_cuts), TowerTap)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model is no part of the blocks that this one may be in
        return self.__dict__ | {"plain": {}, "before": None, "entered": False, "left": False}

    @property
    def in_tower(self) -> bool:
        """Whether there is anything to do where pictures are encoded."""
        return bool(self.tower_taps or self.in_vision)

    @property
    def enabled(self) -> bool:
        """Whether a call of this thread is to be pruned."""
        return not self.plain or get_ident() not in self.plain  # torch.compile cannot trace get_ident

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave the calls that this thread makes inside the block alone."""
        me = get_ident()
        self.plain[me] = self.plain.get(me, 0) + 1
        try:
            yield
        finally:
            self.plain[me] -= 1
            if not self.plain[me]:
                del self.plain[me]

    def of_kind(self, kind: type[T]) -> list[T]:
        """The cuts of one kind."""
        return [cut for _, cut in self.cuts if isinstance(cut, kind)]

    @property
    def pixel_cuts(self) -> list[PixelCut]:
        """What happens to the picture before the tower sees it."""
        return self.of_kind(PixelCut)

    @property
    def patch_cuts(self) -> list[PatchCut]:
        """What goes in front of a packed tower."""
        return self.of_kind(PatchCut)

    @property
    def tower_cuts(self) -> list[TowerCut]:
        """Cuts inside the vision tower."""
        return self.of_kind(TowerCut)

    @property
    def projector_cuts(self) -> list[ProjectorCut]:
        """Cuts between tower and projector."""
        return self.of_kind(ProjectorCut)

    @property
    def in_vision(self) -> bool:
        """Whether a cut changes what tower and projector make of a picture."""
        return any(not isinstance(cut, Cut) for _, cut in self.cuts)

    @property
    def measured(self) -> list[TowerTap]:
        """What is to be measured in the tower, each once: for cuts behind it and in the language model."""
        behind = wanted_taps(self.projector_cuts, TowerTap)
        return [tap for tap in dict.fromkeys((*self.tower_taps, *behind)) if not isinstance(tap, BlockKeys)]

    @property
    def decoder_cuts(self) -> list[tuple[str, Cut]]:
        """Cuts in the language model, with the names of their methods."""
        return [(name, cut) for name, cut in self.cuts if isinstance(cut, Cut)]

    @property
    def key_layers(self) -> set[int]:
        """Tower layers whose keys a cut in or behind the tower wants."""
        return {tap.layer for tap in wanted_taps((*self.tower_cuts, *self.projector_cuts), BlockKeys)}

    @property
    def flow_layers(self) -> set[int]:
        """Tower layers of which a cut in the tower wants all that is projected."""
        return {tap.layer for tap in wanted_taps(self.tower_cuts, BlockFlow)}

    def projected(self, layer: int) -> tuple[str, ...]:
        """Which projections of a tower layer are kept for cuts behind it."""
        if layer in self.flow_layers:
            return ("query", "key", "value")
        return ("key",) if layer in self.key_layers else ()

    @property
    def inside_layers(self) -> set[int]:
        """Tower layers between whose two blocks there is a cut."""
        return {cut.at.layer for cut in self.tower_cuts if cut.at.inside}

    @property
    def decoder_tap_layers(self) -> set[int]:
        """Decoder layers at whose input a tap measures."""
        return {tap.layer for tap in wanted_taps((cut for _, cut in self.decoder_cuts), DecoderTap)}

    @property
    def block_layers(self) -> set[int]:
        """Decoder layers whose two blocks a tap watches."""
        return {tap.layer for tap in wanted_taps((cut for _, cut in self.cuts), BlockTap)}

    def grid(self, inner: nn.Module, modality: str, size: Any) -> ImageGrid:
        """The layout of an image or video of a size (of `Family.sizes`)."""
        return self.layouts.find((modality, size), lambda: self.family.packing(inner, modality, size))


def wanted_taps(cuts: Iterable[AnyCut], kind: type[Tap]) -> list[Any]:
    """The taps of a kind that some cuts want to see, each once."""
    return list(dict.fromkeys(tap for cut in cuts for tap in cut.see if isinstance(tap, kind)))


def handed(args: tuple, kwargs: dict[str, Any], name: str = "hidden_states") -> tuple[Any, tuple, dict[str, Any]]:
    """What a module is handed first, by its place or by its name, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


@dataclass
class Hook:
    """Base of all hooks. One acts in the calls of the model that its plan is installed on, and goes with that plan.

    The same module may be part of several models.
    """

    plan: Plan

    def owns(self, thing: Any) -> bool:
        """Whether a frame, a call or a hook (or None) is of this hook's plan."""
        return thing is not None and thing.plan is self.plan
