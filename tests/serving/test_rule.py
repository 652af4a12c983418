"""Which methods vLLM can be given: one rule, read off what they do; all that are registered are held to it.

A method that is served keeps on a picture, through `serving.choice`, the very rows that its pruned prompt has on
transformers; no vLLM is needed to see that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import scenes
import tiny
import torch
from torch import nn

from vlmprune import registry
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method, Pruner
from vlmprune.parts import Cut, Decoder, Hidden, Reduction, TowerTap, VisionAttention, select
from vlmprune.parts.cuts import Clusters, Merge, PatchCut, Pick, PixelCut, ProjectorCut, Stay, TowerCut, Vision
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout, Views
from vlmprune.parts.packing import Layouts
from vlmprune.parts.taps import Tap
from vlmprune.patches import FAMILIES, family_of
from vlmprune.serving.choice import SERVED, Choice, ServedPicture, refusals, usual
from vlmprune.serving.merge import Tower, install
from vlmprune.serving.rule import averages_heads
from vlmprune.serving.watch import TowerWatcher, built_for, look_only
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
            _, facts = usual(family)
            choice_of(cls(**given), replace(facts, view_patches=4 * facts.view_patches)).check()


CASES = [(family, name) for family in MODELS for name in registry.names()]  # of other towers in test_watch.py


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
    sizes = [(40, 24), (20, 70)] if served.needs_sizes else [None]
    for seed, size in enumerate(sizes):
        grid = Layouts().find(size, lambda size=size: served.packing(inner, "image", size))
        prompt = tiny.prompt(model, [3, "image", 4], [size or (24, 24)], seed=seed, together=True)
        rows = served_rows(inner, served, choice, grid, size, prompt["pixel_values"])
        assert len(rows) == choice.count(grid)
        torch.testing.assert_close(rows, prefilled(model, prompt, name, options)[3:-4], rtol=1e-4, atol=1e-5)


class Projection(nn.Module):
    """Queries, keys and values by one module, as in vLLM."""

    def __init__(self, attention):
        super().__init__()
        self.parts = nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])

    def forward(self, rows):
        return torch.cat([part(rows) for part in self.parts], -1), None


class Attention(nn.Module):
    """The attention of a layer of transformers, built as vLLM's."""

    tp_size = 1

    def __init__(self, attention):
        super().__init__()
        self.qkv_proj, self.out_proj = Projection(attention), attention.out_proj
        self.head_dim, self.scale = attention.head_dim, attention.scale

    def forward(self, hidden_states):
        heads = [
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.qkv_proj(hidden_states)[0].chunk(3, -1)
        ]
        made = nn.functional.scaled_dot_product_attention(*heads, scale=self.scale)
        return self.out_proj(made.transpose(1, 2).flatten(2)), None


class Layer(nn.Module):
    """A layer of transformers' towers, built as vLLM's."""

    def __init__(self, layer):
        super().__init__()
        self.layer_norm1, self.layer_norm2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.self_attn = Attention(layer.self_attn)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.self_attn(hidden_states=self.layer_norm1(hidden_states))[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Encoder(nn.Module):
    """The layers that vLLM builds: up to the features, and those that only look."""

    def __init__(self, layers, built, looking):
        super().__init__()
        self.layers = nn.ModuleList([Layer(layer) for layer in layers[:looking]])
        for layer in self.layers[built:]:
            layer.__class__ = look_only(Layer, bare=True)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@torch.no_grad()
def served_rows(inner, family, choice, grid, size, pixels):
    """What serving hands to the language model: its hooks on transformers' weights in layers like vLLM's."""
    layers, facts, plan, entered = family.tower_layers(inner.vision_tower), choice.plan.facts, choice.plan, []
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    inner.vision_tower(pixels.flatten(0, -4)[: grid.views])
    hook.remove()
    taps, built = [tap for tap in plan.measured if tap.layer >= 0], facts.feature_layer + 1
    encoder = Encoder(layers, built, built_for(taps, facts, built))
    watcher = TowerWatcher(encoder.layers, taps, plan.key_layers, facts, mean=None)
    if choice.merges:
        install(encoder, watcher)
        watcher.tower = Tower(choice, [grid])
    features = encoder(entered[0])
    views = inner.multi_modal_projector(features[:, int(facts.has_cls) :])
    newline = getattr(inner, "image_newline", None)
    packed = views[0] if newline is None else family.pack(inner, views, newline, size)
    return choice.rows([ServedPicture(grid)], watcher.take(), [packed])[0][0]


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
    return select(norms(seen), 5 + int(norms(seen).std() > 0), layout, self.newlines)


def loops_by_values(self, seen, layout):
    scores = norms(seen)
    while scores.max() > 0.1:  # says nothing of the count
        scores = scores / 2
    return select(scores, self.budget, layout, self.newlines)


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


@pytest.mark.parametrize("rule", [fine, loops_by_values])
def test_a_method_that_nobody_declared_is_served_if_it_may_be(rule):
    choice = choice_of(Odd(keep=8, rule=rule))
    choice.check()
    assert choice.blind == (rule is fine)  # whether its count costs nothing
    assert choice.count(choice.sample) == 8 + choice.sample.newlines


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

    why = why_not("it", Cut(Decoder(0), (tap,), fine, "contiguous"), FACTS)
    assert "which is not known before the language model" in why


def test_a_cut_that_nobody_knows_is_refused():
    from vlmprune.serving.rule import why_not

    assert why_not("it", object(), FACTS) == "it makes a object, which serving does not know"


@dataclass(frozen=True)
class DropsInside(Pruner):
    """Drops tokens inside the tower, by taps that serving knows."""

    def cuts(self, facts):
        return [TowerCut(Vision(1), (Hidden(),), self.five), Cut(Decoder(0), (Hidden(),), self.fine, "contiguous")]

    fine = fine

    def five(self, seen, sizes):
        return Stay((torch.arange(sizes.shape[1]) < 5).expand(sizes.shape), 5)


def test_a_tower_that_would_be_shortened_is_refused():
    model = tiny.shared()
    family, inner = family_of(model), family_of(model).inner(model)
    choice = Choice([DropsInside(keep=4)], family, family.facts(inner))
    grid, prompt = family.image_grid(inner, None), tiny.prompt(model, [3, "image", 4], [(24, 24)])
    with pytest.raises(UnsupportedError, match="tower layer 1: reduce dropped tokens inside the tower"):
        served_rows(inner, family, choice, grid, None, prompt["pixel_values"])


#: What serving reads of all that methods and engine hand each other, or knows to mean nothing to it. A new field must
#: be thought of in `serving` before it stands here: it would be passed over without a word.
FIELDS = {
    Cut: {"at", "see", "reduce", "positions", "reorders"},
    TowerCut: {"at", "see", "reduce", "weigh"},
    ProjectorCut: {"see", "reduce"},
    PixelCut: {"reduce"},
    PatchCut: {"reduce"},
    Reduction: {"keep", "counts", "patches", "merge", "scores", "soft"},
    Merge: {"into", "weight", "source"},
    Pick: {"keep", "merge", "mix"},
    Clusters: {"into", "count"},
    Stay: {"keep", "count", "scores"},
    Views: {"grids"},
    Layout: {
        "grids", "sample", "ordinal", "start", "position", "alive", "alive_counts", "alive_patches", "entered",
        "entered_patches", "soft", "standing",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_serving_knows_every_field_of_a_contract(kind):
    assert {field.name for field in fields(kind)} == FIELDS[kind]
