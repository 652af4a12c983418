"""Options with a range, searched for one method at one budget (`vlmprune tune --method`), by Optuna.

Every trial answers the same prompts as the unpruned model, so trials are compared in pairs; what is kept small is the
KL divergence of their answers (`kl_answer`), which moves before answers do. The sampler has a fixed seed and sees
nothing but what the journal keeps: a search that was stopped is gone on with by doing it again, and nothing is measured
twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmprune.eval.fidelity.measure import StudyEntry
from vlmprune.parts.options import Range
from vlmprune.runtime.errors import CommandError, UserError, extra
from vlmprune.runtime.status import Bar, note, status

if TYPE_CHECKING:
    from vlmprune.eval.tune.run import Candidate, Tuning

__all__ = ["Trial", "best", "calibrate", "optuna", "search_options", "split"]

MOST_PICTURES = 32  # of a trial; the paper of VFlowOpt takes 30 samples
FINALISTS = 3  # of the trials, beside the method's own options
MORE = 1.02  # times the visual tokens of the method's own options that a trial may see
TIME = 0.7  # of what is left, for the trials; the rest is for the finalists
WORST = 1e6  # what the sampler is told of a trial that cannot be taken


@dataclass(frozen=True)
class Trial:
    """Options that were tried.

    Attributes:
        number: from 1 on; 0 are the method's own options.
        entry: the method with them.
        options: those that were searched.
        kl: nats per token, mean over the prompts; None where it was refused.
        layer_average: visual tokens that a decoder layer sees, mean over layers and prompts.
        pictures: how many it answered prompts about.
        why: why it cannot be taken; empty where it can.
    """

    number: int
    entry: StudyEntry
    options: Mapping[str, float]
    kl: float | None
    layer_average: float
    pictures: int
    why: str = ""


def optuna() -> Any:
    """The library that searches.

    Raises:
        UserError: it is not installed.
    """
    found = extra("optuna", "--method searches options by Optuna: pip install 'vlmprune[tune]'.")
    found.logging.set_verbosity(found.logging.WARNING)
    return found


def split(pictures: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Pictures for the trials, and others for the verdict, which the search has not seen.

    Raises:
        UserError: there is a single one.
    """
    if len(pictures) < 2:
        raise UserError("--method needs at least two pictures: one to search on, and another to judge by.")
    count = min(MOST_PICTURES, len(pictures) // 2)
    return pictures[:count], pictures[count:]


def calibrate(
    search: Tuning, entry: StudyEntry, ranges: Mapping[str, Range], trials: int, pictures: Sequence[str]
) -> list[Trial]:
    """Try options until so many trials are done, or time is over; the method's own come first.

    Raises:
        CommandError: the method's own options are refused.
    """
    found = optuna()
    sampler = found.samplers.TPESampler(seed=0, n_startup_trials=max(5, trials // 5))
    study = found.create_study(sampler=sampler)
    spaces = {
        name: found.distributions.FloatDistribution(one.low, one.high, log=one.log) for name, one in ranges.items()
    }
    with search.within(TIME), Bar(trials) as bar:
        start = measured(search, entry, {}, 0, pictures)
        if start is None:
            return []
        made = [start]
        while len(made) <= trials:
            asked = study.ask(spaces)
            options = {name: float(f"{value:.4g}") for name, value in asked.params.items()}
            one = tried(search, entry, options, len(made), pictures, start)
            if one is None:
                note(f"{len(made) - 1} of {trials} trials done")
                break
            study.tell(asked, WORST if one.kl is None or one.why else one.kl)
            made.append(one)
            bar.step()
    return made


def tried(
    search: Tuning, entry: StudyEntry, options: Mapping[str, float], number: int, pictures: Sequence[str], start: Trial
) -> Trial | None:
    """One trial, which the method may refuse and which may not cost more than the method's own options do."""
    try:
        one = measured(search, entry, options, number, pictures)
    except CommandError as error:
        return Trial(number, entry, options, None, 0.0, 0, str(error))
    if one is not None and one.layer_average > MORE * start.layer_average:
        return replace(one, why=f"sees {one.layer_average:.1f} tokens, more than {start.layer_average:.1f}")
    return one


def measured(
    search: Tuning, entry: StudyEntry, options: Mapping[str, float], number: int, pictures: Sequence[str]
) -> Trial | None:
    """One trial on all pictures; None where time was too short for them."""
    name = f"trial {number}" if number else ""
    mine = replace(entry, options=entry.options | options, name=name)
    status(f"{mine.label}: {', '.join(f'{option}={value}' for option, value in options.items())}")
    rows = search.rows([mine], pictures).get(mine.label, [])
    answered = {row.picture for row in rows}
    if not answered or answered != set(pictures) - set(search.skipped):
        return None
    kl, tokens = (float(np.mean([getattr(row.compared, of) for row in rows])) for of in ("kl_answer", "layer_average"))
    return Trial(number, mine, options, kl, tokens, len(answered))


def search_options(
    search: Tuning, entries: Sequence[StudyEntry], ranges: Mapping[str, Range], count: int
) -> tuple[list[Trial], list[Candidate], list[Candidate]]:
    """The trials of every budget; the best of them as candidates; and these judged by pictures no trial has seen."""
    seen, others = split(search.pictures)
    found = [calibrate(search, entry, ranges, count, seen) for entry in entries]
    candidates = search.costs([entry for trials in found if trials for entry in best(trials)])
    search.measure(candidates, others, 1)
    return [one for trials in found for one in trials], candidates, search.judged(candidates)


def best(trials: Sequence[Trial]) -> list[StudyEntry]:
    """The method's own options, and the best that were found."""
    order = sorted((one for one in trials[1:] if not one.why), key=lambda one: (one.kl, one.number))
    return [trials[0].entry, *(one.entry for one in order[:FINALISTS])]
