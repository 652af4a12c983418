"""Choosing and gathering, every implementation against Python lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import gather_inputs

top_k = torch.ops.vlmprune.top_k
select_gather = torch.ops.vlmprune.select_gather
CUDA = True
SHAPES = [(1, 1), (3, 17), (2, 257), (1, 700)]
SCORES = [torch.float32, torch.float16, torch.bfloat16]
# bfloat16 stands for both half precisions in every run
RANKED = ["bool", "torch.float32", pytest.param("torch.float16", marks=pytest.mark.exhaustive), "torch.bfloat16"]
SPECIAL = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-7, -1e-7, 3e38, 65504.0]


def ranked(scores, count, among):
    """Indices of the best, by hand: a NaN first, then the higher score, then the lower index."""
    key = lambda i: (scores[i] == scores[i], -scores[i] if scores[i] == scores[i] else 0, i)  # noqa: E731
    return sorted(sorted((i for i in range(len(scores)) if among[i]), key=key)[: max(count, 0)])


def scores_of(rows, columns, dtype, seed=0):
    """Many ties, and everything that a float can be."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (rows, columns), generator=g).float() / 2
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (rows, columns), generator=g)]
    return torch.where(torch.rand(rows, columns, generator=g) < 0.3, special, scores).to(dtype)


def test_top_k_in_tiles(device, monkeypatch):
    """What Triton does with rows that have no room in registers, at a size that its interpreter can bear."""
    triton_choose = pytest.importorskip("vlmprune.kernels.triton_choose")
    monkeypatch.setattr(triton_choose, "TILE", 64)
    rows, columns = 2, 257
    among = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.8
    for seed, wanted in enumerate((1, 65, 300)):
        scores, counts = scores_of(rows, columns, torch.float32, seed), torch.tensor([wanted, 100])
        kept = triton_choose.top_k(scores.to(device), counts.to(device), among.to(device)).cpu()
        for i in range(rows):
            expected = ranked(scores[i].tolist(), int(counts[i]), among[i].tolist())
            assert kept[i].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", SCORES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_top_k(implementation, device, shape, dtype):
    rows, columns = shape
    g = torch.Generator().manual_seed(1)
    among = [torch.ones(shape, dtype=torch.bool), torch.rand(shape, generator=g) < 0.6, torch.zeros(shape) > 0]
    wanted = [columns // 2, columns, columns + 3, 0, 1]
    interpreted = implementation == "triton" and device.type == "cpu"  # which takes its time: each once, not all pairs
    pairs = zip(among + among[:2], wanted, strict=True) if interpreted else itertools.product(among, wanted)
    for real, count in pairs:
        scores, counts = scores_of(*shape, dtype, count), torch.full((rows,), count)
        counts[0] = max(count - 1, 0)  # ragged
        kept = top_k(scores.to(device), counts.to(device), real.to(device)).cpu()
        for i in range(rows):
            expected = ranked(scores[i].tolist(), int(counts[i]), real[i].tolist())
            assert kept[i].nonzero().flatten().tolist() == expected


def test_top_k_of_nothing_and_of_more_dimensions(implementation, device):
    for shape in ((0, 5), (3, 0)):
        empty = torch.zeros(shape, device=device)
        kept = top_k(empty, torch.ones(shape[0], dtype=torch.long, device=device), empty > 0)
        assert kept.shape == shape
    scores = torch.arange(24.0, device=device).view(2, 3, 4)
    counts = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device)
    kept = top_k(scores.transpose(0, 1), counts.T, torch.ones(3, 2, 4, device=device) > 0)  # not contiguous
    assert kept.sum(-1).T.tolist() == [[0, 1, 2], [3, 4, 4]]
    assert kept[2, 0].tolist() == [False, False, True, True]


def columns_of(ids, row):
    """The ids of every column of a row, one per axis, as lists."""
    return ids[..., row, :][None].flatten(0, -2).T.tolist()


def by_hand(kept, real, ids, contiguous):
    """Which columns `select_gather` has to return with which ids, and how many are gone, row by row."""
    for b, mine in enumerate(kept):
        left, gone, before = set(mine), 0, []
        for i, is_real in enumerate(real[b]):
            gone += is_real and i not in left
            before.append(gone)
        given = columns_of(ids, b)
        yield [[max(x - contiguous * before[i], 0) for x in given[i]] for i in mine], gone


def check(out, kept, real, given, length, contiguous):
    hidden, ids, cos, sin, index, mask, dropped = (x.cpu() for x in out)
    batch, columns = len(kept), len(real[0]) if real else 0
    assert hidden.shape == (batch, length, given[0].shape[-1])
    given = [x.cpu() for x in given]
    for b, (positions, gone) in enumerate(by_hand(kept, real, given[1], contiguous)):
        padding = length - len(kept[b])
        assert mask[b].tolist() == [False] * padding + [True] * len(kept[b])
        assert dropped[b] == gone
        assert index[b].tolist()[padding:] == kept[b]
        assert columns_of(ids, b)[padding:] == positions
        # whatever stands in for padding is nothing that is kept, and every entry is what its index says
        assert not {*index[b].tolist()[:padding]} & {*kept[b]}
        assert len({*index[b].tolist()}) == length <= columns
        assert torch.equal(hidden[b], given[0][b, index[b]])
        assert torch.equal(cos[..., b, :, :], given[2][..., b, index[b], :])
        assert torch.equal(sin[..., b, padding:, :], given[3][..., b, kept[b], :])


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("ranked_by", RANKED)
@pytest.mark.parametrize(("axes", "twisted"), [(0, False), (3, True)])
def test_select_gather(implementation, device, axes, twisted, ranked_by, contiguous):
    """Ragged counts from nothing to everything, padding on both sides, the first and the last column among the kept."""
    g = torch.Generator().manual_seed(3)
    cases = [((1, 1), 8, torch.float32), ((3, 20), 1, torch.float16), ((2, 33), 5, torch.bfloat16)]
    interpreted = implementation == "triton" and device.type == "cpu"  # which takes its time
    cases = cases[1 + contiguous :][:1] if interpreted else [
        *cases,
        ((3, 280), 24, torch.bfloat16), ((2, 270), 7, torch.float32), ((2, 600), 8, torch.float16),
    ]  # fmt: skip
    for shape, dim, dtype in cases:
        batch, columns = shape
        given = gather_inputs(*shape, dim, dtype, device, axes, rotary=6 if dim != 7 else 0, twisted=twisted)
        real = torch.rand(shape, generator=g) < 0.8
        if batch > 1:
            real[0] = True
        counts = torch.randint(0, columns + 1, (batch,), generator=g)
        counts[-1] = columns  # as many as there are
        if ranked_by == "bool":
            scores, counts = torch.rand(shape, generator=g) < 0.5, None
            scores[0, [0, -1]] = True
            kept = [(s & r).nonzero().flatten().tolist() for s, r in zip(scores, real, strict=True)]
        else:
            scores = scores_of(*shape, next(d for d in SCORES if str(d) == ranked_by))
            kept = [ranked(s.tolist(), int(n), r.tolist()) for s, n, r in zip(scores, counts, real, strict=True)]
        longest = max(map(len, kept))
        wide = scores.new_zeros(batch, 2 * columns)[:, ::2].copy_(scores) if twisted else scores
        for length in {longest if contiguous else columns} if interpreted else {longest, columns}:
            out = select_gather(
                wide.to(device),
                None if counts is None else counts.to(device),
                real.to(device),
                *given,
                length,
                contiguous,
            )
            check(out, kept, real.tolist(), given, length, contiguous)


def test_a_mask_of_none_is_all_real(implementation, device):
    given = gather_inputs(2, 9, 4, torch.float32, device)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0]], device=device).bool()
    out = select_gather(keep, None, None, *given, 4, True)
    check(out, [[0, 2, 3, 8], []], [[True] * 9] * 2, given, 4, True)


def test_nothing_at_all(implementation, device):
    for batch, columns, length in ((0, 5, 2), (2, 5, 0), (2, 0, 0)):
        given = gather_inputs(batch, columns, 4, torch.float32, device)
        keep = torch.zeros(batch, columns, dtype=torch.bool, device=device)
        out = select_gather(keep, None, None, *given, length, True)
        assert [x.shape for x in out[:1] + out[4:]] == [(batch, length, 4), (batch, length), (batch, length), (batch,)]
        assert (out[6] == columns).all()


def test_refusals():
    given = gather_inputs(1, 4, 2, torch.float32, "cpu")
    with pytest.raises(ValueError, match="between 0 and the 4 columns"):
        select_gather(torch.ones(1, 4).bool(), None, None, *given, 5, False)
    with pytest.raises(ValueError, match="float scores need counts"):
        select_gather(torch.ones(1, 4), None, None, *given, 2, False)


def test_gradients_go_back_where_rows_came_from():
    given = gather_inputs(2, 6, 3, torch.float64, "cpu", axes=3)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    hidden, cos, sin = (given[i].requires_grad_() for i in (0, 2, 3))

    def run(hidden, cos, sin):
        out = select_gather(keep, None, None, hidden, given[1], cos, sin, 3, False)
        return out[0], out[2], out[3]

    assert torch.autograd.gradcheck(run, (hidden, cos, sin))
    assert torch.autograd.gradgradcheck(run, (hidden, cos, sin))
