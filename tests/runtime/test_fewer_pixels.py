"""`downsample` on a tower that packs pictures: a smaller picture, and nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import tiny_folders
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

import vlmprune
from vlmprune.eval import testbed
from vlmprune.patches import family_of
from vlmprune.runtime import answering, loading
from vlmprune.runtime.errors import UserError
from vlmprune.runtime.fewer_pixels import FewerPixels, fitted
from vlmprune.runtime.status import Bar
from vlmprune.spec import Job

SIZES = [(128, 128), (96, 208), (256, 48)]  # (width, height)
EDGE = 16  # pixels of a token


@pytest.fixture(scope="module")
def loaded():
    return loading.load(loading.find_model("scene-qwen"))


@pytest.fixture(scope="module")
def record():
    return next(r for r in testbed.questions("qwen") if r.category == "colour" and r.image.width > 1.5 * r.image.height)


def pictures():
    return [tiny_folders.noise_picture(*size, seed) for seed, size in enumerate(SIZES)]


def real(loaded, most=65536, least=1024):
    """The model's image processor with other bounds, built anew."""
    fields = loaded.processor.image_processor.to_dict()
    names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "resample")
    size = {"shortest_edge": least, "longest_edge": most}
    return Qwen2VLImageProcessorPil(size=size, **{name: fields[name] for name in names})


@pytest.mark.parametrize("budget", [0.25, 0.5, 20])
def test_every_picture_has_its_own_bound(loaded, budget):
    """Each is what the real processor makes of it alone under so many pixels: at most so many tokens."""
    made = FewerPixels(loaded.processor.image_processor, budget)([pictures()])
    wholes = [width * height // EDGE**2 for width, height in SIZES]
    start = 0
    for picture, whole, grid in zip(pictures(), wholes, made["image_grid_thw"].tolist(), strict=True):
        left = budget if isinstance(budget, int) else int(whole * budget)
        alone = real(loaded, left * EDGE**2, EDGE**2)([picture], return_tensors="pt")
        rows = grid[1] * grid[2]
        assert alone["image_grid_thw"][0].tolist() == grid
        assert 0.5 * left <= rows // 4 <= left
        torch.testing.assert_close(made["pixel_values"][start : start + rows], alone["pixel_values"], rtol=0, atol=0)
        start += rows
    assert start == len(made["pixel_values"])


def test_a_budget_of_all_tokens_is_the_picture(loaded):
    image_processor = loaded.processor.image_processor
    whole = image_processor(pictures(), return_tensors="pt")
    for budget in (1.0, 1000):
        made = FewerPixels(image_processor, budget)(pictures())
        assert torch.equal(made["pixel_values"], whole["pixel_values"])
        assert torch.equal(made["image_grid_thw"], whole["image_grid_thw"])


def test_the_processor_itself_is_left_alone(loaded):
    before = loaded.processor.image_processor
    job = Job("downsample", {"keep": 0.5})
    mine = answering.seen_by(loaded, job)
    assert isinstance(mine.processor.image_processor, FewerPixels)
    assert loaded.processor.image_processor is before
    assert mine.processor.tokenizer is loaded.processor.tokenizer
    assert answering.seen_by(loaded, Job("random", {"keep": 0.5})) is loaded
    with pytest.raises(UserError, match="downsample stands twice"):
        fitted(loaded.processor, vlmprune.spec.build("downsample", {"keep": 0.5}) * 2, family_of(loaded.model))


def test_the_tower_reads_fewer_patches_and_the_answer_is_that_of_the_smaller_picture(loaded, record):
    """Beside a method at the same budget: as many tokens, but the tower reads all of the picture for it."""
    read, model = [], loaded.model
    handle = model.model.visual.register_forward_pre_hook(
        lambda m, args, kw: read.append(len(args[0])), with_kwargs=True
    )
    prepare = partial(loading.model_inputs, visuals=[record.image], prompt="describe the picture .")
    jobs = [Job(name, {"keep": 0.25}) for name in ("downsample", "random")]
    try:
        with Bar(3) as bar:
            plain, (fewer, pruned) = answering.run_jobs(loaded, jobs, prepare(loaded), 12, bar, 0, prepare)
    finally:
        handle.remove()
    whole = record.image.width * record.image.height // EDGE**2
    (small,) = fewer.trace.grids
    assert read == [4 * whole, 4 * small.tokens, 4 * whole]
    assert fewer.counts == [{
        "patches_before": whole, "patches_after": small.tokens, "newlines_before": 0, "newlines_after": 0
    }]  # fmt: skip
    assert 0.6 * whole // 4 <= small.tokens <= whole // 4
    assert pruned.counts[0]["patches_after"] == whole // 4
    assert (fewer.name, pruned.name) == ("downsample (fewer pixels)", "random")

    smaller = real(loaded, whole // 4 * EDGE**2, EDGE**2)([record.image], return_tensors="pt")
    text = loaded.processor.tokenizer(
        f"<s>user: <vision> {'<image>' * small.tokens} </vision> describe the picture . assistant:",
        return_tensors="pt", add_special_tokens=False,
    )  # fmt: skip
    kinds = {"mm_token_type_ids": (text["input_ids"] == model.config.image_token_id).long()}
    with torch.no_grad():
        made = model.generate(**text, **smaller, **kinds, max_new_tokens=12, do_sample=False)
    said = loaded.processor.batch_decode(made[:, text["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert fewer.answer == said
    assert fewer.answer != plain


def test_with_a_method_behind_it(loaded, record):
    prepare = partial(loading.model_inputs, visuals=[record.image], prompt=record.question)
    options = {"downsample.keep": 0.5, "random.keep": 0.5}
    with Bar(2) as bar:
        _, (both,) = answering.run_jobs(
            loaded, [Job("downsample+random", options)], prepare(loaded), 2, bar, 0, prepare
        )
    (grid,) = both.trace.grids
    assert both.total["patches_after"] == grid.tokens // 2 < both.total["patches_before"] // 2


def test_refused_where_nobody_makes_the_picture_smaller(loaded):
    with pytest.raises(
        vlmprune.UnsupportedError, match="give its processor a smaller bound of pixels, as `vlmprune run`"
    ):
        vlmprune.patch(loaded.model, "downsample", keep=0.5)


def test_videos_are_not_made_smaller(loaded):
    from vlmprune.runtime.videos import VideoClip

    clip = VideoClip((Image.new("RGB", (64, 64)),) * 2, (0, 1), (0.0, 0.1), 2, 10.0)
    prepare = partial(loading.model_inputs, visuals=[clip], prompt="describe the picture .")
    with Bar(2) as bar, pytest.raises(UserError, match="downsample makes pictures of this model smaller"):
        answering.run_jobs(loaded, [Job("downsample", {"keep": 0.5})], prepare(loaded), 2, bar, 0, prepare)
