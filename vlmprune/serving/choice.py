"""Which rows of a picture stay, and how many: tensors in and out, without any module of a host's.

The count is asked for where there are no weights (vLLM's front end writes the placeholders): methods decide about
tensors that have no values either, or about noise, and one whose count hangs on what it sees is refused by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

import vlmprune.kernels  # noqa: F401 - registers torch.ops.vlmprune
from vlmprune.engine.compile import compile_plan
from vlmprune.engine.decided import check_flow, check_pick, check_reduction, whose
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid, Layout, Views, upload
from vlmprune.parts.merging import picked
from vlmprune.parts.scores import STRIDE
from vlmprune.parts.taps import BlockKeys, ClusterOf, Kept, Tap
from vlmprune.parts.tracing import trace_packing
from vlmprune.patches import FAMILIES, Family
from vlmprune.registry import options, required
from vlmprune.serving.plugin import ARCHITECTURES
from vlmprune.serving.rule import FAILURES, refusing, why_not
from vlmprune.serving.watch import Projected

__all__ = ["Choice", "ServedPicture", "refusals", "usual"]

#: Families that are served.
SERVED = tuple(ARCHITECTURES)
UNKNOWN = "how many tokens {} keeps is not known before it has seen the picture, and vLLM writes placeholders before"
Look = Callable[[torch.Tensor], torch.Tensor]
#: What pictures are tried: of noise, of one colour, dark with few lights, darker and darker.
NOISE: tuple[Look, ...] = (
    lambda x: x, lambda x: x * 0 + 0.5, lambda x: x**30, lambda x: x.flatten().sort().values.view_as(x),
)  # fmt: skip
HEADS, DIM = 2, 8  # of what stands for a model where there is none
ANY_SIDE = 6  # tokens along a side of a picture that stands for those of any size


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
        self.blind = True  # whether counts can be had without values

    @property
    def merges(self) -> bool:
        """Whether the tower's own output is changed, so that pictures of other budgets cannot be encoded beside."""
        return bool(self.plan.tower_cuts or self.plan.projector_cuts or ClusterOf() in self.plan.tower_taps)

    @property
    def by_content(self) -> bool:
        """Whether the choice hangs on the number of the picture."""
        return any(hasattr(method, "seed") for method in self.plan.methods)

    @property
    def names(self) -> str:
        """The methods, for errors."""
        return "+".join(method.known_as for method in self.plan.methods)

    @property
    def sample(self) -> ImageGrid:
        """The layout of a picture that stands for all."""
        side = math.isqrt(self.plan.facts.view_patches) or ANY_SIDE
        if self.plan.family.runs:
            return trace_packing(lambda x, newline: x.flatten(0, 1), 3, side, side, (1, 1), apart=True)
        views, crops = (3, (1, 2)) if self.plan.facts.views else (1, (1, 1))
        # a newline, where there are crops, makes rules about them act
        ends = views > 1
        return trace_packing(
            lambda x, newline: torch.cat((x.flatten(0, 1), newline[None][:ends])), views, side, side, crops
        )

    def check(self) -> None:
        """Refuse what vLLM cannot be given (`serving.rule`); errors of `count` and `check_alone`."""
        grid = self.sample
        self.count(grid)
        self.check_alone(grid)

    def count(self, grid: ImageGrid) -> int:
        """Tokens that stay of a picture, newlines included.

        Raises:
            UnsupportedError: that is not known before the picture was seen, or a method refuses such pictures.
        """
        if grid not in self.counts:
            with refusing(UNKNOWN.format(self.names)):
                self.counts[grid] = self.counted(grid)
        return self.counts[grid]

    def counted(self, grid: ImageGrid) -> int:
        """`count`, by tensors without values, which cost next to nothing; by noise where a method reads some."""
        if self.blind:
            try:
                return self.counted_on(grid, torch.device("meta"))
            except UnsupportedError:
                raise
            except FAILURES:
                self.blind = False
        return self.counted_on(grid, torch.device("cpu"))

    def counted_on(self, grid: ImageGrid, device: torch.device, look: Look = NOISE[0]) -> int:
        """Tokens that a method says it keeps of a picture that looks so."""
        seen, hidden = self.imagined(grid, device, look)
        return self.decide(layout_of([ServedPicture(grid)], device), seen, hidden)[1].alive_counts[0]

    def check_alone(self, grid: ImageGrid) -> None:
        """Refuse methods to which the rest of a prompt matters, for vLLM encodes every picture apart from it.

        Raises:
            UnsupportedError: a picture is cut otherwise beside others, and at another place, than alone; or not as the
                method promised.
        """
        names, device = self.names, torch.device("cpu")
        places = torch.tensor([5, 9 + grid.tokens, 30 + 2 * grid.tokens])
        with refusing(f"{names} could not be tried on noise, as serving does before it takes a method"):
            counts = {self.counted_on(grid, device, look) for look in NOISE}
            one, other = (self.imagined(grid, device, seed=seed) for seed in range(2))
            own = (layout_of([ServedPicture(grid, number)], device) for number in (0, 2))
            alone = [self.decide(layout, *picture) for layout, picture in zip(own, (one, other), strict=True)]
            seen = {tap: torch.cat((one[0][tap], one[0][tap], other[0][tap])) for tap in one[0]}
            layout = layout_of([ServedPicture(grid, number) for number in range(3)], device)
            layout = replace(layout, sample=[0, 0, 0], position=layout.position + places[:, None])
            hidden, left = self.decide(layout, seen, torch.cat((one[1], one[1], other[1])))
        if len(counts.union(left.alive_counts)) > 1:
            raise UnsupportedError(f"{UNKNOWN.format(names)}.")
        for at, (rows, mine) in zip((0, 2), alone, strict=True):
            if not torch.equal(mine.alive[0], left.alive[at]) or not torch.allclose(rows[0], hidden[at], atol=1e-5):
                raise UnsupportedError(
                    f"what {names} keeps of a picture hangs on what else is in its prompt, and vLLM encodes pictures "
                    "apart from their prompts."
                )
        if not self.by_content and not torch.equal(left.alive[0], left.alive[1]):
            raise UnsupportedError(f"{names} draws by the picture's number in its prompt, and has no seed to draw by.")
        if ClusterOf() not in self.plan.tower_taps and left.alive.sum(1).tolist() != left.alive_counts:
            raise UnsupportedError(f"{names} keeps other numbers of tokens than it promises.")

    def imagined(
        self, grid: ImageGrid, device: torch.device, look: Look = NOISE[0], seed: int = 0
    ) -> tuple[dict[Tap, torch.Tensor], torch.Tensor]:
        """What might be seen of a picture, its taps by views and its features: noise, on "meta" without values."""
        generator = None if device.type == "meta" else torch.Generator().manual_seed(seed)
        facts, views, patches = self.plan.facts, grid.views, grid.encoded // grid.views
        tokens = patches + facts.has_cls  # of the tower

        def rand(*shape: int) -> torch.Tensor:
            return look(torch.rand(*shape, device=device, generator=generator))

        layer, hidden = Projected(rand(views, tokens, 3 * DIM), DIM // HEADS, 1.0), rand(views, tokens, DIM)
        seen: dict[Tap, torch.Tensor] = {BlockKeys(layer): rand(views, tokens, DIM) for layer in self.plan.key_layers}
        for tap in self.plan.measured:
            if tap == ClusterOf():
                seen[tap] = torch.arange(patches, device=device).expand(views, -1)
            elif tap.layer >= 0:  # what merges tells the others
                seen[tap] = tap.measure(None if tap.layer >= facts.tower_layers else layer, hidden, facts.has_cls)
        return seen | self.pick(hidden, seen, [grid])[1], rand(1, grid.tokens, DIM)

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
            pick = cut.reduce({tap: seen.get(tap, features) for tap in cut.see}, Views(grids))
            check_pick(whose(self.plan, cut), pick, features, self.plan.facts.has_cls)
            features = picked(features, pick)
            kept[Kept()] = pick.keep
        return features, kept

    def rows(
        self,
        pictures: Sequence[ServedPicture],
        seen: dict[Tap, torch.Tensor],
        features: Sequence[torch.Tensor],
        parts: int = 1,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What enters the language model of every picture.

        Args:
            seen: tower taps of these pictures' views, one after the other, `(views, patches, ...)`.
            features: `(tokens, dim)` of every picture, packed and unpruned.
            parts: of which a row of features is made, side by side: what enters the language model, which is what
                methods see, and what is added behind its layers (DeepStack), which is kept and merged alike.

        Returns:
            of every picture its rows `(count, dim)`, and which of its tokens `(count,)` they stand for.

        Raises:
            RuntimeError: features that are not as the layouts say.
        """
        found, told = [len(rows) for rows in features], [picture.grid.tokens for picture in pictures]
        if found != told:
            raise RuntimeError(f"vLLM made {found} tokens of these pictures, and their layouts say {told}.")
        padded = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        hidden, layout = self.decide(layout_of(pictures, padded.device), seen, padded, parts)
        promised = upload(layout.alive_counts, hidden.device)
        torch._assert_async((layout.alive.sum(1) == promised).all(), "a method kept other numbers than it promised.")
        order = (~layout.alive).to(torch.uint8).sort(dim=1, stable=True).indices
        chosen = zip(hidden, order, layout.alive_counts, strict=True)
        return [(rows.index_select(0, places[:count]), places[:count]) for rows, places, count in chosen]

    def decide(
        self, layout: Layout, seen: dict[Tap, torch.Tensor], hidden: torch.Tensor, parts: int = 1
    ) -> tuple[torch.Tensor, Layout]:
        """Run all cuts on `(pictures, width, dim)`: the same with merges done, and the layout of what is left."""
        for method in self.plan.methods:
            method.check_inputs(layout)
        at = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device).view(hidden.shape[:2])
        values = {tap: layout.from_tower(seen[tap]) for tap in self.plan.tower_taps}
        for name, cut in self.plan.decoder_cuts:
            own = hidden[..., : hidden.shape[-1] // parts]
            reduction = cut.reduce({tap: values.get(tap, own) for tap in cut.see}, layout)
            check_reduction(where := whose(self.plan, cut), reduction, layout.alive, layout.alive_counts)
            if reduction.counts is None:
                raise UnsupportedError(f"{UNKNOWN.format(name)}: take another method, or leave newlines='row' away.")
            if reduction.soft is not None:
                raise UnsupportedError(f"{name} weakens tokens instead of taking them away: there is nothing to serve.")
            keep = reduction.keep & layout.alive
            if reduction.counts != layout.alive_counts and (flow := reduction.merge) is not None:
                check_flow(where, flow, layout.width)
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


def usual(name: str) -> tuple[Family, ModelFacts]:
    """A family, and the facts of a model of it as published ones are; with few patches, to try methods in no time."""
    return FAMILIES[name], FAMILIES[name].usual(view_patches=36)


def refusals(cls: type[Method], **more: Any) -> dict[str, str]:
    """Why vLLM cannot be given a method (with `served_with`, and `more` options), by the family where it cannot."""
    given = {"keep": 0.5} if "keep" in options(cls) else {}
    if set(required(cls)) - set(given) or cls.training != "none":
        return dict.fromkeys(SERVED, f"{cls.name} cannot be asked without more options; it acts at: {cls.stage}")
    found = {}
    for name in SERVED:
        try:
            choice = Choice([cls(**given, **cls.plain_with | cls.served_with | more)], *usual(name))
            choice.check_alone(choice.sample)  # to ask without values too, torch gets ready for a second
        except (UnsupportedError, ValueError) as error:
            found[name] = str(error).removesuffix(".")
    return found
