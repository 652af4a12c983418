"""Any prompt, picture size and budget: what pruning promises holds, or it is refused in words."""

from __future__ import annotations

import shutil
from collections import Counter

import probes
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmprune

F64 = torch.float64
FAMILIES = {
    "llava": {}, "llava_next": {"family": "llava_next"},
    "llava_onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
}  # fmt: skip
# methods that read the tower, the decoder, nothing, and one that merges; all run without a [CLS] token
METHODS = ("fopru", "fastv", "random", "pool")
few = settings(
    derandomize=True, deadline=None, database=None, max_examples=8, suppress_health_check=list(HealthCheck)
)  # fmt: skip
sides = st.sampled_from((1, 2, 7, 24, 30, 60, 97, 2000))
# what a processor makes of a picture 2000 times as long as wide is a matter of the model's grids: sizes are enough
sizes = st.tuples(sides, sides)
keeps = st.sampled_from((1, 2, 5, 10**6, 1e-9, 0.3, 0.999, 1.0))


def shared(family):
    return tiny.shared(dtype=F64, **FAMILIES[family])


@st.composite
def prompts(draw):
    """Parts of a prompt, with pictures anywhere and texts of any length between, and the sizes of its pictures."""
    parts = draw(st.lists(st.one_of(st.just("image"), st.integers(1, 9)), min_size=1, max_size=5))
    return [*parts, draw(st.integers(1, 4))], [draw(sizes) for _ in range(parts.count("image"))]


def expected(keep, patches):
    """The promise of `keep`, in its own words: a count, capped; a fraction, floored, at least 1."""
    return min(keep, patches) if isinstance(keep, int) else max(1, int(patches * keep))


def check_trace(trace, keep, method="random"):
    for image, grid in enumerate(trace.grids):
        kept = trace.kept(image)
        assert kept == sorted(set(kept))
        assert all(0 <= token < grid.tokens for token in kept)
        counts = trace.counts[image]
        assert counts["patches_before"] == grid.patches
        most = expected(keep, grid.patches)
        if method == "pool":  # the largest grid of cells within the budget; a fraction leaves one of every plane
            assert 1 <= counts["patches_after"] <= max(most, len(grid.planes))
        else:
            assert counts["patches_after"] == most
        assert len(kept) == counts["patches_after"] + counts["newlines_after"]


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(data=st.data())
def test_any_batch(family, data):
    """Lengths come back, counts are as promised, and every row is what it is alone."""
    model = shared(family)
    given_prompts = data.draw(st.lists(prompts(), min_size=1, max_size=3))
    keep, method = data.draw(keeps), data.draw(st.sampled_from(METHODS))
    # newlines compete in fastv, as in its paper
    options = {"newlines": "all"} if method == "fastv" else {}
    rows = [tiny.prompt(model, *p, seed=i, together=True) for i, p in enumerate(given_prompts)]
    batch = probes.step_inputs(tiny.batch(rows, data.draw(st.sampled_from(("left", "right")))))
    with torch.no_grad(), vlmprune.patch(model, method, keep=keep, **options) as handle:
        alone, kept = [], []
        for row in rows:
            alone.append(model(**row).logits[0])
            assert alone[-1].shape == (row["input_ids"].shape[1], tiny.VOCAB)
            if "pixel_values" in row:
                check_trace(handle.trace, keep, method)
                kept += [handle.trace.kept(i) for i in range(len(handle.trace.grids))]
        out = model(**batch)
        assert out.logits.shape == (*batch["input_ids"].shape, tiny.VOCAB)
        for i, want in enumerate(alone):
            probes.same(out.logits[i][batch["attention_mask"][i].bool()], want)
        if "pixel_values" in batch:
            assert [handle.trace.kept(i) for i in range(len(handle.trace.grids))] == kept
            assert max(handle.trace.kv_lengths) <= batch["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(data=st.data())
def test_a_budget_of_everything_is_the_plain_model_bit_by_bit(family, data):
    model = shared(family)
    rows = [tiny.prompt(model, *data.draw(prompts()), seed=i, together=True) for i in range(2)]
    batch = probes.step_inputs(tiny.batch(rows, data.draw(st.sampled_from(("left", "right")))))
    keep, method = data.draw(st.sampled_from((1.0, 10**6))), data.draw(st.sampled_from(("fopru", "fastv", "random")))
    with torch.no_grad():
        plain = model(**batch).logits
        with vlmprune.patch(model, method, keep=keep):
            assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (1, 24), (3, 2000), (1999, 2)], ids=str)
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_extreme_pictures(family, size):
    """The traced layout has as many tokens as the model itself makes, whatever the picture's shape."""
    model = shared(family)
    prompt = tiny.prompt(model, [3, "image", 2], [size])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3) as handle:
        logits = model(**prompt).logits
        assert logits.shape[1] == prompt["input_ids"].shape[1]
        assert logits.isfinite().all()
        check_trace(handle.trace, 3)
        assert handle.trace.grids[0].tokens == tiny.tokens_per_image(model, [size])[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.0000001, float("nan"), float("inf"), float("-inf"), -(10**30)])
def test_budgets_out_of_range(method, keep):
    with pytest.raises(ValueError, match="keep="):
        vlmprune.patch(shared("llava"), method, keep=keep)


# NaN and infinity


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["fopru", "fastv", "random", "pool", "tome"])
def test_pixels_that_are_no_numbers(family, value, method):
    """One bad pixel in the second picture: told at once, by forward and by generate, and the model still works."""
    model = tiny.shared(**FAMILIES[family])
    prompt = tiny.prompt(model, [3, "image", 2, "image", 2], [(24, 24), (24, 24)], together=True)
    bad = prompt | {"pixel_values": prompt["pixel_values"].clone()}
    bad["pixel_values"][1].view(-1)[7] = value
    with torch.no_grad(), vlmprune.patch(model, method, keep=0.4):
        good = model(**prompt).logits
        told = (
            rf"NaN or infinite numbers in the features of image 1: '{method}' cannot.*pixel_values.*bfloat16 or float32"
        )
        with pytest.raises(ValueError, match=told):
            model(**bad)
        with pytest.raises(ValueError, match=told):
            model.generate(**bad, max_new_tokens=2)
        assert torch.equal(model(**prompt).logits, good)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", ["fopru", "random"])
def test_pixels_of_the_original_package(family, method):
    original = pytest.importorskip("original")
    model, twin = original.pair(family)
    prompt, _ = original.prompt(twin, [3, "image", 2], [(40, 24)])
    bad = prompt | {"images": [x.clone() for x in prompt["images"]]}
    bad["images"][0].view(-1)[7] = float("nan")
    if family == "llava":
        bad["images"] = torch.stack(bad["images"])
    with torch.no_grad(), vlmprune.patch(model, method, keep=3) as handle:
        with pytest.raises(ValueError, match=rf"embeddings, which hold features of its images: '{method}'"):
            model(**bad)
        model(**prompt)
        assert len(handle.trace.kept_patches(0)) == 3


def test_a_damaged_checkpoint_on_the_command_line(cli, llava, picture, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    next(w for name, w in weights.items() if "projector" in name).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    argv = ["--image", picture, "--prompt", "what is it ?", "--model", tmp_path / "damaged", "--max-new-tokens", 2]
    code, out, err = cli("run", *argv)
    assert (code, out) == (2, "")
    assert "NaN or infinite numbers in the features of image 0: 'fopru' cannot" in err.splitlines()[-1]


def test_features_that_are_no_numbers(tiny_model):
    """Given ready, as `generate` gives them."""
    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3):
        ready = model.model.get_image_features(prompt.pop("pixel_values"), return_dict=True)
        ready.pooler_output[0][2, 3] = float("inf")
        with pytest.raises(ValueError, match="NaN or infinite numbers in the features of image 0: "):
            model(**prompt, mm_encoder_outputs={"image": ready})


def test_a_tower_that_overflows(tiny_model):
    """What a method sees of the tower may be broken where the features are not: fopru reads the attention behind."""
    model = tiny.model()
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    with torch.no_grad(), vlmprune.patch(model, "fopru", keep=3) as handle:
        (tap,) = handle._plan.tower_taps
        layers[tap.layer].self_attn.k_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"VisionAttention|features of image 0"):
            model(**tiny.prompt(model, [3, "image", 2], [(24, 24)]))


@pytest.mark.parametrize("method", ["fastv", "transprune"])
def test_a_decoder_that_overflows(method):
    model = tiny.model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, method, keep=3):
        model.model.language_model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
        with pytest.raises(ValueError, match=rf"cut of '{method}' at decoder layer \d sees NaN.*cannot tell tokens"):
            model(**prompt)


class BadScores(vlmprune.Method):
    """Scores of which one is no number; `promised` says whether the method knows its counts beforehand."""

    def __init__(self, score, promised):
        self.score, self.promised = score, promised

    def cuts(self, facts):
        return [vlmprune.Cut(vlmprune.Decoder(0), (), self.reduce)]

    def reduce(self, seen, layout):
        scores = torch.arange(layout.alive.shape[1]).expand(layout.alive.shape).double().clone()
        scores[0, 4] = self.score
        keep = scores >= 10
        keep[0, 4] = True
        return vlmprune.Reduction(keep, [int(keep.sum())] if self.promised else None, scores=scores)


@pytest.mark.parametrize("promised", [True, False])
def test_scores_that_are_no_numbers(tiny_model, promised):
    """NaN is refused; infinity is a score like others ("always", "never")."""
    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    with torch.no_grad():
        with vlmprune.patch(model, BadScores(float("nan"), promised)), pytest.raises(ValueError, match="'BadScores'"):
            model(**prompt)
        with vlmprune.patch(model, BadScores(float("inf"), promised)) as handle:
            model(**prompt)
            assert handle.trace.kept(0) == [4, *range(10, 16)]


def test_looking_for_numbers_costs_no_read(tiny_model, monkeypatch):
    """The flags ride with the counts of placeholders: one read of the device in all."""
    model = tiny_model()
    prompt = {k: v for k, v in tiny.prompt(model, [3, "image", 2], [(24, 24)]).items() if k != "attention_mask"}
    reads, original = Counter(), torch.Tensor.tolist
    with torch.no_grad(), vlmprune.patch(model, "fopru", keep=3):
        model(**prompt)
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.update([x.dtype]) or original(x))
        model(**prompt)
    assert reads == {torch.long: 1}
