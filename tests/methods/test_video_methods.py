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
from vlmprune.methods.vidcom2 import commonness, frame_scales

F64 = torch.float64
FAMILIES = {
    "next-video": {"family": "llava_next_video"},
    "onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
}
MOVING = ["evs", "vidcom2"]


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
