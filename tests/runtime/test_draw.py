"""Kept-token pictures: every patch at its place, kept ones untouched."""

import numpy as np
import pytest
import tiny
import tiny_folders
import torch
from PIL import Image
from testbed import anyres
from transformers import LlavaImageProcessorPil

import vlmprune
from vlmprune.methods import FastV, Pool
from vlmprune.patches import family_of
from vlmprune.runtime import draw
from vlmprune.runtime.frames import FramesAsPictures
from vlmprune.runtime.videos import VideoClip
from vlmprune.trace import CutTrace, Trace


def grid_of(model, size):
    """Layout of a picture of `size` (width, height)."""
    family = family_of(model)
    return family.image_grid(family.inner(model), size[::-1])


def onevision():
    return tiny.shared(family="llava_onevision", tower="siglip", text="qwen2")


def boxes_of(family, size, tower="clip"):
    grid = grid_of(tiny.model(family, tower=tower), size)
    image_processor = tiny_folders.processor(family, tower).image_processor
    return grid, np.array(draw.patch_boxes(image_processor, size, grid))


def by_hand(width, height, rows, cols):
    """Boxes of a raster that covers the whole picture."""
    x, y = np.arange(cols) * width / cols, np.arange(rows) * height / rows
    return np.array([(a, b, a + width / cols, b + height / rows) for b in y for a in x])


@pytest.mark.parametrize("side", [24, 96, 500])
def test_single_view_covers_a_square_picture(side):
    _, boxes = boxes_of("llava", (side, side))
    np.testing.assert_allclose(boxes, by_hand(side, side, 4, 4), atol=0.02 * side)


def test_centre_crop():
    _, boxes = boxes_of("llava", (96, 48))  # the processor crops the middle 48 x 48
    np.testing.assert_allclose(boxes, by_hand(48, 48, 4, 4) + np.array([24, 0, 24, 0]), atol=1)


def test_squashed_picture():
    _, boxes = boxes_of("llava", (96, 48), tower="siglip")
    np.testing.assert_allclose(boxes, by_hand(96, 48, 4, 4), atol=1)


def test_padding_is_not_taken_for_the_picture():
    # the original LLaVA pads to a square with a grey that is as bright as the middle of the picture
    image_processor = LlavaImageProcessorPil(size=tiny_folders.SIZE, crop_size=tiny_folders.CROP, do_pad=True)
    grid = grid_of(tiny.model("llava"), (96, 48))
    boxes = draw.patch_boxes(image_processor, (96, 48), grid)
    np.testing.assert_allclose(boxes, by_hand(96, 96, 4, 4) - np.array([0, 24, 0, 24]), atol=1)


@pytest.mark.parametrize("size", [(48, 24), (24, 48), (48, 48), (96, 48), (150, 140), (200, 90)])
def test_crops_are_stitched(size):
    grid, boxes = boxes_of("llava_next", size)
    thumbnail, newline = (grid.view == 0).numpy(), grid.newline.numpy()
    np.testing.assert_allclose(boxes[thumbnail], by_hand(*size, 4, 4), atol=0.03 * max(size))
    canvas = boxes[~thumbnail & ~newline]
    rows, cols = grid.planes[1]
    # whole patches where the picture fills the canvas; else the model's own rounding leaves up to a patch more or less
    step = (canvas[0, 2] - canvas[0, 0], canvas[0, 3] - canvas[0, 1])
    assert step[0] == pytest.approx(step[1], rel=0.1)  # anyres keeps the aspect
    assert canvas[:, 0].min() == pytest.approx(0, abs=step[0])
    assert canvas[:, 2].max() == pytest.approx(size[0], abs=step[0])
    assert canvas[:, 1].min() == pytest.approx(0, abs=step[1])
    assert canvas[:, 3].max() == pytest.approx(size[1], abs=step[1])
    # one raster without seams between crops
    np.testing.assert_allclose(np.diff(canvas.reshape(rows, cols, 4)[0, :, 0]), step[0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(canvas.reshape(rows, cols, 4)[:, 0, 1]), step[1], rtol=1e-6)
    assert (boxes[newline] == 0).all()


def coloured(width, height, step):
    """A picture of patches that all have colours of their own, and the colours by row and column."""
    rows, cols = height // step, width // step
    colours = np.zeros((rows, cols, 3), np.uint8)
    colours[..., 0] = 60 + 15 * np.arange(rows)[:, None]
    colours[..., 1] = 60 + 15 * np.arange(cols)
    colours[..., 2] = 90
    return Image.fromarray(colours.repeat(step, 0).repeat(step, 1)), colours


def pruned(family, image, method="random", **options):
    """Trace of a tiny model that read `image`, and its processor."""
    model, processor = tiny.model(family), tiny_folders.processor(family)
    inputs = processor(text="what <image>", images=[image], return_tensors="pt")
    with torch.no_grad(), vlmprune.patch(model, method, **options) as handle:
        model(**inputs)
        return handle.trace, processor


def centres(panel, rows, cols):
    """Colours at the middle of every patch of a drawn picture."""
    pixels = np.asarray(panel)
    y = ((np.arange(rows) + 0.5) * pixels.shape[0] / rows).astype(int)
    x = ((np.arange(cols) + 0.5) * pixels.shape[1] / cols).astype(int)
    return pixels[y][:, x]


@pytest.mark.parametrize("size", [(24, 24), (48, 24), (96, 90), (90, 96), (300, 280), (400, 100)])
def test_a_shrunken_canvas_covers_the_picture(size):
    grid, boxes = boxes_of("llava_onevision", size, "siglip")
    canvas = (~grid.newline & (grid.plane == 1)).numpy()
    rows, cols = grid.planes[1]
    np.testing.assert_allclose(boxes[canvas], by_hand(*size, rows, cols), atol=0.04 * max(size))
    thumbnail = (grid.plane == 0).numpy()
    np.testing.assert_allclose(boxes[thumbnail], by_hand(*size, 4, 4), atol=0.04 * max(size))  # squashed
    assert (grid.blend is not None) == (size in [(96, 90), (90, 96), (300, 280)])


@pytest.mark.parametrize("size", [(96, 48), (48, 96), (50, 50)])
def test_one_of_several_pictures_is_padded_to_a_square(size):
    family, model = family_of(onevision()), onevision()
    image_processor = tiny_folders.processor("llava_onevision", "siglip").image_processor
    boxes = draw.patch_boxes(image_processor, size, family.image_grid(model.model, None))
    side = max(size)
    shift = np.array([side - size[0], side - size[1]] * 2) / 2
    assert boxes[-1] == (0, 0, 0, 0)  # the newline
    np.testing.assert_allclose(boxes[:-1], by_hand(side, side, 4, 4) - shift, atol=1.5)


def test_a_kept_patch_of_a_shrunken_canvas_is_clear():
    model, picture = onevision(), tiny_folders.noise_picture(96, 90)
    processor = tiny_folders.processor("llava_onevision", "siglip")
    inputs = processor(text="<image> what", images=[[picture]], return_tensors="pt")
    with torch.no_grad(), vlmprune.patch(model, "fopru", keep=9) as handle:
        model(**inputs)
    canvas, _ = draw.kept_pictures(picture, handle.trace, processor.image_processor)
    boxes = draw.patch_boxes(processor.image_processor, picture.size, handle.trace.grids[0])
    factor, original = canvas.width / picture.width, np.asarray(picture)
    kept = set(handle.trace.kept_patches())
    for token, (left, top, right, bottom) in enumerate(boxes):
        if handle.trace.grids[0].plane[token] == 0 or handle.trace.grids[0].newline[token]:
            continue
        x, y = int((left + right) / 2), int((top + bottom) / 2)
        shown = np.asarray(canvas)[int((y + 0.5) * factor), int((x + 0.5) * factor)]
        assert np.array_equal(shown, original[y, x]) == (token in kept)


def clip_of(frames):
    return VideoClip(
        tuple(frames), tuple(range(len(frames))), tuple(float(n) for n in range(len(frames))), len(frames), 1.0
    )


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_videos_are_drawn_as_strips(family):
    """Every frame of tokens keeps its own patches' colours; frames beyond a line of eight go to the next."""
    shots = [tiny_folders.noise_picture(48, 48, seed) for seed in range(10)]
    if family == "qwen2_vl":  # two frames make one frame of tokens, a token is 24 pixels large
        fields = {"size": {"shortest_edge": 2304, "longest_edge": 2304}, "patch_size": 12, "merge_size": 2}
        model, size, tokens = tiny.shared(family=family), (5, 4, 4), 2
        part = FramesAsPictures(fields | {"temporal_patch_size": 2}, None, family)
    else:
        model, size, tokens = onevision(), 10, 2
        part = FramesAsPictures({"size": tiny_folders.CROP}, None, family)
    family = family_of(model)
    grid = family.video_grid(family.inner(model), size)
    planes = len(grid.planes)
    assert planes == (5 if size != 10 else 10)
    boxes = np.array(draw.patch_boxes(part, (48, 48), grid))[~grid.newline.numpy()]
    np.testing.assert_allclose(boxes, np.tile(by_hand(48, 48, tokens, tokens), (planes, 1)), atol=1.5)

    keep = torch.zeros(1, grid.tokens, dtype=torch.bool)
    keep[0, [0, 4 + 3]] = True  # of the first frame the upper left, of the second the lower right
    trace = Trace([grid], [0], [CutTrace(0, "x", "original", keep)], 9, [9], [9, 9])
    panel = draw.kept_panel(clip_of(shots), trace, part, 0, "x")
    assert panel.lines[:2] == [
        f"2 of {grid.patches} patches", f"frame by frame: {', '.join(['1', '1', *['0'] * (planes - 2)])}"
    ]  # fmt: skip
    (strip,) = panel.pictures
    side, gap = 192, draw.GAP // 2
    lines, across = (1, 5) if planes == 5 else (2, 8)
    assert strip.size == (across * (side + gap) - gap, lines * (side + gap) - gap)
    second = 2 if planes == 5 else 1  # the first of its pair
    for at, shot, corner in ((0, 0, (0, 0)), (1, second, (96, 96))):
        whole = shots[shot].resize((side, side), Image.Resampling.NEAREST)
        inner = (corner[0] + 4, corner[1] + 4, corner[0] + 88, corner[1] + 88)
        left = at * (side + gap)
        shown = strip.crop((left + inner[0], inner[1], left + inner[2], inner[3]))
        assert np.array_equal(np.asarray(shown), np.asarray(whole.crop(inner)))
    assert np.asarray(strip.crop((100, 100, 190, 190))).mean() < 0.6 * np.asarray(shots[0]).mean()  # dropped


def test_a_picture_is_no_video_and_the_reverse():
    model = onevision()
    processor = tiny_folders.processor("llava_onevision", "siglip")
    with torch.no_grad(), vlmprune.patch(model, "random", keep=2) as handle:
        model(**tiny.prompt(model, [3, "video", 4], [], videos=[2]))
    with pytest.raises(vlmprune.UnsupportedError, match="what to draw on is no video, as image 0"):
        draw.draw_kept(tiny_folders.noise_picture(30, 30), handle.trace, processor)
    image = tiny_folders.noise_picture(48, 48)
    trace, processor = one_view(image)
    with pytest.raises(vlmprune.UnsupportedError, match="what to draw on is no picture"):
        draw.draw_kept(clip_of([image]), trace, processor)


def test_kept_patches_keep_their_colour():
    image, colours = coloured(24, 24, 6)
    trace, processor = pruned("llava", image, keep=5)
    (panel,) = draw.kept_pictures(image, trace, processor.image_processor)
    assert panel.size == (384, 384)
    kept = np.zeros(16, bool)
    kept[trace.kept_patches()] = True
    same = (centres(panel, 4, 4) == colours).all(-1).flatten()
    assert kept.sum() == 5
    assert (same == kept).all()
    # every pixel of a kept patch is untouched, every other one is darker
    inside = kept.reshape(4, 4).repeat(96, 0).repeat(96, 1)
    pixels, original = np.asarray(panel), np.asarray(image.resize((384, 384), Image.Resampling.NEAREST))
    assert (pixels[inside] == original[inside]).all()
    line = (pixels == 255).all(-1)
    assert (pixels[~inside & ~line].sum(-1) < original[~inside & ~line].sum(-1)).all()
    assert 0 < line[~inside].mean() < 0.05


@pytest.mark.parametrize("size", [(48, 24), (24, 48), (48, 48)])
def test_kept_crops_are_at_their_place(size):
    image, colours = coloured(*size, 6)
    trace, processor = pruned("llava_next", image, keep=12)
    canvas, thumbnail = draw.kept_pictures(image, trace, processor.image_processor)
    grid = trace.grids[0]
    assert max(thumbnail.size) * 2 == max(canvas.size)
    rows, cols = grid.planes[1]
    expected = np.zeros((rows, cols), bool)
    for token in trace.kept_patches():
        if grid.view[token] > 0:
            expected[grid.row[token], grid.col[token]] = True
    assert 0 < expected.sum() < rows * cols
    assert ((centres(canvas, rows, cols) == colours).all(-1) == expected).all()
    small = np.zeros((4, 4), bool)
    for token in trace.kept_patches():
        if grid.view[token] == 0:
            small[grid.row[token], grid.col[token]] = True
    original = image.resize(thumbnail.size, Image.Resampling.NEAREST)
    assert ((centres(thumbnail, 4, 4) == centres(original, 4, 4)).all(-1) == small).all()


def test_last_cut_is_drawn():
    image, colours = coloured(24, 24, 6)
    trace, processor = pruned("llava", image, "fastv", keep=3)
    (panel,) = draw.kept_pictures(image, trace, processor.image_processor)
    same = (centres(panel, 4, 4) == colours).all(-1).flatten()
    assert sorted(np.flatnonzero(same)) == trace.kept_patches()
    assert same.sum() == 3


def test_what_outlived_more_cuts_is_brighter():
    image = Image.new("RGB", (24, 24), (200, 200, 200))
    trace, processor = pruned("llava", image, "transprune", keep=3)
    (panel,) = draw.kept_pictures(image, trace, processor.image_processor)
    outlived = sum(cut.keep[0].int() for cut in trace.cuts)
    shades = centres(panel, 4, 4)[..., 0].flatten()
    by_cuts = [set(shades[outlived.numpy() == n].tolist()) for n in range(4)]
    assert all(len(found) <= 1 for found in by_cuts)  # one shade for each
    shown = [min(found) for found in by_cuts if found]
    assert len(shown) > 2
    assert shown == sorted(set(shown))
    assert shown[-1] == 200


def test_what_the_model_never_sees_is_drawn_apart():
    """Cut off by the processor is not dropped: light and striped, where dropped is dark."""
    image = Image.new("RGB", (48, 24), (200, 200, 200))
    trace, processor = pruned("llava", image, keep=8)
    (panel,) = draw.kept_pictures(image, trace, processor.image_processor)
    grey = np.asarray(panel)[..., 0]
    cut, seen = grey[:, : grey.shape[1] // 4 - 2], grey[:, grey.shape[1] // 4 + 2 : -grey.shape[1] // 4 - 2]
    assert set(np.unique(cut)) == {150, int(200 * 0.35 + 255 * 0.65)}
    assert 0.1 < (cut == 150).mean() < 0.3  # stripes
    dropped = seen[(seen != 200) & (seen != 255)]
    assert dropped.max() < 200 * draw.DARK + 2
    panel = draw.kept_panel(image, trace, processor.image_processor, 0, "x")
    assert panel.lines == ["8 of 16 patches", "the model sees 50% of the picture (striped: cut off)"]


@pytest.mark.parametrize(
    ("family", "size", "share"),
    [("llava", (48, 24), 0.5), ("llava", (24, 96), 0.25), ("llava", (30, 30), 1), ("llava_next", (90, 24), 1)],
)
def test_how_much_the_model_sees(family, size, share):
    image_processor = tiny_folders.processor(family).image_processor
    assert draw.seen_share(image_processor, size, grid_of(tiny.model(family), size)) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("family", "size"), [("llava", (24, 24)), ("llava_next", (48, 24))])
def test_pool_is_drawn_as_what_it_averages(family, size):
    image, colours = coloured(*size, 6)
    trace, processor = pruned(family, image, "pool", keep=4 if family == "llava" else 12)
    panel = draw.kept_pictures(image, trace, processor.image_processor)[0]
    grid, rows = trace.grids[0], colours.shape[0]
    r, c = {"llava": (2, 2), "llava_next": (2, 4)}[family]
    assert grid.planes[-1] == colours.shape[:2]
    means = colours.astype(float).reshape(r, rows // r, c, colours.shape[1] // c, 3).mean((1, 3))
    np.testing.assert_allclose(centres(panel, r, c), means, atol=1)
    # every pixel of a cell but its edge: a quarter of the way in it has the same colour, unlike `grid`'s cells
    quarter = np.asarray(panel)[
        panel.height // (4 * r) :: panel.height // r, panel.width // (4 * c) :: panel.width // c
    ]
    np.testing.assert_allclose(quarter, means, atol=1)
    other, _ = pruned(family, image, "grid", keep=4 if family == "llava" else 12)
    grid_panel = draw.kept_pictures(image, other, processor.image_processor)[0]
    assert not np.array_equal(np.asarray(grid_panel), np.asarray(panel))


def test_a_pooled_cell_that_is_dropped_later_is_dark():
    image = Image.new("RGB", (24, 24), (200, 200, 200))
    trace, processor = pruned("llava", image, [Pool(keep=4), FastV(keep=2)])
    (panel,) = draw.kept_pictures(image, trace, processor.image_processor)
    bright = centres(panel, 2, 2)[..., 0].flatten()
    levels = [n for n in draw.outlived(trace, 0) if n]
    assert sorted(levels) == [0.5, 0.5, 1, 1]
    assert sorted(bright) == [144, 144, 200, 200] or sorted(bright) == [145, 145, 200, 200]


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (2000, 30), (1000, 700)])
def test_any_size_can_be_drawn(size):
    grid, boxes = boxes_of("llava", size)
    assert np.isfinite(boxes).all()
    panel = draw.paint(Image.new("RGB", size, "red"), boxes.tolist(), [True] * grid.tokens)
    assert max(panel.size) == 384 or size == (3, 40)
    assert (np.asarray(panel) == (255, 0, 0)).all(-1).any()


def test_sheet_and_texts():
    image, _ = coloured(48, 24, 6)
    trace, processor = pruned("llava_next", image, "pool", keep=12)
    panel = draw.kept_panel(image, trace, processor.image_processor, 0, "pool")
    assert panel.title == "pool"
    assert panel.lines == ["crops 8 of 32, thumbnail 4 of 16, the rest merged in"]
    assert draw.kept_panel(image, *one_view(image), 0, "x").lines[0] == "4 of 16 patches"
    long = draw.plain_panel(image, "a very long title " * 20)
    made = draw.sheet([[long, panel], [long]], heading="字 what?")
    assert made.width == 3 * draw.GAP + 384 + (384 + draw.GAP // 2 + 192)
    assert (np.asarray(made)[:, -draw.GAP :] == 255).all()  # the title was cut
    assert draw.draw_kept(image, trace, processor).width == made.width


def one_view(image):
    trace, processor = pruned("llava", image, keep=4)
    return trace, processor.image_processor


@pytest.mark.parametrize("size", [(224, 112), (112, 224), (160, 160), (101, 243), (150, 170), (90, 40)], ids=str)
def test_a_picture_of_any_size_is_covered_whole(size):
    """Its sides are rounded to whole tokens, and what is resized is brought back to the picture's own pixels."""
    processor = anyres.processor().image_processor
    model, given = anyres.model(), processor(images=Image.new("RGB", size), return_tensors="pt")
    grid = family_of(model).image_grid(model.model, tuple(given["image_grid_thw"][0].tolist()))
    rows, cols = grid.planes[0]
    assert (rows, cols) == (max(round(size[1] / anyres.CELL), 1), max(round(size[0] / anyres.CELL), 1))
    boxes = np.array(draw.patch_boxes(processor, size, grid))
    np.testing.assert_allclose(boxes, by_hand(*size, rows, cols), atol=0.04 * max(size))
    assert draw.seen_share(processor, size, grid) > 0.98


def test_several_packed_pictures_are_read_one_by_one():
    processor = anyres.processor().image_processor
    pictures = [draw.probe((64, 32)), draw.probe((32, 48))]
    views = draw.seen_views(processor, pictures[0])
    assert views.shape == (1, 3, 32, 64)
    np.testing.assert_array_equal(views[0].transpose(1, 2, 0), np.asarray(pictures[0]))
    np.testing.assert_array_equal(draw.seen_views(processor, pictures), views)  # the first of several
