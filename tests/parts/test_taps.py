"""Taps against the model's own eager attention."""

from __future__ import annotations

import copy

import probes
import pytest
import reference
import tiny
import torch
from probes import far, same
from reference import Rule
from tiny import CACHE
from torch import nn
from transformers import DynamicCache, StaticCache

import vlmprune
from vlmprune import Cut, Decoder, Method, Reduction
from vlmprune.parts.attention import Visible, attention_mass
from vlmprune.parts.taps import Hidden, ReceivedAttention, TextAttention, VisionAttention
from vlmprune.parts.vector_taps import TowerFeatures

F64 = torch.float64


class See(Method):
    """Looks, and keeps everything."""

    def __init__(self, *taps, layer=0):
        self.taps, self.layer, self.seen = taps, layer, None

    def cuts(self, facts):
        return [Cut(Decoder(self.layer), self.taps, self.look)]

    def look(self, seen, layout):
        self.seen, self.layout = seen, layout
        return Reduction(layout.alive.clone(), list(layout.alive_counts))


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 3, "image", 2], [(40, 24), (24, 24)])


def eager(**options):
    return tiny.shared(attn="eager", **options)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tower_attention_is_what_eager_attention_computes(tiny_model, tower, family, dtype):
    options = {"tower": tower, "family": family, "dtype": dtype}
    model, plain, first = tiny_model(**options), eager(**options), int(tower == "clip")
    prompt = prompt_of(model)
    rows = ["patches", "all", "cls"] if first else ["patches", "all"]
    spy = See(*[VisionAttention(layer, row) for layer in range(6) for row in rows])
    with torch.no_grad(), vlmprune.patch(model, spy):
        model(**prompt)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-6  # transformers takes the softmax in float32
    views, start, pixels = [], 0, prompt["pixel_values"]
    for image, grid in zip(pixels, spy.layout.grids, strict=True):
        views += [image] if image.ndim == 3 else list(image[: grid.views])
    with torch.no_grad():
        attentions = plain.model.vision_tower(torch.stack(views), output_attentions=True).attentions
    for tap, got in spy.seen.items():
        mean = attentions[tap.layer].mean(1)
        want = {
            "cls": mean[:, 0, first:],
            "patches": mean[:, first:, first:].mean(1),
            "all": mean[:, :, first:].mean(1),
        }
        want = want[tap.rows]
        twin = mean[:, first:, 0] if tap.rows == "cls" and first else mean[:, first:, first:].mean(2)
        start = 0
        for i, grid in enumerate(spy.layout.grids):
            patches = ~grid.newline
            numbers = start * 16 + grid.source[patches]
            same(got[i, : grid.tokens][patches], want.flatten()[numbers], tolerance)
            if tap.rows == "cls":
                far(got[i, : grid.tokens][patches], twin[:, :16].flatten()[numbers], tolerance)
            start += grid.views


@pytest.mark.parametrize("rows", ["last", "all"])
@pytest.mark.parametrize("options", [
    {}, {"family": "llava_next"}, {"text": "qwen2"}, {"text": "mistral", "sliding_window": 9}, {"tower": "siglip"},
    {"text": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
], ids=str)  # fmt: skip
def test_decoder_attention_is_what_eager_attention_computes(tiny_model, options, rows):
    model, plain = tiny_model(dtype=F64, **options), eager(dtype=F64, **options)
    prompt = prompt_of(model)
    spy = See(*[TextAttention(layer, rows) for layer in range(3)], layer=3)
    with torch.no_grad(), vlmprune.patch(model, spy):
        model(**prompt)
        attentions = plain(**prompt, output_attentions=True).attentions
    columns = (prompt["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    for tap, got in spy.seen.items():
        mean = attentions[tap.layer][0].mean(0)
        want = (mean[-1] if rows == "last" else mean.mean(0))[columns]
        twin = (mean[-2] if rows == "last" else mean[:-1].mean(0))[columns]
        got = torch.cat([got[i, : g.tokens] for i, g in enumerate(spy.layout.grids)])
        same(got, want, 1e-6)
        far(got, twin, 1e-6)


def test_decoder_attention_after_a_cut_is_that_of_the_short_sequence(tiny_model):
    for positions in ("contiguous", "original"):
        model, rules = tiny_model(dtype=F64), [Rule(0, 2, positions=positions), Rule(2, 3, 2, positions=positions)]
        prompt = prompt_of(model)
        spy = See(TextAttention(1), TextAttention(2), TextAttention(2, "all"), layer=3)
        with torch.no_grad(), vlmprune.patch(model, [probes.rules(*rules), spy]):
            model(**prompt)
        with torch.no_grad():
            result = reference.run(model, prompt, rules)
        columns = (prompt["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
        for tap, got in spy.seen.items():
            x, kept = result.inputs[tap.layer]
            with torch.no_grad():
                mean = reference.probabilities(model, tap.layer, x, result.positions[tap.layer]).mean(0)
            row = mean[-1] if tap.rows == "last" else mean.mean(0)
            # tokens that live to see layer 3
            alive = [c for c in columns if c in result.inputs[3][1]]
            want = torch.stack([row[kept.index(c)] for c in alive])
            same(got[spy.layout.alive], want)
            far(got[spy.layout.alive], want.flip(0))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("options", [
    {}, {"text": "mistral", "sliding_window": 9},
    {"text": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
], ids=["llama", "mistral-window", "qwen2-mixed"])  # fmt: skip
def test_decoder_attention_of_a_later_turn_is_shared_with_what_was_said_before(tiny_model, options, kind):
    """Rows and columns are those of the new turn; what the cache holds takes its part of the softmax."""
    model = tiny_model(dtype=F64, **options)
    rules = [Rule(0, 2), Rule(2, 3, 2, positions="original")]
    turns = [prompt_of(model), tiny.prompt(model, [2, "image", 1, "image", 4], [(24, 60), (24, 24)], seed=1)]
    taps = [TextAttention(layer, rows) for layer in (1, 2) for rows in ("last", "instruction", "all")]
    spy, text = See(*taps, ReceivedAttention(2), layer=3), model.config.text_config
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=99)
    with torch.no_grad(), vlmprune.patch(model, [probes.rules(*rules), spy]):
        for turn in turns:
            model(**(turn | {"attention_mask": None}), **{CACHE: cache})
        whole = {key: torch.cat([turn[key] for turn in turns], int(key != "pixel_values")) for key in turns[0]}
        result = reference.run(model, whole, [], turns=[(2, rules)] * 2)
    start, last = turns[0]["input_ids"].shape[1], whole["input_ids"].shape[1] - 1
    images = [range(start + 2, start + 18), range(start + 19, start + 35)]
    for tap, got in spy.seen.items():
        x, kept = result.inputs[tap.layer]
        with torch.no_grad():
            mean = reference.probabilities(model, tap.layer, x, result.positions[tap.layer]).mean(0)
        for i, image in enumerate(images):
            alive = [c for c in image if c in result.inputs[3][1]]
            here = [kept.index(c) for c in alive]

            def received(columns, mean=mean, kept=kept, here=here):
                return mean[[r for r, c in enumerate(kept) if c in columns]].mean(0)[here]

            rows = {
                "last": [last],
                "instruction": range(last - 3, last + 1),
                "all": range(start, last + 1),
                "whole": range(last + 1),
            }
            if isinstance(tap, TextAttention):
                want = received(rows[tap.rows])
                twin = received(rows["whole" if tap.rows == "all" else "all"])
            else:
                want = torch.stack((received(image), received(rows["instruction"])), -1)
                twin = want.flip(-1)
            # norms round to float32, where a difference in the last bit of float64 may flip a value
            same(got[i][spy.layout.alive[i]], want, 1e-7)
            far(got[i][spy.layout.alive[i]], twin, 1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_taps_in_a_padded_batch_are_those_of_each_prompt_alone(tiny_model, side):
    model = tiny_model(family="llava_next", dtype=F64, text="mistral", sliding_window=30)
    prompts = [prompt_of(model), tiny.prompt(model, [9], []), tiny.prompt(model, [2, "image", 11], [(20, 70)], 3)]
    taps = [TextAttention(1), TextAttention(1, "all"), VisionAttention(3), VisionAttention(4, "patches")]
    taps += [TowerFeatures(4)]
    spy, alone = See(*taps, layer=2), []
    with torch.no_grad(), vlmprune.patch(model, spy):
        for p in (prompts[0], prompts[2]):
            model(**p)
            alone += [{t: v[i][spy.layout.patches[i]] for t, v in spy.seen.items()} for i in range(len(spy.layout))]
        model(**probes.step_inputs(tiny.batch(prompts, side)))
    for i, want in enumerate(alone):
        for tap in taps:
            same(spy.seen[tap][i][spy.layout.patches[i]], want[tap])


def test_tower_features_are_its_hidden_states(tiny_model):
    """The input of a layer; where the last one makes the features, what it gives."""
    for options, layers in (({}, (2, 5)), ({"family": "llava_onevision", "tower": "siglip", "text": "qwen2"}, (2, 6))):
        model, spy = tiny_model(dtype=F64, **options), See(*[TowerFeatures(layer) for layer in layers])
        prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)], together=True)
        with torch.no_grad(), vlmprune.patch(model, spy):
            model(**prompt)
            views = prompt["pixel_values"].flatten(0, -4)
            states = (
                tiny.shared(dtype=F64, **options).model.vision_tower(views, output_hidden_states=True).hidden_states
            )
        for layer, (tap, got) in zip(layers, spy.seen.items(), strict=True):
            grid, first = spy.layout.grids[0], int(options == {})
            patches = ~grid.newline
            want = states[tap.layer][:, first:].flatten(0, 1)[grid.source[patches]]
            same(got[0, : grid.tokens][patches], want)
            far(got[0, : grid.tokens][patches], states[layer - 1][:, first:].flatten(0, 1)[grid.source[patches]])


def test_hidden_at_decoder_0_are_the_projected_features(tiny_model):
    for family in ("llava", "llava_next"):
        model, spy, deep = tiny_model(family=family, dtype=F64), See(Hidden()), See(Hidden(), layer=2)
        prompt = prompt_of(model)
        with torch.no_grad():
            features = reference.image_features(model, prompt)
            result = reference.run(model, prompt, [])
            with vlmprune.patch(model, [spy, deep]):
                model(**prompt)
        columns = (prompt["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
        same(spy.seen[Hidden()][spy.layout.alive], torch.cat(features))
        same(deep.seen[Hidden()][spy.layout.alive], result.inputs[2][0][columns])
        far(deep.seen[Hidden()][spy.layout.alive], torch.cat(features))


def test_scores_are_float32_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model, spy = tiny.model(dtype=dtype), See(VisionAttention(2), TextAttention(1), layer=2)
        with torch.no_grad(), vlmprune.patch(model, spy):
            model(**prompt_of(model))
        assert {v.dtype for v in spy.seen.values()} == {torch.float32}
        assert all(torch.isfinite(v).all() for v in spy.seen.values())


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("grouped", [1, 3])
def test_attention_mass_in_chunks(rows, grouped):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2 * grouped, rows, 5, generator=g, dtype=F64)
    k = torch.randn(2, 2, 40, 5, generator=g, dtype=F64)
    at, real = torch.randint(40, (2, rows), generator=g), torch.rand(2, 40, generator=g) < 0.7
    real[:, 0] = True
    seen, visible = Visible(at, real), (torch.arange(40) <= at[..., None]) & real[:, None]
    visible = visible[:, None]
    weight = torch.rand(2, rows, generator=g, dtype=F64)
    full = q @ k.repeat_interleave(grouped, 1).transpose(2, 3) * 0.3
    want = full.masked_fill(~visible, -torch.inf).softmax(-1).mean(1)
    same(attention_mass(q, k, 0.3, seen, weight), (want * weight[..., None]).sum(1), 1e-12)
    same(attention_mass(q, k, 0.3), full.softmax(-1).mean((1, 2)), 1e-12)
    far(attention_mass(q, k, 0.3, seen), (want * weight[..., None]).sum(1), 1e-12)


def test_a_tap_costs_nothing_when_no_method_asks(tiny_model):
    """The same number of projections as the plain model, plus one query and one key per tap."""
    model = copy.deepcopy(tiny_model())
    prompt, calls = prompt_of(model), []
    for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).register_forward_pre_hook(lambda m, a: calls.append(m))

    def count():
        calls.clear()
        with torch.no_grad():
            model(**prompt)
        return len(calls)

    plain = count()
    for method, options, extra in (
        ("random", {}, 0),
        ("fopru", {}, 2),
        ("vtc_cls", {"start_layer": 4}, 2),
        ("fastv", {}, 2),
    ):
        with vlmprune.patch(model, method, keep=5, **options):
            assert count() == plain + extra, method


def test_a_tap_nobody_measures_raises(tiny_model, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(TextAttention, "misfit", lambda *_: None)  # else refused before anything runs
    with (
        vlmprune.patch(model, See(TextAttention(2), layer=1)),
        pytest.raises(vlmprune.CutNotRunError, match="TextAttention"),
    ):
        model(**prompt_of(model))


class LowRank(nn.Module):
    """Stands for a LoRA layer: its output is not its base weight times the input, and `weight` lies."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)) / 2)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=torch.Generator().manual_seed(1)) / 2)

    @property
    def weight(self):
        raise AssertionError("taps must call the projection, not read its weight")

    def forward(self, x):
        return self.base(x) + (x @ self.down.to(x).T) @ self.up.to(x).T


@pytest.mark.parametrize("method", ["vtc_cls", "fopru", "fastv"])
@torch.no_grad()
def test_taps_call_projections_that_an_adapter_replaced(method):
    model = tiny.model(dtype=F64)
    prompt = prompt_of(model)
    with vlmprune.patch(model, method, keep=5) as handle:
        model(**prompt)
        before = handle.trace.cuts[0].scores
    merged = copy.deepcopy(model)
    layers = [(*m.model.vision_tower.encoder.layers, *m.model.language_model.layers) for m in (model, merged)]
    for mine, its in zip(*layers, strict=True):
        for name in ("q_proj", "k_proj"):
            low = LowRank(getattr(mine.self_attn, name)).double()
            setattr(mine.self_attn, name, low)
            getattr(its.self_attn, name).weight += low.up @ low.down
    scores = []
    for made in (model, merged):
        with vlmprune.patch(made, method, keep=5) as handle:
            made(**prompt)
            scores.append(handle.trace.cuts[0].scores)
    same(*scores)
    far(scores[0], before)
