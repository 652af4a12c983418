"""The cells of one model: its entries, multiplied out with budgets, seeds and tasks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmprune import spec
from vlmprune.engine.compile import compile_cuts
from vlmprune.errors import UnsupportedError
from vlmprune.eval.config.entries import Budget, Entry, unique
from vlmprune.eval.config.schema import Setting
from vlmprune.methods.downsample import Downsample
from vlmprune.parts.facts import ModelFacts
from vlmprune.patches import FAMILIES
from vlmprune.spec import NONE

__all__ = ["Cell", "Draft", "cells_of"]


@dataclass(frozen=True)
class Cell:
    """One result: a method at a budget (and seed) on a task of a model. Its fields are those of the cell file."""

    id: str
    model: str
    method: str
    label: str
    options: dict[str, Any]
    budget: dict[str, int | float] | None
    seed: int | None
    task: str
    control: bool
    group: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """All options, as the model's `use` takes them."""
        return self.options | (self.budget or {}) | ({} if self.seed is None else {"seed": self.seed})

    @property
    def title(self) -> str:
        """For a progress bar or a message: `fopru keep 0.25 seed 0`."""
        words = [self.label, *(f"{word} {amount}" for word, amount in (self.budget or {}).items())]
        return " ".join([*words, *([] if self.seed is None else [f"seed {self.seed}"])])


@dataclass
class Draft:
    """What is collected while one model is planned; without facts, the model was not looked at."""

    setting: Setting
    facts: ModelFacts | None = None
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wrong(self, what: str, why: str) -> None:
        """Note a mistake in the line of a key, task, metric or published number."""
        self.mistakes.append((self.setting.where[what], why))

    def skip(self, entry: Entry, budget: Budget | None, why: str) -> None:
        """Note what the report says about something that was left out."""
        about = {"model": self.setting.name, "label": entry.label, "budget": dict([budget]) if budget else None}
        self.skipped.append(about | {"reason": why})


def cells_of(draft: Draft, tasks: dict[str, str | None]) -> tuple[Cell, ...]:
    """Methods and controls, multiplied out with their budgets and seeds and with the tasks."""
    return tuple(
        cell_of(draft.setting, entry, budget, seed, task, group)
        for entry in order(draft.setting)
        for budget, seed in variants(draft, entry)
        for task, group in tasks.items()
    )


def order(setting: Setting) -> list[Entry]:
    """The unpruned model first, then methods, then the other controls."""
    full = [entry for entry in setting.controls if entry.parts[0].name == NONE]
    return [*full, *setting.methods, *(entry for entry in setting.controls if entry not in full)]


def variants(draft: Draft, entry: Entry) -> list[tuple[Budget | None, int | None]]:
    """The budgets and seeds that an entry is run with.

    A budget that the entry states itself must be possible. One of the setting's list is left out with its reason where
    this method cannot meet it, as long as the method can run at all; a control is left out in any case.
    """
    try:
        takes = [spec.takes(part.name) for part in entry.parts]
    except ValueError as error:
        draft.mistakes.append((entry.where, str(error)))
        return []
    mine = takes[0] if entry.alone else set()
    budgets = budgets_of(draft, entry, mine)
    seeds = seeds_of(draft, entry, mine) if budgets else ()
    return [(budget, seed) for budget in possible(draft, entry, budgets, seeds) for seed in seeds]


def budgets_of(draft: Draft, entry: Entry, takes: set[str]) -> Sequence[Budget | None]:
    """What to try an entry at, the setting's budgets if it has none of its own.

    (None,) runs it once, as it is; nothing is tried where a control would need a budget.
    """
    if entry.budgets:
        return entry.budgets
    own = not entry.alone or entry.own_budget or entry.parts[0].name == NONE
    budgets = () if own else setting_budgets(draft.setting, entry)
    if budgets and not takes & {*spec.BUDGETS}:
        draft.notes.append(f"{entry.label} takes no budget: it is run once.")
        budgets = ()
    if not budgets and entry.control and "keep" in takes:
        draft.skip(entry, None, "there is no budget (keep or average) to run it at")
        return ()
    return budgets or (None,)


def seeds_of(draft: Draft, entry: Entry, takes: set[str]) -> Sequence[int | None]:
    """The seeds of an entry: (None,) where it has none; nothing where they are a mistake."""
    fixed = "seed" in entry.parts[0].options
    if entry.seeds is None:
        by_chance = entry.alone and entry.parts[0].name == "random" and not fixed
        return draft.setting.seeds if by_chance else (None,)
    if "seed" not in takes:
        draft.mistakes.append((entry.where, f"{entry.label} takes no seed, so `seeds` means nothing to it."))
        return ()
    if fixed:
        draft.mistakes.append((entry.where, "give `seeds` or the option seed, not both."))
        return ()
    return entry.seeds


def possible(
    draft: Draft, entry: Entry, budgets: Sequence[Budget | None], seeds: Sequence[int | None]
) -> list[Budget | None]:
    """The budgets that an entry can be run at; the others are skipped, or a mistake."""
    good: list[Budget | None] = []
    refused: list[tuple[Budget | None, str]] = []
    for budget in budgets if seeds else ():
        why = impossible(cell_of(draft.setting, entry, budget, seeds[0], "-", None), draft.facts)
        if why is None:
            good.append(budget)
        else:
            refused.append((budget, why))
    if refused and not entry.control and (entry.budgets or not good):
        draft.mistakes += [(entry.where, f"{entry.label}: {why}") for _, why in refused]
        return []
    for budget, why in refused:
        draft.skip(entry, budget, why)
    return good


def setting_budgets(setting: Setting, entry: Entry) -> tuple[Budget, ...]:
    """The setting's budgets; a control is run at those that single entries state, too."""
    if not entry.control:
        return setting.budgets
    stated = [budget for other in setting.methods for budget in other.budgets or ()]
    return unique([*setting.budgets, *stated])


def impossible(cell: Cell, facts: ModelFacts | None) -> str | None:
    """Why a cell cannot be run on a model, or None; without facts, only what does not depend on the model."""
    try:
        made = spec.build(cell.method, cell.arguments, none=True)
        if facts is not None:  # another model, or a processor, that a method asks besides is there when it runs
            smaller = FAMILIES[facts.family].bounds_pixels  # by the processor (runtime/fewer_pixels.py)
            made = [method.done() if smaller and isinstance(method, Downsample) else method for method in made]
            compile_cuts([replace(method, **method.plain_with) for method in made], facts)
    except (TypeError, ValueError, FileNotFoundError, UnsupportedError) as error:
        return str(error)
    return None


def cell_of(
    setting: Setting, entry: Entry, budget: Budget | None, seed: int | None, task: str, group: str | None
) -> Cell:
    """One cell, with its readable name."""
    options = {
        option if entry.alone else f"{part.name}.{option}": value
        for part in entry.parts
        for option, value in part.options.items()
    }
    return Cell(
        id=id_of(setting, entry, budget, seed, task),
        model=setting.name,
        method="+".join(part.name for part in entry.parts),
        label=entry.label,
        options=options,
        budget=dict([budget]) if budget else None,
        seed=seed,
        task=task,
        control=entry.control,
        group=group,
    )


def id_of(setting: Setting, entry: Entry, budget: Budget | None, seed: int | None, task: str) -> str:
    """The name of a cell's file."""
    amount = "-".join(map(str, budget)) if budget else "full" if entry.parts[0].name == NONE else "own"
    words = [setting.name, entry.label, amount, task, *([] if seed is None else [f"seed-{seed}"])]
    words += [] if setting.limit is None else [f"limit-{setting.limit}"]  # a first try must not replace what took long
    name = "--".join(re.sub(r"[^\w.+-]+", "_", word) for word in words)
    if len(name) > 200:  # file systems allow 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name
