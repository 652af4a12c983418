"""FlowCut, against a tower walked through by hand, one view at a time."""

from __future__ import annotations

import math

import pytest
import reference
import tiny
import torch

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods.flowcut import FlowCut, importance, to_remove
from vlmprune.parts import BlockFlow, Carried, Cut, Decoder, Hidden, Stay, TowerCut, Vision

F64 = torch.float64


def told(name, cuts):
    """A method of the test's own."""
    return type(name, (vlmprune.Method,), {"name": name, "cuts": lambda self, facts: cuts})()


def peaked(model, factor=6.0):
    """The model with a tower that pays less even attention, so that pictures decide how many go."""
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data *= factor
    return model


def flow_by_hand(layer, x, first):
    """`(attention, alikeness, length)` of every token behind [CLS] as lists, by one view's input."""
    attention, read = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        p(read).view(len(x), attention.num_heads, -1) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rows, paid, alike = ([0] if first else range(len(x))), 0, 0
    for row in rows:
        for head in range(attention.num_heads):
            paid += torch.softmax(k[:, head] @ q[row, head] * attention.scale, 0)
            alike += torch.softmax(v[:, head] @ v[row, head], 0)
    n = len(rows) * attention.num_heads
    return [(t / n)[first:].tolist() for t in (paid, alike)] + [v.mean(1).abs().sum(-1)[first:].tolist()]


def tower_by_hand(model, view, target, wrong=""):
    """Patches that are left, their vectors, and how many tokens every layer read, for one view."""
    tower, first = model.model.vision_tower, int(model.config.vision_config.model_type == "clip_vision_model")
    x = tower.embeddings(view[None])
    x = tower.pre_layrnorm(x)[0] if first else x[0]
    behind = model.config.vision_feature_layer + 1 or None  # which of the last layers are not asked
    layers, scores, left, lengths = tower.encoder.layers[:behind], None, list(range(len(x) - first)), []
    last = len(layers) - 2
    for index, layer in enumerate(layers):
        lengths.append(len(x))
        paid, alike, length = flow_by_hand(layer, x, first)
        x = layer(x[None], attention_mask=None)[0]
        if index > last:
            break
        now = [(a / sum(paid) + b / sum(alike)) * c for a, b, c in zip(paid, alike, length, strict=True)]
        forget = scores is None or wrong == "forgets"
        scores = now if forget else [(a + b) / 2 for a, b in zip(scores, now, strict=True)]
        ahead = last - index
        if ahead % 2:
            continue
        entropy = -sum(a / sum(paid) * math.log(a / sum(paid)) for a in paid)
        part = 1 - (0 if wrong == "even" else (entropy / math.log(len(left))) ** 2)
        gone = round((len(left) - target) / math.sqrt(ahead) * part) if ahead else len(left) - target
        best = sorted(range(len(left)), key=lambda i: (-scores[i], i))[: len(left) - gone]
        keep = sorted(best)
        scores, left = [scores[i] for i in keep], [left[i] for i in keep]
        x = x[[*range(first), *(i + first for i in keep)]]
    return left, x[first:], lengths


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("factor", [1.0, 6.0, 30.0])
def test_llava_equals_by_hand(tower, factor):
    model = peaked(tiny.model(tower=tower, seed=3).double(), factor)
    prompt = tiny.prompt(model, [4, "image", 3, "image", 5], [(24, 24), (24, 24)])
    with torch.no_grad():
        x, images = reference.embed(model, prompt)
        rows, gone, expected = list(x), set(), []
        for view, image in zip(prompt["pixel_values"], images, strict=True):
            left, vectors, _ = tower_by_hand(model, view, 5)
            for patch, vector in zip(left, model.model.multi_modal_projector(vectors), strict=True):
                rows[image[patch]] = vector
            gone |= {c for patch, c in enumerate(image) if patch not in left}
            expected.append(left)
        short = torch.stack([row for c, row in enumerate(rows) if c not in gone])
        want = model.lm_head(model.model.language_model(inputs_embeds=short[None]).last_hidden_state[0, -1])
        with vlmprune.patch(model, "flowcut", keep=5) as handle:
            got = model(**prompt).logits[0, -1]
            assert [handle.trace.kept(i) for i in range(2)] == expected
            assert handle.trace.kv_lengths == [len(short)] * tiny.LAYERS
        plain = model(**prompt).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert (got - plain).abs().max() > 1e-7


@pytest.mark.parametrize("feature", [-2, -1])
@pytest.mark.parametrize("wrong", ["forgets", "even", "together"])
def test_many_pictures_at_once_and_what_the_equality_tells_apart(wrong, feature):
    """Of twelve pictures in one call all keep what each alone would, and not what a known mistake would keep."""
    model = peaked(tiny.model(seed=3).double())
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = feature
    prompt = tiny.prompt(model, ["image"] * 12 + [3], [(24, 24)] * 12, seed=1)
    prompt["pixel_values"] *= torch.linspace(0.3, 3, 12, dtype=F64)[:, None, None, None]
    read = []
    note = lambda module, args, kwargs: read.append(kwargs["hidden_states"].shape[1])  # noqa: E731
    layers = model.model.vision_tower.encoder.layers
    with torch.no_grad(), vlmprune.patch(model, "flowcut", keep=4) as handle:
        hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        model(**prompt)
        [hook.remove() for hook in hooks]
        got = [handle.trace.kept(i) for i in range(12)]
        right = [tower_by_hand(model, view, 4) for view in prompt["pixel_values"]]
        assert got == [left for left, _, _ in right]
        lengths = [length for _, _, length in right]
        assert len({tuple(length) for length in lengths}) > 1  # pictures differ in how many they lose
        assert read[: len(lengths[0])] == [max(column) for column in zip(*lengths, strict=True)]
        if wrong != "together":
            assert got != [tower_by_hand(model, view, 4, wrong)[0] for view in prompt["pixel_values"]]
            return
    with torch.no_grad(), vlmprune.patch(model, "flowcut", keep=4, parity="released") as handle:
        model(**prompt)
        assert got != [handle.trace.kept(i) for i in range(12)]


def test_views_of_which_fewer_are_left_do_not_see_what_fills_them_up():
    """Crops of one picture in one call: the features of each are those of its view alone."""
    model = peaked(tiny.model(family="llava_next", seed=3).double())
    prompt = tiny.prompt(model, [2, "image", 3], [(40, 70)], seed=2)
    views = prompt["pixel_values"][0]
    views *= torch.linspace(0.3, 3, len(views), dtype=F64)[:, None, None, None]
    with torch.no_grad(), vlmprune.patch(model, "flowcut", keep=0.25, layer=None) as handle:
        model(**prompt)
        grid, kept = handle.trace.grids[0], handle.trace.kept()
        by_hand = [tower_by_hand(model, view, 4) for view in views]
        assert len({tuple(lengths) for _, _, lengths in by_hand}) > 1
        features = reference.image_features(model, prompt)[0]
    patches = [t for t in kept if not grid.newline[t]]
    assert sorted(int(grid.source[t]) for t in patches) == sorted(
        v * 16 + p for v, (left, _, _) in enumerate(by_hand) for p in left if v * 16 + p in grid.source[~grid.newline]
    )
    with torch.no_grad():
        for v, (left, vectors, _) in enumerate(by_hand):
            projected = model.model.multi_modal_projector(vectors)
            for t in patches:
                view, patch = divmod(int(grid.source[t]), 16)
                if view == v:
                    torch.testing.assert_close(features[t], projected[left.index(patch)], rtol=1e-9, atol=1e-9)


def flow_to_the_end(model, x, rows, wrong=""):
    """The scores of some rows at the input of decoder layer 1, by the prompt's last row."""
    paid = reference.probabilities(model, 1, x, torch.arange(len(x)))[:, -1][:, rows]
    paid = paid if wrong == "all columns" else paid / paid.sum(1, keepdim=True)
    layer = model.model.language_model.layers[1]
    dim = layer.self_attn.head_dim
    value = layer.self_attn.v_proj(layer.input_layernorm(x)).view(len(x), -1, dim).transpose(0, 1)
    alike = ((value[:, rows] @ value[:, -1, :, None])[..., 0] / dim**0.5).softmax(-1)
    shares = [side.mean(0) / side.mean(0).sum() for side in (paid, alike)]
    return (shares[0] if wrong == "attention alone" else sum(shares)) * value[:, rows].mean(0).abs().sum(-1)


@pytest.mark.parametrize("text", [{}, {"text": "mistral"}], ids=["llama", "mistral"])
def test_crops_are_cut_again_by_what_flows_to_the_end(text):
    """Two and a half times the budget leaves the tower; what decoder layer 1 then keeps, and all behind it, by hand."""
    model = peaked(tiny.model(family="llava_next", seed=3, **text).double())
    prompt = tiny.prompt(model, [2, "image", 3, 4], [(40, 70)], seed=2)
    with torch.no_grad(), vlmprune.patch(model, "flowcut", keep=0.25) as handle:
        got = model(**prompt).logits[0, -1]
        (grid,), (first, second) = handle.trace.grids, [handle.trace.kept(0, cut) for cut in range(2)]
        views = [int(grid.source[t]) // 16 for t in first if not grid.newline[t]]
        assert set(map(views.count, set(views[:11]))) == {11}  # of 16: 0.25 * 2.5 of them and one; crops lose padding
        x, (image,) = reference.embed(model, prompt)
        columns = [c for c in range(len(x)) if c not in image or c - image[0] in first]
        x = reference.run_layer(model, 0, x[columns], torch.arange(len(columns)))
        rows = [i for i, c in enumerate(columns) if c in image and not grid.newline[c - image[0]]]
        scores, budget = flow_to_the_end(model, x, rows), int(0.25 * grid.patches)
        gone = set(rows) - {rows[i] for i in reference.top(scores.tolist(), budget, list(range(len(rows))))}
        assert second == [columns[i] - image[0] for i in range(len(columns)) if columns[i] in image and i not in gone]
        for wrong in ("all columns", "attention alone"):
            assert flow_to_the_end(model, x, rows, wrong).argsort().tolist() != scores.argsort().tolist()
        x = x[[i for i in range(len(columns)) if i not in gone]]
        for index in range(1, tiny.LAYERS):
            x = reference.run_layer(model, index, x, torch.arange(len(x)))
        torch.testing.assert_close(got, model.lm_head(model.model.language_model.norm(x)[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("average", "early"), [(0.3, 0.25), (0.8, 0.25), (0.05, 1 / 32), (1.0, 0.25)])
def test_a_mean_over_layers_counts_both_cuts(average, early):
    enters, left = FlowCut(average=average).shares(early)
    assert early * enters + (1 - early) * left == pytest.approx(average)
    assert enters == min(1, 2.5 * left)


def test_several_pictures_with_crops_are_each_cut_as_alone():
    model = peaked(tiny.model(family="llava_next", seed=3).double())
    sizes = [(40, 70), (24, 24), (70, 30)]
    alone = [tiny.prompt(model, ["image", 3 + i], [size], seed=i) for i, size in enumerate(sizes)]
    with torch.no_grad(), vlmprune.patch(model, "flowcut", keep=0.25) as handle:
        kept = []
        for prompt in alone:
            model(**prompt)
            kept.append(handle.trace.kept())
            assert len(handle.trace.kept_patches()) == int(0.25 * handle.trace.grids[0].patches)
        model(**tiny.batch(alone))
        assert [handle.trace.kept(image) for image in range(len(sizes))] == kept


def test_numbers_by_hand():
    flow = torch.tensor([[[0.1, 0.2, 2.0], [0.3, 0.2, 1.0]]])
    torch.testing.assert_close(importance(flow), torch.tensor([[(0.25 + 0.5) * 2, 0.75 + 0.5]]))
    left = torch.tensor([16, 16, 9, 4])
    paid = torch.tensor([[1.0] * 16, [1.0, 1.0] + [0.0] * 14, [1.0] * 3 + [0.0] * 13, [1.0] + [0.0] * 15])
    # evenness ln 16 / ln 16, ln 2 / ln 16, ln 3 / ln 9, 0
    assert to_remove(paid, left, 4, 4).tolist() == [0, round(6 * 15 / 16), round(2.5 * 0.75), 0]
    assert to_remove(paid, left, 4, 4, together=True).tolist() == [0] * 4
    assert to_remove(paid, left, 4, 0).tolist() == [12, 12, 5, 0]


def test_all_of_it_and_what_is_refused():
    model = tiny.shared(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)])
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "flowcut", keep=1.0):
            assert torch.equal(model(**prompt).logits, plain)
    with pytest.raises(UnsupportedError, match=r"flowcut treats all views alike.*give a fraction as average"):
        vlmprune.patch(tiny.shared(family="llava_next"), "flowcut", average=4)
    with pytest.raises(UnsupportedError, match=r"flowcut.*looks at that tower|flowcut.*merges tokens inside"):
        vlmprune.patch(model, [FlowCut(keep=0.5), "fopru"], keep=4)
    first = tiny.model()
    first.config.vision_feature_layer = first.model.config.vision_feature_layer = 1
    with pytest.raises(UnsupportedError, match="flowcut cuts in front of the layer that makes the features"):
        vlmprune.patch(first, "flowcut", keep=4)


def test_attention_without_weights_is_refused_where_views_differ():
    model = peaked(tiny.model(seed=3))
    prompt = tiny.prompt(model, ["image"] * 12 + [3], [(24, 24)] * 12, seed=1)
    prompt["pixel_values"] *= torch.linspace(0.3, 3, 12)[:, None, None, None]
    layer = model.model.vision_tower.encoder.layers[1]
    flash = lambda *given: setattr(layer.self_attn.config, "_attn_implementation", "flash_attention_2")  # noqa: E731
    with torch.no_grad(), vlmprune.patch(model, "flowcut", keep=4):
        layer.register_forward_hook(flash)  # from the first cut on
        with pytest.raises(UnsupportedError, match="'flash_attention_2' takes no weights: load the model with"):
            model(**prompt)


KEEP = {
    "keep of shape": Stay(torch.ones(1, 3, dtype=torch.bool)),
    "keep of torch.float32, and bools": Stay(torch.ones(1, 17)),
    "keep without a token of some view": Stay(torch.zeros(1, 17, dtype=torch.bool)),
    "count=4, and keep of another number": Stay(torch.arange(17)[None] < 5, 4),
    "count=99, which is not one of 1..17": Stay(torch.arange(17)[None] < 5, 99),
    "scores of torch.int64, and floats": Stay(None, scores=torch.zeros(1, 17, dtype=torch.long)),
}


@pytest.mark.parametrize("what", KEEP)
def test_what_does_not_fit_is_named(what):
    model = tiny.shared()
    prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)])
    cut = TowerCut(Vision(1), (Hidden(),), lambda seen, sizes: KEEP[what])
    with torch.no_grad(), vlmprune.patch(model, told("odd", [cut])), pytest.raises(ValueError, match=what) as caught:
        model(**prompt)
    assert "odd, the cut at tower layer 1" in str(caught.value)


def test_what_nobody_left_cannot_be_seen():
    model = tiny.shared()
    prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)])
    nobody = told("early", [TowerCut(Vision(1), (Carried(),), lambda seen, sizes: Stay(None))])
    with (
        vlmprune.patch(model, nobody),
        pytest.raises(UnsupportedError, match=r"left scores that Carried\(\) could see"),
    ):
        model(**prompt)
    for see, why in ((BlockFlow(2), "the flow of the layer before it, 0"), (Carried(1), "it is of no layer")):
        with pytest.raises(ValueError, match=why):
            vlmprune.patch(model, told("far", [TowerCut(Vision(1), (see,), lambda seen, sizes: Stay(None))]))
        with pytest.raises(ValueError, match="only cuts in the tower"):
            vlmprune.patch(model, told("late", [Cut(Decoder(0), (see,), lambda seen, layout: None)]))
