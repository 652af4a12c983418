"""PixelPrune: what it drops by the rule, told back from what it keeps, and a tower that reads the rest, by hand."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import tiny_qwen
import torch
from torch import nn
from waits import reads

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods.divprune import DivPrune
from vlmprune.methods.pixelprune import PixelPrune, unpredicted
from vlmprune.parts import PatchCut

F64 = torch.float64
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def told(name, cuts):
    """A method of the test's own."""
    return type(name, (vlmprune.Method,), {"name": name, "cuts": lambda self, facts: cuts})()


def predicted(picture, row, col):
    """What the neighbours predict of a token, by the paper's rule; None of the first."""
    if row == col == 0:
        return None
    if row == 0 or col == 0:
        return picture[row - 1][col] if row else picture[row][col - 1]
    left, above, corner = picture[row][col - 1], picture[row - 1][col], picture[row - 1][col - 1]
    return above if corner == left and corner != above else left


def drawn(frames, rows, cols, seed):
    """Pictures of few colours, `(frames, rows, cols, 6)`, with edges and areas."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 3, (frames, rows, cols), generator=generator)
    calm = torch.rand(frames, rows, cols, generator=generator) < 0.6
    for row in range(1, rows):
        colours[:, row] = colours[:, row].where(~calm[:, row], colours[:, row - 1])
    for col in range(1, cols):
        colours[:, :, col] = colours[:, :, col].where(~calm[:, :, col - 1], colours[:, :, col - 1])
    return torch.randn(3, 6, generator=generator)[colours]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(1, 5, 7), (2, 4, 6), (1, 1, 9), (3, 8, 1), (1, 1, 1)], ids=str)
def test_what_is_kept_tells_the_picture_back(size, seed):
    pixels = drawn(*size, seed)
    keep = unpredicted(pixels)
    for frame, kept in zip(pixels.tolist(), keep.tolist(), strict=True):
        back = [[None] * size[2] for _ in range(size[1])]
        for row in range(size[1]):
            for col in range(size[2]):
                guess = predicted(frame, row, col)
                assert kept[row][col] == (frame[row][col] != guess)
                back[row][col] = frame[row][col] if kept[row][col] else predicted(back, row, col)
        assert back == frame
    if keep.numel() > 20:
        assert keep.numel() / 8 < keep.sum() < keep.numel()


def test_the_rule_in_numbers():
    left = [[1, 1, 2], [1, 1, 2], [3, 1, 1]]
    assert unpredicted(torch.tensor(left)[None, :, :, None]).int().tolist() == [[[1, 0, 1], [0, 0, 0], [1, 1, 1]]]
    assert unpredicted(torch.tensor([[0.0, -0.0, float("nan")]])[None, :, :, None]).tolist() == [[[True, False, True]]]


def by_hand(model, pixels, grids, keep):
    """Every token's features, and those behind tower layers, `(tokens, dim)` each: of what is kept, else None."""
    tower, family = model.model.visual, model.config.model_type
    rotary, heads = [], []
    real = tower.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: (heads.append(args[0]), rotary.append(kwargs["position_embeddings"]), None)[-1],
        with_kwargs=True,
    )
    whole = tower(pixels, grid_thw=torch.tensor(grids))
    real.remove()
    x, (cos, sin) = heads[0], rotary[0]  # what the first layer reads, in its own order
    order = torch.arange(len(keep))
    if family == "qwen2_5_vl":  # windows of 2 x 2 tokens, listed here by hand
        order, start = [], 0
        for frames, rows, cols in grids:
            high, wide = rows // 2, cols // 2
            for frame in range(frames):
                base = start + frame * high * wide
                for top, side in product(range(0, high, 2), range(0, wide, 2)):
                    places = product(range(top, min(top + 2, high)), range(side, min(side + 2, wide)))
                    order.append([base + row * wide + col for row, col in places])
            start += frames * high * wide
        windows, order = order, torch.tensor([token for window in order for token in window])
    views, start = [], 0
    for frames, rows, cols in grids:
        for _ in range(frames):
            views.append(list(range(start, start := start + rows * cols // 4)))
    home = order.argsort()  # where each token is read

    def rows_of(tokens):
        return [4 * int(home[t]) + i for t in tokens if keep[t] for i in range(4)]

    behind = []
    for index, layer in enumerate(tower.blocks):
        apart = windows if family == "qwen2_5_vl" and index not in tiny_qwen.FULL else views
        new = x.clone()
        for tokens in apart:
            if here := rows_of(tokens):
                ends = torch.tensor([0, len(here)], dtype=torch.int32)
                new[here] = layer(
                    x[here], cu_seqlens=ends, max_seqlen=len(here), position_embeddings=(cos[here], sin[here])
                )
        x = new
        if family == "qwen3_vl" and index in tower.deepstack_visual_indexes:
            behind.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)](x))
    return [tower.merger(x)[home], *behind], whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_tower_reads_what_is_left(family, kind):
    model = tiny.shared(dtype=F64, family=family)
    if kind == "image":
        prompt = tiny.prompt(model, [4, "image", 3, "image", 5], [(40, 56), (24, 72)])
        pixels, sizes = "pixel_values", "image_grid_thw"
    else:
        prompt = tiny.prompt(model, [4, "video", 3, "video", 5], [], videos=[2, 3])
        pixels, sizes = "pixel_values_videos", "video_grid_thw"
    prompt = tiny_qwen.repeated(model, prompt)
    grids, read = prompt[sizes].tolist(), []
    keep, start = [], 0
    tokens = prompt[pixels].unflatten(0, (-1, 4)).flatten(1)
    for frames, rows, cols in grids:
        end = start + frames * rows * cols // 4
        for frame in tokens[start:end].unflatten(0, (frames, rows // 2, cols // 2)).tolist():
            keep += [frame[r][c] != predicted(frame, r, c) for r in range(rows // 2) for c in range(cols // 2)]
        start = end
    note = lambda module, args, kwargs: read.append(len(args[0]))  # noqa: E731
    with torch.no_grad():
        want, whole = by_hand(model, prompt[pixels], grids, keep)
        with vlmprune.patch(model, "pixelprune") as handle:
            hooks = [
                layer.attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.visual.blocks
            ]
            model(**prompt)
            [hook.remove() for hook in hooks]
            got = getattr(model.model, f"get_{kind}_features")(prompt[pixels], prompt[sizes], return_dict=True)
    assert len(keep) > sum(keep) > 0
    assert read == [4 * sum(keep)] * tiny_qwen.DEPTH
    kept, start = [], 0
    for item, grid in enumerate(handle.trace.grids):
        kept += [start + token for token in handle.trace.kept(item)]
        start += grid.tokens
    assert kept == [t for t, stays in enumerate(keep) if stays]
    behind = getattr(got, "deepstack_features", None) or []
    features = [torch.cat(list(each)) for each in (got.pooler_output, *behind)]
    assert len(features) == len(want)
    for mine, right in zip(features, want, strict=True):
        torch.testing.assert_close(mine[kept], right[kept], rtol=1e-9, atol=1e-9)
    assert (features[0][kept] - whole.pooler_output[kept]).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_repeats_nothing_changes(family):
    model = tiny.shared(family=family)
    prompt = tiny.prompt(model, [4, "image", 3, "image", 5], [(40, 24), (20, 70)])
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, PixelPrune()) as handle:
            assert torch.equal(model(**prompt).logits, plain)
            assert handle.trace.kv_lengths == [prompt["input_ids"].shape[1]] * tiny.LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_how_often_the_device_is_waited_for(family, monkeypatch):
    """Beyond what any method before the language model waits for; windows are looked at apart."""
    model = tiny.shared(family=family)
    prompt, found = tiny_qwen.repeated(model, tiny.prompt(model, [4, "image", 6], [(40, 24)])), {}
    for name, options in (("pixelprune", {}), ("random", {"keep": 4})):
        with torch.no_grad(), vlmprune.patch(model, name, **options):
            model(**prompt)
            found[name] = reads(lambda: model(**prompt), monkeypatch).total
    assert found["pixelprune"] == found["random"] + PixelPrune.syncs + (family == "qwen2_5_vl")


def test_beside_a_method_with_a_budget():
    model = tiny.shared(dtype=F64, family="qwen3_vl")
    prompt = tiny_qwen.repeated(model, tiny.prompt(model, [4, "image", 5], [(64, 64)]))
    with torch.no_grad(), vlmprune.patch(model, [PixelPrune(), DivPrune(keep=9)]) as handle:
        model(**prompt)
        assert len(handle.trace.kept()) == 9
        assert all(token % 8 < 5 for token in handle.trace.kept())  # the right half repeats


def test_what_is_refused():
    qwen = tiny.shared(family="qwen2_vl")
    with pytest.raises(UnsupportedError, match=r"pixelprune drops tokens before the vision tower.*llava models"):
        vlmprune.patch(tiny.shared(), "pixelprune")
    for option, value, why in (("tau", 0.1, "pixels are lost"), ("keep", 0.5, "takes a budget, as in")):
        with pytest.raises(ValueError, match=why):
            vlmprune.patch(qwen, "pixelprune", **{option: value})
    with pytest.raises(UnsupportedError, match=r"'pixelprune' .*'fopru' looks at that tower"):
        vlmprune.patch(qwen, [PixelPrune(), vlmprune.registry.find("fopru")(keep=0.5)])
    with pytest.raises(UnsupportedError, match="'pixelprune' and 'pixelprune' both take or merge"):
        vlmprune.patch(qwen, [PixelPrune(), PixelPrune()])


KEEP = {
    "keep of shape": lambda pixels, sizes: torch.ones(3, dtype=torch.bool),
    "keep of torch.float32, and bools": lambda pixels, sizes: pixels[:, 0].float(),
    "kept nothing": lambda pixels, sizes: torch.zeros(len(pixels), dtype=torch.bool),
}


@pytest.mark.parametrize("what", KEEP)
def test_what_does_not_fit_is_named(what):
    model = tiny.shared(family="qwen2_vl")
    prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)])
    odd, refused = told("odd", [PatchCut(KEEP[what])]), pytest.raises(ValueError, match=what)
    with torch.no_grad(), vlmprune.patch(model, odd), refused as caught:
        model(**prompt)
    assert "odd, the cut in front of the tower" in str(caught.value)


def test_hooks_go():
    model = tiny.shared(family="qwen3_vl")
    before = sum(len(module._forward_hooks) for module in model.modules())
    with vlmprune.patch(model, "pixelprune"):
        assert sum(len(module._forward_hooks) for module in model.modules()) > before
        assert isinstance(model.model.visual.merger, nn.Module)
    assert sum(len(module._forward_hooks) for module in model.modules()) == before
