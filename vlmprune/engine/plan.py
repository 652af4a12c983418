"""What is done to one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn

from vlmprune.parts.cuts import Cut, Decoder, Pixels, Projector, Vision
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid
from vlmprune.parts.taps import BlockKeys, BlockTap, TowerTap
from vlmprune.patches import Family
from vlmprune.trace import Trace

__all__ = ["Plan"]


@dataclass
class Plan:
    """What is done to one model: shared by its hooks, copied with them.

    Attributes:
        cuts: (name of the method, cut), in the order they run.
        plain: threads that are inside `handle.disabled()`, with the number of times they entered it.
        trace: what the last pruned prefill did.
    """

    family: Family
    facts: ModelFacts
    cuts: list[tuple[str, Cut]]
    plain: dict[int, int] = field(default_factory=dict, repr=False)
    trace: Trace | None = None
    grids: dict[Any, ImageGrid] = field(default_factory=dict, repr=False)

    @property
    def tower_taps(self) -> list[TowerTap]:
        """What the cuts in the language model want to see of the vision tower, each once."""
        return list(dict.fromkeys(t for _, cut in self.decoder_cuts for t in cut.see if isinstance(t, TowerTap)))

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model is no part of the block that this one may be in
        return self.__dict__ | {"plain": {}}

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

    @property
    def pixel_cuts(self) -> list[Cut]:
        """What happens to the picture before the tower sees it."""
        return [cut for _, cut in self.cuts if isinstance(cut.at, Pixels)]

    @property
    def tower_cuts(self) -> list[Cut]:
        """Cuts inside the vision tower."""
        return [cut for _, cut in self.cuts if isinstance(cut.at, Vision)]

    @property
    def projector_cuts(self) -> list[Cut]:
        """Cuts between tower and projector."""
        return [cut for _, cut in self.cuts if isinstance(cut.at, Projector)]

    @property
    def measured(self) -> list[TowerTap]:
        """What is to be measured in the tower, each once: for cuts behind it and in the language model."""
        behind = (tap for cut in self.projector_cuts for tap in cut.see)
        wanted = (tap for tap in (*self.tower_taps, *behind) if isinstance(tap, TowerTap))
        return list(dict.fromkeys(tap for tap in wanted if not isinstance(tap, BlockKeys)))

    @property
    def decoder_cuts(self) -> list[tuple[str, Cut]]:
        """Cuts in the language model, with the names of their methods."""
        return [(name, cut) for name, cut in self.cuts if isinstance(cut.at, Decoder)]

    @property
    def key_layers(self) -> set[int]:
        """Tower layers whose keys a cut in or behind the tower wants."""
        return {
            tap.layer
            for cut in (*self.tower_cuts, *self.projector_cuts)
            for tap in cut.see
            if isinstance(tap, BlockKeys)
        }

    @property
    def block_layers(self) -> set[int]:
        """Decoder layers whose two blocks a tap watches."""
        return {tap.layer for _, cut in self.cuts for tap in cut.see if isinstance(tap, BlockTap)}

    def grid(self, inner: nn.Module, modality: str, size: Any) -> ImageGrid:
        """The layout of an image or video of a size (of `Family.sizes`), traced once per size."""
        if (modality, size) not in self.grids:
            trace = self.family.video_grid if modality == "video" else self.family.image_grid
            self.grids[modality, size] = trace(inner, size)
        return self.grids[modality, size]
