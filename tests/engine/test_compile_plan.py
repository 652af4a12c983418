"""What a method may ask for: everything is checked when a model is patched, by name."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import tiny
import torch
from leftovers import ours
from tiny import tokens_per_image

import vlmprune
from vlmprune import Cut, Decoder, Method, Reduction, UnsupportedError, registry
from vlmprune.engine.compile import compile_cuts
from vlmprune.parts.cuts import PixelCut, Projector, ProjectorCut, TowerCut, Vision
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.taps import (
    BlockKeys,
    BlockTap,
    ClsLogits,
    ClusterOf,
    CrossShare,
    Distinctness,
    Hidden,
    Kept,
    ReceivedAttention,
    Tap,
    TextAttention,
    VisionAttention,
)

FACTS = ModelFacts("llava", 6, 4, True, 4, views=False, view_patches=16)
IN_TOWER = "a cut in the tower sees Hidden(), BlockKeys(layer), BlockFlow(layer) and Carried() alone"


def keep_all(seen, layout):
    return Reduction(layout.alive.clone(), list(layout.alive_counts))


@dataclass(frozen=True)
class Asks(Method):
    """A method of somebody else."""

    wanted: tuple[Cut, ...] = ()

    def cuts(self, facts):
        return list(self.wanted)


def cut(at, *see, **options):
    return (TowerCut if isinstance(at, Vision) else Cut)(at, see, keep_all, **options)


@dataclass(frozen=True)
class Stray(Tap):
    pass


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        *[(cut(Vision(2), tap), f"tower layer 2 cannot see {tap}: {IN_TOWER}")
          for tap in (VisionAttention(1), ClsLogits(1), Distinctness(1), ClusterOf(), TextAttention(0),
                      ReceivedAttention(0), CrossShare(0), BlockTap(0))],
        *[(ProjectorCut((tap,), keep_all), f"the cut in front of the projector cannot see {tap}: ")
          for tap in (VisionAttention(6), BlockKeys(6), Kept(), TextAttention(0), BlockTap(0))],
        (cut(Vision(2), BlockKeys(0)), "BlockKeys(layer=0): this cut sees the keys of the layer before it, 1"),
        (cut(Vision(2), BlockKeys(2)), "the keys of the layer before it, 1"),
        (cut(Decoder(1), BlockKeys(0)), "decoder layer 1 cannot see BlockKeys(layer=0): only cuts in the tower"),
        (cut(Decoder(1), TextAttention(3)), "decoder layer 1 cannot see TextAttention(layer=3, rows='last'): "
         "its layer must not lie behind the cut, so be one of 0..1"),
        (cut(Decoder(1), ReceivedAttention(2)), "one of 0..1"),
        (cut(Decoder(1), CrossShare(-1)), "one of 0..1"),
        (cut(Decoder(2), BlockTap(2)), "its layer must have run before the cut, one of 0..1"),
        (cut(Decoder(0), BlockTap(0)), "no decoder layer has run before this cut"),
        (cut(Decoder(0), VisionAttention(99)), "VisionAttention(layer=99, rows='cls'): this tower has layers 0..5"),
        (cut(Decoder(0), VisionAttention(6)), "this tower has layers 0..5"),
        (cut(Decoder(0), VisionAttention(-1)), "this tower has layers 0..5"),
        (cut(Decoder(0), VisionAttention(1.0)), "this tower has layers 0..5"),
        (cut(Decoder(0), Distinctness(6)), "this tower has layers 0..5"),  # its output becomes no feature
        (cut(Decoder(0), Kept()), "cannot see Kept(layer=-1): no cut in or around the tower keeps"),
        (cut(Decoder(0), Kept(3)), "it is of no layer: write Kept()"),
        (cut(Decoder(0), ClusterOf(3)), "it is of no layer: write ClusterOf()"),
        (cut(Decoder(1), CrossShare(1, system="4")), "system='4' must be a number of tokens of at least 0, or None"),
        (cut(Decoder(1), CrossShare(1, system=-1)), "system=-1 must be a number of tokens"),
        (cut(Decoder(1), ReceivedAttention(1, logits="no")), "logits='no' must be True or False"),
        (cut(Decoder(0), VisionAttention(1, "csl")), "rows='csl' is not one of 'cls', 'patches'"),
        (cut(Decoder(0), TextAttention(0, "lsat")), "rows='lsat' is not one of 'last', 'instruction', 'all'"),
        (cut(Decoder(0), Stray()), "nothing would measure it"),
        (cut(Decoder(0), "Hidden"), "'Hidden' in see= is no tap"),
        (cut(Decoder(0), Hidden), "in see= is no tap"),
        (Cut(Decoder(0), Hidden(), keep_all), "must be a tuple of taps"),
        (cut(Decoder(0), positions="contigous"), "positions='contigous' is not one of 'original', 'contiguous'. "
         "Did you mean 'contiguous'?"),
        (Cut(Decoder(0), (), None), "reduce=None cannot be called"),
        (cut(Decoder(4)), "cuts at decoder layer 4, and this model allows 0..3"),
        (cut(Decoder(-1)), "this model allows 0..3"),
        (cut(Decoder(1.5)), "layer 1.5, which is no whole number"),
        (cut(Vision(0)), "cuts at tower layer 0, and this model allows 1..5"),
        (cut(Vision(6)), "cuts at tower layer 6, and this model allows 1..5"),
        (cut(Vision(5, inside=True)), "cuts at the inside of tower layer 5, and this model allows 0..4"),
        (cut(3), "Asks: Cut(at=3) is not at Decoder(layer). Tokens are cut at Decoder(layer) by Cut"),
        (Cut(Vision(2), (), keep_all), "Cut(at=Vision(layer=2, inside=False)) is not at Decoder(layer)"),
        (Cut(Projector(), (), keep_all), "Cut(at=Projector()) is not at Decoder(layer)"),
        (TowerCut(Decoder(2), (), keep_all), "TowerCut(at=Decoder(layer=2)) is not at Vision(layer)"),
        (PixelCut(None), "the cut of pixels: reduce=None cannot be called"),
        ("cut", "Asks.cuts must return a list of Cut"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(wrong, told):
    method = Asks((wrong,))
    with pytest.raises((TypeError, ValueError), match=re.escape(told)) as raised:
        compile_cuts([method], FACTS)
    assert str(raised.value).startswith("Asks")
    model = tiny.shared()
    with pytest.raises(type(raised.value), match=re.escape(told)):
        vlmprune.patch(model, method)
    assert not ours(model)


@pytest.mark.parametrize(
    ("kind", "places", "words"),
    [(Cut, (Decoder(0), ()), ("weigh",)), (TowerCut, (Vision(1), ()), ("positions", "reorders")),
     (ProjectorCut, ((),), ("at", "positions", "weigh", "reorders")),
     (PixelCut, (), ("at", "see", "positions", "weigh", "reorders"))],
)  # fmt: skip
def test_a_kind_of_cut_has_no_field_that_means_nothing_there(kind, places, words):
    kind(*places, reduce=keep_all)
    for word in words:
        with pytest.raises(TypeError, match=word):
            kind(*places, reduce=keep_all, **{word: True})


def test_a_tower_without_cls_has_no_cls_rows():
    blind = replace(FACTS, has_cls=False)
    for tap in (VisionAttention(1), ClsLogits(1)):
        with pytest.raises(ValueError, match=r"has no \[CLS\] token"):
            compile_cuts([Asks((cut(Decoder(0), tap),))], blind)
        compile_cuts([Asks((cut(Decoder(0), tap),))], FACTS)
    compile_cuts([Asks((cut(Decoder(0), VisionAttention(1, "patches")),))], blind)


def test_keys_are_seen_once():
    twice = Asks((cut(Vision(2), BlockKeys(1)), cut(Vision(2), BlockKeys(1))))
    with pytest.raises(ValueError, match="an earlier cut there has merged these tokens"):
        compile_cuts([twice], FACTS)


def test_what_can_be_seen_is_let_through():
    good = Asks((
        cut(Decoder(3), TextAttention(3, "all"), TextAttention(0), BlockTap(2), Hidden(), Distinctness(5),
            VisionAttention(5), positions="original"),
        cut(Decoder(0), CrossShare(0)),
        PixelCut(keep_all),
    ))  # fmt: skip
    assert [c.at for _, c in compile_cuts([good], FACTS)] == [None, Decoder(0), Decoder(3)]
    assert [c.at for _, c in compile_cuts([Asks((cut(Vision(2), BlockKeys(1), Hidden()),))], FACTS)] == [Vision(2)]
    assert compile_cuts([Asks((ProjectorCut((), keep_all), cut(Decoder(0), Kept(), ClusterOf())))], FACTS)


def test_behind_the_last_layer_is_what_becomes_the_features():
    last = replace(FACTS, feature_layer=5)
    assert compile_cuts([Asks((cut(Vision(6)), cut(Vision(5, inside=True)), cut(Decoder(0), ClusterOf())))], last)
    assert compile_cuts([Asks((cut(Decoder(0), Distinctness(6)),))], last)
    with pytest.raises(ValueError, match=r"this tower has layers 0\.\.6"):
        compile_cuts([Asks((cut(Decoder(0), Distinctness(7)),))], last)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("has_cls", [False, True])
def test_every_method_passes_or_refuses_in_its_own_words(views, has_cls):
    facts = ModelFacts("llava_next" if views else "llava", 24, 22, has_cls, 32, views, 576)
    passed = set()
    for name in registry.names():
        cls = registry.find(name)
        if not set(registry.required(cls)) <= {"keep"} or name == "atp":
            continue
        try:
            made = cls(**({"keep": 0.5} if "keep" in registry.options(cls) else {}), **cls.plain_with)
            compile_cuts([made], facts)
        except UnsupportedError as error:
            assert "token" in str(error) or "single view" in str(error)  # noqa: PT017
        else:
            passed.add(name)
    assert {"random", "grid", "pool", "fastv", "transprune", "fopru"} <= passed


@dataclass
class Spy:
    taps: tuple = ()
    seen: list = field(default_factory=list)

    def __call__(self, seen, layout):
        self.seen.append(list(seen))
        return keep_all(seen, layout)


@pytest.mark.parametrize("order", [1, -1])
def test_seen_comes_in_the_order_of_see(tiny_model, order):
    model, spy = tiny_model(), Spy()
    taps = (TextAttention(1), Hidden(), VisionAttention(3), BlockTransition(0), TextAttention(0))[::order]
    with torch.no_grad(), vlmprune.patch(model, Asks((Cut(Decoder(1), taps, spy),))):
        model(**tiny.prompt(model, [4, "image", 6], [(24, 24)]))
    assert spy.seen == [list(taps)]


@dataclass(frozen=True)
class BlockTransition(BlockTap):
    def measure(self, before, after, scene):
        return after.flatten(0, 1)[scene.flat_index()]


# Inputs


@dataclass(frozen=True)
class Picky(Method):
    """Refuses, and checks nothing itself."""

    refuses_inputs: ClassVar[dict[str, str]] = {"single": "wants crops", "video": "wants no time"}

    def cuts(self, facts):
        return [cut(Decoder(2))]


def test_kinds_of_inputs_that_nobody_knows():
    @dataclass(frozen=True)
    class Typo(Picky):
        refuses_inputs: ClassVar[dict[str, str]] = {"videos": "wants no time"}

    with pytest.raises(ValueError, match=r"Typo.refuses_inputs: 'videos' .* Did you mean 'video'"):
        compile_cuts([Typo()], FACTS)


def several(model):
    return tiny.prompt(model, [3, "image", 2, "image", 4], [(24, 48), (48, 24)], together=True)


@torch.no_grad()
def test_the_engine_refuses_inputs_for_a_method(tiny_model):
    model = tiny_model(family="llava_onevision", tower="siglip")
    alone = tiny.prompt(model, [3, "image", 4], [(24, 48)], together=True)
    video = tiny.prompt(model, [3, "video", 4], [], videos=(3,))
    with vlmprune.patch(model, [registry.find("random")(keep=2), Picky()]):
        model(**alone)
        with pytest.raises(UnsupportedError, match="Picky wants crops"):
            model(**several(model))
        with pytest.raises(UnsupportedError, match="Picky wants no time"):
            model(**video)


@torch.no_grad()
def test_globalcom2_on_several_images_is_refused_and_listed(tiny_model):
    """They have one view each, and were not pruned at all, whatever keep said."""
    from vlmprune.eval.catalogue import models

    model = tiny_model(family="llava_onevision", tower="siglip")
    with vlmprune.patch(model, "globalcom2", keep=0.3, score="distinct") as handle:
        model(**tiny.prompt(model, [3, "image", 4], [(48, 48)], together=True))
        assert handle.trace.counts[0]["patches_after"] < handle.trace.counts[0]["patches_before"]
        with pytest.raises(UnsupportedError, match=r"globalcom2 .*single view"):
            model(**several(model))
    (family,) = [f for f in models()["families"] if f["model_type"] == "llava_onevision"]
    assert "globalcom2" in family["refused_inputs"]["several images of one prompt, which have no crops"]


@dataclass(frozen=True)
class Lazy(vlmprune.methods.base.Budgeted):
    """Takes a budget and drops something of large images alone."""

    def cuts(self, facts):
        return [Cut(Decoder(0), (), self.reduce)]

    def reduce(self, seen, layout):
        keep = layout.alive.clone()
        for image, grid in enumerate(layout.grids):
            if grid.tokens > 60:
                keep[image, 5:] = False
        return Reduction(keep)


@torch.no_grad()
def test_a_budget_without_effect_is_told_once(tiny_model):
    model = tiny_model(family="llava_next")
    sizes = [(24, 48), (48, 48)]
    small, large = tokens_per_image(model, sizes)
    assert small < 60 < large
    prompts = [tiny.prompt(model, [3, "image", 4], [size]) for size in sizes]
    both = tiny.prompt(model, [3, "image", 1, "image", 4], sizes)
    for keep, told in ((3, True), (0.2, True), (500, False), (1.0, False)):
        with vlmprune.patch(model, Lazy(keep=keep)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(**prompts[1])
            if told:
                with pytest.warns(UserWarning, match=rf"Lazy dropped nothing of image 0 .*budget, {keep}"):
                    model(**both)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(**both)


# Fractions


@torch.no_grad()
@pytest.mark.parametrize("first", ["tome", "globalcom2"])
@pytest.mark.parametrize("second", ["fastv", "fopru", "random", "vtc_cls", "todre"])
def test_a_fraction_is_of_what_entered_alone_and_in_a_batch(tiny_model, first, second):
    """Also where the first cut's counts are found out later, and whoever stands beside it."""
    if first == "tome" and second in ("fopru", "vtc_cls", "todre"):
        pytest.skip("looks at a tower that is merged")
    model = tiny_model(family="llava_next", dtype=torch.float64)
    options = {"fastv": {"newlines": "all"}, "todre": {"tau": None}}.get(second, {})
    options |= {"scope": "view"} if second in ("fopru", "vtc_cls") else {}
    methods = [registry.find(first)(keep=0.5), registry.find(second)(keep=0.5, **options)]
    whole, unpadded = (24, 48), (40, 24)  # the second one's canvas is un-padded, so that counts are found out
    prompts = [tiny.prompt(model, [3 + i, "image", 4], [size], seed=i) for i, size in enumerate((whole, unpadded))]

    def counts(prompt):
        with vlmprune.patch(model, methods) as handle:
            model(**prompt)
        trace = handle.trace
        return [[len(trace.kept_patches(i, c)) for c in (0, 1)] for i in range(len(trace.grids))]

    alone = [counts(prompt)[0] for prompt in prompts]
    together = counts(tiny.batch(prompts))
    assert together == alone
    for entered, left in alone:
        if options.get("scope") == "view":  # floored per view
            assert 0 < left <= entered // 2
            assert left >= entered // 2 - 4
        else:
            assert left == entered // 2


@torch.no_grad()
def test_newlines_that_competed_before_the_llm_are_no_patches(tiny_model):
    """The number of patches that entered is then nobody's promise: it is read."""
    model = tiny_model(family="llava_next", dtype=torch.float64)
    prompt = tiny.prompt(model, [3, "image", 4], [(40, 24)])
    second = registry.find("fastv")(keep=0.5, newlines="all", layer=2)
    with vlmprune.patch(model, [Compete(), second]) as handle:
        model(**prompt)
    entered, left = (len(handle.trace.kept_patches(0, c)) for c in (0, 1))
    assert len(handle.trace.kept(0, 0)) > entered
    assert left == entered // 2


@dataclass(frozen=True)
class Compete(Method):
    def cuts(self, facts):
        return [Cut(Decoder(0), (), self.reduce)]

    def reduce(self, seen, layout):
        keep = layout.alive.clone()
        keep[:, :3] = False
        return Reduction(keep, [n - 3 for n in layout.alive_counts])
