"""Greedy diversity, every implementation against textbook loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

greedy = torch.ops.vlmprune.greedy
OBJECTIVES = ["max_sum", "max_min", "log_det"]


def textbook(features, first, count, candidates, objective):
    """Picks of one image; every step looks at all picks anew. Cosines closer than rounding count as equal."""
    x = functional.normalize(features.double(), dim=-1)
    cosine = x @ x.T
    picks, allowed = [first], {i for i in range(len(x)) if candidates[i]} - {first}
    while len(picks) < count:
        values = {}
        for i in sorted(allowed):
            if objective == "max_sum":
                values[i] = -sum(float(cosine[i, j]) for j in picks)
            elif objective == "max_min":
                values[i] = min(1 - float(cosine[i, j]) for j in picks)
            else:
                both = [*picks, i]
                values[i] = float(torch.linalg.det(cosine[both][:, both]))
        best = max(values.values())
        picks.append(next(i for i, value in values.items() if value >= best - 1e-7 * (objective != "log_det")))
        allowed.remove(picks[-1])
    return picks


def exact(images, tokens, dim, seed=0):
    """Features of ±1 in 4^n dimensions: their norms are powers of two and all cosines exact, with many ties."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (images, tokens, dim), generator=g).float() * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_picks_of_a_ragged_batch(implementation, device, objective, dtype):
    features = exact(3, 30, 16) if objective != "log_det" else torch.randn(3, 30, 16, generator=torch.manual_seed(0))
    features = features.to(dtype)
    candidates = torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    candidates[:, [0, 29]] = True
    first, counts = torch.tensor([29, 0, 0]), torch.tensor([8, 1, 5])
    # not contiguous
    wide = features.transpose(1, 2).contiguous().transpose(1, 2)
    args = [x.to(device) for x in (wide, first, counts, candidates)]
    picked, order = (x.cpu() for x in greedy(*args, objective, 8))
    for i in range(3):
        expected = textbook(features[i], int(first[i]), int(counts[i]), candidates[i].tolist(), objective)
        assert order[i, : counts[i]].tolist() == expected
        assert picked[i].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_rows_are_picked_in_order(implementation, device, objective, dtype):
    """Padding patches are equal; products of equal rows may differ in the last bit by where they stand."""
    if dtype == torch.float64 and implementation != "torch":
        pytest.skip("float64 is computed by plain torch")
    sizes = [(100, 37, 40), (200, 64, 10), (300, 64, 150)]
    interpreted = implementation == "triton" and device.type == "cpu"  # which takes its time
    for tokens, dim, steps in sizes[: 2 if interpreted else 3]:
        g = torch.Generator().manual_seed(tokens)
        rows = torch.randn(tokens // 3, dim, generator=g, dtype=dtype)
        like = torch.randint(0, len(rows), (tokens,), generator=g)
        first = (like == like[0]).nonzero()[0]
        every = torch.ones(1, tokens, dtype=torch.bool)
        args = [x.to(device) for x in (rows[like][None], first, torch.tensor([steps]), every)]
        order = greedy(*args, objective, steps)[1][0].tolist()
        for row in like.unique().tolist():
            standing = (like == row).nonzero().flatten().tolist()
            picked = [token for token in order if like[token] == row]
            assert picked == standing[: len(picked)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_edges(implementation, device, objective):
    zero = torch.zeros(1, dtype=torch.long, device=device)

    def run(features, count, candidates=None):
        features = features.to(device)
        candidates = torch.ones(features.shape[:2], device=device) > 0 if candidates is None else candidates.to(device)
        counts = torch.full((len(features),), count, device=device)
        return greedy(features, zero.expand(len(features)), counts, candidates, objective, count)

    picked, order = run(torch.randn(1, 1, 4), 1)  # one token
    assert picked.all()
    assert order.tolist() == [[0]]
    picked, order = run(torch.randn(2, 5, 4), 0)  # no picks
    assert not picked.any()
    assert order.shape == (2, 0)
    picked, order = run(torch.randn(0, 5, 4), 3)  # no images
    assert picked.shape == (0, 5)
    picked, order = run(torch.ones(1, 6, 4), 6)  # all alike: in order
    assert order.tolist() == [[0, 1, 2, 3, 4, 5]]
    picked, order = run(torch.zeros(1, 4, 4), 3)  # no direction at all
    assert order.tolist() == [[0, 1, 2]]
    picked, order = run(torch.randn(1, 7, 4), 7)  # everything
    assert picked.all()
    only = torch.tensor([[True, False, False, True, False]])
    picked, order = run(torch.randn(1, 5, 4), 2, only)
    assert order.tolist() == [[0, 3]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_cosines_at_once_or_row_by_row(monkeypatch, objective):
    """The plain implementation has two ways to its cosines."""
    from vlmprune.kernels import reference

    features, first = exact(2, 300, 64), torch.tensor([3, 299])
    args = (features, first, torch.tensor([40, 17]), torch.ones(2, 300) > 0, objective, 40)
    grams, gram = [], reference.gram
    monkeypatch.setattr(reference, "gram", lambda x: grams.append(x.shape) or gram(x))
    orders = [reference.greedy(*args)[1]]  # few picks: a row for each
    assert not grams
    monkeypatch.setattr(reference, "CACHE", 0)  # features that do not stay in the cache: all at once pays sooner
    orders.append(reference.greedy(*args)[1])
    assert len(grams) == 1
    monkeypatch.setattr(reference, "GRAM_LIMIT", 299)
    orders.append(reference.greedy(*args)[1])
    assert len(grams) == 1
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["exact", "random", "duplicates", "NaN", "few candidates"])
def test_a_cpu_picks_what_a_gpu_would(monkeypatch, objective, kind):
    """On a CPU most tokens are not looked at for most picks; the plain implementation for GPUs looks at all."""
    from vlmprune.kernels import greedy_cpu, reference

    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 400, 24, generator=g) + torch.randn(24, generator=g)
    candidates, first, counts = torch.rand(2, 400, generator=g) < 0.9, torch.tensor([3, 399]), torch.tensor([60, 17])
    if kind == "exact":
        features = exact(2, 400, 64)
    if kind == "duplicates":
        features = features[:, torch.randint(100, (400,), generator=g)]
        counts.clamp_(max=20)  # behind the 24th, rounding says which of them is worth most
    if kind == "NaN":
        features[0, 50] = torch.nan
    if kind == "few candidates":
        candidates &= torch.arange(400) < 40
    args = (features.double() if kind == "random" else features, first, counts, candidates, objective, 60)
    expected, all_order = reference.greedy(*args)
    late, best = [], greedy_cpu.Worth.best
    monkeypatch.setattr(greedy_cpu.Worth, "best", lambda *given: late.append(1) or best(*given))
    for tokens in (401, 400):
        monkeypatch.setattr(greedy_cpu, "LATE", {"max_min": tokens, "log_det": tokens})
        picked, order = greedy_cpu.greedy(*args)
        assert bool(late) == (tokens == 400 and objective != "max_sum" and kind not in ("duplicates", "exact"))
        assert torch.equal(picked, expected)
        for i in range(2):
            assert torch.equal(order[i, : counts[i]], all_order[i, : counts[i]])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gram", [True, False])
def test_one_launch_for_each_pick(monkeypatch, device, objective, gram):
    """What Triton does where all dot products have no room, or where log_det has many steps."""
    triton_greedy = pytest.importorskip("vlmprune.kernels.triton_greedy")
    from vlmprune.kernels import reference

    features = exact(2, 300, 64) if objective != "log_det" else torch.randn(2, 300, 24, generator=torch.manual_seed(0))
    features[:, 5::7] = features[:, :1].clone()
    args = [features, torch.tensor([7, 299]), torch.tensor([9, 4]), torch.rand(2, 300) < 0.8, objective, 9]
    monkeypatch.setattr(triton_greedy, "MANY_STEPS", 0 if gram else 99)
    if not gram:
        monkeypatch.setattr(triton_greedy, "MOST_COLUMNS", 299)
    elif objective != "log_det":
        monkeypatch.setattr(
            triton_greedy, "products_of", lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
        )
    launched, step_by_step = [], triton_greedy.step_by_step
    monkeypatch.setattr(triton_greedy, "step_by_step", lambda *a: launched.append(a[1]) or step_by_step(*a))
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    picked, order = triton_greedy.greedy(*there)
    expected, all_order = reference.greedy(*args)
    assert launched == [gram and objective == "log_det"]
    assert torch.equal(picked.cpu(), expected)
    for i in range(2):
        assert torch.equal(order[i, : args[2][i]].cpu(), all_order[i, : args[2][i]])


def test_a_first_pick_that_is_no_token(device):
    if device.type == "cuda":
        pytest.skip("a GPU says so in a debug build (TRITON_DEBUG=1)")
    for first in (-1, 5):
        with pytest.raises(IndexError, match=f"the first pick {first} of image 0 is none of 5 tokens"):
            greedy(torch.randn(1, 5, 4), torch.tensor([first]), torch.tensor([2]), torch.ones(1, 5) > 0, "max_min", 2)


def test_unknown_objective():
    x = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="max_sum"):
        greedy(x, torch.zeros(1).long(), torch.ones(1).long(), x[..., 0] == 0, "maxmin", 1)
