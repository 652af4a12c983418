"""What a check says, and when a difference is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = ["CHECKS", "Line", "Report", "judge", "relative"]

Outcome = Literal["pass", "FAIL", "?", "-"]

CHECKS = {
    "rows": "the pruned prefill equals the model's own layers run by hand on the kept rows",
    "batch": "a row of a padded batch equals the prompt alone",
    "cache": "every layer caches as many entries as promised, each the right one and none twice",
    "decode": "decoding equals the plain model on the whole sequence with dropped columns masked",
    "positions": "the keys are turned by the positions that the policy says",
    "restore": "after unpatch the logits are bitwise those from before, and no hook is left",
    "syncs": "a pruned prefill waits for the device no more often than promised",
    "generate": "the greedy answer with a cache is that without one, and a static cache changes nothing",
}

SLACK = 5.0  # a difference is one from so many times the noise on
CLEAR = 1.5  # and what is wrong on purpose must lie so many times above that


@dataclass(frozen=True)
class Line:
    """One check of one method.

    Attributes:
        check: a key of `CHECKS`.
        outcome: "pass"; "FAIL"; "?" where a deliberate mistake could not be told from rounding, or the check could not
            be judged otherwise; "-" where it does not apply.
        told: why, in words; empty for a plain pass.
        off: largest relative difference (Euclidean norm of a row of states over that of the reference's row).
        noise: the same between ways of computing the unpruned model that should agree (alone and in a batch, with a
            cache and without, layer by layer), the largest.
        twin: the same for the deliberate mistake.
    """

    check: str
    outcome: Outcome
    told: str = ""
    off: float | None = None
    noise: float | None = None
    twin: float | None = None

    @property
    def numbers(self) -> str:
        """`off 1.2e-07, noise 9.1e-08, deliberate mistake 0.43`; empty if nothing was measured."""
        known = {"off": self.off, "noise": self.noise, "deliberate mistake": self.twin}
        return ", ".join(f"{name} {value:.2g}" for name, value in known.items() if value is not None)


@dataclass(frozen=True)
class Report:
    """All checks of one method on one model.

    Attributes:
        method: names, joined by `+`.
        options: of every method that was stacked, as its object prints.
        lines: one per check, in the order of `CHECKS`.
        about: the model and the machine, for a bug report.
    """

    method: str
    options: list[str]
    lines: list[Line]
    about: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check failed ("?" and "-" are no failures)."""
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [line.check for line in self.lines if line.outcome == "FAIL"]

    def __getitem__(self, check: str) -> Line:
        return next(line for line in self.lines if line.check == check)

    def __str__(self) -> str:
        wide = max(map(len, CHECKS))
        told = ["; ".join(part for part in (line.told, line.numbers) if part) for line in self.lines]
        rows = [f"{line.check:{wide}}  {line.outcome:4}  {words}" for line, words in zip(self.lines, told, strict=True)]
        return "\n".join([self.method, *(row.rstrip() for row in rows)])


def relative(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """`(...,)` differences of the rows of `(..., dim)` tensors, relative to the rows of `want`; inf where not finite.

    A row that is much shorter than the others is measured against these.
    """
    got, want = got.double(), want.double()
    size = torch.linalg.vector_norm(want, dim=-1)
    off = torch.linalg.vector_norm(got - want, dim=-1) / size.clamp(min=max(0.1 * float(size.mean()), 1e-30))
    return off.nan_to_num(nan=torch.inf)


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest of `relative`; inf where shapes differ."""
    return float(relative(got, want).max()) if got.shape == want.shape else float("inf")


def worst_logits(got: torch.Tensor, want: torch.Tensor) -> float:
    """As `worst`; a constant on all logits of a row means nothing."""
    return worst(got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True))


def tolerance(noise: float, dtype: torch.dtype) -> float:
    """What may be rounding."""
    return SLACK * max(noise, torch.finfo(dtype).eps / 2)


def judge(
    check: str, off: float, noise: float, twin: float | None, dtype: torch.dtype, told: str = "", failed: str = ""
) -> Line:
    """Pass, fail or inconclusive.

    Args:
        off, noise, twin: of `Line`; no twin means that nothing could be made wrong.
        told, failed: words for a pass, and for a failure.
    """
    limit = tolerance(noise, dtype)
    if not (math.isfinite(off) and off <= limit):  # NaN and other shapes are no rounding, whatever the noise
        return Line(check, "FAIL", failed or told, off, noise, twin)
    if twin is None or not twin > CLEAR * limit:
        rounding = "a deliberate mistake cannot be told from rounding"
        hint = "" if dtype in (torch.float32, torch.float64) else "; float32 may tell"
        return Line(check, "?", f"{rounding} in {str(dtype).removeprefix('torch.')}{hint}", off, noise, twin)
    return Line(check, "pass", told, off, noise, twin)


def largest(found: Sequence[float]) -> tuple[float, int]:
    """The largest number and where it stands."""
    at = max(range(len(found)), key=lambda i: found[i])
    return found[at], at
