"""Merging inside the vision tower, against a tower walked through by hand with Python lists."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import reference
import tiny
import torch
from torch.nn.functional import elu, normalize

import vlmprune
from vlmprune import CutNotRunError, UnsupportedError
from vlmprune.engine.channels import OWNER
from vlmprune.engine.encode import Call
from vlmprune.methods import PiToMe, ToMe
from vlmprune.parts.merging import match_alternating, match_energy, spread_evenly

F64 = torch.float64


def pairs(metric, a, b, removed):
    """The `removed` tokens of `a` with the most similar partner in `b`: {token: partner}, and `a` by similarity."""
    x = normalize(metric, dim=-1)
    best = {}
    for i in a:
        partner = max(b, key=lambda j: (float(x[i] @ x[j]), -j))
        best[i] = (partner, float(x[i] @ x[partner]))
    ranked = sorted(best, key=lambda i: -best[i][1])
    return {i: best[i][0] for i in ranked[:removed]}, ranked


def merged(x, sizes, members, gone, order):
    """New tokens in `order` after every token of `gone` flowed into its partner."""
    groups = {i: [i] for i in order}
    for i, partner in gone.items():
        groups[partner].append(i)
    out, new_sizes, new_members = [], [], []
    for i in order:
        total = sum(sizes[j] for j in groups[i])
        out.append(sum(x[j] * (sizes[j] / total) for j in groups[i]))
        new_sizes.append(total)
        new_members.append(sorted(m for j in groups[i] for m in members[j]))
    return torch.stack(out), new_sizes, new_members


def tower_by_hand(model, view, method, keep, weigh=False, place="inside", energy_from=13, last=False, wrong=""):
    """Clusters of original patches at the feature layer, and each one's vector, for one view.

    The features leave the last layer but one, or the `last`.
    `wrong` says what is done otherwise than in the sources: "raster" order, one layer "fewer", or the "margin".
    """
    tower, first = model.model.vision_tower, int(model.config.vision_config.model_type == "clip_vision_model")
    x = tower.embeddings(view[None])
    x = tower.pre_layrnorm(x)[0] if first else x[0]
    layers = tower.encoder.layers
    run, patches = len(layers) - 1 + last, len(x) - first
    steps, target = run - (wrong == "fewer"), int(patches * keep)
    if method == "tome":
        schedule = spread_evenly(patches - target, steps)
    else:
        sizes_at = [round(patches * (target / patches) ** (i / steps)) for i in range(steps + 1)]
        schedule = [a - b for a, b in pairwise(sizes_at)]
    schedule += [0] * (run - steps)
    sizes, members = [1.0] * len(x), [[i - first] for i in range(len(x))]
    for index, removed in enumerate(schedule):
        layer, attention = layers[index], layers[index].self_attn
        read = layer.layer_norm1(x)
        keys = attention.k_proj(read).view(len(x), attention.num_heads, -1).mean(1)
        bias = torch.tensor(sizes, dtype=x.dtype).log()[None, None, None] if weigh and index else None
        x = x + attention(read[None], attention_mask=bias)[0][0]
        if behind := method == "pitome" or place == "behind":
            x = x + layer.mlp(layer.layer_norm2(x))
        metric = keys if method == "tome" else x
        if method == "tome" or index < round(energy_from * len(layers) / 24):
            a, b = list(range(2 * first, len(x), 2)), list(range(1, len(x), 2))
            gone, ranked = pairs(metric, a, b, removed)
            left = a if first or wrong == "raster" else ranked
            order = [*range(first), *(i for i in left if i not in gone), *b]
        else:
            unit = normalize(x[first:], dim=-1)
            margin = 0.9 - 0.9 * (0 if wrong == "margin" else index) / len(layers)
            energy = elu(unit @ unit.T - margin).mean(1).tolist()
            ranked = sorted(range(len(energy)), key=lambda i: (-energy[i], i))
            ranked = [i + first for i in ranked]
            a, b = ranked[: 2 * removed : 2], ranked[1 : 2 * removed : 2]
            gone, _ = pairs(metric, a, b, removed)
            order = [*range(first), *ranked[2 * removed :], *b]
        x, sizes, members = merged(x, sizes, members, gone, order)
        if not behind:
            x = x + layer.mlp(layer.layer_norm2(x))
    return members[first:], x[first:]


CASES = [
    ("tome", {}, "clip"),
    ("tome", {"place": "behind"}, "clip"),
    ("tome", {"weigh": True}, "clip"),
    ("pitome", {}, "clip"),
    ("pitome", {"energy_from": 0}, "clip"),
    ("pitome", {"energy_from": 24}, "clip"),
    ("tome", {}, "siglip"),
    ("tome", {"place": "behind", "weigh": True}, "siglip"),
    ("pitome", {"weigh": True}, "siglip"),
]


@pytest.mark.parametrize(("method", "options", "tower"), CASES)
def test_llava_equals_by_hand(method, options, tower):
    model = tiny.shared(dtype=F64, tower=tower)
    prompt = tiny.prompt(model, [4, "image", 3, "image", 5], [(24, 24), (24, 24)])
    with torch.no_grad():
        x, images = reference.embed(model, prompt)
        rows, gone, expected = list(x), set(), []
        for view, image in zip(prompt["pixel_values"], images, strict=True):
            clusters, vectors = tower_by_hand(model, view, method, 0.5, **options)
            assert len(clusters) == 8
            projected = model.model.multi_modal_projector(vectors)
            for members, vector in zip(clusters, projected, strict=True):
                rows[image[members[0]]] = vector
                gone |= {image[m] for m in members[1:]}
            expected.append(sorted(members[0] for members in clusters))
        short = torch.stack([row for c, row in enumerate(rows) if c not in gone])
        out = model.model.language_model(inputs_embeds=short[None]).last_hidden_state[0]
        want = model.lm_head(out[-1])
        with vlmprune.patch(model, method, keep=0.5, **options) as handle:
            got = model(**prompt).logits[0, -1]
            assert [handle.trace.kept(i) for i in range(2)] == expected
            assert handle.trace.kv_lengths == [len(short)] * tiny.LAYERS
        plain = model(**prompt).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert (got - plain).abs().max() > 1e-7


OTHERS = [
    ("tome", "clip", {}, {"place": "behind"}),
    ("tome", "clip", {}, {"weigh": True}),
    ("tome", "clip", {}, {"wrong": "fewer"}),
    ("tome", "siglip", {}, {"wrong": "raster"}),
    ("pitome", "siglip", {}, {"wrong": "raster"}),
    ("pitome", "clip", {}, {"wrong": "fewer"}),
    ("pitome", "siglip", {}, {"wrong": "margin"}),
    ("pitome", "siglip", {"energy_from": 0}, {"wrong": "margin"}),
    ("pitome", "clip", {}, {"weigh": True}),
    ("pitome", "clip", {}, {"energy_from": 0}),
    ("pitome", "clip", {"energy_from": 0}, {"energy_from": 24}),
]


@pytest.mark.parametrize(("method", "tower", "options", "other"), OTHERS, ids=str)
def test_what_the_equality_by_hand_tells_apart(method, tower, options, other):
    """Of twelve pictures all keep what they should, and not what another option or a known mistake would keep."""
    model = tiny.shared(dtype=F64, tower=tower)
    prompt = tiny.prompt(model, ["image"] * 12 + [3], [(24, 24)] * 12, seed=1)
    views = prompt["pixel_values"]
    views += views[:, :, :1, :1]  # or no cosine is ever above a margin
    with torch.no_grad(), vlmprune.patch(model, method, keep=0.5, **options) as handle:
        model(**prompt)
        got = [handle.trace.kept(i) for i in range(12)]
        right, wrong = (
            [
                sorted(members[0] for members in tower_by_hand(model, view, method, 0.5, **options | given)[0])
                for view in views
            ]
            for given in ({}, other)
        )
    assert got == right != wrong


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("method", "options"), [("tome", {}), ("tome", {"place": "behind"}), ("pitome", {})], ids=str)
def test_features_of_the_last_layer(method, options, tower):
    """`vision_feature_layer=-1`: the last merge is behind, or inside, the tower's last layer."""
    model = tiny.model(tower=tower, seed=2).double()
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = -1
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, method, keep=0.5, **options) as handle:
        features = model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output[0]
        clusters, vectors = tower_by_hand(model, prompt["pixel_values"][0], method, 0.5, last=True, **options)
        model(**prompt)
        assert handle.trace.kept() == sorted(members[0] for members in clusters)
        for members, vector in zip(clusters, model.model.multi_modal_projector(vectors), strict=True):
            torch.testing.assert_close(features[members], vector.expand(len(members), -1), rtol=1e-9, atol=1e-9)


def test_every_state_of_a_merged_tower_is_its_layers_own():
    """Entry i of the tower's hidden states is what layer i reads, with a row for every original token."""
    model = tiny.shared(dtype=F64)
    tower, views = model.model.vision_tower, tiny.pixels(model, [(24, 24)])["pixel_values"]
    for method, left in (("tome", [17, 15, 13, 11, 10, 9]), ("pitome", [17, 15, 13, 12, 10, 9])):
        read = []
        note = lambda module, args, kwargs, read=read: read.append(kwargs["hidden_states"])  # noqa: E731
        with torch.no_grad(), vlmprune.patch(model, method, keep=0.5) as handle:
            layers = tower.encoder.layers
            hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
            states = tower(views, output_hidden_states=True, **{OWNER: Call(handle._plan)}).hidden_states
            for hook in hooks:
                hook.remove()
        assert [x.shape[1] for x in read] == left
        assert [state.shape[1] for state in states] == [17] * 7
        for layer, state, x in zip(layers, states[:-1], read, strict=True):
            for row in layer.layer_norm1(state[0]):
                assert (x[0] - row).abs().amax(1).min() < 1e-12
            assert len(state[0].unique(dim=0)) == x.shape[1]


def test_a_host_that_does_not_hand_on_what_is_to_be_merged():
    model = tiny.model()
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    attention = model.model.vision_tower.encoder.layers[2].self_attn
    with torch.no_grad(), vlmprune.patch(model, "tome", keep=0.5):
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {"hidden_states": kwargs["hidden_states"]}),
            with_kwargs=True,
            prepend=True,
        )
        with pytest.raises(CutNotRunError, match="the cut inside tower layer 2 did not run"):
            model(**prompt)


@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_next_equals_by_hand(method):
    """Un-padding takes part of a cluster away: what is left of it is one token."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 5], [(40, 24)])
    with torch.no_grad():
        x, (image,) = reference.embed(model, prompt)
        with vlmprune.patch(model, method, keep=0.5) as handle:
            got = model(**prompt).logits[0, -1]
            grid, kept = handle.trace.grids[0], handle.trace.kept()
        rows, gone = list(x), set()
        for v in range(grid.views):
            clusters, vectors = tower_by_hand(model, prompt["pixel_values"][0, v], method, 0.5)
            projected = model.model.multi_modal_projector(vectors)
            token = {
                int(grid.source[t]) - v * 16: t for t in range(grid.tokens) if grid.view[t] == v and not grid.newline[t]
            }
            for members, vector in zip(clusters, projected, strict=True):
                tokens = sorted(token[m] for m in members if m in token)
                for t in tokens:
                    rows[image[t]] = vector
                gone |= {image[t] for t in tokens[1:]}
        short = torch.stack([row for c, row in enumerate(rows) if c not in gone])
        out = model.model.language_model(inputs_embeds=short[None]).last_hidden_state[0]
    assert kept == [t for t, c in enumerate(image) if c not in gone]
    torch.testing.assert_close(got, model.lm_head(out[-1]), rtol=1e-9, atol=1e-9)


def test_a_tower_that_is_looked_at_is_not_merged():
    model = tiny.shared()
    for other in ("fopru", "vtc_cls", "todre"):
        with pytest.raises(UnsupportedError, match=f"tome.*{other}"):
            vlmprune.patch(model, [ToMe(keep=0.5), other], keep=4)
    vlmprune.patch(model, [PiToMe(keep=0.5), "fastv"])
    vlmprune.unpatch(model)


def test_bad_budgets():
    for word in ("keep", "average"):
        with pytest.raises(ValueError, match=f"^{word}=1 would .* at most half can go: raise {word} "):
            vlmprune.patch(tiny.shared(), "tome", **{word: 1})
        with pytest.raises(UnsupportedError, match=f"give a fraction as {word}"):
            vlmprune.patch(tiny.shared(family="llava_next"), "pitome", **{word: 4})


def test_matchings_are_partitions():
    torch.manual_seed(1)
    x = torch.randn(2, 21, 6)
    for has_cls in (True, False):
        for clusters in (match_alternating(x, 7, has_cls), match_energy(x, 7, 0.5, has_cls)):
            assert clusters.count == 14
            assert clusters.into.shape == (2, 21)
            for row in clusters.into.tolist():
                assert set(row) == set(range(14))
                if has_cls:
                    assert row.count(row[0]) == 1
                    assert row[0] == 0
    assert spread_evenly(384, 22) == [18] * 10 + [17] * 12
    assert math.isclose(sum(spread_evenly(512, 23)), 512)


@pytest.mark.parametrize("second", [{"keep": 0.5}, {"keep": 0.25}])
def test_two_mergers_are_refused(second):
    for other in (vlmprune.methods.ToMe, vlmprune.methods.PiToMe):
        with pytest.raises(vlmprune.UnsupportedError, match="both take or merge tokens in, in front of"):
            vlmprune.patch(tiny.shared(), [vlmprune.methods.ToMe(keep=0.5), other(**second)])
