"""The hooks inside the vision tower: they measure taps, merge tokens, and leave what was seen on its output.

`BeforeTower` puts a frame into the keyword arguments, the host hands these to every layer, `BeforeTowerLayer` takes it
out and measures, `AfterTower` leaves what was seen on the output object, which comes back with the image features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.engine.channels import FRAME, INSIDE, OWNER, SEEN, Seen
from vlmprune.engine.decided import check_clusters, check_pick, check_pixels, check_stay, whose
from vlmprune.engine.finite import demand
from vlmprune.engine.placement import check_device, loaded
from vlmprune.engine.plan import Hook, Plan, handed
from vlmprune.engine.sequence import visible
from vlmprune.engine.thin import Thin
from vlmprune.engine.watch import Watch, Watched
from vlmprune.errors import CutNotRunError, UnsupportedError, check_first_run
from vlmprune.parts.cuts import Pick, ProjectorCut, Stay, TowerCut, Vision
from vlmprune.parts.layers import Projections
from vlmprune.parts.layout import Views, download
from vlmprune.parts.merging import picked
from vlmprune.parts.taps import BlockFlow, BlockKeys, Carried, ClusterOf, Hidden, Kept, Pixels, Tap, TowerTap
from vlmprune.patches.tagged import untag
from vlmprune.patches.towers import tower_layer

__all__ = [
    "AfterProjection",
    "AfterTower",
    "AfterTowerAttention",
    "BeforeTower",
    "BeforeTowerAttention",
    "BeforeTowerLayer",
]


class TowerFrame:
    """One pass through the vision tower: taps, and what cuts inside it have merged.

    Attributes:
        note: where `seen` goes if not on the output; of the pixels (see `Tagged`).
        tower: whose pass it is.
        call: what it is told of the call it is in.
        seen: measured taps.
        keys: by layer, head-mean keys for a cut behind it.
        flows: by layer, all that its projections make, for a cut behind it.
        sizes: `(views, tokens)` float, patches that every token stands for, 0 behind the last one of a view of which
            fewer are left; None before the first cut.
        carried: scores that the last cut left, or None.
        thin: what is left of the patches of a packed tower, None where all are.
        place: `(views, original tokens)` long, the token that each original one is part of, -1 of those that were
            dropped; None before the first cut.
        places: the same at the input of every layer, after the cuts there.
        inputs: by layer, what it reads after the cuts there, where the host may note something else as its input.
        inside: the last layer's cut between its two blocks, if it had one.
    """

    def __init__(self, plan: Plan, tower: nn.Module, call: Any, note: Any = None):
        self.plan, self.has_cls, self.tower, self.call, self.note = plan, plan.facts.has_cls, tower, call, note
        self.seen: dict[Tap, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.flows: dict[int, Projections] = {}
        self.sizes: torch.Tensor | None = None
        self.carried: torch.Tensor | None = None
        self.place: torch.Tensor | None = None
        self.places: list[torch.Tensor | None] = []
        self.inputs: dict[int, torch.Tensor] = {}
        self.inside: Inside | None = None
        self.weigh = False
        self.thin: Thin | None = None

    def enter(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, rest: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Do all that is to be done at the input of tower layer `index`; returns its new arguments."""
        check_first_run(index, len(self.places))
        self.check_inside()
        check_device(layer, hidden)
        if self.thin is not None:
            hidden, kwargs = self.thin.enter(index, hidden, kwargs)
        for tap in self.plan.measured:
            if tap.layer == index:
                self.check_sight(rest, kwargs)
                with torch.no_grad(), loaded(layer):  # scores choose tokens; nothing is learned through them
                    self.seen[tap] = self.measure(tap, layer, hidden.detach(), kwargs)
        hidden = self.merge(Vision(index), hidden)
        self.places.append(self.place)
        if self.weigh:
            check_weighing(layer)
            bias = self.sizes.log().to(hidden.dtype)[:, None, None]
            rest, kwargs = rest[1:], kwargs | {"attention_mask": bias}
        for cut in self.plan.tower_cuts:
            if cut.at == Vision(index, inside=True):
                self.inputs[index], self.inside = hidden, Inside(self, cut, layer, rest, kwargs)
                return self.inside.hand_over(hidden)
        return (hidden, *rest), kwargs

    def measure(self, tap: TowerTap, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """A tap by token, `(views, tokens, ...)`, of a tower layer's input; `(tokens, 1, ...)` of a packed one."""
        sizes, family, facts = self.call.sizes, self.plan.family, self.plan.facts
        found = [tap.measure(*view, self.has_cls) for view in family.tower_views(layer, hidden, kwargs, sizes)]
        if not facts.packed:
            return self.of_tokens(tap, found[0])
        values = torch.cat([each.flatten(0, 1) for each in found])[None]
        return family.tokens_of(self.tower, values, sizes, facts.unit).transpose(0, 1)

    def of_tokens(self, tap: TowerTap, values: torch.Tensor) -> torch.Tensor:
        """Values of patches, `(views, patches, ...)`, by token, `(views, tokens, ...)`."""
        facts = self.plan.facts
        found = self.plan.family.tokens_of(self.tower, values, self.call.sizes, facts.unit)
        if facts.unit > 1 and found.shape[1] != facts.view_patches:
            raise UnsupportedError(
                f"{tap} sees {values.shape[1]} patches of a view of the tower, which do not make {facts.view_patches} "
                "tokens."
            )
        return found

    def check_sight(self, rest: tuple, kwargs: dict) -> None:
        """Refuse to look at views that are padded inside: a tap would take padding for patches."""
        mask = rest[0] if rest else kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and not self.plan.facts.packed:
            demand(
                visible(mask).all(),
                "a method of this patch looks at the vision tower, and a picture fills a part of its view alone "
                "(pixel_attention_mask has zeros): give pictures that fill it, or take a method that does not look "
                "at the tower.",
            )

    def check_inside(self) -> None:
        """Raise if the cut inside the layer that ran last has not run: that layer then saw nothing but zeros."""
        if self.inside is not None and self.inside.decided is None:
            raise CutNotRunError(
                f"the cut inside tower layer {len(self.places) - 1} did not run: what it was to merge did not reach "
                "that layer's attention."
            )

    def merge(self, at: Vision, hidden: torch.Tensor) -> torch.Tensor:
        """Do the cuts of one place on `(views, tokens, dim)`."""
        for cut in self.plan.tower_cuts:
            if cut.at == at:
                hidden = self.inputs[at.layer] = means(hidden, *self.decide(cut, hidden))
        return hidden

    def decide(self, cut: TowerCut, hidden: torch.Tensor) -> Decided:
        """What a cut merges or drops of `(views, tokens, dim)`: the arguments of `means`."""
        views, tokens, _ = hidden.shape
        with torch.no_grad():
            if self.sizes is None:
                kind = torch.promote_types(hidden.dtype, torch.float32)
                self.sizes = torch.ones(views, tokens, dtype=kind, device=hidden.device)
                self.place = torch.arange(tokens, device=hidden.device).expand(views, -1)
            clusters = cut.reduce({tap: self.look(tap, hidden) for tap in cut.see}, self.sizes)
            if isinstance(clusters, Stay):
                return self.drop(cut, clusters)
            check_clusters(whose(self.plan, cut), clusters, self.sizes)
            into = clusters.into
            sizes = self.sizes.new_zeros(views, clusters.count).scatter_add(1, into, self.sizes)
            share = self.sizes / sizes.gather(1, into)
            self.sizes, self.weigh, self.place = sizes, cut.weigh, followed(self.place, into)
        return into, share, clusters.count

    def drop(self, cut: TowerCut, stay: Stay) -> Decided:
        """Follow a cut that drops tokens; views with fewer left than others end in zeros, which nothing looks at."""
        check_stay(whose(self.plan, cut), stay, self.sizes)
        self.carried = stay.scores
        if stay.keep is None:
            return None, None, self.sizes.shape[1]
        keep = stay.keep & (self.sizes > 0)
        counts = download(keep.sum(1)) if stay.count is None else [stay.count]
        into = (keep.cumsum(1) - 1).clamp(min=0)
        share, empty = keep.to(self.sizes), self.sizes.new_zeros(len(keep), max(counts))
        if stay.scores is not None:
            scores = stay.scores.masked_fill(~keep, 0)
            self.carried = empty.to(scores.dtype).scatter_add(1, into, scores)
        self.place = followed(self.place, into.masked_fill(~keep, -1))
        self.sizes = empty.scatter_add(1, into, self.sizes * share)
        self.weigh = cut.weigh or min(counts) < max(counts)
        return into, share, max(counts)

    def pick(self, cut: ProjectorCut, output: Any) -> None:
        """Run a cut between tower and projector: exchange what its anchors stand for in the feature layers."""
        features = self.states(output)[self.plan.facts.feature_layer + 1].detach()
        with torch.no_grad():
            pick: Pick = cut.reduce({tap: self.look(tap, features) for tap in cut.see}, Views(self.call.grids))
            check_pick(whose(self.plan, cut), pick, features, self.has_cls)
        # hosts hand out the layers that become features and no others
        output.hidden_states = tuple(h if h is None else picked(h, pick) for h in output.hidden_states)
        self.seen[Kept()] = pick.keep

    def look(self, tap: Tap, hidden: torch.Tensor) -> torch.Tensor:
        """What a cut sees that works on `(views, tokens, dim)`; keys are read once, for a cut merges their tokens."""
        if isinstance(tap, BlockKeys):
            return self.keys.pop(tap.layer)
        if isinstance(tap, BlockFlow):
            return tap.of(self.flows.pop(tap.layer), self.sizes > 0, self.has_cls)
        if isinstance(tap, Carried):
            if self.carried is None:
                raise UnsupportedError("no cut in the tower in front of this one left scores that Carried() could see.")
            return self.carried
        return hidden if isinstance(tap, Hidden) else self.seen[tap]

    def finish(self, output: Any) -> None:
        """Do all that is to be done behind the last layer, and leave what was seen on the output."""
        self.check_inside()
        if self.thin is not None:
            output.last_hidden_state = self.thin.whole(output.last_hidden_state)
            self.seen[Kept()] = self.thin.keep[:, None]
        if self.plan.tower_cuts:
            self.unmerge(output)
        for cut in self.plan.projector_cuts:
            self.pick(cut, output)
        self.look_behind(output)
        # a host that hands on bare tensors takes the note instead of the output
        noted = output if self.note is None else self.note
        setattr(noted, SEEN, Seen(self.plan, self.seen))

    def states(self, output: Any) -> tuple[torch.Tensor | None, ...]:
        """What the tower hands out of its layers; the host asks for it where features are taken from among them."""
        if output.hidden_states is None:
            raise UnsupportedError(
                f"{type(self.tower).__name__} hands out no hidden states of its layers, from which the features of a "
                f"{self.plan.family.model_type} model would be taken: if they leave the tower through the norm behind "
                "its last layer, its family (patches/) has to say closed = True."
            )
        return output.hidden_states

    def unmerge(self, output: Any) -> None:
        """Give every original position its cluster's token in all that the tower hands out."""
        output.last_hidden_state = spread(output.last_hidden_state, self.place)
        # entry i of hidden_states is the input of layer i, the last one what leaves the tower's layers; a cut at
        # either comes too late for the host, which noted what it got
        last = len(self.places)
        if any(cut.at == Vision(last) for cut in self.plan.tower_cuts):
            self.merge(Vision(last), self.states(output)[-1])
        self.places.append(self.place)
        inputs = [h if h is None else self.inputs.get(i, h) for i, h in enumerate(self.states(output))]
        output.hidden_states = tuple(spread(h, place) for h, place in zip(inputs, self.places, strict=True))

    def look_behind(self, output: Any) -> None:
        """Measure what can be seen behind the last layer alone."""
        for tap in self.plan.tower_taps:
            if tap.layer == self.plan.facts.tower_layers:  # what becomes the features
                behind = output.last_hidden_state if self.plan.facts.closed else self.states(output)[-1]
                with torch.no_grad():
                    self.seen[tap] = self.of_tokens(tap, tap.measure(None, behind.detach(), self.has_cls))
        if Kept() in self.plan.tower_taps and self.plan.tower_cuts:
            self.seen[Kept()] = self.cluster_of(output.last_hidden_state)[:, int(self.has_cls) :] >= 0
        if ClusterOf() in self.plan.tower_taps:
            self.seen[ClusterOf()] = self.cluster_of(output.last_hidden_state)[:, int(self.has_cls) :]

    def cluster_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(views, original tokens)` long, the token of the feature layer that each original one is part of, or -1."""
        place = self.places[self.plan.facts.feature_layer + 1] if self.plan.tower_cuts else None
        return torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1) if place is None else place


def check_weighing(layer: nn.Module) -> None:
    """Refuse attention that takes no weights."""
    used = tower_layer(layer).attention.config._attn_implementation
    if used.startswith("flash"):
        raise UnsupportedError(
            f"a method of this patch weighs the vision tower's attention, or leaves more tokens of some views than of "
            f"others, and {used!r} takes no weights: load the model with attn_implementation='sdpa'."
        )


#: What a cut does to `(views, tokens, dim)`: the arguments of `means`.
Decided = tuple[torch.Tensor | None, torch.Tensor | None, int]


def means(hidden: torch.Tensor, into: torch.Tensor | None, share: torch.Tensor | None, count: int) -> torch.Tensor:
    """Weighted means of `(views, tokens, dim)`: `(views, count, dim)`.

    Args:
        into: `(views, tokens)` long, the cluster of every token; None leaves all as it is.
        share: `(views, tokens)` float, its weight there.
    """
    if into is None:
        return hidden
    parts = hidden.to(share.dtype) * share[..., None]
    merged = parts.new_zeros(len(parts), count, hidden.shape[-1])
    return merged.scatter_add(1, wide(into, hidden), parts).to(hidden.dtype)


class Inside:
    """A cut between the attention and the feed-forward block of a tower layer, in one call of that layer.

    The layer keeps its input to add the attention's output to it, so it gets one row of zeros as its input: its
    attention is handed the real one, and writes what is left of the sum. To zeros that is added exactly.

    Where the layer runs again for its gradients, the decision of the first run stands.
    """

    def __init__(self, frame: TowerFrame, cut: TowerCut, layer: nn.Module, rest: tuple, kwargs: dict):
        self.frame, self.cut, self.norm = frame, cut, tower_layer(layer).normed
        self.kwargs = dict(kwargs)
        self.mask = rest[0] if rest else self.kwargs.pop("attention_mask", None)
        self.decided: Decided | None = None

    def hand_over(self, hidden: torch.Tensor) -> tuple[tuple, dict]:
        """The layer's arguments for its real input `(views, tokens, dim)`.

        That travels in the attention mask's place: re-entrant checkpointing sees positional tensors alone.
        """
        return (hidden.new_zeros(len(hidden), 1, hidden.shape[-1]), hidden), self.kwargs | {INSIDE: self}

    def merge(self, hidden: torch.Tensor) -> torch.Tensor:
        """Merge what the attention and the layer's input add up to, `(views, tokens, dim)`."""
        if self.decided is None:
            self.decided = self.frame.decide(self.cut, hidden)
        return means(hidden, *self.decided)


def spread(hidden: torch.Tensor | None, place: torch.Tensor | None) -> torch.Tensor | None:
    """`(views, clusters, dim)`, or None, back to `(views, original tokens, dim)`, with zeros for what was dropped."""
    if hidden is None or place is None:
        return hidden
    return hidden.gather(1, wide(place.clamp(min=0), hidden)).masked_fill((place < 0)[..., None], 0)


def followed(place: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """`(views, original tokens)` where each goes whose `place` goes `into` another; -1 is nowhere."""
    return into.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)


def wide(index: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`(views, entries)` numbers of tokens as an index into the rows of `(views, tokens, dim)`."""
    return index[..., None].expand(-1, -1, hidden.shape[-1])


@dataclass
class BeforeTower(Watched):
    """Pre-hook of the tower: starts a frame in the calls of its own model, which says so."""

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        pixels, rest, kwargs = handed(args, kwargs, "pixel_values")
        pixels, note = untag(pixels)
        call = kwargs.get(OWNER) if note is None else note
        if not self.owns(call):
            return None
        kwargs.pop(OWNER, None)
        for cut in self.plan.pixel_cuts:
            changed = cut.reduce(pixels)
            check_pixels(whose(self.plan, cut), changed, pixels)
            pixels = changed
        frame = TowerFrame(self.plan, module, call, note)
        for cut in self.plan.patch_cuts:
            frame.thin = Thin(self.plan, cut, module, pixels, call.sizes)
        if Pixels() in self.plan.measured:
            frame.seen[Pixels()] = Pixels.of(pixels.detach(), self.plan.facts.view_patches)
        self.show(frame)
        return (pixels, *rest), kwargs | {FRAME: frame}


@dataclass
class BeforeTowerLayer(Watched):
    """Pre-hook of a tower layer: takes the frame out and lets it measure and merge.

    `through` has the frame of a tower that hands its layers none of its keyword arguments.
    """

    index: int
    through: Watch | None
    names: tuple[str, ...] = ()

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        frame = kwargs.get(FRAME) if self.through is None else self.through.frame(last=False)
        if not self.owns(frame):
            return None
        kwargs.pop(FRAME, None)
        changed = frame.enter(self.index, module, *handed(args, kwargs))
        if self.names:
            kind = tower_layer(module)
            frame.flows[self.index] = Projections(kind.scale)
            for name in self.names:
                self.check_projection(name, getattr(kind, f"{name}_projection"))
        self.show(frame)
        return changed

    def check_projection(self, name: str, projection: nn.Module) -> None:
        """Refuse a layer whose keys, queries or values would not be seen."""
        if not any(
            isinstance(hook, AfterProjection) and self.owns(hook) for hook in projection._forward_hooks.values()
        ):
            raise UnsupportedError(
                f"the {name} projection of tower layer {self.index} was replaced after patching (an adapter came "
                "or went), and a cut in or behind the tower reads what it makes: patch the model again."
            )


@dataclass
class BeforeTowerAttention(Watched):
    """Pre-hook of a tower layer's attention with a cut behind it: gives it the layer's real input (see `Inside`)."""

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        inside = kwargs.get(INSIDE)
        if inside is None or not self.owns(inside.frame):
            return None
        hidden = kwargs["attention_mask"]
        self.show((inside, hidden))
        changed = {"hidden_states": inside.norm(hidden), "attention_mask": inside.mask}
        return (), {name: value for name, value in kwargs.items() if name != INSIDE} | changed


@dataclass
class AfterTowerAttention(Hook):
    """Hook of a tower layer's attention with a cut behind it: merges (see `Inside`)."""

    watching: Watch

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if (watched := self.watching.frame(last=True)) is None:
            return None
        inside, hidden = watched
        return inside.merge(hidden + output[0]), *output[1:]


@dataclass
class AfterProjection(Hook):
    """Hook of a tower layer's projection to queries, keys or values: keeps them for a cut behind this layer."""

    index: int
    watching: Watch
    name: str
    heads: int

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if (frame := self.watching.frame(last=True)) is not None:
            made = output.detach().unflatten(-1, (self.heads, -1))
            if self.name == "key" and self.index in self.plan.key_layers:
                frame.keys[self.index] = made.mean(-2)
            if self.index in self.plan.flow_layers:
                setattr(frame.flows[self.index], self.name, made.transpose(1, 2))


@dataclass
class AfterTower(Hook):
    """Hook of the tower: leaves what was seen on its output."""

    through: Watch | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.through is not None:
            self.through.end()
        if self.owns(frame := kwargs.get(FRAME)):
            frame.finish(output)
