"""What a check says, and when a difference is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = ["CHECKS", "OPEN", "Line", "Noise", "Report", "judge", "relative", "tolerance"]

Outcome = Literal["pass", "FAIL", "?", "!", "-"]

CHECKS = {
    "rows": "the pruned prefill equals the model's own layers run by hand on the kept rows",
    "batch": "a row of a padded batch equals the prompt alone",
    "cache": "every layer caches as many entries as promised, each the right one and none twice",
    "decode": "decoding equals the plain model on the whole sequence with dropped columns masked",
    "positions": "the keys are turned by the positions that the policy says",
    "restore": "after unpatch the logits are bitwise those from before, and no hook is left",
    "syncs": "a pruned prefill waits for the device no more often than promised",
    "generate": "`generate`'s greedy answer is that by hand, and a static cache changes nothing",
    "taps": "what a method sees is what the host's own eager attention computes",
}

SLACK = 5.0  # a difference is one from so many times the noise on
CLEAR = 1.5  # and what is wrong on purpose must lie so many times above that
OPEN = 1  # so many lines may be inconclusive
# what no rounding makes of the unpruned model, computed in two ways
STRANGE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.25}


@dataclass(frozen=True)
class Line:
    """One check of one method.

    Attributes:
        check: a key of `CHECKS`.
        outcome: "pass"; "FAIL"; "?" where a deliberate mistake could not be told from rounding, or the check could not
            be judged otherwise; "!" where the two ways that are compared differ for the unpruned model already, so that
            nothing can be said about pruning; "-" where it does not apply.
        told: why, in words; empty for a plain pass.
        off: largest relative difference (Euclidean norm of a row of states over that of the reference's row).
        noise: the same between the two ways of computing the unpruned model that this line compares; where `off` is
            above that, the largest between any two ways (alone and in a batch, with a cache and without, ...).
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

    @property
    def words(self) -> str:
        """All that is told of it, numbers last; empty for a plain pass that measured nothing."""
        return "; ".join(filter(None, (self.told, self.numbers)))


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
        """Whether all is well: no "FAIL", no "!", and no more than one "?", for more of them tell too little."""
        return not self.failed and not self.unknown and len(self.open) <= OPEN

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return self.named("FAIL")

    @property
    def unknown(self) -> list[str]:
        """Names of the checks that know nothing of this model: by hand, the unpruned model is another one."""
        return self.named("!")

    @property
    def open(self) -> list[str]:
        """Names of the checks that could not tell."""
        return self.named("?")

    def named(self, outcome: Outcome) -> list[str]:
        """Names of the checks with this outcome."""
        return [line.check for line in self.lines if line.outcome == outcome]

    def __getitem__(self, check: str) -> Line:
        return next(line for line in self.lines if line.check == check)

    def __str__(self) -> str:
        wide = max(map(len, CHECKS))
        rows = [f"{line.check:{wide}}  {line.outcome:4}  {line.words}" for line in self.lines]
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


@dataclass(frozen=True)
class Noise:
    """How far apart two ways of computing the unpruned model are.

    Attributes:
        mine: the two ways that a line compares.
        most: any two ways.
    """

    mine: float
    most: float

    def limit(self, off: float, dtype: torch.dtype) -> tuple[float, float]:
        """What may be rounding, and the noise behind it.

        Ways that gave the same bits may take different kernels when pruned: what is above their noise, and not above
        the largest, is no failure; but then the deliberate mistake must lie above that.
        """
        tight = tolerance(self.mine, dtype)
        return (tight, self.mine) if off <= tight else (max(tight, tolerance(self.most, dtype)), self.most)


def tolerance(noise: float, dtype: torch.dtype) -> float:
    """What may be rounding; with no noise at all, once."""
    return max(SLACK * noise, torch.finfo(dtype).eps / 2)


def judge(
    check: str, off: float, noise: Noise, twin: float | None, dtype: torch.dtype, told: str = "", failed: str = ""
) -> Line:
    """Pass, fail or inconclusive.

    Args:
        off, twin: of `Line`; no twin means that nothing could be made wrong.
        told, failed: words for a pass, and for a failure.
    """
    if not noise.mine <= STRANGE[dtype]:
        words = (
            f"unpruned, the two ways that this line compares differ by {noise.mine:.2g}, which is no rounding: the "
            "check does not know this model, and nothing is said about pruning; please report it"
        )
        return Line(check, "!", words, off, noise.mine, twin)
    limit, known = noise.limit(off, dtype)
    if not (math.isfinite(off) and off <= limit):  # NaN and other shapes are no rounding, whatever the noise
        return Line(check, "FAIL", failed or told, off, known, twin)
    if twin is None or not twin > CLEAR * limit:
        rounding = "a deliberate mistake cannot be told from rounding"
        hint = "" if dtype in (torch.float32, torch.float64) else "; float32 may tell"
        return Line(check, "?", f"{rounding} in {str(dtype).removeprefix('torch.')}{hint}", off, known, twin)
    return Line(check, "pass", told, off, known, twin)


def largest(found: Sequence[float]) -> tuple[float, int]:
    """The largest number and where it stands."""
    at = max(range(len(found)), key=lambda i: found[i])
    return found[at], at
