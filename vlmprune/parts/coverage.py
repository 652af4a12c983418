"""Greedy coverage: picks that stand for all others. One token a time, the one that adds most to how well rows (of what
is to be covered) are covered by their best pick: facility location, as of arXiv 2510.24214, 2508.18264 and 2508.07871.

On a CPU what a token adds is not summed up anew for every pick: of every pick only the rows count that it covers better
than all before, few after the first ones. Tokens that are then nearly as good as the best are summed up anew, so that
picks are those of the loop that looks at everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vlmprune.kernels.precision import product
from vlmprune.kernels.reference import gram
from vlmprune.parts.attention import upcast
from vlmprune.parts.budget import count
from vlmprune.parts.cuts import Reduction
from vlmprune.parts.layout import Layout, download
from vlmprune.parts.selection import AnyNewlines, candidates, capped, keep_patches

__all__ = ["Cover", "greedy_cover", "select_covering"]

LIMIT = 1 << 24  # numbers that are held at one time; of more, rows are worked out where they are needed
CHUNK = 256  # rows that are worked out together
MANY = 3  # where a pick covers one row in so many better, all tokens are summed up anew: that is faster then
NEARLY = 1e-5  # tokens whose worth is this share of the best one's away from it are summed up anew


@dataclass
class Cover:
    """How well every token covers every row: the cosine of their vectors, or a softmax of cosines over the tokens.

    Args:
        rows: `(rows, dim)`; tokens: `(tokens, dim)`; the same object where tokens are to cover each other.
        real: `(rows,)` bool, the rows that count; None for all.
        among: `(tokens,)` bool, the candidates, over which a softmax runs.
        temperature: of the softmax; None for plain cosines.
        scale: what a softmax is multiplied with.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    among: torch.Tensor
    real: torch.Tensor | None = None
    temperature: float | None = None
    scale: float = 1.0
    level: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        same = self.rows is self.tokens
        self.tokens = torch.nn.functional.normalize(upcast(self.tokens), dim=-1)
        self.rows = self.tokens if same else torch.nn.functional.normalize(upcast(self.rows), dim=-1)
        if self.temperature is not None:
            logits = [
                (product(part, self.tokens.T) / self.temperature).masked_fill(~self.among, -torch.inf).logsumexp(1)
                for part in self.rows.split(CHUNK)
            ]
            self.level = torch.cat(logits) if logits else self.rows.new_zeros(0)

    @classmethod
    def of_each_other(
        cls, tokens: torch.Tensor, among: torch.Tensor, temperature: float | None = None, scale: float = 1.0
    ) -> Cover:
        """How well tokens `(tokens, dim)` cover each other, those of `among` alone."""
        return cls(tokens, tokens, among, among, temperature, scale)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, at: torch.Tensor | None = None) -> torch.Tensor:
        """`(rows, tokens)` of some rows, of all for None."""
        if at is None and self.rows is self.tokens:
            return self.shaped(squared(self.tokens), slice(None))
        at = slice(None) if at is None else at
        return self.shaped(product(self.rows[at], self.tokens.T), at)

    def column(self, token: int) -> torch.Tensor:
        """`(rows,)` of one token."""
        return self.shaped(product(self.rows, self.tokens[token][:, None]), slice(None))[:, 0]

    def shaped(self, cosine: torch.Tensor, at: torch.Tensor | slice) -> torch.Tensor:
        """What some rows of cosines mean."""
        if self.temperature is not None:
            cosine = torch.exp(cosine / self.temperature - self.level[at][:, None]) * self.scale
        return cosine if self.real is None else cosine.mul_(self.real[at][:, None])


def greedy_cover(
    covers: Sequence[Cover],
    picks: int,
    among: torch.Tensor,
    weight: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pick tokens, each the one whose gain * weight + bonus is largest; ties go to the lower index.

    The gain of a token is the sum over the rows of all `covers` of what it covers them better than all picks before;
    nothing is covered less than 0. No device sync where there are at most 16.8 million pairs of rows and tokens.

    Args:
        picks: how many.
        among: `(tokens,)` bool, the candidates.
        weight: `(tokens,)` float of at least 0; None for 1.
        bonus: `(tokens,)` float; None for 0.

    Returns:
        `(picks,)` long, in order; arbitrary past the number of candidates.
    """
    if among.is_meta:  # where only the number is asked for
        return torch.zeros(picks, dtype=torch.long, device=among.device)
    few = sum(map(len, covers)) * len(among) <= LIMIT
    if torch.compiler.is_compiling() or (few and not on_host(among)):
        return look_at_all(torch.cat([cover.part() for cover in covers]), picks, among, weight, bonus)
    order = Greedy([Covered(cover, few) for cover in covers], weight, bonus).order(picks, array(among))
    return torch.tensor(order + [0] * (picks - len(order)), dtype=torch.long).to(among.device)


def on_host(x: torch.Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return x.device.type == "cpu"


def squared(x: torch.Tensor) -> torch.Tensor:
    """All products of `(tokens, dim)` vectors with each other, of which half are worked out."""
    if torch.compiler.is_compiling() or not on_host(x):
        return gram(x, 96)
    whole = array(x)
    return torch.from_numpy(whole @ whole.T)  # one array twice: a symmetric product to numpy's BLAS, faster than blocks


def look_at_all(
    table: torch.Tensor, picks: int, among: torch.Tensor, weight: torch.Tensor | None, bonus: torch.Tensor | None
) -> torch.Tensor:
    """`greedy_cover` of `(rows, tokens)` by summing up every token for every pick."""
    covered, order, left = table.new_zeros(len(table), 1), [], among
    for _ in range(picks):
        score = torch.relu(table - covered).sum(0)
        score = score if weight is None else score * weight
        score = score if bonus is None else score + bonus
        order.append(score.masked_fill(~left, -torch.inf).argmax())
        covered = torch.maximum(covered, table.index_select(1, order[-1][None]))
        left = left.index_fill(0, order[-1], False)
    return torch.stack(order) if order else torch.zeros(0, dtype=torch.long, device=among.device)


def array(x: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor, on the host."""
    return x.detach().cpu().numpy()


class Covered:
    """A `Cover` on the host: how well its rows are covered so far, and what every token would add to that.

    Attributes:
        now: `(rows,)`.
        gain: `(tokens,)` float64.
    """

    def __init__(self, cover: Cover, held: bool):
        self.cover, self.whole = cover, array(cover.part()) if held else None
        alike = cover.rows is cover.tokens and cover.temperature is None and cover.real is None
        self.across = self.whole if alike or self.whole is None else self.whole.T  # a row is read faster than a column
        self.now = np.zeros(len(cover), np.float64 if cover.tokens.dtype == torch.float64 else np.float32)
        self.gain = self.sums()

    def rows(self, at: np.ndarray) -> np.ndarray:
        """`(rows, tokens)` of some rows, a copy."""
        if self.whole is not None:
            return self.whole.take(at, 0)
        return array(self.cover.part(torch.from_numpy(at).to(self.cover.tokens.device)))

    def column(self, token: int) -> np.ndarray:
        """`(rows,)` of a token."""
        return array(self.cover.column(token)) if self.across is None else self.across[token]

    def sums(self) -> np.ndarray:
        """`(tokens,)` what every token adds, summed up over all rows."""
        total = torch.full((len(self.cover.tokens),), -self.now.sum(dtype=np.float64), dtype=torch.float64)
        for start in range(0, len(self.now), CHUNK):
            now = self.now[start : start + CHUNK, None]
            at = slice(start, start + len(now))
            rows = self.rows(np.arange(at.start, at.stop)) if self.whole is None else self.whole[at]
            total += torch.maximum(torch.from_numpy(rows), torch.from_numpy(now)).sum(0, dtype=torch.float64)
        return total.numpy()

    def anew(self, token: int) -> None:
        """Sum up what one token adds."""
        self.gain[token] = np.maximum(self.column(token) - self.now, 0).sum(dtype=np.float64)

    def pick(self, token: int) -> None:
        """Cover the rows by a token."""
        column = self.column(token)
        better = (column > self.now).nonzero()[0]
        before, after = self.now[better], column[better]
        self.now[better] = after
        if self.whole is not None and MANY * len(better) > len(self.now):
            self.gain = self.sums()
            return
        for start in range(0, len(better), CHUNK):
            part = slice(start, start + CHUNK)
            rows = self.rows(better[part])
            np.maximum(rows, before[part, None], out=rows)
            np.minimum(rows, after[part, None], out=rows)
            self.gain -= rows.sum(0, dtype=np.float64) - before[part].sum(dtype=np.float64)


@dataclass
class Greedy:
    """`greedy_cover` on the host."""

    covers: list[Covered]
    weight: torch.Tensor | None
    bonus: torch.Tensor | None

    def order(self, picks: int, candidates: np.ndarray) -> list[int]:
        """The picks, at most as many as there are candidates."""
        weight = None if self.weight is None else array(self.weight).astype(np.float64)
        left, order = np.where(candidates, 0, -np.inf), []
        left = left if self.bonus is None else left + array(self.bonus)

        def worth() -> np.ndarray:
            gain = self.covers[0].gain
            for cover in self.covers[1:]:
                gain = gain + cover.gain
            return gain if weight is None else gain * weight

        dust = NEARLY * float(np.max(worth(), initial=0.0)) / 100
        for _ in range(min(picks, int(candidates.sum()))):
            score = worth() + left
            best = int(score.argmax())
            near = (score >= score[best] - NEARLY * abs(score[best]) - dust).nonzero()[0]
            if len(near) > 1:
                for token in near:
                    for cover in self.covers:
                        cover.anew(token)
                best = int(near[(worth() + left)[near].argmax()])
            order.append(best)
            left[best] = -np.inf
            for cover in self.covers:
                cover.pick(best)
        return order


def select_covering(
    covers: Sequence[Sequence[Cover]],
    keep: int | float | list[int],
    layout: Layout,
    newlines: AnyNewlines,
    weight: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
) -> Reduction:
    """Keep the tokens of every image that cover its rows best (`greedy_cover`).

    Args:
        covers: for every image, of the tokens that it has.
        keep: budget in patches per image or video (tokens for `newlines="candidates"`), or one count for each.
        weight, bonus: `(images, tokens)`.
    """
    among, totals, available = candidates(layout, newlines)
    wanted = keep if isinstance(keep, list) else [count(keep, total) for total in totals]
    reached = capped(wanted, download(among.sum(1)) if available is None else available)
    mask = torch.zeros_like(among)
    for i, (grid, picks) in enumerate(zip(layout.grids, reached, strict=True)):
        of = [None if each is None else each[i, : grid.tokens] for each in (weight, bonus)]
        mask[i] = mask[i].index_fill(0, greedy_cover(covers[i], picks, among[i, : grid.tokens], *of), True)
    return keep_patches(mask & among, layout, reached, newlines)
