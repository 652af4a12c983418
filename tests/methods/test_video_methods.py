"""Methods of videos: what they choose, worked out by hand from the features that a model makes."""

from __future__ import annotations

import math

import probes
import pytest
import reference
import tiny
import torch
from torch.nn.functional import cosine_similarity, normalize

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods.evs import changes
from vlmprune.methods.quota import frame_budgets
from vlmprune.methods.vidcom2 import commonness, frame_scales

F64 = torch.float64
FAMILIES = {
    "next-video": {"family": "llava_next_video"},
    "onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
}
MOVING = ["evs", "vidcom2", "quota"]


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def model(request):
    return tiny.shared(dtype=F64, **request.param)


def video(model, frames=4, seed=0):
    """A prompt with one video, and its features `(frames, patches, dim)`."""
    prompt = tiny.prompt(model, [3, "video", 5], [], seed=seed, videos=[frames])
    (features,) = reference.video_features(model, prompt)
    return prompt, features[: len(features) // frames * frames].view(frames, -1, features.shape[-1])


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, 9, 1])
def test_evs(model, keep):
    prompt, frames = video(model)
    total, first = frames.shape[0] * frames.shape[1], frames.shape[1]
    wanted = max(first, keep if isinstance(keep, int) else int(total * keep))
    score = dict.fromkeys(range(first), 255.0)
    for f in range(1, len(frames)):
        for p in range(first):
            score[f * first + p] = float(1 - cosine_similarity(frames[f, p], frames[f - 1, p], 0))
    by_hand = sorted(sorted(score, key=lambda t: -score[t])[:wanted])
    with vlmprune.patch(model, "evs", keep=keep) as handle:
        model(**prompt)
        assert handle.trace.kept_patches() == by_hand
    still = sorted(sorted(score, key=score.get)[:wanted])
    assert still != by_hand or wanted == first


def test_what_does_not_change_scores_nothing():
    frames = torch.randn(3, 5, 4)
    frames[2] = frames[1] * 2
    got = changes(frames)
    assert (got[0] == 255).all()
    torch.testing.assert_close(got[2], torch.zeros(5), atol=1e-6, rtol=0)
    assert (got[1] > 1e-3).any()


def common_by_hand(frames):
    """The two scores of VidCom²."""
    flat = frames.flatten(0, 1)
    spread = ((flat - flat.mean(0)) ** 2).mean(0)
    quiet = sorted(range(len(spread)), key=lambda c: float(spread[c]))[: len(spread) // 2]
    unit = normalize(frames[..., quiet], dim=-1)

    def g(x, centre):
        return sum(math.exp(-float(((x - centre) ** 2).sum()) / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    whole = unit.flatten(0, 1).mean(0)
    return (
        torch.tensor([[g(x, whole) for x in frame] for frame in unit]),
        torch.tensor([[g(x, frame.mean(0)) for x in frame] for frame in unit]),
    )


def test_commonness_and_scales():
    frames = torch.randn(3, 6, 8, dtype=F64)
    for got, want in zip(commonness(frames), common_by_hand(frames), strict=True):
        torch.testing.assert_close(got.float(), want)
    common = torch.tensor([[2.0, 2.0], [2.01, 2.01], [2.02, 2.02]])
    weight = [math.exp(x) for x in (0, -1, -2)]
    p = [w / sum(weight) for w in weight]
    torch.testing.assert_close(frame_scales(common, 0.25), torch.tensor([0.25 * (1 + x - 1 / 3) for x in p]))
    assert (frame_scales(common, 0.9) <= 1).all()


@torch.no_grad()
@pytest.mark.parametrize("parity", [None, "released"])
@pytest.mark.parametrize("keep", [0.5, 7])
def test_vidcom2(model, keep, parity):
    prompt, frames = video(model)
    per, total = frames.shape[1], frames.shape[0] * frames.shape[1]
    of_video, of_frame = common_by_hand(frames)
    ratio = keep if isinstance(keep, float) else keep / total
    unique = -of_video.mean(1) / 0.01
    p = (unique - unique.max()).exp()
    p = p / p.sum()
    scale = [min(1.0, ratio * (1 + float(x) - float(p.mean()))) for x in p]
    order = [sorted(range(per), key=lambda i, f=f: float(of_video[f, i] + of_frame[f, i])) for f in range(len(frames))]
    if parity == "released":
        kept = [f * per + t for f in range(len(frames)) for t in order[f][: max(1, round(scale[f] * per))]]
    else:
        turns = [
            ((rank + 0.5) / (scale[f] * per) if rank else 0.0, f * per + t)
            for f in range(len(frames))
            for rank, t in enumerate(order[f])
        ]
        kept = [t for _, t in sorted(turns)[: keep if isinstance(keep, int) else int(total * keep)]]
    with vlmprune.patch(model, "vidcom2", keep=keep, parity=parity) as handle:
        model(**prompt)
        assert handle.trace.kept_patches() == sorted(kept)


@torch.no_grad()
@pytest.mark.parametrize("name", MOVING)
def test_a_budget_of_all_patches_is_the_identity(model, name):
    prompt, forced = video(model)[0], probes.random_tokens(1, 3)
    plain = probes.forced_logits(model, prompt, forced)
    with vlmprune.patch(model, name, keep=1.0):
        assert torch.equal(probes.forced_logits(model, prompt, forced), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", MOVING)
def test_still_pictures_and_thinned_videos_are_refused(model, name):
    still = tiny.prompt(model, [3, "image", 5], [(24, 24)])
    with vlmprune.patch(model, name, keep=0.5), pytest.raises(UnsupportedError, match=f"{name} .*videos alone"):
        model(**still)
    both = [vlmprune.registry.find("random")(keep=0.5), vlmprune.registry.find(name)(keep=0.5)]
    with vlmprune.patch(model, both), pytest.raises(UnsupportedError, match=f"put {name} first"):
        model(**video(model)[0])


def test_frame_budgets():
    got = frame_budgets(torch.tensor([1.0, 2.0, 0.0, 3.0]), 28, 100)
    assert got.tolist() == [2, 8, 0, 18]  # 1 : 4 : 0 : 9
    # a frame takes no more than it has; the rest goes to the others once
    assert frame_budgets(torch.tensor([1.0, 2.0, 0.0, 3.0]), 28, 13).tolist() == [3, 12, 0, 13]
    assert frame_budgets(torch.zeros(3), 28, 13).tolist() == [1, 0, 0]


def pooled_by_hand(scores, budget, states):
    """`{first patch of a cell: mean}` of `(frames, patches, dim)` states, tokens counted through the video."""
    per = states.shape[1]
    side, made = math.isqrt(per), {}
    for frame, number in enumerate(frame_budgets(scores, budget, per).tolist()):
        if not number:
            continue
        down = min(side, math.isqrt(number))
        across = min(side, number // down)
        cells = {}
        for patch in range(per):
            cells.setdefault((patch // side * down // side, patch % side * across // side), []).append(patch)
        made |= {frame * per + cell[0]: states[frame, cell].mean(0) for cell in cells.values()}
    return made


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, 11])
def test_quota_by_a_scorer(model, keep):
    prompt, frames = video(model)
    scores = torch.tensor([0.2, 0.9, 0.05, 0.4], dtype=F64)
    budget = keep if isinstance(keep, int) else int(frames.shape[0] * frames.shape[1] * keep)
    want = pooled_by_hand(scores, budget, frames)
    asked = []
    with vlmprune.patch(model, "quota", keep=keep, scorer=lambda x: asked.append(x) or scores) as handle:
        model(**prompt)
        (cut,) = handle.trace.cuts
    torch.testing.assert_close(asked[-1], frames)
    assert (cut.layer, handle.trace.kept_patches()) == (0, sorted(want))
    assert len(want) <= budget
    flat = frames.flatten(0, 1)
    made = torch.zeros_like(flat).index_add(
        0, cut.merge.into[0, : len(flat)], flat * cut.merge.weight[0, : len(flat), None]
    )
    for token, mean in want.items():
        torch.testing.assert_close(made[token], mean)
    wrong = vlmprune.patch(model, "quota", keep=keep, scorer=lambda x: scores[:2])
    with wrong, pytest.raises(ValueError, match="scorer= must make"):
        model(**prompt)


@torch.no_grad()
def test_quota_by_the_models_own_attention(model):
    prompt, frames = video(model)
    per = frames.shape[1]
    ids = prompt["input_ids"][0]
    x = model.get_input_embeddings()(ids)
    holes = (ids == reference.VIDEO).nonzero().flatten()
    (features,) = reference.video_features(model, prompt)
    x[holes] = features
    x = reference.run_layer(model, 0, x, torch.arange(len(x)))
    weights = reference.probabilities(model, 1, x, torch.arange(len(x))).mean(0)
    seen = weights[holes[-1] + 1 :].mean(0)[holes[: 4 * per]].view(4, per).sum(1)
    budget = int(4 * per * 0.5)
    with vlmprune.patch(model, "quota", keep=0.5) as handle:
        model(**prompt)
        assert handle.trace.cuts[0].layer == 2
        assert handle.trace.kept_patches() == sorted(pooled_by_hand(seen, budget, frames))
