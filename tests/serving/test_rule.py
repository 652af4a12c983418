"""Which methods vLLM can be given: one rule, read off what they do; all that are registered are held to it.

A method that is served keeps on a picture, through `serving.choice`, the very rows that its pruned prompt has on
transformers; no vLLM is needed to see that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import scenes
import tiny
import torch

from vlmprune import registry
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method, Pruner
from vlmprune.parts import Cut, Decoder, Hidden, Reduction, TowerTap, VisionAttention, select
from vlmprune.parts.cuts import Clusters, Merge, Pick, PixelCut, ProjectorCut, TowerCut
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout, Views
from vlmprune.parts.packing import Layouts
from vlmprune.parts.taps import BlockKeys, Tap
from vlmprune.patches import FAMILIES, family_of
from vlmprune.serving.choice import SERVED, Choice, ServedPicture, refusals
from vlmprune.serving.rule import averages_heads
from vlmprune.serving.watch import Projected
from vlmprune.spec import build

MODELS = {"llava": {}, "llava_next": {"family": "llava_next"}, "llava_onevision": scenes.ONEVISION}
FACTS = ModelFacts("llava_next", 24, 22, True, decoder_layers=32, views=True, view_patches=36)


def choice_of(method: Method, facts: ModelFacts = FACTS) -> Choice:
    return Choice([method], FAMILIES[facts.family], facts)


# --- all that are registered


@pytest.mark.parametrize("name", registry.names())
def test_every_registered_method_is_served_or_refused_for_a_reason(name):
    cls = registry.find(name)
    found = refusals(cls)
    assert set(found) <= set(SERVED)
    assert all(len(why) > 20 for why in found.values())
    if found.keys() < set(SERVED):
        given = {"keep": 0.5} | cls.served_with
        for family in set(SERVED) - set(found):  # what an engine asks besides says so too
            has_cls = family != "llava_onevision"
            facts = ModelFacts(family, 24, 22, has_cls, 32, views=FAMILIES[family].views, view_patches=144)
            choice_of(cls(**given), facts).check()


CASES = [(family, name) for family in SERVED for name in registry.names()]


@pytest.mark.parametrize("keep", [5, 0.3])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_is_served_keeps_the_rows_of_transformers(family, name, keep):
    cls, model = registry.find(name), tiny.shared(**MODELS[family])
    fallback = scenes.FALLBACK.get(name, {}) if family == "llava_onevision" else {}
    if set(registry.required(cls)) - {"keep"}:
        pytest.skip("refused: it cannot be asked without more options")
    options = {"keep": keep, **cls.served_with, **fallback}
    served, inner = family_of(model), family_of(model).inner(model)
    try:
        choice = Choice(build(name, options), served, served.facts(inner))
        choice.check()
    except (UnsupportedError, ValueError) as error:
        pytest.skip(f"refused: {error}")
    if choice.plan.tower_cuts:
        pytest.skip("merges in vLLM's own tower: run there, and counted in test_choice.py")
    sizes = [(40, 24), (20, 70)] if served.needs_sizes else [None]
    for seed, size in enumerate(sizes):
        grid = Layouts().find(size, lambda size=size: served.packing(inner, "image", size))
        prompt = tiny.prompt(model, [3, "image", 4], [size or (24, 24)], seed=seed, together=True)
        rows = served_rows(inner, served, choice, grid, size, prompt["pixel_values"])
        assert len(rows) == choice.count(grid)
        torch.testing.assert_close(rows, prefilled(model, prompt, name, options)[3:-4], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def served_rows(inner, family, choice, grid, size, pixels):
    """What serving hands to the language model, with transformers' tower in the place of vLLM's."""
    (layers, tower), seen, inputs = (family.tower_layers(inner.vision_tower), inner.vision_tower), {}, {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: inputs.update({i: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    out = tower(pixels.flatten(0, -4)[: grid.views], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    inputs[len(layers)] = out.hidden_states[-1]

    def shown(index):
        if index == len(layers):
            return None
        attention = layers[index].self_attn
        rows = layers[index].layer_norm1(inputs[index])
        qkv = torch.cat([project(rows) for project in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
        return Projected(qkv, attention.head_dim, attention.scale)

    facts = choice.plan.facts
    for tap in choice.plan.measured:
        if tap.layer >= 0:
            seen[tap] = tap.measure(shown(tap.layer), inputs[tap.layer], facts.has_cls)
    for index in choice.plan.key_layers:
        seen[BlockKeys(index)] = shown(index).keys(shown(index).qkv).mean(1)
    features, kept = choice.pick(out.hidden_states[facts.feature_layer + 1], seen, [grid])
    views = inner.multi_modal_projector(features[:, int(facts.has_cls) :])
    newline = getattr(inner, "image_newline", None)
    packed = views[0] if newline is None else family.pack(inner, views, newline, size)
    return choice.rows([ServedPicture(grid)], seen | kept, [packed])[0]


@torch.no_grad()
def prefilled(model, prompt, name, options):
    """`(length, dim)` rows that the first decoder layer reads of a prompt, pruned by transformers' hooks."""
    import vlmprune

    found = []
    norm = model.model.language_model.layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        with vlmprune.patch(model, name, **options):
            model(**prompt)
    finally:
        hook.remove()
    return found[0][0]


# --- what nobody has declared is refused


@dataclass(frozen=True)
class Odd(Pruner):
    """Cuts by a function of this test's, before the language model."""

    rule: Any = None
    see: tuple = (Hidden(),)

    def cuts(self, facts):
        return [Cut(Decoder(0), self.see, self.reduce)]

    def reduce(self, seen, layout):
        return self.rule(self, seen, layout)


def norms(seen):
    return seen[Hidden()].norm(dim=-1)


def fine(self, seen, layout):
    return select(norms(seen), self.budget, layout, self.newlines)


def reads_values(self, seen, layout):
    return select(norms(seen), max(1, int(norms(seen).sum() * 0) + 5), layout, self.newlines)


def counts_by_values(self, seen, layout):
    keep = layout.patches & (norms(seen) > norms(seen).mean())
    return Reduction(keep, keep.sum(1).tolist())


def leaves_counts_out(self, seen, layout):
    return Reduction(layout.patches & (norms(seen) > 1))


def by_place(self, seen, layout):
    return select(norms(seen) * layout.position.sin(), self.budget, layout, self.newlines)


def shares_a_prompts_budget(self, seen, layout):
    alone = layout.sample.count(layout.sample[0]) == 1
    return select(norms(seen), 8 if alone else 4, layout, self.newlines)


def compares_pictures(self, seen, layout):
    return select(norms(seen) * (norms(seen) < norms(seen).amax() * 0.9), self.budget, layout, self.newlines)


def draws_without_a_seed(self, seen, layout):
    order = [torch.rand(layout.width, generator=torch.Generator().manual_seed(n % 2**40)) for n in layout.ordinal]
    return select(torch.stack(order).to(layout.device), self.budget, layout, self.newlines)


def softens(self, seen, layout):
    made = fine(self, seen, layout)
    return Reduction(made.keep, made.counts, made.patches, soft=torch.ones_like(norms(seen)))


def breaks_its_promise(self, seen, layout):
    made = fine(self, seen, layout)
    return Reduction(made.keep, [n + 1 for n in made.counts])


def breaks(self, seen, layout):
    return seen["nothing"]


def test_a_method_that_nobody_declared_is_served_if_it_may_be():
    choice_of(Odd(keep=8, rule=fine)).check()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (reads_values, "is not known before it has seen the picture"),
        (counts_by_values, "is not known before it has seen the picture"),
        (leaves_counts_out, "is not known before it has seen the picture"),
        (by_place, "hangs on what else is in its prompt"),
        (shares_a_prompts_budget, "hangs on what else is in its prompt|is not known before"),
        (compares_pictures, "hangs on what else is in its prompt"),
        (draws_without_a_seed, "has no seed to draw by"),
        (softens, "weakens tokens"),
        (breaks_its_promise, "keeps other numbers of tokens than it promises"),
        (breaks, "KeyError"),
    ],
)
def test_what_serving_would_get_wrong_is_refused(rule, words):
    with pytest.raises(UnsupportedError, match=words):
        choice_of(Odd(keep=8, rule=rule)).check()


@dataclass(frozen=True)
class Asks(TowerTap):
    """A tap of the tower that measures by a function of this test's."""

    how: Any = None

    def measure(self, layer, hidden, has_cls):
        return self.how(layer, hidden)[:, int(has_cls) :]


@dataclass(frozen=True)
class Unheard(Tap):
    def misfit(self, at, facts):
        return None


SEEN = {
    "values": (lambda layer, hidden: layer.values(layer.normed(hidden)).sum(1), "does not show .AttributeError"),
    "normed": (lambda layer, hidden: layer.normed(hidden).norm(dim=-1), "comes out otherwise there"),
    "keys": (lambda layer, hidden: layer.keys(layer.normed(hidden)).norm(dim=-1).mean(1), None),
    "hidden": (lambda layer, hidden: hidden.norm(dim=-1), None),
    "strongest head": (lambda layer, hidden: layer.keys(layer.normed(hidden)).norm(dim=-1).amax(1), None),
}


@pytest.mark.parametrize("how", SEEN)
def test_a_tap_is_shown_what_vllms_tower_has_and_no_more(how):
    measure, words = SEEN[how]
    method = Odd(keep=8, rule=lambda self, seen, layout: select(*seen.values(), 8, layout), see=(Asks(3, measure),))
    if words is None:
        choice_of(method).check()
    else:
        with pytest.raises(UnsupportedError, match=words):
            choice_of(method)


@pytest.mark.parametrize(("how", "wanted"), [("keys", True), ("hidden", True), ("strongest head", False)])
def test_what_ranks_cannot_average_is_known(how, wanted):
    assert averages_heads(Asks(3, SEEN[how][0]), FACTS) is wanted
    assert averages_heads(VisionAttention(3), FACTS)


@pytest.mark.parametrize("tap", [Asks(-1, SEEN["hidden"][0]), Unheard()], ids=["of no layer", "of no kind"])
def test_a_tap_that_nobody_knows_is_refused(tap):
    from vlmprune.serving.rule import why_not

    why = why_not("it", Cut(Decoder(0), (tap,), fine), FACTS)
    assert "which is not known before the language model" in why


def test_a_cut_that_nobody_knows_is_refused():
    from vlmprune.serving.rule import why_not

    assert why_not("it", object(), FACTS) == "it makes a object, which serving does not know"


#: What serving reads of all that methods and engine hand each other, or knows to mean nothing to it. A new field must
#: be thought of in `serving` before it stands here: it would be passed over without a word.
FIELDS = {
    Cut: {"at", "see", "reduce", "positions", "reorders"},
    TowerCut: {"at", "see", "reduce", "weigh"},
    ProjectorCut: {"see", "reduce"},
    PixelCut: {"reduce"},
    Reduction: {"keep", "counts", "patches", "merge", "scores", "soft"},
    Merge: {"into", "weight", "source"},
    Pick: {"keep", "merge"},
    Clusters: {"into", "count"},
    Views: {"grids"},
    Layout: {
        "grids", "sample", "ordinal", "start", "position", "alive", "alive_counts", "alive_patches", "entered",
        "entered_patches", "soft", "standing",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_serving_knows_every_field_of_a_contract(kind):
    assert {field.name for field in fields(kind)} == FIELDS[kind]
