"""The hooks inside the vision tower: they measure taps, merge tokens, and leave what was seen on its output.

`BeforeTower` puts a frame into the keyword arguments, the host hands these to every layer, `BeforeTowerLayer` takes it
out and measures, `AfterTower` leaves what was seen on the output object, which comes back with the image features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.engine.channels import FRAME, SEEN, SIZES
from vlmprune.engine.placement import check_device, loaded
from vlmprune.engine.plan import Plan
from vlmprune.engine.watch import Watch
from vlmprune.errors import UnsupportedError, check_first_run
from vlmprune.parts.cuts import Cut, Merge, Pick
from vlmprune.parts.layout import ImageGrid, Views
from vlmprune.parts.taps import BlockKeys, ClusterOf, Hidden, Kept, Tap
from vlmprune.patches import Family
from vlmprune.patches.base import Bound
from vlmprune.patches.tagged import untag
from vlmprune.patches.towers import tower_layer

__all__ = [
    "AfterKeys",
    "AfterTower",
    "BeforeTower",
    "BeforeTowerLayer",
    "RememberSizes",
    "check_fixed",
    "encoder",
]


class TowerFrame:
    """One pass through the vision tower: taps, and what cuts inside it have merged.

    Attributes:
        note: where `seen` goes if not on the output; of the pixels (see `Tagged`).
        grids: layouts of the images or videos, where a cut behind the tower wants them.
        seen: measured taps.
        sizes: `(views, tokens)` float, patches that every token stands for; None before the first cut.
        places: for every layer, `(views, original tokens)` long, the token that each original one is part of; None
            where nothing is merged.
    """

    def __init__(self, plan: Plan, note: Any = None, grids: list[ImageGrid] | None = None):
        self.plan, self.has_cls, self.note, self.grids = plan, plan.facts.has_cls, note, grids
        self.seen: dict[Tap, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.sizes: torch.Tensor | None = None
        self.places: list[torch.Tensor | None] = []
        self.weigh = False

    def enter(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, rest: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Do all that is to be done at the input of tower layer `index`; returns its new arguments."""
        check_first_run(index, len(self.places))
        check_device(layer, hidden)
        for tap in self.plan.measured:
            if tap.layer == index:
                with torch.no_grad(), loaded(layer):  # scores choose tokens; nothing is learned through them
                    self.seen[tap] = tap.measure(tower_layer(layer), hidden.detach(), self.has_cls)
        place = self.places[-1] if self.places else None
        for cut in self.plan.tower_cuts:
            if cut.at.layer == index:
                hidden, place = self.merge(cut, hidden, place)
        self.places.append(place)
        if self.weigh:
            bias = self.sizes.log().to(hidden.dtype)[:, None, None]
            rest, kwargs = rest[1:], kwargs | {"attention_mask": bias}
        return (hidden, *rest), kwargs

    def merge(self, cut: Cut, hidden: torch.Tensor, place: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace `(views, tokens, dim)` by its clusters' size-weighted means."""
        views, tokens, _ = hidden.shape
        if self.sizes is None:
            self.sizes = torch.ones(
                views, tokens, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
            )
            place = torch.arange(tokens, device=hidden.device).expand(views, -1)
        with torch.no_grad():
            seen = {tap: self.keys.pop(tap.layer) if isinstance(tap, BlockKeys) else hidden for tap in cut.see}
            clusters = cut.reduce(seen, self.sizes)
        into = clusters.into
        sizes = self.sizes.new_zeros(views, clusters.count).scatter_add(1, into, self.sizes)
        share = (self.sizes / sizes.gather(1, into))[..., None]
        parts = hidden.to(share.dtype) * share
        merged = parts.new_zeros(views, clusters.count, hidden.shape[-1])
        merged = merged.scatter_add(1, into[..., None].expand_as(parts), parts).to(hidden.dtype)
        self.sizes, self.weigh = sizes, cut.weigh
        return merged, into.gather(1, place)

    def pick(self, cut: Cut, output: Any) -> None:
        """Run a cut between tower and projector: exchange what its anchors stand for in the feature layers."""
        features = output.hidden_states[self.plan.facts.feature_layer + 1].detach()
        seen = dict(self.seen)
        for tap in cut.see:
            if isinstance(tap, BlockKeys):
                seen[tap] = self.keys.pop(tap.layer)
            elif isinstance(tap, Hidden):
                seen[tap] = features
        with torch.no_grad():
            pick: Pick = cut.reduce({tap: seen[tap] for tap in cut.see}, Views(self.grids))
        if pick.merge is not None:  # hosts hand out the layers that become features and no others
            states = [None if h is None else flow(h, pick.merge) for h in output.hidden_states]
            output.hidden_states = tuple(states)
        self.seen[Kept()] = pick.keep

    def finish(self, output: Any) -> None:
        """Give every original position its cluster's token, and leave what was seen on the output."""
        if self.plan.tower_cuts:
            made_by = [self.places[0], *self.places]  # entry i of hidden_states is the output of layer i - 1
            states = zip(output.hidden_states, made_by, strict=True)
            output.hidden_states = tuple(h if h is None else spread(h, place) for h, place in states)
            output.last_hidden_state = spread(output.last_hidden_state, self.places[-1])
        for cut in self.plan.projector_cuts:
            self.pick(cut, output)
        for tap in self.plan.tower_taps:
            if tap.layer == self.plan.facts.tower_layers:  # behind the last layer: what becomes the features
                with torch.no_grad():
                    self.seen[tap] = tap.measure(None, output.hidden_states[-1].detach(), self.has_cls)
        if ClusterOf() in self.plan.tower_taps:
            place = self.places[self.plan.facts.feature_layer]
            if place is None:
                views, tokens, _ = output.last_hidden_state.shape
                place = torch.arange(tokens, device=output.last_hidden_state.device).expand(views, -1)
            self.seen[ClusterOf()] = place[:, int(self.has_cls) :]
        # a host that hands on bare tensors takes the note instead of the output
        setattr(output if self.note is None else self.note, SEEN, self.seen)


def spread(hidden: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """`(views, clusters, dim)` back to `(views, original tokens, dim)`."""
    return hidden if place is None else hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))


def flow(hidden: torch.Tensor, merge: Merge) -> torch.Tensor:
    """`(views, tokens, dim)` with every anchor that `merge` names replaced by the weighted sum of its sources."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    source = (
        hidden if merge.source is None else hidden.gather(1, merge.source[..., None].expand(-1, -1, hidden.shape[-1]))
    )
    parts = source.to(wide) * merge.weight[..., None].to(wide)
    summed = parts.new_zeros(hidden.shape).scatter_add(1, merge.into[..., None].expand_as(parts), parts)
    named = merge.weight.new_zeros(hidden.shape[:2]).scatter_add(1, merge.into, (merge.weight != 0).to(merge.weight))
    return torch.where(named[..., None] > 0, summed.to(hidden.dtype), hidden)


@dataclass
class BeforeTower:
    """Pre-hook of the tower: starts a frame."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.plan.enabled:
            return None
        grids = kwargs.pop(FRAME, None)
        pixels, *rest = args if args else (kwargs.pop("pixel_values"),)
        pixels, note = untag(pixels)
        grids = grids if note is None else note.grids
        for cut in self.plan.pixel_cuts:
            pixels = cut.reduce(pixels)
        return (pixels, *rest), kwargs | {FRAME: TowerFrame(self.plan, note, grids)}


@dataclass
class BeforeTowerLayer:
    """Pre-hook of a tower layer: takes the frame out and lets it measure and merge."""

    index: int
    watching: Watch | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.watching is not None:
            self.watching.end()
        if FRAME not in kwargs:
            return None
        if self.watching is not None and not any(
            isinstance(hook, AfterKeys) for hook in tower_layer(module).key_projection._forward_hooks.values()
        ):
            raise UnsupportedError(
                f"the key projection of tower layer {self.index} was replaced after patching (an adapter came "
                "or went), and merging in the tower reads the keys there: patch the model again."
            )
        frame = kwargs.pop(FRAME)
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        args, kwargs = frame.enter(self.index, module, hidden, tuple(rest), kwargs)
        if self.watching is not None:
            self.watching.begin(frame)
        return args, kwargs


@dataclass
class AfterKeys:
    """Hook of a tower layer's key projection: keeps the head-mean keys for a cut behind this layer."""

    index: int
    watching: Watch
    heads: int

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if (frame := self.watching.frame(last=True)) is not None:
            frame.keys[self.index] = output.detach().unflatten(-1, (self.heads, -1)).mean(-2)


@dataclass
class AfterTower:
    """Hook of the tower: leaves what was seen on its output."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (frame := kwargs.get(FRAME)) is not None:
            frame.finish(output)


class RememberSizes(Bound):
    """Stands before `get_image_features` or `get_video_features` on one instance: notes the sizes of what it encodes.

    `generate` throws them away. A bound attribute of the instance and not a hook, because no module is called with
    them.
    """

    def __init__(self, module: nn.Module, plan: Plan, modality: str):
        self.module, self.plan, self.family, self.modality = module, plan, plan.family, modality
        self.__signature__ = inspect.signature(self.encode().__get__(module))

    def encode(self) -> Callable[..., Any]:
        """The method of the model's class; torch.compile would look a bound one up on the instance, where this is."""
        return getattr(type(self.module), encoder(self.modality))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        # the host only computes with these on the host: one read here spares it one per image
        for name in ("image_sizes", "batch_num_images"):
            if given.get(name) is not None:
                given[name] = torch.as_tensor(given[name]).cpu()
        check_fixed(self.family, self.module.config, given)
        noted = self.family.needs_sizes or self.modality == "video"
        sizes = self.family.sizes(self.modality, given) if noted else [None] * len(given["pixel_values"])
        if self.plan.projector_cuts and self.plan.enabled:
            given[FRAME] = [self.plan.grid(self.module, self.modality, size) for size in sizes]
        output = self.encode()(self.module, **given)
        if noted and not isinstance(output, tuple):
            setattr(output, SIZES, sizes)
        return output


def encoder(modality: str) -> str:
    """Name of a model's method that encodes images or videos."""
    return f"get_{modality}_features"


def check_fixed(family: Family, config: Any, given: dict[str, Any]) -> None:
    """Refuse arguments of a call that contradict the config, by which layouts and taps are traced."""
    for name in family.fixed:
        if given.get(name) is not None and given[name] != getattr(config, name, given[name]):
            raise UnsupportedError(f"{name}={given[name]!r} per call is not supported: set it in the model's config.")
