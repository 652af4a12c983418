"""ATP: its pure functions against the reference cases, the method in models, soft masks, and weights."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import reference
import tiny
import torch
from probes import far, forced_logits, random_tokens, same
from tiny import modules
from torch.nn.functional import adaptive_avg_pool1d

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods.atp.method import Atp, hard_keep, min_max, redundancy, soft_masks, spatial_scores
from vlmprune.methods.atp.modules import AtpConfig, Threshold, pool_scores
from vlmprune.methods.atp.training import budget_loss, depth_loss, shares_left
from vlmprune.parts.attention import Visible, attention_mass, mean_logits

F64 = torch.float64
ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/goldens/decoder_methods.json").read_text())["atp_llava"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, F64])
CUTS = (1, 2, 3)  # of the tiny models' four layers


def close(actual, expected, dtype):
    rtol = 1e-9 if dtype == F64 else 1e-4
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol)


# --- reference cases ------------------------------------------------------------------------------------------------


def grid_scores(side, strides, dtype, lambda_sample=3.0):
    cell = torch.arange(side**2)
    return spatial_scores(cell // side, cell % side, tuple(strides), lambda_sample, dtype)


@DTYPES
def test_spatial_golden(dtype):
    given, expected = GOLDEN["spatial"]["inputs"], GOLDEN["spatial"]["expected"]
    scores = grid_scores(given["side"], given["strides"], dtype, given["lambda_sample"])
    close(scores, expected["score_6x6"], dtype)
    for theta in ("0.1", "0.3", "0.7"):
        assert (scores > float(theta)).nonzero().flatten().tolist() == expected[f"kept_at_theta_{theta}"]
    for stride, value in expected["value_by_stride"].items():
        close(grid_scores(24, [int(stride)], dtype)[:1], [value], dtype)
    whole = grid_scores(24, AtpConfig.strides, dtype)
    for theta, count in expected["count_24x24_by_theta"].items():
        assert int((whole > float(theta)).sum()) == count


@DTYPES
def test_module_golden(dtype):
    given, expected = GOLDEN["module"]["inputs"], GOLDEN["module"]["expected"]
    q, k = (torch.tensor(given[name], dtype=dtype)[None] for name in "qk")
    scale, n = q.shape[-1] ** -0.5, q.shape[2]
    first, last = given["n_sys"], given["n_sys"] + given["side"] ** 2
    everything, row = torch.ones(1, last - first, dtype=torch.bool), torch.arange(n)
    visible = Visible(row[None])
    visual, text = ((row >= first) & (row < last))[None].to(dtype), (row >= last)[None].to(dtype)
    own, cross = (attention_mass(q, k, scale, visible, rows / rows.sum())[:, first:last] for rows in (visual, text))
    close(own[0], expected["s_self_probs"], dtype)
    close(cross[0], expected["s_cross"], dtype)
    red = redundancy(own, cross, everything, "none")[2]
    close(red[0], expected["s_redundant"], dtype)
    logits = mean_logits(q, k, scale, weight=visual)[:, first:last]
    close(logits[0], expected["s_self_raw_logits"], dtype)
    close(redundancy(logits, cross, everything, "logits")[2][0], expected["s_redundant_raw_logits"], dtype)

    module = Threshold(AtpConfig({"decoder_layers": 4}, 0.5, (1,), form="means", hidden=3)).to(dtype)
    weights = {k: torch.tensor(given[k], dtype=dtype) for k in ("w_z", "b_z", "w_r", "b_r", "w_s", "b_s")}
    with torch.no_grad():
        module.z.weight.copy_(weights["w_z"].T)
        module.z.bias.copy_(weights["b_z"])
        for head in "rs":
            getattr(module, head).weight.copy_(weights[f"w_{head}"][None])
            getattr(module, head).bias.fill_(weights[f"b_{head}"])
    inner = []
    module.z.register_forward_hook(lambda layer, args, output: inner.append(output))
    theta_r, theta_s = module(own, cross, everything)
    close(inner[0][0], expected["z"], dtype)
    close(theta_r[0], expected["theta_r"], dtype)
    close(theta_s[0], expected["theta_s"], dtype)

    space = grid_scores(given["side"], given["strides"], dtype, given["lambda_sample"])[None]
    masks = soft_masks(red, space, theta_r, theta_s, given["temperature"])
    for mask, name in zip(masks, ("soft_mask_r", "soft_mask_s", "soft_mask"), strict=True):
        close(mask[0], expected[name], dtype)
    never = torch.tensor([torch.inf])
    for thetas, name in (
        ((theta_r, theta_s), "kept"),
        ((theta_r, never), "kept_by_redundancy"),
        ((never, theta_s), "kept_by_space"),
    ):
        kept = hard_keep(red, space, *thetas, everything)[0].nonzero().flatten().tolist()
        assert kept == expected[name]
    assert [first + t for t in expected["kept"]] == expected["kept_position_ids"]  # original positions

    variant = expected["minmax_variant"]
    red = redundancy(own, cross, everything, "minmax")[2]
    close(red[0], variant["s_redundant"], dtype)
    thetas = torch.tensor([variant["theta_r"]], dtype=dtype), torch.tensor([variant["theta_s"]], dtype=dtype)
    close(soft_masks(red, space, *thetas, given["temperature"])[2][0], variant["soft_mask"], dtype)
    assert hard_keep(red, space, *thetas, everything)[0].nonzero().flatten().tolist() == variant["kept"]


def test_masked_logits_are_left_out_of_the_mean():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 4, dtype=F64), torch.randn(1, 1, 5, 4, dtype=F64)
    visible, weight = Visible(torch.arange(5)[None]), torch.tensor([[0.0, 1, 2, 1, 0]], dtype=F64)
    logits = (q @ k.transpose(-1, -2)).mean(1)[0]
    expected = [
        sum(weight[0, j] * logits[j, i] for j in range(i, 5)) / max(sum(weight[0, j] for j in range(i, 5)), 1)
        for i in range(5)
    ]
    same(mean_logits(q, k, 1.0, visible, weight)[0], torch.stack(expected))


def test_pool_is_the_adaptive_one_over_what_is_left():
    torch.manual_seed(0)
    scores, among = torch.randn(4, 50), torch.rand(4, 50) > 0.4
    among[2, 5:] = False  # fewer tokens than bins
    among[3] = False
    for bins in (1, 7, 64):
        pooled = pool_scores(scores, among, bins)
        for row in range(3):
            same(pooled[row], adaptive_avg_pool1d(scores[row, among[row]][None], bins)[0], 1e-5)
        assert not pooled[3].any()


def test_nothing_over_the_thresholds_leaves_the_nearest():
    red, space = torch.tensor([[0.1, 0.3, 0.2], [0.9, 0.1, 0.1]]), torch.zeros(2, 3)
    theta = torch.tensor([0.5, 0.5])
    among = torch.tensor([[True, False, True], [True, True, True]])
    assert hard_keep(red, space, theta, theta, among).tolist() == [[False, False, True], [True, False, False]]
    assert not hard_keep(red, space, theta, theta, torch.zeros_like(among)).any()
    assert min_max(red, among).tolist()[0][0] == 0.0


def test_losses_by_hand():
    shares = torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.1, 0.1]], dtype=F64)
    config = AtpConfig({"decoder_layers": 32}, 0.25, (4, 14, 24))
    same(depth_loss(shares, config.layers), torch.tensor((2 + 3.5 + 3 + 0.4 + 1.4 + 2.4) / 2, dtype=F64))
    by_hand = [(4 + 10 * 0.5 + 10 * 0.25 + 8 * 0.125) / 32, (4 + 28 * 0.1) / 32]
    same(config.mean(shares), torch.tensor(by_hand, dtype=F64))
    same(replace(config, mean_over="modules").mean(shares), shares.mean(1))
    expected = abs(sum(by_hand) / 2 - 0.25)
    same(budget_loss(config.mean(shares), 0.25), torch.tensor(expected, dtype=F64))
    same(budget_loss(config.mean(shares), 0.25, 576), torch.tensor(576 * expected, dtype=F64))


# --- in a model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def kept_by_hand(model, prompt, thresholds):
    """Kept tokens of every image after each cut, from the attention of the layer before, in plain loops."""
    config, cuts = thresholds.config, []
    grids = [reference_grid(model, prompt, i) for i in range(len(prompt["pixel_values"]))]
    alive = [list(range(g.tokens)) for g in grids]
    columns = reference.embed(model, prompt)[1]
    for stage, layer in enumerate(config.layers):
        rules = [Listed(layer=at, positions="original", lists=kept) for at, kept in cuts]
        result = reference.run(model, prompt, rules)
        x, left = result.inputs[layer - 1]
        attention = reference.probabilities(model, layer - 1, x, result.positions[layer - 1]).mean(0)
        entry = {column: i for i, column in enumerate(left)}
        text = [i for column, i in entry.items() if column > columns[-1][-1]]
        after = []
        for grid, mine, place in zip(grids, alive, columns, strict=True):
            patches = [t for t in mine if not grid.newline[t]]
            rows = [entry[place[t]] for t in patches]
            own, cross = ([float(attention[over][:, r].mean()) for r in rows] for over in (rows, text))
            own, cross = ([(s - min(x)) / ((max(x) - min(x)) or 1) for s in x] for x in (own, cross))
            among = torch.ones(1, len(patches), dtype=torch.bool)
            tensors = [torch.tensor([x], dtype=model.dtype) for x in (own, cross)]
            theta_r, theta_s = (float(theta) for theta in thresholds.cuts[stage](*tensors, among))
            kept = []
            for t, a, b in zip(patches, own, cross, strict=True):
                on = [s for s in config.strides if grid.row[t] % s == 0 and grid.col[t] % s == 0]
                space = 1 - 3 / max(on) ** 2 if on else 0.0
                if (a + b) / 2 > theta_r or space > theta_s:
                    kept.append(t)
            after.append(sorted(kept + [t for t in mine if grid.newline[t]]))
        cuts.append((layer, after))
        alive = after
    return [kept for _, kept in cuts]


def reference_grid(model, prompt, image):
    with torch.no_grad(), vlmprune.patch(model, "random", keep=1.0) as handle:
        model(**prompt)
    return handle.trace.grids[image]


@dataclass(frozen=True)
class Listed(reference.Rule):
    """A cut that keeps given tokens."""

    lists: tuple = ()

    def keeps(self, ordinal, tokens):
        return [t in self.lists[ordinal] for t in range(tokens)]


FAMILIES = {
    "llava": {},
    "llava-siglip-qwen2": {"tower": "siglip", "text": "qwen2"},
    "next": {"family": "llava_next"},
    "next-mistral": {"family": "llava_next", "text": "mistral", "sliding_window": 24},
}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_choice_equals_one_by_hand(options, tiny_model):
    model = tiny_model(dtype=F64, **options)
    thresholds = modules(model)
    prompt = tiny.prompt(model, [4, "image", 3, "image", 5], [(40, 24), (20, 70)])
    expected = kept_by_hand(model, prompt, thresholds)
    with torch.no_grad(), vlmprune.patch(model, Atp(thresholds=thresholds)) as handle:
        logits = model(**prompt).logits
    trace = handle.trace
    assert [cut.layer for cut in trace.cuts] == list(CUTS)
    assert [[trace.kept(i, c) for i in range(2)] for c in range(3)] == expected
    assert len({len(kept) for cut in expected for kept in cut}) > 2, "the case should be one with emergent counts"
    rules = [Listed(layer=at, positions="original", lists=kept) for at, kept in zip(CUTS, expected, strict=True)]
    same(logits[0, -1], reference.run(model, prompt, rules).logits[0])


@pytest.mark.parametrize("norm", ["minmax", "none", "logits"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_row_of_a_ragged_batch_equals_the_sample_alone(family, norm, tiny_model):
    model = tiny_model(family=family, dtype=F64)
    prompts = [
        tiny.prompt(model, [4, "image", 5], [(24, 24)]),
        tiny.prompt(model, [2, "image", 3, "image", 2], [(40, 24), (20, 50)], seed=3),
        tiny.prompt(model, [9, "image", 1], [(24, 50)], seed=4),
    ]
    batch, forced = tiny.batch(prompts), random_tokens(3, 2)
    thresholds = modules(model, score_norm=norm)
    if norm != "minmax":  # these scores are far from what sigmoids give
        with torch.no_grad():
            for cut in thresholds.cuts:
                cut.r.bias.fill_(-3.0)
                cut.s.bias.fill_(-1.2)
    with vlmprune.patch(model, Atp(thresholds=thresholds)) as handle:
        together, trace = forced_logits(model, batch, forced), handle.trace
        counts = []
        for i, prompt in enumerate(prompts):
            same(forced_logits(model, prompt, forced[i : i + 1])[0], together[i])
            mine = [j for j, sample in enumerate(trace.sample) if sample == i]
            for c in range(3):
                alone = [handle.trace.kept(o, c) for o in range(len(mine))]
                assert alone == [trace.kept(j, c) for j in mine]
            counts += [len(trace.kept(j, 0)) for j in mine]
    assert len(set(counts)) > 1
    far(forced_logits(model, batch, forced), together)


def test_after_a_method_before_the_llm(tiny_model):
    model = tiny_model(family="llava_next", dtype=F64)
    prompts = [tiny.prompt(model, [4, "image", 5], [(24, 24)]), tiny.prompt(model, [2, "image", 9], [(40, 24)], seed=3)]
    forced = random_tokens(2, 2)
    with vlmprune.patch(model, ["random", Atp(thresholds=modules(model))], keep=0.5) as handle:
        together = forced_logits(model, tiny.batch(prompts), forced)
        assert [cut.method for cut in handle.trace.cuts] == ["random", "atp", "atp", "atp"]
        assert handle.trace.layer_average() < handle.trace.entering() < handle.trace.grids[0].tokens
        for i, prompt in enumerate(prompts):
            same(forced_logits(model, prompt, forced[i : i + 1])[0], together[i])


def test_use_of_one_threshold(tiny_model):
    model = tiny_model(dtype=F64)
    prompt, thresholds = tiny.prompt(model, [4, "image", 5], [(24, 24)], seed=1), modules(model)
    with torch.no_grad():
        for cut in thresholds.cuts:
            cut.r.bias.fill_(-0.8)
            cut.s.bias.fill_(-1.2)
    kept = {}
    for use in ("both", "redundancy", "spatial"):
        with torch.no_grad(), vlmprune.patch(model, Atp(thresholds=thresholds, use=use)) as handle:
            model(**prompt)
            kept[use] = set(handle.trace.kept(0, 0))
    assert kept["both"] == kept["redundancy"] | kept["spatial"]
    assert kept["both"] > kept["spatial"]
    assert kept["both"] > kept["redundancy"]


def test_a_copy_of_a_patched_model_has_modules_of_its_own(tiny_model):
    model = tiny.model(dtype=F64)
    prompt, thresholds = tiny.prompt(model, [4, "image", 5], [(24, 24)]), modules(model)
    with torch.no_grad(), vlmprune.patch(model, Atp(thresholds=thresholds)):
        before, copy = model(**prompt).logits, deepcopy(model)
        for p in thresholds.parameters():
            p.fill_(5.0)
        same(copy(**prompt).logits, before)


# --- soft masks -----------------------------------------------------------------------------------------------------


def two_prompts(model):
    return tiny.batch(
        [
            tiny.prompt(model, [4, "image", 5], [(24, 24)]),
            tiny.prompt(model, [2, "image", 3, "image", 2], [(40, 24), (20, 50)], seed=3),
        ]
    )


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_soft_masks_become_hard_as_the_temperature_grows(family, tiny_model):
    model = tiny_model(family=family, dtype=F64)
    thresholds, inputs = modules(model), two_prompts(model)
    with torch.no_grad(), vlmprune.patch(model, Atp(thresholds=thresholds)) as handle:
        hard, trace = model(**inputs, use_cache=False).logits[:, -2:], handle.trace
        kept = [cut.keep for cut in trace.cuts]
        thresholds.train()
        gaps = []
        for thresholds.temperature in (10.0, 1e3, 1e5, 1e7):
            soft = model(**inputs, use_cache=False).logits[:, -2:]
            gaps.append((soft - hard).abs().max().item())
        assert gaps[-1] < 1e-8
        assert gaps[0] > 1e-3
        assert handle.trace.kv_lengths == [inputs["input_ids"].shape[1]] * 4
        for cut, keep in zip(handle.trace.cuts, kept, strict=True):
            assert torch.equal(cut.keep, keep)
            same(cut.soft, keep.double(), 1e-6)
            assert (shares_left(handle.trace, True) - shares_left(trace, False)).abs().max() < 1e-6
    assert any((~keep).any() for keep in kept)


def test_soft_masks_are_the_same_through_sdpa_and_eager_with_gradients(tiny_model):
    found = []
    for attn in ("sdpa", "eager"):
        model = tiny_model(attn=attn)
        thresholds = modules(model, train=True)
        with vlmprune.patch(model, Atp(thresholds=thresholds)):
            logits = model(**two_prompts(model), use_cache=False).logits[:, -1]
        logits.logsumexp(-1).sum().backward()
        found.append([logits.detach()] + [p.grad.clone() for p in thresholds.parameters()])
        for p in model.parameters():
            p.grad = None
    for a, b in zip(*found, strict=True):
        same(a, b, 1e-4)


@pytest.mark.parametrize("form", ["pooled", "means"])
def test_gradients_reach_both_heads(form, tiny_model):
    model = tiny_model().requires_grad_(False)
    try:
        thresholds, inputs = modules(model, train=True, form=form), two_prompts(model)
        with vlmprune.patch(model, Atp(thresholds=thresholds)) as handle:
            logits = model(**inputs, use_cache=False).logits
            for loss in (logits[:, -1].logsumexp(-1).sum(), shares_left(handle.trace, soft=True).sum()):
                grads = torch.autograd.grad(loss, list(thresholds.parameters()), retain_graph=True)
                names = [name for name, _ in thresholds.named_parameters()]
                dead = [name for name, grad in zip(names, grads, strict=True) if not grad.abs().sum() > 0]
                assert not dead
    finally:
        model.requires_grad_(True)


def test_masks_of_several_cuts_multiply(tiny_model):
    model = tiny_model()
    thresholds = modules(model, train=True)
    with vlmprune.patch(model, Atp(thresholds=thresholds)) as handle:
        model(**two_prompts(model), use_cache=False)
    first, second, third = (cut.soft for cut in handle.trace.cuts)
    assert (second <= first).all()
    assert (third <= second).all()
    assert (third < first).any()


def test_a_cache_filled_under_soft_masks_is_refused(tiny_model):
    model = tiny_model()
    prompt, thresholds = tiny.prompt(model, [4, "image", 5], [(24, 24)]), modules(model, train=True)
    with vlmprune.patch(model, Atp(thresholds=thresholds)), pytest.raises(UnsupportedError, match="for training"):
        model.generate(**prompt, max_new_tokens=3)
