"""Greedy coverage: the picks of the loop that papers published, in less time."""

from __future__ import annotations

from time import process_time

import pytest
import torch

from vlmprune.parts import coverage
from vlmprune.parts.coverage import Cover, greedy_cover, look_at_all


def published(similarity: torch.Tensor, picks: int, weight: torch.Tensor, bonus: torch.Tensor) -> list[int]:
    """The loop of SCOPE and MMTok, in our words: at every pick all rows and all columns are looked at.

    Args:
        similarity: `(rows, tokens)`.
    """
    covered, order, left = torch.zeros(len(similarity)), [], torch.ones(similarity.shape[1], dtype=torch.bool)
    for _ in range(picks):
        gain = torch.relu(similarity - covered[:, None]).sum(0)
        order.append(int((gain * weight + bonus).masked_fill(~left, -torch.inf).argmax()))
        left[order[-1]] = False
        covered = torch.maximum(covered, similarity[:, order[-1]])
    return order


def like_features(tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Features with a mean that all share and few directions that most lies in."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 12, generator=g) @ torch.randn(12, dim, generator=g)
    return torch.randn(tokens, dim, generator=g) + few + torch.randn(dim, generator=g)


def alike(features: torch.Tensor, among: torch.Tensor) -> Cover:
    """Tokens that are to cover each other."""
    return Cover(features, features, among, real=among)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("modular", [False, True])
def test_picks_are_the_published_ones(monkeypatch, held, modular):
    monkeypatch.setattr(coverage, "LIMIT", 1 << 24 if held else 0)
    features = like_features(300, 24)
    g = torch.Generator().manual_seed(1)
    weight = torch.rand(300, generator=g) if modular else torch.ones(300)
    bonus = 4 * torch.rand(300, generator=g) if modular else torch.zeros(300)
    among = torch.ones(300, dtype=torch.bool)
    table = alike(features, among).part()
    want = published(table, 80, weight, bonus)
    given = (weight, bonus) if modular else ()
    assert greedy_cover([alike(features, among)], 80, among, *given).tolist() == want
    assert look_at_all(table, 80, among, weight, bonus).tolist() == want
    assert want != published(table, 80, weight.flip(0) + 1e-3 * bonus, weight * 9)


@pytest.mark.parametrize("held", [True, False])
def test_several_covers_of_other_rows_count_together(monkeypatch, held):
    """As MMTok has them: softmaxes of words and of patches over the patches."""
    monkeypatch.setattr(coverage, "LIMIT", 1 << 24 if held else 0)
    features, words, among = like_features(90, 12), like_features(7, 12, seed=1), torch.arange(90) % 5 > 0
    unit, told = (torch.nn.functional.normalize(x, dim=-1) for x in (features, words))
    among_all = torch.ones(90, dtype=torch.bool)
    for mask in (among_all, among):
        p = (told @ unit.T / 0.02).masked_fill(~mask, -torch.inf).softmax(1) / 7
        q = (unit @ unit.T / 0.2).masked_fill(~mask, -torch.inf).softmax(1) * mask[:, None] / 90
        want = published(torch.cat((p, 0.5 * q)), 30, mask.float(), torch.zeros(90))
        covers = [
            Cover(words, features, mask, temperature=0.02, scale=1 / 7),
            Cover(features, features, mask, real=mask, temperature=0.2, scale=0.5 / 90),
        ]
        assert greedy_cover(covers, 30, mask).tolist() == want
        assert greedy_cover(covers[1:], 30, mask).tolist() != want


def test_what_is_no_candidate_is_neither_picked_nor_covered():
    features, among = like_features(60, 8), torch.arange(60) % 3 > 0
    picks = greedy_cover([alike(features, among)], 20, among)
    alone = greedy_cover([alike(features[among], among[among])], 20, among[among])
    assert picks.tolist() == among.nonzero().flatten()[alone].tolist()
    assert greedy_cover([alike(features, among)], 60, among)[:40].sort().values.tolist() == [
        i for i in range(60) if i % 3
    ]


def test_equal_tokens_go_by_their_number():
    features = torch.eye(3).repeat(40, 1)
    among = torch.ones(120, dtype=torch.bool)
    assert greedy_cover([alike(features, among)], 5, among).tolist() == [0, 1, 2, 3, 4]
    assert published(alike(features, among).part(), 5, torch.ones(120), torch.zeros(120)) == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_it_takes_at_most_half_the_time_of_the_published_loop():
    """From the features on, at the size that papers report most, one thread; the best of five of each."""
    features, among, ones = like_features(576, 256), torch.ones(576, dtype=torch.bool), torch.ones(576)

    def ours():
        return greedy_cover([alike(features, among)], 128, among).tolist()

    def theirs():
        unit = torch.nn.functional.normalize(features, dim=-1)
        return published(unit @ unit.T, 128, ones, 0 * ones)

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(5):
        for name, call in (("ours", ours), ("theirs", theirs)):
            start = process_time()
            picks = call()
            times[name].append(process_time() - start)
            assert name == "ours" or picks == ours()
    assert min(times["ours"]) <= 0.5 * min(times["theirs"]), times
