"""Where every visual token comes from, against the model's own packing."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

import vlmprune
from vlmprune.parts.layout import Layout
from vlmprune.parts.tracing import trace_packing
from vlmprune.patches import family_of

sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))


def next_model(tower="clip"):
    return tiny.shared(family="llava_next", tower=tower)


def packed_indices(model, size):
    """Every patch's number (view * patches + patch) sent through the model's packing; -1 at newlines."""
    views = image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, tiny.TILE)
    numbers = torch.arange(views * tiny.SIDE**2, dtype=torch.float64).view(views, tiny.SIDE**2, 1)
    packed, lengths = model.model.pack_image_features(
        [numbers], torch.tensor([size]), "default", image_newline=torch.tensor([-1.0], dtype=torch.float64)
    )
    assert lengths.tolist() == [len(packed[0])]
    return packed[0][:, 0].long(), views


@settings(max_examples=150, deadline=None, derandomize=True)
@given(size=sizes)
def test_grids_equal_the_models_packing(size):
    model = next_model()
    grid = family_of(model).image_grid(model.model, size)
    numbers, views = packed_indices(model, size)
    newline = numbers == -1
    assert (grid.tokens, grid.views) == (len(numbers), views)
    assert torch.equal(grid.newline, newline)
    assert torch.equal(grid.source[~newline], numbers[~newline])
    assert torch.equal(grid.view[~newline], numbers[~newline] // tiny.SIDE**2)
    assert (grid.patches, grid.newlines) == (int((~newline).sum()), int(newline.sum()))
    assert sum(grid.patches_per_view) == grid.patches
    assert grid.patches_per_view == [int((grid.view[~newline] == v).sum()) for v in range(views)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(size=sizes)
def test_rows_and_columns(size):
    model = next_model()
    grid = family_of(model).image_grid(model.model, size)
    side, patch = tiny.SIDE, ~grid.newline
    _, across = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, tiny.TILE)
    # place on the canvas, by hand from the crop's number and the patch's number within it
    crop, inside = grid.view - 1, grid.source % side**2
    y, x = crop // across * side + inside // side, crop % across * side + inside % side
    thumbnail, canvas = patch & (grid.view == 0), patch & (grid.view > 0)
    assert torch.equal(grid.row[thumbnail] * side + grid.col[thumbnail], inside[thumbnail])
    assert grid.planes[0] == (side, side)
    if not canvas.any():  # a picture so thin that nothing of the canvas is left
        assert len(grid.planes) == 1
        return
    assert torch.equal(grid.row[canvas], y[canvas] - y[canvas].min())
    assert torch.equal(grid.col[canvas], x[canvas] - x[canvas].min())
    assert grid.planes[1] == (int(grid.row[canvas].max()) + 1, int(grid.col[canvas].max()) + 1)
    assert grid.planes[1][0] * grid.planes[1][1] + side**2 == grid.patches
    # tokens stand in raster order, and a newline closes every row of the canvas
    flat = grid.row * 1000 + grid.col
    assert bool((flat[canvas][1:] > flat[canvas][:-1]).all())
    assert grid.row[grid.newline].tolist() == list(range(grid.planes[1][0]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=sizes)
def test_counts_equal_placeholders(size):
    """What `get_image_features` makes, which is what a processor writes placeholders for."""
    for tower in ("clip", "siglip"):
        model = next_model(tower)
        grid = family_of(model).image_grid(model.model, size)
        assert tiny.tokens_per_image(model, [size]) == [grid.tokens]


def test_processor_writes_as_many_placeholders():
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    model = next_model()
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = tiny.PATCH, 1
    processor.vision_feature_select_strategy = "default"
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=model.config.image_grid_pinpoints)
    for size in [(24, 24), (40, 24), (24, 61), (100, 33), (7, 90), (333, 222)]:
        grid = family_of(model).image_grid(model.model, size)
        # the processor takes the [CLS] token off afterwards
        assert processor._get_number_of_features(*size, tiny.TILE, tiny.TILE) - 1 == grid.tokens


def test_llava_has_one_square_view():
    model = tiny.shared()
    grid = family_of(model).image_grid(model.model, None)
    assert (grid.tokens, grid.views, grid.newlines, grid.planes) == (16, 1, 0, ((4, 4),))
    assert grid.source.tolist() == list(range(16)) == (grid.row * 4 + grid.col).tolist()


def test_single_view_with_a_newline_at_its_end():
    """`pack_image_features` appends a newline to an image of one view."""
    model = next_model()

    def pack(x, newline):
        return model.model.pack_image_features([x], [(24, 24)], "default", image_newline=newline)[0][0]

    grid = trace_packing(pack, 1, 4, 4, (1, 1))
    assert (grid.tokens, grid.patches, grid.newline.tolist()) == (17, 16, [False] * 16 + [True])
    assert grid.source[:16].tolist() == list(range(16))
    assert grid.planes == ((4, 4),)


def test_interpolated_coordinates_still_tell_places():
    """Packings that shrink the canvas mix features; coordinates survive and name the nearest patch."""

    def pack(x, newline):
        canvas = x[1:].view(2, 2, 4, 4, -1).permute(4, 0, 2, 1, 3).reshape(-1, 8, 8)
        small = torch.nn.functional.interpolate(canvas[None], (6, 6), mode="bilinear")[0]
        lines = torch.cat((small, newline[:, None, None].expand(-1, 6, 1)), 2)
        return torch.cat((x[0], lines.flatten(1).T))

    grid = trace_packing(pack, 5, 4, 4, (2, 2))
    assert (grid.tokens, grid.newlines, grid.planes) == (16 + 42, 6, ((4, 4), (6, 6)))
    canvas = ~grid.newline & (grid.view > 0)
    assert (grid.row * 6 + grid.col)[canvas].tolist() == list(range(36))
    exact = (torch.arange(6) + 0.5) * 8 / 6 - 0.5
    y = (grid.view[canvas] - 1) // 2 * 4 + grid.source[canvas] % 16 // 4
    assert ((y.view(6, 6)[:, 0] - exact).abs() <= 0.5 + 1e-9).all()


# Batches


class Spy(vlmprune.Method):
    """Remembers the layout of a prefill."""

    layouts: list[Layout] = []  # noqa: RUF012

    def cuts(self, facts):
        return [vlmprune.Cut(vlmprune.Decoder(0), (), self.reduce)]

    def reduce(self, seen, layout):
        Spy.layouts.append(layout)
        return vlmprune.Reduction(layout.alive.clone(), list(layout.alive_counts))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_positions_are_columns_of_the_prompt(tiny_model, family, side):
    model = tiny_model(family=family)
    prompts = [
        tiny.prompt(model, [3, "image", 6], [(24, 24)]),
        tiny.prompt(model, [9], []),
        tiny.prompt(model, ["image", "image", 2, "image"], [(40, 24), (24, 60), (33, 20)]),
    ]
    batch = tiny.batch(prompts, side)
    with torch.no_grad(), vlmprune.patch(model, Spy()):
        model(**batch)
    layout = Spy.layouts.pop()
    assert (layout.sample, layout.ordinal) == ([0, 2, 2, 2], [0, 0, 1, 2])
    for row in range(3):
        mine = [i for i, s in enumerate(layout.sample) if s == row]
        columns = [c for i in mine for c in layout.position[i][layout.alive[i]].tolist()]
        assert columns == (batch["input_ids"][row] == tiny.IMAGE).nonzero().flatten().tolist()
    assert layout.alive.sum(1).tolist() == layout.alive_counts == [g.tokens for g in layout.grids]
    assert layout.patches.sum(1).tolist() == layout.alive_patches


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_tower_values_arrive_at_their_tokens(tiny_model, family):
    """`from_tower` against the model's packing, several images with different views."""
    model = tiny_model(family=family)
    sizes = [(24, 24), (40, 24), (20, 90)]
    prompt = tiny.prompt(model, [2, *["image"] * 3], sizes)
    with torch.no_grad(), vlmprune.patch(model, Spy()):
        model(**prompt)
    layout = Spy.layouts.pop()
    views = sum(grid.views for grid in layout.grids)
    values = torch.arange(views * 16).view(views, 16)
    got, wide = layout.from_tower(values), layout.from_tower(torch.stack((values, -values), -1))
    start = 0
    for i, grid in enumerate(layout.grids):
        if family == "llava":
            want = torch.arange(16)
        else:
            want, _ = packed_indices(model, sizes[i])
        patches = ~grid.newline
        assert torch.equal(got[i, : grid.tokens][patches], want[patches] + start)
        assert torch.equal(wide[i, :, 1], -got[i])
        start += grid.views * 16


def test_image_sizes_are_height_and_width(tiny_model):
    model = tiny_model(family="llava_next")
    tall, wide = (family_of(model).image_grid(model.model, s) for s in ((72, 24), (24, 72)))
    assert tall.planes[1] == (12, 4)
    assert wide.planes[1] == (4, 12)
    with torch.no_grad(), vlmprune.patch(model, "random", keep=0.5) as handle:
        model(**tiny.prompt(model, [2, "image"], [(72, 24)]))
        assert handle.trace.grids[0].planes[1] == (12, 4)
