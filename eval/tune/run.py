"""The search of `vlmprune tune`: what candidates cost, then halving on the user's prompts; all is kept as it comes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vlmprune.eval.fidelity import run as fidelity_run
from vlmprune.eval.fidelity.asking import refuse_nothing
from vlmprune.eval.fidelity.costs import CostBook, EntryCosts
from vlmprune.eval.fidelity.journal import Journal
from vlmprune.eval.fidelity.measure import StudyEntry, StudyRow
from vlmprune.eval.scores import score
from vlmprune.eval.tune.judge import LossVerdict, judge
from vlmprune.eval.tune.search import Standing, better_half, rungs
from vlmprune.runtime.errors import CommandError, UserError
from vlmprune.runtime.loading import Loaded
from vlmprune.runtime.prompts import Pair
from vlmprune.runtime.status import Bar, note, status
from vlmprune.runtime.tables import counted

__all__ = ["Candidate", "Goal", "Tuning", "loss_of"]

TIMING = 0.5  # of what time is left; the rest is for the answers


@dataclass(frozen=True)
class Goal:
    """What is wanted: `speedup` of the "first" token or of the "answer", and `loss` at most, in shares."""

    speedup: float
    loss: float
    of: str = "answer"
    metric: str = "exact"


@dataclass
class Candidate:
    """A method at a budget, what it costs, and how it did on the prompts that it was given."""

    entry: StudyEntry
    costs: EntryCosts
    rows: list[StudyRow] = field(default_factory=list)
    verdict: LossVerdict | None = None
    rung: int = 0
    kl: float = 0.0

    @property
    def label(self) -> str:
        return self.entry.label

    def speedup(self, goal: Goal) -> float:
        """Unpruned / pruned time of what the goal is about."""
        return getattr(self.costs, goal.of)["median"]


def loss_of(row: StudyRow, pair: Pair, metric: str) -> float:
    """What pruning lost on a prompt: of the score where answers were given, else whether the answer changed."""
    if not pair.answers:
        return 1.0 - row.compared.answer_agrees
    return score(metric, row.unpruned, pair.answers) - score(metric, row.pruned, pair.answers)


class Tuning:
    """One search, whose results are kept in a folder.

    Args:
        loaded: the model.
        folder: of rows and costs.
        setting: what all results depend on.
        pairs: the prompts.
        goal: what is wanted.
        batch: prompts at a time, in timing too.
        longest: tokens of an answer.
        deadline: seconds; when they are over, the search ends with what it has.
        now: the clock of the deadline.
    """

    def __init__(
        self,
        loaded: Loaded,
        folder: Path,
        setting: dict[str, Any],
        pairs: Sequence[Pair],
        goal: Goal,
        batch: int = 1,
        longest: int = 64,
        deadline: float = float("inf"),
        repeats: int = 5,
        now: Callable[[], float] = time.monotonic,
    ):
        self.loaded, self.folder, self.setting, self.goal = loaded, folder, setting, goal
        self.batch, self.longest, self.now = batch, longest, now
        self.journal = Journal(folder, setting)
        self.pairs = shuffled(pairs)
        self.pictures = list(dict.fromkeys(pair.picture for pair in self.pairs))
        self.skipped: dict[str, str] = {}
        self.refusals: dict[str, dict[str, list[str]]] = {}  # by method and reason the budgets
        self.book = CostBook(loaded, self.journal, self.pairs, batch, longest, repeats, self.skipped)
        self.end = now() + deadline
        self.interrupted = False
        self.untimed: list[StudyEntry] = []  # what time was too short for

    @property
    def over(self) -> bool:
        """Whether there is no time left, or the user said stop."""
        return self.interrupted or self.now() > self.end

    @property
    def complete(self) -> bool:
        """Whether there was time for everything."""
        return not self.over and not self.untimed

    def told_untimed(self) -> str:
        """How much was not tried at all; nothing where all was."""
        return f", {counted(len(self.untimed), 'candidate')} not tried at all" if self.untimed else ""

    @contextmanager
    def within(self, share: float) -> Iterator[None]:
        """Time is over when this share of what is left is."""
        end, now = self.end, self.now()
        self.end = now + share * (end - now)
        try:
            yield
        finally:
            self.end = end

    def costs(self, entries: Sequence[StudyEntry]) -> list[Candidate]:
        """Measure what entries cost that are not known yet, in half of the time; the others are left out."""
        made = []
        with self.within(TIMING), Bar(len(entries)) as bar:
            for entry in entries:
                if entry not in self.book and self.over:
                    self.untimed.append(entry)
                    continue
                status(f"timing {entry.label}")
                try:
                    made.append(Candidate(entry, self.book.of(entry)))
                except KeyboardInterrupt:
                    self.interrupted = True
                    self.untimed.append(entry)
                except CommandError as error:  # a method that refuses still pictures, or this size of them
                    self.refuse(entry, error)
                bar.step()
        return made

    def search(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Halve the candidates on more and more pictures; returns those that were left at the end, best first."""
        left = list(candidates)
        steps = rungs(len(self.pictures), len(left))
        for number, pictures in enumerate(steps, 1):
            self.measure(left, self.pictures[:pictures], number)
            measured = [one for one in left if one.rung == number]
            if self.over or not measured:
                break
            if number < len(steps):
                stay = set(better_half([self.standing(one, len(left)) for one in measured], self.goal.speedup))
                left = [one for one in measured if one.label in stay]
                note(f"{counted(pictures, 'picture')}: {counted(len(left), 'candidate')} of {len(measured)} go on")
        return self.judged(left)

    def judged(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that came furthest, with their verdicts, best first."""
        reached = max((one.rung for one in candidates), default=0)
        finalists = [one for one in candidates if one.rung == reached > 0]
        for one in finalists:
            one.verdict = judge(self.losses(one), self.goal.loss, len(finalists))
        return sorted(finalists, key=lambda one: rank(one, self.goal))

    def measure(self, candidates: Sequence[Candidate], pictures: Sequence[str], number: int) -> None:
        """Ask candidates about pictures; the rows of prompts that all of them answered are taken."""
        by_label = self.rows([one.entry for one in candidates], pictures)
        for one in (one for one in candidates if one.label in by_label):
            one.rows, one.rung = by_label[one.label], number
            one.kl = float(np.mean([row.compared.kl_answer for row in one.rows]))

    def rows(self, entries: Sequence[StudyEntry], pictures: Sequence[str]) -> dict[str, list[StudyRow]]:
        """The rows of the prompts about pictures that all entries answered, by label; what is not there is asked.

        An entry that refuses a picture is left out, and noted.

        Raises:
            CommandError: the only entry refuses one.
        """
        wanted = set(pictures)
        pairs = [pair for pair in self.pairs if pair.picture in wanted]
        todo = fidelity_run.Todo(self.journal, entries, pairs)
        left = todo.left()
        while left and not self.over:
            some, left = left[: 4 * self.batch], left[4 * self.batch :]
            try:
                self.ask(entries, some)
            except CommandError:
                if len(entries) == 1:
                    raise
                entries = [entry for entry in entries if self.takes(entry, some)]
                todo = fidelity_run.Todo(self.journal, entries, pairs)
        by_label: dict[str, list[StudyRow]] = {}
        for row in todo.rows() if entries else ():
            by_label.setdefault(row.label, []).append(row)
        return by_label

    def ask(self, entries: Sequence[StudyEntry], pairs: Sequence[Pair]) -> None:
        """Put the rows of entries and prompts into the journal."""
        todo = fidelity_run.Todo(self.journal, entries, pairs)
        self.interrupted |= fidelity_run.measure(self.loaded, todo, self.batch, self.longest, self.skipped)

    def takes(self, entry: StudyEntry, pairs: Sequence[Pair]) -> bool:
        """`ask`, and whether the entry refused no picture."""
        try:
            self.ask([entry], pairs)
        except CommandError as error:
            self.refuse(entry, error)
            return False
        return True

    def refuse(self, entry: StudyEntry, error: CommandError) -> None:
        """Note that an entry is left out, and why."""
        note(f"left out: {entry.label}: {error}")
        reasons = self.refusals.setdefault(entry.method, {})
        reasons.setdefault(str(error), []).append(entry.budget or "own schedule")

    def refuse_nothing(self) -> NoReturn:
        """End where nothing was measured."""
        if self.interrupted or self.skipped:
            refuse_nothing(self.skipped, self.interrupted)
        raise UserError("there was no time to measure anything: give more --minutes, fewer --methods or --limit.")

    @property
    def refused(self) -> dict[str, list[str]]:
        """What was left out of methods, and why."""
        return {
            method: [f"{', '.join(budgets)}: {why}" for why, budgets in reasons.items()]
            for method, reasons in self.refusals.items()
        }

    def losses(self, candidate: Candidate) -> list[float]:
        """The mean loss of every picture."""
        pairs = {(pair.picture, pair.prompt): pair for pair in self.pairs}
        by_picture: dict[str, list[float]] = {}
        for row in candidate.rows:
            loss = loss_of(row, pairs[row.picture, row.prompt], self.goal.metric)
            by_picture.setdefault(row.picture, []).append(loss)
        return [float(np.mean(losses)) for losses in by_picture.values()]

    def standing(self, candidate: Candidate, beside: int) -> Standing:
        """How a candidate stands; hopeless is who would be refused even with all others tested beside it."""
        found = judge(self.losses(candidate), self.goal.loss, beside)
        return Standing(candidate.label, candidate.speedup(self.goal), found.loss, found.answer == "no")


def rank(candidate: Candidate, goal: Goal) -> tuple:
    """The order of finalists: proved ones, open ones, refused ones; among each the fast enough, then by loss."""
    verdict, speed = candidate.verdict, candidate.speedup(goal)
    fast = speed >= goal.speedup
    order = ("yes", "open", "no").index(verdict.answer)
    return (not fast, order, verdict.loss, -speed) if fast else (True, order, -speed, verdict.loss)


def shuffled(pairs: Sequence[Pair]) -> list[Pair]:
    """The prompts, picture by picture, in an order that hangs on nothing but the pictures' names."""
    names = sorted({pair.picture for pair in pairs})
    random.Random(0).shuffle(names)
    place = {name: i for i, name in enumerate(names)}
    return sorted(pairs, key=lambda pair: place[pair.picture])
