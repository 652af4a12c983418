"""Which rows of a picture stay, and how many: tensors in and out, without any module of a host's.

The count is asked for where there are no weights (vLLM's front end writes the placeholders), so it is read off what the
methods decide about noise; a method whose count hangs on what it sees is refused by that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

import vlmprune.kernels  # noqa: F401 - registers torch.ops.vlmprune
from vlmprune.engine.compile import compile_plan
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.parts.cuts import AnyCut, Cut, PixelCut, TowerCut
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid, Layout, Views, upload
from vlmprune.parts.merging import flow
from vlmprune.parts.scores import STRIDE
from vlmprune.parts.taps import BlockKeys, ClusterOf, Hidden, Kept, Tap, TowerTap
from vlmprune.parts.tracing import trace_packing
from vlmprune.patches import FAMILIES, Family
from vlmprune.registry import options, required
from vlmprune.serving.plugin import ARCHITECTURES

__all__ = ["Choice", "ServedPicture", "refusals", "why_not"]

#: Families that are served.
SERVED = tuple(ARCHITECTURES)
DIM = 8  # of the noise that stands for features where only the count is asked for


@dataclass(frozen=True)
class ServedPicture:
    """One picture as a method sees it.

    Attributes:
        grid: its layout.
        number: of its content, added to the seed of methods that have one: vLLM tells nobody the picture's place in
            its prompt, and what it caches goes into other places.
    """

    grid: ImageGrid
    number: int = 0


def why_not(name: str, cut: AnyCut, facts: ModelFacts) -> str | None:
    """Why vLLM cannot be given what a method asks for on a model, or None."""
    match cut:
        case PixelCut():
            return f"{name} changes the picture and leaves all its tokens: there is nothing to serve faster"
        case TowerCut() if cut.weigh:
            return f"{name} with weigh=True weighs the tower's attention, and vLLM's takes no weights"
        case TowerCut() if facts.views:
            return f"{name} merges views whole, and how much un-padding leaves of that is not known beforehand"
        case Cut() if cut.at.layer > 0:
            return (
                f"{name} cuts inside the language model (decoder layer {cut.at.layer}), and vLLM keeps as many keys in "
                "every layer: take a method that cuts before it"
            )
        case Cut() if cut.positions == "original":
            return f"{name} has positions='original', and vLLM counts positions through: use positions='contiguous'"
        case Cut() if cut.reorders:
            return f"{name} writes its tokens in an order of its own: leave parity='released' away"
    strange = next((tap for tap in cut.see if not isinstance(tap, Hidden | TowerTap)), None)  # of the language model
    return None if strange is None else f"{name} looks at {strange}, which is not known before the language model"


class Choice:
    """Methods compiled for one model.

    Raises:
        UnsupportedError: one that vLLM cannot be given; others as of `compile_plan`.
    """

    def __init__(self, methods: Sequence[Method], family: Family, facts: ModelFacts):
        self.plan = compile_plan(methods, family, facts)
        for name, cut in self.plan.cuts:
            if why := why_not(name, cut, facts):
                raise UnsupportedError(f"{why}.")
        self.counts: WeakKeyDictionary[ImageGrid, int] = WeakKeyDictionary()

    @property
    def merges(self) -> bool:
        """Whether the tower's own output is changed, so that pictures of other budgets cannot be encoded beside."""
        return bool(self.plan.tower_cuts or self.plan.projector_cuts or ClusterOf() in self.plan.tower_taps)

    @property
    def by_content(self) -> bool:
        """Whether the choice hangs on the number of the picture."""
        return any(hasattr(method, "seed") for method in self.plan.methods)

    def check(self) -> None:
        """Refuse methods whose count is not known beforehand, by a picture that stands for all; errors of `count`."""
        side = math.isqrt(self.plan.facts.view_patches)
        views, crops = (3, (1, 2)) if self.plan.facts.views else (1, (1, 1))
        # a newline, where there are crops, makes rules about them act
        ends = views > 1
        self.count(
            trace_packing(
                lambda x, newline: torch.cat((x.flatten(0, 1), newline[None][:ends])), views, side, side, crops
            )
        )

    def count(self, grid: ImageGrid) -> int:
        """Tokens that stay of a picture, newlines included.

        Raises:
            UnsupportedError: that is not known before the picture was seen, or a method refuses such pictures.
        """
        if grid not in self.counts:
            generator = torch.Generator().manual_seed(0)
            views, patches = grid.views, grid.encoded // grid.views
            tokens = patches + self.plan.facts.has_cls  # of the tower
            seen = {tap: torch.rand(views, patches, generator=generator) for tap in self.plan.measured}
            if ClusterOf() in seen:
                seen[ClusterOf()] = torch.zeros(views, patches, dtype=torch.long)
            for layer in self.plan.key_layers:
                seen[BlockKeys(layer)] = torch.rand(views, tokens, DIM, generator=generator)
            seen |= self.pick(torch.rand(views, tokens, DIM, generator=generator), seen, [grid])[1]
            hidden = torch.rand(1, grid.tokens, DIM, generator=generator)
            self.counts[grid] = self.decide([ServedPicture(grid)], seen, hidden)[1].alive_counts[0]
        return self.counts[grid]

    def pick(
        self, features: torch.Tensor, seen: dict[Tap, torch.Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[torch.Tensor, dict[Tap, torch.Tensor]]:
        """Run the cuts between tower and projector.

        Args:
            features: `(views, tokens, dim)` of the tower, the [CLS] token's included.
            seen: tower taps of these views.

        Returns:
            the features with merges done, and what later cuts see of these.
        """
        kept: dict[Tap, torch.Tensor] = {}
        for cut in self.plan.projector_cuts:
            picked = cut.reduce({tap: seen.get(tap, features) for tap in cut.see}, Views(grids))
            features = features if picked.merge is None else flow(features, picked.merge)
            kept[Kept()] = picked.keep
        return features, kept

    def rows(
        self, pictures: Sequence[ServedPicture], seen: dict[Tap, torch.Tensor], features: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What enters the language model of every picture.

        Args:
            seen: tower taps of these pictures' views, one after the other, `(views, patches, ...)`.
            features: `(tokens, dim)` of every picture, packed and unpruned.

        Returns:
            `(count, dim)` of every picture.

        Raises:
            RuntimeError: features that are not as the layouts say.
        """
        found, told = [len(rows) for rows in features], [picture.grid.tokens for picture in pictures]
        if found != told:
            raise RuntimeError(f"vLLM made {found} tokens of these pictures, and their layouts say {told}.")
        hidden, layout = self.decide(pictures, seen, torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True))
        promised = upload(layout.alive_counts, hidden.device)
        torch._assert_async((layout.alive.sum(1) == promised).all(), "a method kept other numbers than it promised.")
        order = (~layout.alive).to(torch.uint8).sort(dim=1, stable=True).indices
        chosen = zip(hidden, order, layout.alive_counts, strict=True)
        return [rows.index_select(0, places[:count]) for rows, places, count in chosen]

    def decide(
        self, pictures: Sequence[ServedPicture], seen: dict[Tap, torch.Tensor], hidden: torch.Tensor
    ) -> tuple[torch.Tensor, Layout]:
        """Run all cuts on `(pictures, width, dim)`: the same with merges done, and the layout of what is left."""
        layout = layout_of(pictures, hidden.device)
        for method in self.plan.methods:
            method.check_inputs(layout)
        at = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device).view(hidden.shape[:2])
        values = {tap: layout.from_tower(seen[tap]) for tap in self.plan.tower_taps}
        for name, cut in self.plan.decoder_cuts:
            reduction = cut.reduce({tap: values.get(tap, hidden) for tap in cut.see}, layout)
            if reduction.counts is None:
                raise UnsupportedError(
                    f"how many tokens {name} keeps is not known before it has seen the picture, and vLLM writes the "
                    "placeholders before: take another method, or leave newlines='row' away."
                )
            keep = reduction.keep & layout.alive
            if reduction.counts != layout.alive_counts and (flow := reduction.merge) is not None:
                hidden = torch.ops.vlmprune.merge(hidden, at, layout.alive, keep, flow.into, flow.weight, flow.source)
            counts, patches = reduction.counts, reduction.patches
            if patches is None and not any(grid.newlines for grid in layout.grids):
                patches = counts
            layout = replace(
                layout, alive=keep, alive_counts=counts, alive_patches=patches, entered=counts, entered_patches=patches
            )
        return hidden, layout


def layout_of(pictures: Sequence[ServedPicture], device: torch.device) -> Layout:
    """Every picture a prompt of its own, of nothing but its tokens."""
    grids = [picture.grid for picture in pictures]
    tokens, patches = [grid.tokens for grid in grids], [grid.patches for grid in grids]
    place = torch.arange(max(tokens), device=device).expand(len(grids), -1)
    starts = [0]
    for grid in grids:
        starts.append(starts[-1] + grid.encoded)
    return Layout(
        grids=grids,
        sample=list(range(len(grids))),
        ordinal=[picture.number * STRIDE for picture in pictures],
        start=starts[:-1],
        position=place,
        alive=place < upload(tokens, device)[:, None],
        alive_counts=tokens,
        alive_patches=patches,
        entered=tokens,
        entered_patches=patches,
    )


def refusals(cls: type[Method]) -> dict[str, str]:
    """Why vLLM cannot be given a method (with `served_with`), by the family where it cannot."""
    given = {"keep": 0.5} if "keep" in options(cls) else {}
    if set(required(cls)) - set(given) or cls.training != "none":
        return dict.fromkeys(SERVED, f"{cls.name} cannot be asked without more options; it acts at: {cls.stage}")
    found = {}
    for name in SERVED:
        family = FAMILIES[name]
        facts = ModelFacts(name, 24, 22, True, decoder_layers=32, views=family.views, view_patches=576)
        try:
            Choice([cls(**given, **cls.served_with)], family, facts).check()
        except (UnsupportedError, ValueError) as error:
            found[name] = str(error).removesuffix(".")
    return found
