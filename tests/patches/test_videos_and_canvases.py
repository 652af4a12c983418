"""LLaVA-OneVision and LLaVA-NeXT-Video: shrunken canvases, several images, videos, and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.patches import family_of

F64 = torch.float64
LARGE, SMALL = (90, 96), (20, 70)
VIDEO_FAMILIES = {
    "llava_onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
    "llava_next_video": {"family": "llava_next_video"},
}


def onevision(**options):
    return tiny.shared(**VIDEO_FAMILIES["llava_onevision"], dtype=F64, **options)


def noise(*shape):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(3))


def rebuilt(grid, features, newline):
    """`(tokens, dim)` by the layout: a weighted sum of the patches that it names."""
    made = (features.flatten(0, 1)[grid.parts] * grid.weights[..., None]).sum(1)
    made[grid.newline] = newline
    return made


# Layouts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_the_layout_of_an_image_rebuilds_the_models_packing(size):
    model = onevision()
    grid = family_of(model).image_grid(model.model, size)
    features, newline = noise(grid.views, 16, 3), -noise(3)
    (packed,), _ = model.model.pack_image_features([features], [size], image_newline=newline)
    torch.testing.assert_close(rebuilt(grid, features, newline), packed, rtol=0, atol=1e-6)
    assert torch.equal(grid.newline, (packed == newline).all(1))
    canvas = ~grid.newline & (grid.plane == 1)
    if not canvas.any():
        return
    rows, cols = grid.planes[1]
    assert (grid.row * cols + grid.col)[canvas].tolist() == list(range(rows * cols))
    assert grid.row[grid.newline].tolist() == list(range(rows))
    assert ((grid.view > 0) == (grid.plane > 0)).all()
    # a shrunken token lies in the crop of its centre, and is a mean of patches
    y, x = grid.centre[canvas].round().long().unbind(1)
    assert torch.equal(grid.view[canvas], 1 + y // 4 * grid.crops[1] + x // 4)
    assert (grid.blend is not None) == (grid.pitch[1] != (1.0, 1.0))
    torch.testing.assert_close(grid.weights.sum(1), torch.ones(grid.tokens, dtype=F64))


def test_large_canvases_are_shrunk_and_small_ones_are_not():
    family, inner = family_of(onevision()), onevision().model
    large, small = family.image_grid(inner, LARGE), family.image_grid(inner, SMALL)
    assert large.planes[1] == (12, 12)
    assert large.blend is not None
    assert small.blend is None
    assert (family.image_grid(inner, None).tokens, family.image_grid(inner, None).newlines) == (17, 1)


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_the_layout_of_a_video_rebuilds_the_models_packing(family, side):
    model = tiny.model(**VIDEO_FAMILIES[family], dtype=F64)
    model.config.vision_config.image_size = side * tiny.PATCH
    model.model.vision_resampler = type(model.model.vision_resampler)(model.config) if "next" in family else None
    grid = family_of(model).video_grid(model.model, 3)
    features = noise(3, side * side, 3)
    pooled = model.model.vision_resampler(features) if "next" in family else model.model.apply_pooling(features)
    small = -(-side // 2) if "onevision" in family else side // 2
    assert grid.planes == ((small, small),) * 3
    assert (grid.frames, grid.views, grid.newlines) == (3, 3, int("onevision" in family))
    assert grid.newline.nonzero().flatten().tolist() == [grid.tokens - 1] * grid.newlines
    got = rebuilt(grid, features, noise(3))[: grid.patches]
    torch.testing.assert_close(got, pooled.flatten(0, 1), rtol=0, atol=1e-6)
    patches = ~grid.newline
    assert grid.view[patches].tolist() == grid.plane[patches].tolist() == [f for f in range(3) for _ in range(small**2)]
    assert (grid.row * small + grid.col)[patches].tolist() == list(range(small**2)) * 3


@pytest.mark.parametrize(
    ("mode", "stride", "told"), [("max", 2, "'max' is not supported"), ("average", 4, "not unders")]
)
def test_pooling_that_is_not_understood_is_refused(mode, stride, told):
    model = tiny.model("llava_next_video")
    model.config.spatial_pool_mode, model.config.spatial_pool_stride = mode, stride
    model.model.vision_resampler = type(model.model.vision_resampler)(model.config)
    prompt = tiny.prompt(model, [3, "video", 4], [], videos=[2])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=2), pytest.raises(UnsupportedError, match=told):
        model(**prompt)


class Spy(vlmprune.Method):
    """Sees the distinctness of the features, and keeps everything."""

    found: list = []  # noqa: RUF012

    def cuts(self, facts):
        from vlmprune.parts.taps import Distinctness, VisionAttention

        taps = (Distinctness(facts.feature_layer + 1), VisionAttention(facts.feature_layer, "patches"))
        return [vlmprune.Cut(vlmprune.Decoder(0), taps, self.reduce)]

    def reduce(self, seen, layout):
        Spy.found.append((seen, layout))
        return vlmprune.Reduction(layout.alive.clone(), list(layout.alive_counts))


def packed_scores(model, scores, sizes, frames):
    """`(views, 16)` scores through the model's own packing, image by image, then video by video; NaN at newlines."""
    gap, start, made = torch.tensor([torch.nan], dtype=F64), 0, []
    for size in sizes:
        views = family_of(model).grid(model.model, size)[0]
        made.append(model.model.pack_image_features([scores[start : start + views, :, None]], [size], gap)[0][0][:, 0])
        start += views
    for count in frames:
        pooled = model.model.apply_pooling(scores[start : start + count, :, None]).flatten()
        made.append(torch.cat((pooled, gap)))
        start += count
    return made


@pytest.mark.parametrize("layer", [-1, -2])
def test_tower_scores_are_shrunk_as_the_features_are(layer):
    """Images and videos mixed: values arrive at their tokens; the tap behind the last layer sees what is projected."""
    model = tiny.model(**VIDEO_FAMILIES["llava_onevision"], dtype=F64)
    model.config.vision_feature_layer = layer
    parts = ["video", 2, "image", 3, "image", "video", 4]
    prompt, projected = tiny.prompt(model, parts, [LARGE, SMALL], videos=[3, 3]), []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: projected.append(args[0]))
    with torch.no_grad(), vlmprune.patch(model, Spy()):
        model(**prompt)
    hook.remove()
    seen, layout = Spy.found.pop()
    features = torch.cat(projected)
    scores = -torch.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)
    assert (layout.sample, layout.ordinal, [g.frames for g in layout.grids]) == ([0] * 4, [0, 1, 2, 3], [0, 0, 3, 3])
    ids = prompt["input_ids"][0]
    for token, items in ((tiny.IMAGE, (0, 1)), (tiny.VIDEO, (2, 3))):
        columns = [c for i in items for c in layout.position[i][layout.alive[i]].tolist()]
        assert columns == (ids == token).nonzero().flatten().tolist()
    for i, want in enumerate(packed_scores(model, scores, [LARGE, SMALL], [3, 3])):
        got = next(iter(seen.values()))[i, : len(want)]
        patches = ~want.isnan()
        assert torch.equal(patches, ~layout.grids[i].newline)
        torch.testing.assert_close(got[patches], want[patches], rtol=0, atol=1e-6)


def test_one_of_several_images_has_no_crops():
    model = onevision()
    with torch.no_grad(), vlmprune.patch(model, "random", keep=5) as handle:
        model(**tiny.prompt(model, [2, "image", "image", 3], [LARGE, SMALL], together=True))
        assert [grid.views for grid in handle.trace.grids] == [1, 1]
        assert [c["patches_after"] for c in handle.trace.counts] == [5, 5]
        # without the number of images per prompt the model takes each for one alone
        model(**tiny.prompt(model, [2, "image", "image", 3], [LARGE, SMALL]))
        assert [grid.views for grid in handle.trace.grids] == [17, 4]


# Budgets of videos


def frames_kept(trace, video=0):
    grid = trace.grids[video]
    return [sum(int(grid.view[t]) == f for t in trace.kept_patches(video)) for f in range(grid.frames)]


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_budgets_of_a_video_are_per_frame_or_of_the_whole(family):
    model = tiny.shared(**VIDEO_FAMILIES[family])
    prompt = tiny.prompt(model, [3, "video", 4], [], videos=[5])
    kept = {}
    for scope in ("view", "image"):
        for keep in (0.5, 12):
            with torch.no_grad(), vlmprune.patch(model, "fopru", keep=keep, scope=scope) as handle:
                model(**prompt)
            kept[scope, keep] = frames_kept(handle.trace)
    assert kept["view", 0.5] == [2] * 5  # of 4 patches a frame
    assert kept["view", 12] == [3, 3, 2, 2, 2]
    assert (sum(kept["image", 0.5]), sum(kept["image", 12])) == (10, 12)  # of 20 in all
    assert kept["image", 12] != kept["view", 12]


@pytest.mark.parametrize("policy", ["all", "row", "none"])
def test_the_newline_of_a_video(policy):
    model = onevision()
    with torch.no_grad(), vlmprune.patch(model, "fopru", keep=1, newlines=policy) as handle:
        model(**tiny.prompt(model, [3, "video", 4], [], videos=[3]))
    assert handle.trace.counts[0]["patches_after"] == 1
    assert handle.trace.counts[0]["newlines_after"] == int(policy != "none")
    assert sum(frames_kept(handle.trace)) == 1


def test_a_video_in_a_disabled_block_is_left_alone():
    model = onevision()
    prompt = tiny.prompt(model, [3, "video", 4, "image"], [SMALL], videos=[2])
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "random", keep=1) as handle:
            assert not torch.equal(model(**prompt).logits, plain)
            with handle.disabled():
                assert torch.equal(model(**prompt).logits, plain)


def test_copies_and_unpatching():
    options = VIDEO_FAMILIES["llava_onevision"]
    model, prompt = (
        tiny.model(**options),
        tiny.prompt(tiny.shared(**options), [3, "video", "image"], [SMALL], videos=[2]),
    )
    vlmprune.patch(model, "fopru", keep=3)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        pruned = model(**prompt).logits
        plain = vlmprune.unpatch(model)(**prompt).logits
        assert not torch.equal(pruned, plain)
        for twin in twins:
            assert torch.equal(twin(**prompt).logits, pruned)
            assert twin.model.get_video_features.module is twin.model
            assert torch.equal(vlmprune.unpatch(twin)(**prompt).logits, plain)
            assert not {"get_image_features", "get_video_features"} & set(vars(twin.model))


# GlobalCom2 on a shrunken canvas


def test_globalcom2_works_on_the_shrunken_canvas():
    model, ratio, tau = onevision(), 0.4, 10.0
    prompt, projected = tiny.prompt(model, [3, "image", 4], [LARGE]), []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: projected.append(args[0]))
    with torch.no_grad(), vlmprune.patch(model, "globalcom2", keep=ratio, score="distinct") as handle:
        model(**prompt)
    hook.remove()
    (features,), (grid,) = projected, handle.trace.grids
    scores = -torch.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)
    (packed,) = packed_scores(model, scores, [LARGE], [])
    rows, cols = grid.planes[1]
    canvas = packed[16:].view(rows, cols + 1)[:, :-1]
    small = scores[0].view(4, 4)
    want = set(small.flatten().topk(int(16 * ratio)).indices.tolist())
    guide = functional.interpolate(small[None, None], (rows, cols), mode="bilinear")[0, 0]
    # one cell of the thumbnail per crop (4 x 4 crops of a 4 x 4 thumbnail)
    share = (small.flatten() / tau).softmax(0)
    ratios = (ratio * (1 + share - share.mean())).clamp(max=1)
    crop = (grid.view - 1)[16:].view(rows, cols + 1)[:, :-1]
    for j in range(16):
        mine = crop == j
        mixed = sum(functional.normalize(x[mine], dim=0) for x in (canvas, guide))
        best = mixed.topk(int(mine.sum() * ratios[j])).indices
        y, x = (z[best] for z in mine.nonzero().unbind(1))
        want |= set((16 + y * (cols + 1) + x).tolist())
    assert handle.trace.kept_patches() == sorted(want)
    assert 0 < len(want) < grid.patches


def test_globalcom2_repeats_no_released_code_on_a_shrunken_canvas():
    model = onevision()
    told = pytest.raises(UnsupportedError, match="knows no shrunken canvas")
    with torch.no_grad(), vlmprune.patch(model, "globalcom2", score="distinct", parity="released"):
        model(**tiny.prompt(model, [3, "image", 4], [SMALL]))
        with told:
            model(**tiny.prompt(model, [3, "image", 4], [LARGE]))


# Refusals


@pytest.mark.parametrize(
    ("name", "way"), [("vtc_cls", "fallback='received'"), ("globalcom2", "score='distinct'"), ("todre", "pivot='mean'")]
)
def test_methods_that_need_a_cls_token_are_refused_by_name(name, way):
    with pytest.raises(UnsupportedError, match=f"{name} .*this tower has none; .*{way}"):
        vlmprune.patch(onevision(), name, keep=0.5)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_another_aspect_ratio_per_call_is_refused(way):
    model = onevision()
    prompt = tiny.prompt(model, [3, "image", 4], [LARGE]) | {"vision_aspect_ratio": "anyres_max_4"}
    with (
        torch.no_grad(),
        vlmprune.patch(model, "random", keep=3),
        pytest.raises(UnsupportedError, match="anyres_max_4"),
    ):
        model(**prompt) if way == "forward" else model.generate(**prompt, max_new_tokens=1)


def test_vipllava_refuses_other_layers_per_call():
    model = tiny.shared(family="vipllava")
    prompt = tiny.prompt(model, [3, "image", 4], [(24, 24)])
    names = ("vision_feature_layer", "vision_feature_layers")  # newer and older transformers
    (name,) = set(inspect.signature(type(model.model).forward).parameters) & set(names)
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3), pytest.raises(UnsupportedError, match="per call"):
        model.model(**prompt, **{name: [-3, -4, 1]})


def test_labels_on_placeholders_of_videos_are_refused():
    model = onevision()
    prompt = tiny.prompt(model, [3, "video", 4], [], videos=[2])
    with vlmprune.patch(model, "random", keep=3):
        with pytest.raises(ValueError, match="labels on visual placeholders"):
            model(**prompt, labels=prompt["input_ids"])
        model(**prompt, labels=prompt["input_ids"].masked_fill(prompt["input_ids"] == tiny.VIDEO, -100))


def test_pixels_and_features_at_once_are_refused():
    model = onevision()
    prompt = tiny.prompt(model, [3, "video", 4], [], videos=[2])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3):
        ready = {"video": model.model.get_video_features(prompt["pixel_values_videos"], return_dict=True)}
        with pytest.raises(ValueError, match="not both"):
            model(**prompt, mm_encoder_outputs=ready)
        asked = {name: value for name, value in prompt.items() if name != "pixel_values_videos"}
        given = model(**asked, mm_encoder_outputs=ready).logits
        assert torch.equal(given, model(**prompt).logits)


def test_features_of_an_unpatched_model_are_refused():
    model = onevision()
    prompt = tiny.prompt(model, [3, "video", 4], [], videos=[2])
    ready = {"video": model.model.get_video_features(prompt.pop("pixel_values_videos"), return_dict=True)}
    told = pytest.raises(UnsupportedError, match="these video features are not as the patched model computed them")
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3), told:
        model(**prompt, mm_encoder_outputs=ready)


def test_image_models_read_no_videos():
    model = tiny.shared()
    prompt = tiny.prompt(model, [3, "image", 4], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3):
        ready = {"video": model.model.get_image_features(prompt["pixel_values"], return_dict=True)}
        with pytest.raises(UnsupportedError, match="video input of llava models is not supported"):
            model(input_ids=prompt["input_ids"], mm_encoder_outputs=ready)


def test_reference_features_are_the_models():
    """The helpers that other tests rely on see both kinds."""
    model = onevision()
    prompt = tiny.prompt(model, ["video", "image", 3], [SMALL], videos=[3])
    with torch.no_grad():
        image, video = reference.image_features(model, prompt), reference.video_features(model, prompt)
    counts = [(prompt["input_ids"] == token).sum() for token in (tiny.IMAGE, tiny.VIDEO)]
    assert [len(image[0]), len(video[0])] == counts
