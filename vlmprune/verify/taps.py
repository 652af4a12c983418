"""Taps against what the host's own eager attention computes: each that a method asks for, on one short prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vlmprune.api import patch
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.parts.cuts import AnyCut, Cut, Decoder, Pick, ProjectorCut, Reduction
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout, Views
from vlmprune.parts.taps import (
    BlockKeys,
    ClsLogits,
    CrossShare,
    DecoderTap,
    Hidden,
    ReceivedAttention,
    Seen,
    Tap,
    TextAttention,
    TowerTap,
    VisionAttention,
)
from vlmprune.patches import Family
from vlmprune.patches.language_models import decoder_layer
from vlmprune.patches.towers import tower_layer
from vlmprune.verify.checks import raised, severest
from vlmprune.verify.evidence import attempt
from vlmprune.verify.prompts import make_prompt, side_of
from vlmprune.verify.verdict import Line, Noise, judge, worst

__all__ = ["taps_line"]

NOTHING = "this method asks to see nothing that eager attention has"
ATTENTION = (VisionAttention, ClsLogits, BlockKeys, TextAttention, ReceivedAttention, CrossShare)
MISTAKE = 1.5  # the factor by which the deliberate mistake scales attention wrong

Site = tuple[type[Tap], int]  # a layer of the tower or of the language model


@dataclass(frozen=True)
class Asked:
    """What some cuts ask to see: what eager attention tells, the layers at whose input they see hidden states, and the
    names of all that is compared with nothing.
    """

    taps: tuple[Tap, ...]
    hidden: tuple[int, ...]
    others: tuple[str, ...]

    @property
    def by_place(self) -> tuple[tuple[BlockKeys, ...], tuple[Tap, ...]]:
        """The taps that are seen behind the tower, and the others."""
        keys = tuple(tap for tap in self.taps if isinstance(tap, BlockKeys))
        return keys, tuple(tap for tap in self.taps if tap not in keys)

    @classmethod
    def of(cls, cuts: Sequence[AnyCut]) -> Asked:
        made: dict[str, dict[Any, None]] = {"taps": {}, "hidden": {}, "others": {}}
        for at, tap in dict.fromkeys((cut.at, tap) for cut in cuts for tap in cut.see):
            if isinstance(tap, ATTENTION):
                made["taps"][tap] = None
            elif tap == Hidden() and isinstance(at, Decoder):
                made["hidden"][at.layer] = None
            else:
                made["others"][type(tap).__name__] = None
        return cls(**{name: tuple(found) for name, found in made.items()})


class Look(Method):
    """Sees what a method would, and leaves everything where it is."""

    def __init__(self, asked: Asked):
        self.asked, self.seen, self.layout = asked, {}, None

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        keys, rest = self.asked.by_place
        last = max((tap.layer for tap in rest if isinstance(tap, DecoderTap)), default=0)
        if facts.recurrent and last:  # nothing is cut in front of the first layer with attention
            last = max(last, facts.attending[0] + 1)
        made: list[AnyCut] = [ProjectorCut(keys, self.pick)] if keys else []
        made += [Cut(Decoder(layer), (Hidden(),), partial(self.look, layer)) for layer in self.asked.hidden]
        return [*made, Cut(Decoder(last), rest, partial(self.look, last))]

    def pick(self, seen: Seen, views: Views) -> Pick:
        self.seen |= seen
        return Pick(views.present.to(next(iter(seen.values())).device))

    def look(self, layer: int, seen: Seen, layout: Layout) -> Reduction:
        self.layout = layout
        self.seen |= {layer if tap == Hidden() else tap: value for tap, value in seen.items()}
        return Reduction(layout.alive.clone(), list(layout.alive_counts))


@dataclass(frozen=True)
class Attended:
    """What an attention block of the host computed, head means in float64.

    Attributes:
        weights, scores: `(batch, rows, columns)` after the softmax and before it.
        keys: `(batch, tokens, head dim)`.
    """

    weights: torch.Tensor
    scores: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class Block:
    """An attention block: as it is, with its input's last bits changed, and with a mistake."""

    right: Attended
    nudged: Attended
    mistaken: Attended


class AttentionWatch(TorchFunctionMode):
    """Notes what eager attention hands to its softmax, and the keys that it multiplies queries by."""

    scores: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.softmax:
            self.scores = args[0]
            self.weights = func(*args, **(kwargs or {}))
            return self.weights
        if func in (torch.matmul, torch.Tensor.matmul) and self.keys is None and args[1].ndim == 4:
            self.keys = args[1].transpose(-1, -2)
        return func(*args, **(kwargs or {}))


def rerun(attention: nn.Module, args: tuple, kwargs: dict, nudge: bool) -> tuple[torch.Tensor, ...]:
    """Weights, scores and keys of an attention block as its own forward makes them.

    Raises:
        UnsupportedError: eager attention of another build.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    if nudge:
        hidden = nudged(hidden)
    given = ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
    with AttentionWatch() as watch:
        out = attention.forward(*given[0], **given[1])  # not called: hooks are for the model's own calls
    weights = out[1] if isinstance(out, tuple) and len(out) > 1 else watch.weights  # towers that throw them away
    if weights is None or watch.scores is None or watch.keys is None:
        raise UnsupportedError(f"{type(attention).__name__} hands back no weights of eager attention")
    return weights, watch.scores, watch.keys


def nudged(hidden: torch.Tensor) -> torch.Tensor:
    """The same numbers, each off by about one unit in its last place (in float32's at least: so hosts take softmax)."""
    eps = max(torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps)
    sign = torch.randint(2, hidden.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) * (1 + eps * sign.to(hidden.device, wide))).to(hidden.dtype)


def attended(weights: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor) -> Attended:
    """The head means."""
    return Attended(*(x.mean(1, dtype=torch.float64) for x in (weights, scores, keys)))


def block_of(attention: nn.Module, args: tuple, kwargs: dict) -> Block:
    """An attention block on what it was just called with."""
    weights, scores, keys = rerun(attention, args, kwargs, False)
    wrong = scores.float() * MISTAKE
    mistaken = attended(wrong.softmax(-1), wrong, keys.roll(1, -2))
    return Block(attended(weights, scores, keys), attended(*rerun(attention, args, kwargs, True)), mistaken)


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Eager attention in every part of a model; afterwards each has its own again.

    Raises:
        UnsupportedError: the model's class refuses.
    """
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        try:
            model.set_attn_implementation("eager")
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise UnsupportedError(f"{type(model).__name__} cannot run eager attention ({error})") from error
        yield
    finally:
        for config, own in before:  # setting that of a config sets those of its parts, which come later
            config._attn_implementation = own


@dataclass
class Host:
    """What the host, unpatched, computes on the prompt: its attention by layer, its hidden states by decoder layer."""

    blocks: dict[Site, Block]
    hidden: dict[int, torch.Tensor]
    rotary: tuple[torch.Tensor, ...] = ()  # what a packed tower turned its patches by


def host_of(family: Family, model: nn.Module, inputs: dict[str, Any], asked: Asked) -> Host:
    """Run the unpatched model with eager attention and keep what was asked for.

    Raises:
        UnsupportedError: an attention block that eager attention did not reach.
    """
    inner, found = family.inner(model), Host({}, {})
    decoder = family.decoder_layers(inner)

    def note(site: Site, attention: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        found.blocks[site] = block_of(attention, args, kwargs)
        if family.packed and site[0] is TowerTap:
            found.rotary = kwargs["position_embeddings"]

    def states(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.hidden[layer] = args[0] if args else kwargs["hidden_states"]

    with ExitStack() as stack:

        def watch(site: Site, attention: nn.Module) -> None:
            if (used := attention.config._attn_implementation) != "eager":
                raise UnsupportedError(f"{type(attention).__name__} cannot run eager attention and stays with {used!r}")
            hook = attention.register_forward_hook(partial(note, site), with_kwargs=True)
            stack.callback(hook.remove)

        for kind, layer in dict.fromkeys(map(site_of, asked.taps)):
            if kind is DecoderTap:
                watch((kind, layer), decoder_layer(decoder[layer]).attention)
                continue
            for tower in family.towers(inner):
                watch((kind, layer), tower_layer(family.tower_layers(tower)[layer]).attention)
        for layer in asked.hidden:
            stack.callback(decoder[layer].register_forward_pre_hook(partial(states, layer), with_kwargs=True).remove)
        model(**inputs, use_cache=False)
    return found


def site_of(tap: Tap) -> Site:
    """The layer that a tap looks at."""
    return (TowerTap if isinstance(tap, TowerTap) else DecoderTap), tap.layer


@dataclass(frozen=True)
class Places:
    """Where the picture's tokens are.

    Attributes:
        visual: `(length,)` bool of the prompt, newlines included.
        patches: prompt columns of its patches.
        tokens: numbers of the patches among the picture's tokens.
        numbers: of the patches among all that the tower made, `view * patches of a view + patch`.
        first: tokens in front of a view's patches.
        home: `(tokens, patches of one)` numbers of the tower's patches by token, where a token is made of several.
    """

    visual: torch.Tensor
    patches: torch.Tensor
    tokens: torch.Tensor
    numbers: torch.Tensor
    first: int
    home: torch.Tensor | None = None

    @classmethod
    def of(cls, visual: torch.Tensor, layout: Layout, has_cls: bool, home: torch.Tensor | None = None) -> Places:
        grid, device = layout.grids[0], visual.device
        tokens = (~grid.newline).nonzero().flatten().to(device)
        numbers = grid.source[~grid.newline].to(device)
        return cls(visual, visual.nonzero().flatten()[tokens], tokens, numbers, int(has_cls), home)


def wanted(tap: Tap, host: Attended, at: Places) -> torch.Tensor:
    """What a tap should have measured, in rows that are compared one by one."""
    if isinstance(tap, BlockKeys):
        return host.keys
    if isinstance(tap, TowerTap):
        patches = of_tower(tap, host, at)
        tokens = patches if at.home is None else patches[:, at.home].mean(-1)
        return tokens.flatten()[at.numbers][None]
    weights, here = host.weights[0], at.patches
    after = weights[int(at.visual.nonzero().max()) + 1 :]
    match tap:
        case TextAttention():
            rows = {"last": weights[-1:], "instruction": after, "all": weights}[tap.rows]
            return rows.mean(0)[here][None]
        case ReceivedAttention():
            own = mean_score(host.scores[0][here][:, here]) if tap.logits else weights[here].mean(0)[here]
            return torch.stack((own, after.mean(0)[here]))
    return shares(tap, weights, at.visual)[None]


def home_of(family: Family, inner: nn.Module, rotary: tuple[torch.Tensor, ...], layout: Layout) -> torch.Tensor | None:
    """As `Places.home` of one picture.

    Where a tower reads patches in an order of its own, it is told by what it turned every patch by: that is another in
    each place. Others read row by row.
    """
    (rows, cols), tower = layout.grids[0].side, family.towers(inner)[0]
    merge = tower.spatial_merge_size if family.axes > 1 else family.unit(inner)
    if merge == 1:
        return None
    down, right, i, j = torch.meshgrid(*map(torch.arange, (rows, cols, merge, merge)), indexing="ij")
    row, col = (down * merge + i).flatten(), (right * merge + j).flatten()
    if family.axes == 1:
        return (row * cols * merge + col).view(-1, merge**2)
    places = torch.stack((row, col), -1).to(rotary[0].device)
    due, there = (torch.cat(list(pair), -1).double() for pair in (tower.rotary_pos_emb(rotary[0], places), rotary))
    return torch.cdist(due, there).argmin(1).view(-1, merge**2)


def of_tower(tap: Tap, host: Attended, at: Places) -> torch.Tensor:
    """`(views, patches)` of a tap in the tower."""
    if isinstance(tap, ClsLogits):
        return host.scores[:, 0, at.first :]
    if tap.rows == "cls":
        return host.weights[:, 0, at.first :]
    asking = host.weights if tap.rows == "all" else host.weights[:, at.first :]
    return asking[:, :, at.first :].mean(1)


def mean_score(scores: torch.Tensor) -> torch.Tensor:
    """The mean over the rows that see a column: masked scores are as low as the type goes."""
    seen = scores > -1e4
    return (scores * seen).nan_to_num(0.0).sum(0) / seen.sum(0)


def shares(tap: CrossShare, weights: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """`(2,)`: of the text's attention what goes to the picture, and the reverse."""
    behind = visual.cumsum(0) > 0
    if tap.system is not None:
        behind |= torch.arange(len(visual), device=visual.device) >= tap.system
    text = ~visual & behind
    return torch.stack((weights[text][:, visual].sum(1).mean(), weights[visual][:, text].sum(1).mean()))


def measured(tap: Tap, value: torch.Tensor, at: Places) -> torch.Tensor:
    """What a tap measured, as `wanted` has it."""
    if isinstance(tap, BlockKeys):
        return value
    if isinstance(tap, CrossShare):
        return value[:1]
    mine = value[0, at.tokens]
    return mine.T if isinstance(tap, ReceivedAttention) else mine[None]


def tap_line(tap: Tap, value: torch.Tensor, block: Block, at: Places, dtype: torch.dtype, most: float) -> Line:
    """One tap against its layer's eager attention."""
    right = wanted(tap, block.right, at)
    # shares that are all or nothing are so at any scale: there the mistake is to take the one for the other
    mistaken = right.flip(-1) if isinstance(tap, CrossShare) else wanted(tap, block.mistaken, at)
    found = (measured(tap, value, at), wanted(tap, block.nudged, at), mistaken)
    off, noise, twin = (worst(x, right) for x in found)
    coarse = torch.float32 if dtype == torch.float64 else dtype  # hosts take the softmax in float32
    noise = Noise(max(noise, torch.finfo(torch.float32).eps), most)  # taps arrive in float32
    return judge("taps", off, noise, twin, coarse, "", f"{tap} is not what eager attention computes")


def hidden_line(layer: int, value: torch.Tensor, host: torch.Tensor, at: Places, dtype: torch.dtype) -> Line:
    """Hidden states in front of a decoder layer against the host's own."""
    right, got = host[0, at.patches], value[0, at.tokens]
    told = f"Hidden() at decoder layer {layer} is not what the layer reads"
    return judge("taps", worst(got, right), Noise(0.0, 0.0), worst(right.roll(1, 0), right), dtype, "", told)


def compared(family: Family, model: nn.Module, asked: Asked, most: float) -> Line:
    """All taps: the line that says most against the model."""
    tile, look = side_of(family, family.inner(model)), Look(asked)
    # a picture of any size is no square of windows, whose order could be its own inverse
    inputs = make_prompt(family, model, [5, "image", 7], [(tile, tile // 2 if family.packed else tile)], 4)
    with eager(model):
        host = host_of(family, model, inputs, asked)
        with patch(model, look) as handle:
            model(**inputs, use_cache=False)
    inner = family.inner(model)
    towers = any(issubclass(kind, TowerTap) for kind, _ in host.blocks)
    home = home_of(family, inner, host.rotary, look.layout) if towers else None
    at = Places.of(inputs["input_ids"][0] == family.token(inner), look.layout, handle._plan.facts.has_cls, home)
    lines = [tap_line(tap, look.seen[tap], host.blocks[site_of(tap)], at, model.dtype, most) for tap in asked.taps]
    lines += [hidden_line(n, look.seen[n], host.hidden[n], at, model.dtype) for n in asked.hidden]
    return severest(lines)


def taps_line(family: Family, model: nn.Module, cuts: Sequence[AnyCut], most: float) -> Line:
    """Each tap that these cuts ask for against eager attention, on a short prompt; `model` is unpatched.

    Noise is what eager attention makes of an input whose last bits are others; the deliberate mistake is attention
    that is scaled wrong (keys, hidden states: each in its neighbour's place).

    Args:
        most: as of `Noise`.
    """
    asked = Asked.of(cuts)
    unseen = f"not looked at: {', '.join(asked.others)}" if asked.others else ""
    if not asked.taps and not asked.hidden:
        return Line("taps", "-", "; ".join(filter(None, (NOTHING, unseen))))
    made = attempt(lambda: compared(family, model, asked, most))
    if isinstance(made, Exception):
        return raised("taps", made)
    if made.outcome != "pass":
        return made
    names = dict.fromkeys([type(tap).__name__ for tap in asked.taps] + ["Hidden"] * bool(asked.hidden))
    told = "; ".join(filter(None, (", ".join(names), unseen)))
    return Line("taps", "pass", told, made.off, made.noise, made.twin)
