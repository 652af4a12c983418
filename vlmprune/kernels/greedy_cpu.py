"""Greedy diversity on a CPU, where looking at a pick costs nothing: every token is not looked at for every pick.

What a token is worth only falls: its nearest pick comes nearer, its distance from the picks' span shrinks. So a share
of the tokens, the best ones, is kept up to date, and as long as the best of them is worth more than any other token was
when last looked at, it is the next pick. When it is not, the others catch up with all picks that they missed, in one
matrix product, and the best are chosen anew. Picks are those of the loop that looks at everything, which runs where
tokens are few: it is sooner there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.precision import product, relaxed
from vlmprune.kernels.reference import first_of_equal, floor, upcast

__all__ = ["greedy"]

SHARE = 8  # one token in so many is kept up to date
# from so many tokens on that pays: catching up costs log_det more, and what max_sum sums up may grow
LATE = {"max_min": 512, "log_det": 1152}


def greedy(
    features: Tensor, first: Tensor, counts: Tensor, candidates: Tensor, objective: str, steps: int
) -> tuple[Tensor, Tensor]:
    """As `torch.ops.vlmprune.greedy`, for tensors on a CPU.

    Raises:
        IndexError: a first pick that is no token.
    """
    x = upcast(features)
    images, tokens, _ = x.shape
    order = first.new_zeros(images, steps)
    picked = torch.zeros(images, tokens, dtype=torch.bool)
    if steps == 0 or images == 0 or tokens == 0:
        return picked, order
    twins, x = [twins_of(one) for one in x], functional.normalize(x, dim=-1)
    for image, (begin, count) in enumerate(zip(array(first), array(counts), strict=True)):
        if not 0 <= begin < tokens:
            raise IndexError(f"vlmprune.greedy: the first pick {begin} of image {image} is none of {tokens} tokens.")
        picks = pick(x[image], twins[image], int(begin), min(int(count), steps), array(candidates[image]), objective)
        order[image, : len(picks)] = torch.tensor(picks, dtype=order.dtype)
        picked[image, picks] = True
    return picked, order


def twins_of(x: Tensor) -> np.ndarray | None:
    """For every row the first one that is bitwise equal to it; None where all are different."""
    head = np.ascontiguousarray(array(x[:, : 8 // x.element_size()]) + 0)  # -0 is 0
    if head.nbytes == 8 * len(x) and len(np.unique(head.view(np.int64))) == len(x):
        return None  # no two rows even begin alike
    return array(first_of_equal(x[None])[0])


def array(x: Tensor) -> np.ndarray:
    """The numbers of a tensor on a CPU, without a copy."""
    return np.from_dlpack(x.detach())


class Worth:
    """What every one of some tokens is worth after the picks that were accounted for, by where they are among them."""

    def __init__(
        self, x: Tensor, value: np.ndarray, basis: np.ndarray, objective: str, twins: np.ndarray | None = None
    ):
        self.x, self.value, self.basis, self.objective, self.twins = x, value, basis, objective, twins
        self.low = value.dtype.type(floor(x.dtype))
        self.relaxed, self.out = relaxed(x), x.new_empty(len(x))
        self.row = array(self.out)

    def cosines(self, token: int) -> np.ndarray:
        """Those to one token, until the next call."""
        if self.relaxed:
            return array(product(self.x, self.x[token]))
        torch.mv(self.x, self.x[token], out=self.out)
        return self.row

    def account(self, done: int, picks: list[int]) -> None:
        """Account for picks, before which `done` others were."""
        before = done
        # products of equal rows may be rounded apart by where they stand
        like = picks if self.twins is None else self.twins[picks]
        if len(picks) == 1:
            rows, done = self.cosines(int(like[0]))[None], 0
        else:
            rows = array(product(self.x[like], self.x.T))
            if self.objective == "log_det" and done:
                rows = rows - self.basis[:done, picks].T @ self.basis[:done]
        rows = rows if self.twins is None else rows[:, self.twins]
        for i, (row, pick) in enumerate(zip(rows, picks, strict=True)):
            if self.objective == "max_sum":
                self.value -= row
            elif self.objective == "max_min":
                np.minimum(self.value, 1 - row, out=self.value)
            else:
                self.project(row, pick, done, before + i)
            self.value[pick] = -np.inf

    def project(self, row: np.ndarray, pick: int, done: int, at: int) -> None:
        """One step of the incremental Cholesky factorisation (`reference.project`); `row` lacks picks from `done`."""
        if at > done:
            row = row - self.basis[done:at, pick] @ self.basis[done:at]
        left = self.value[pick]
        left = left if left != -np.inf else type(left)(1)  # a first pick that is no candidate
        along = np.multiply(row, 1 / left**0.5 if left > self.low else left * 0, out=self.basis[at])
        if self.twins is not None:
            along[:] = along[self.twins]
        self.value -= along * along

    def settle(self) -> None:
        """What is all but inside the picks' span is worth nothing to log_det."""
        if self.objective == "log_det":
            np.putmask(self.value, (self.value < self.low) & (self.value > -np.inf), 0)

    def top(self) -> int:
        """The first of the tokens that are worth most."""
        place = int(self.value.argmax())
        if self.objective == "log_det" and not self.value[place] > self.low:  # until then nothing so small matters
            self.settle()
            place = int(self.value.argmax())
        return place

    def best(self, many: int, done: int) -> tuple[Worth, np.ndarray, float]:
        """The best tokens by themselves, which tokens they are, and what the best of the others is worth."""
        self.settle()
        columns = np.sort(np.argpartition(self.value, len(self.value) - many)[len(self.value) - many :])
        basis = np.empty((len(self.basis), many), self.basis.dtype)
        basis[:done] = self.basis[:done, columns]
        others = self.value.copy()
        others[columns] = -np.inf
        return Worth(self.x[columns], self.value[columns], basis, self.objective), columns, others.max()


def worth_at_first(x: Tensor, twins: np.ndarray | None, count: int, candidates: np.ndarray, objective: str) -> Worth:
    """What all tokens are worth before the first of `count` picks."""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    start = {"max_sum": 0.0, "max_min": np.inf, "log_det": 1.0}[objective]
    basis = np.empty((count - 1 if objective == "log_det" else 0, len(x)), kind)
    return Worth(x, np.where(candidates, kind(start), kind(-np.inf)), basis, objective, twins)


def pick(
    x: Tensor, twins: np.ndarray | None, first: int, count: int, candidates: np.ndarray, objective: str
) -> list[int]:
    """The picks of one image in their order; a NaN is worth most, as in torch."""
    if count <= 0:
        return []
    every = worth_at_first(x, twins, count, candidates, objective)
    many = len(x) // SHARE
    falls = len(x) >= LATE.get(objective, np.inf) and twins is None and bool(np.isfinite(array(x.sum())))
    picks, done, some = [first], 0, None
    place, bound, columns = 0, np.inf, np.empty(0, int)
    with np.errstate(invalid="ignore"):
        while len(picks) < count:
            if some is not None:
                some.account(len(picks) - 1, [place])
                place = some.top()
                if some.value[place] > bound:
                    picks.append(int(columns[place]))
                    continue
            every.account(done, picks[done:])
            done = len(picks)
            picks.append(every.top())
            if falls:
                some, columns, bound = every.best(many, done)
                place = int(np.searchsorted(columns, picks[-1]))
                if place >= many or columns[place] != picks[-1]:  # one of many that are worth as much
                    some = None
    return picks
