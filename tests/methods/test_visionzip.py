"""VisionZip between tower and projector: what its anchors become, by hand from the unpatched tower."""

from __future__ import annotations

import pytest
import tiny
import torch

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods.visionzip import VisionZip
from vlmprune.parts.selection import stride


def by_hand(model: torch.nn.Module, pixels: torch.Tensor, keep: int, contextual: int) -> torch.Tensor:
    """`(keep, dim)` projected tokens of one image in the order of their places, written with loops."""
    inner = model.model
    tower, layer = inner.vision_tower, inner.vision_tower.encoder.layers[-2]
    states = tower(pixels, output_hidden_states=True).hidden_states
    before, after = states[-3], states[-2][0]  # input and output of the feature layer
    normed, attention = layer.layer_norm1(before)[0], layer.self_attn
    heads = attention.num_heads
    query = attention.q_proj(normed).unflatten(-1, (heads, -1))
    key = attention.k_proj(normed).unflatten(-1, (heads, -1))
    row = sum(torch.softmax(query[0, h] @ key[:, h].T * attention.scale, -1) for h in range(heads))[1:]
    mean_key = torch.nn.functional.normalize(key.mean(1)[1:], dim=-1)
    strong = sorted(row.argsort(descending=True)[: keep - contextual - 1].tolist())
    rest = [p for p in range(len(row)) if p not in strong]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    flows = {t: [] for t in targets}
    for p in rest:
        if p not in targets:
            flows[max(targets, key=lambda t: float(mean_key[p] @ mean_key[t]))].append(p)
    made = {p: after[1 + p] for p in strong}
    for t, sources in flows.items():
        made[t] = after[1 + t] + (torch.stack([after[1 + p] for p in sources]).mean(0) if sources else 0)
    made[next(p for p in rest if p not in targets)] = after[0]
    return inner.multi_modal_projector(torch.stack([made[p] for p in sorted(made)])[None])[0]


@pytest.mark.parametrize(("keep", "contextual"), [(6, 2), (9, 1), (3, 1)])
def test_its_anchors_are_what_they_are_by_hand(keep, contextual):
    model = tiny.model(dtype=torch.float64)
    prompt = tiny.prompt(model, [7, "image", 9], [None])
    with torch.no_grad():
        want = by_hand(model, prompt["pixel_values"], keep, contextual)
        with vlmprune.patch(model, VisionZip(keep=keep, contextual=contextual / keep)) as handle:
            model(**prompt)
            features = model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output[0]
    torch.testing.assert_close(features[handle.trace.kept(0)], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("keep", "most"), [(6, 5 / 6), (2, 1 / 2), (1, 0)])
@pytest.mark.parametrize("contextual", [0.95, 1])
def test_no_more_is_contextual_than_cls_leaves(keep, most, contextual):
    model, kept = tiny.shared(), []
    prompt = tiny.prompt(model, [7, "image", 9], [None])
    for share in (contextual, most):
        with torch.no_grad(), vlmprune.patch(model, VisionZip(keep=keep, contextual=share)) as handle:
            model(**prompt)
            kept.append(handle.trace.kept_patches(0))
    assert kept[0] == kept[1]
    assert len(kept[0]) == keep


def test_a_budget_of_everything_changes_nothing():
    model = tiny.model(dtype=torch.float64)
    prompt = tiny.prompt(model, [7, "image", 9], [None])
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "visionzip", keep=1.0):
            assert torch.equal(model(**prompt).logits, plain)


def test_every_nth_of_what_is_left():
    candidates = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    marked = stride(candidates, [2, 3])
    assert marked.int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert not stride(candidates, [0, 0]).any()


def test_two_methods_that_merge_there_are_refused():
    with pytest.raises(UnsupportedError, match="take one of the two"):
        vlmprune.patch(tiny.model(), [VisionZip(keep=4), vlmprune.methods.ToMe(keep=4)])
