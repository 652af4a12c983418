"""From methods and the facts of a model to a plan: all that must fit together is checked here, before any hook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from vlmprune.engine.plan import Plan
from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.parts.cuts import AnyCut, Cut, Decoder, PatchCut, PixelCut, Positions, ProjectorCut, TowerCut, Vision
from vlmprune.parts.facts import ModelFacts, need_patches, need_sparse
from vlmprune.parts.taps import BlockFlow, BlockKeys, ClusterOf, Kept, Tap, TowerTap
from vlmprune.patches import Family

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["compile_cuts", "compile_plan"]

STAGES = (PixelCut, PatchCut, TowerCut, ProjectorCut, Cut)


def compile_plan(methods: Sequence[Method], family: Family, facts: ModelFacts) -> Plan:
    """What is to be done to a model; errors as of `compile_cuts`."""
    return Plan(family, facts, compile_cuts(methods, facts), tuple(methods))


def compile_cuts(methods: Sequence[Method], facts: ModelFacts) -> list[tuple[str, AnyCut]]:
    """All cuts of some methods in the order they run, each with the name of its method.

    Raises:
        TypeError: a method returns something else than cuts.
        ValueError: a cut at a layer that the model has not, a tap that cannot be seen there, a word that means nothing.
        UnsupportedError: the model lacks something, or methods that cannot share a model.
    """
    by_method = [(method.known_as, cuts_of(method, facts)) for method in methods]
    cuts = [(name, cut) for name, made in by_method for cut in made]
    for name, cut in cuts:
        check_cut(name, cut, facts)
    check_methods(by_method)
    check_keys(cuts)
    check_kept(cuts)
    check_merged_tower(cuts)
    cuts = [(name, placed(cut, facts)) for name, cut in cuts]
    return sorted(cuts, key=lambda entry: (STAGES.index(type(entry[1])), entry[1].at))


def cuts_of(method: Method, facts: ModelFacts) -> list[AnyCut]:
    """What a method asks for."""
    method.check_refusals()
    cuts = method.cuts(facts)
    if not isinstance(cuts, list | tuple) or not all(type(cut) in STAGES for cut in cuts):
        raise TypeError(f"{method.known_as}.cuts must return a list of Cut, not {cuts!r}.")
    return list(cuts)


def placed(cut: AnyCut, facts: ModelFacts) -> AnyCut:
    """A cut with the family's own position policy where it has none."""
    if not isinstance(cut, Cut) or cut.positions is not None:
        return cut
    return replace(cut, positions="contiguous" if facts.axes == 1 else "original")


def place(cut: AnyCut) -> str:
    """Where a cut is, in words."""
    match cut:
        case PixelCut():
            return "the cut of pixels"
        case PatchCut():
            return "the cut in front of the tower"
        case ProjectorCut():
            return "the cut in front of the projector"
        case TowerCut():
            return f"the cut {'inside' if cut.at.inside else 'at'} tower layer {cut.at.layer}"
    return f"the cut at decoder layer {cut.at.layer}"


def check_cut(name: str, cut: AnyCut, facts: ModelFacts) -> None:
    """Refuse a cut that is nowhere in the model, says what means nothing there, or asks to see what it cannot."""
    if isinstance(cut, TowerCut | ProjectorCut):
        need_patches(name, facts)
    if isinstance(cut, Cut | TowerCut):
        check_layer(name, cut, facts)
    where = f"{name}, {place(cut)}"
    if isinstance(cut, Cut):
        check_positions(where, cut.positions, facts)
    elif isinstance(cut, PatchCut):
        need_sparse(name, facts)
    elif facts.packed:
        raise UnsupportedError(
            f"{where}: this tower packs pictures of any size into one sequence, in and around which nothing can be "
            "merged or shrunk. Take a method that cuts in the language model, or give the processor a smaller "
            "max_pixels, which saves time too."
        )
    if not callable(cut.reduce):
        raise TypeError(f"{where}: reduce={cut.reduce!r} cannot be called.")
    if not isinstance(cut.see, list | tuple):
        raise TypeError(f"{where}: see={cut.see!r} must be a tuple of taps.")
    for tap in cut.see:
        check_tap(where, tap, cut, facts)


def check_positions(where: str, positions: str | None, facts: ModelFacts) -> None:
    """Refuse a word that is no position policy, and one that the model's positions have no meaning for."""
    known = get_args(Positions)
    if positions == "contiguous" and facts.axes > 1:
        raise UnsupportedError(
            f"{where}: positions='contiguous' closes the gaps that a cut makes in position ids, and those of "
            f"{facts.family} models lie on {facts.axes} axes (time, height, width), where there is nothing to close: "
            "use positions='original', or leave it out."
        )
    if positions is not None and positions not in known:
        words = ", ".join(map(repr, known))
        raise ValueError(f"{where}: positions={positions!r} is not one of {words}.{did_you_mean(positions, known)}")


def check_tap(where: str, tap: Any, cut: AnyCut, facts: ModelFacts) -> None:
    """Refuse what is no tap, and one that cannot be seen there."""
    if not isinstance(tap, Tap):
        raise TypeError(f"{where}: {tap!r} in see= is no tap (an object of vlmprune.parts.taps, or derived from one).")
    if why := tap.misfit(cut.at, facts):
        raise ValueError(f"{where} cannot see {tap}: {why}.")


def check_layer(name: str, cut: Cut | TowerCut, facts: ModelFacts) -> None:
    """Refuse a place of another kind of cut, and a layer that the model has not."""
    meant = Decoder if isinstance(cut, Cut) else Vision
    if not isinstance(cut.at, meant):
        raise TypeError(
            f"{name}: {type(cut).__name__}(at={cut.at!r}) is not at {meant.__name__}(layer). Tokens are cut at "
            "Decoder(layer) by Cut, and merged at Vision(layer) by TowerCut; ProjectorCut and PixelCut have one place."
        )
    where, layers = layers_for(cut, facts)
    if isinstance(cut.at.layer, bool) or not isinstance(cut.at.layer, int):
        raise TypeError(f"{name} cuts at {where} {cut.at.layer!r}, which is no whole number.")
    if isinstance(cut, Cut) and facts.recurrent and 0 < cut.at.layer <= facts.attending[0]:
        raise UnsupportedError(
            f"{name} cuts at decoder layer {cut.at.layer}, in front of which all layers are recurrent; how long a "
            f"conversation is says the first with attention, {facts.attending[0]}. Cut at 0, or behind that one."
        )
    if cut.at.layer not in layers:
        allowed = f"{layers.start}..{layers.stop - 1}"
        raise ValueError(f"{name} cuts at {where} {cut.at.layer}, and this model allows {allowed}.")


def layers_for(cut: Cut | TowerCut, facts: ModelFacts) -> tuple[str, range]:
    """What the layers of such a cut are called, and which of them a model has."""
    if isinstance(cut, Cut):
        return "decoder layer", range(facts.decoder_layers)
    # what is merged behind the feature layer is not in the features
    if cut.at.inside:
        return "the inside of tower layer", range(facts.feature_layer + 1)
    return "tower layer", range(1, facts.feature_layer + 2)


def looks(cuts: list[tuple[str, AnyCut]], kind: Any) -> list[tuple[str, AnyCut, Tap]]:
    """Who looks where at what: the method, its cut and the tap, for all taps of a kind."""
    return [(name, cut, tap) for name, cut in cuts for tap in cut.see if isinstance(tap, kind)]


def check_keys(cuts: list[tuple[str, AnyCut]]) -> None:
    """Refuse a second look at a tower layer's keys or flow: the first cut has merged their tokens."""
    seen: set[Tap] = set()
    for name, cut, tap in looks(cuts, BlockKeys | BlockFlow):
        if tap in seen:
            raise ValueError(f"{name}, {place(cut)} cannot see {tap}: an earlier cut there has merged these tokens.")
        seen.add(tap)


def check_kept(cuts: list[tuple[str, AnyCut]]) -> None:
    """Refuse to look at what was kept where nothing keeps."""
    if all(isinstance(cut, PixelCut | Cut) for _, cut in cuts):
        for name, cut, tap in looks(cuts, Kept):
            raise ValueError(f"{name}, {place(cut)} cannot see {tap}: no cut in or around the tower keeps.")


def check_methods(methods: list[tuple[str, list[AnyCut]]]) -> None:
    """Refuse methods that cannot share a model: their cuts would not mean what they say."""
    merging, cutting = makers(methods, PatchCut | TowerCut | ProjectorCut), makers(methods, Cut)
    if len(merging) > 1:
        raise UnsupportedError(
            f"{merging[0]!r} and {merging[1]!r} both take or merge tokens in, in front of or behind the vision tower, "
            "and each counts on all of them: take one of the two."
        )
    writing = [name for name, cuts in methods for cut in cuts if isinstance(cut, Cut) and cut.reorders]
    if writing and len(cutting) > 1:
        other = next((name for name in cutting if name != writing[0]), writing[0])
        raise UnsupportedError(
            f"{writing[0]!r} writes its tokens in an order of its own and cannot be combined with {other!r}, which "
            "reads their places: use it alone, or without parity='released'."
        )


def makers(methods: list[tuple[str, list[AnyCut]]], kind: Any) -> list[str]:
    """The methods that make cuts of a kind."""
    return [name for name, cuts in methods if any(isinstance(cut, kind) for cut in cuts)]


def check_merged_tower(cuts: list[tuple[str, AnyCut]]) -> None:
    """Refuse to look at a tower in which tokens are merged."""
    merging = next((name for name, cut in cuts if isinstance(cut, PatchCut | TowerCut)), None)
    if merging is None:
        return
    for name, cut, tap in looks(cuts, TowerTap):
        if isinstance(cut, Cut) and not isinstance(tap, ClusterOf | Kept):
            raise UnsupportedError(
                f"{merging!r} merges tokens inside the vision tower and {name!r} looks at that tower ({tap}): "
                "combine it with a method that needs no tower tap."
            )
