"""What `vlmprune tune` tries: methods at budgets, and what of them fits a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from vlmprune import registry, spec
from vlmprune.eval.tune.calibrate import optuna
from vlmprune.parts.options import Range, ranges
from vlmprune.runtime import answering
from vlmprune.runtime.errors import UserError
from vlmprune.runtime.status import note
from vlmprune.spec import Job

if TYPE_CHECKING:
    from vlmprune.runtime.loading import Loaded

__all__ = ["Tried", "all_methods", "own_options", "some_methods"]

#: What methods look at (`Method.looks_at`), in the order in which they are tried, should time be short.
ORDER = ("tower", "nothing", "features", "question", "decoder", "")
#: What is not tried unless it is named, and why.
LEFT_OUT = {
    "atp": "its modules are trained for one model: --methods atp --option weights=FOLDER.",
    "downsample": "on most models it takes detail away and no token: --methods downsample tries it all the same.",
}


@dataclass
class Tried:
    """What is to be tried.

    Attributes:
        jobs: methods at budgets.
        refused: the methods that are left out, and why.
        named: whether somebody named the methods: all of them must fit then.
        ranges: the options that are searched, and where; none where methods are compared.
    """

    jobs: list[Job]
    refused: dict[str, list[str]] = field(default_factory=dict)
    named: bool = True
    ranges: dict[str, Range] = field(default_factory=dict)

    def fitting(self, loaded: Loaded) -> list[Job]:
        """The jobs that fit a model; the methods of the others are refused, and told.

        Raises:
            UserError: one does not, of those that were named, or none does.
        """
        left = [job for job in self.jobs if self.fits(loaded, job)]
        if not left:
            raise UserError(f"nothing fits the model: {list(self.refused.values())[-1][-1]}")
        for name, why in self.refused.items():
            note(f"left out: {name}: {' '.join(why)}")
        return left

    def fits(self, loaded: Loaded, job: Job) -> bool:
        """Whether a job fits a model."""
        try:
            answering.check(loaded, [job])
        except UserError as error:
            if self.named:
                raise
            self.refuse(job.method, str(error))
            return False
        return True

    def refuse_all(self, refused: Mapping[str, Sequence[str]]) -> None:
        """Note what is left out besides, by method and reasons."""
        for method, whys in refused.items():
            self.refuse(method, *whys)

    def refuse(self, method: str, *whys: str) -> None:
        """Note why a method is left out."""
        told = self.refused.setdefault(method, [])
        told += [why for why in whys if why not in told]


def some_methods(names: Sequence[str], budgets: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> Tried:
    """Methods by name, at budgets and by their own published schedules.

    Raises:
        ValueError, TypeError: an unknown method or option, or a bad value.
    """
    jobs = spec.jobs(names, budgets, options, named=False)
    own = [name for name in names if all(has_schedule(part) for part in spec.names_of(name))]
    return Tried([*jobs, *(spec.jobs(own, [{}], options, named=False) if own else [])])


def has_schedule(name: str) -> bool:
    """Whether a method runs without a budget."""
    return getattr(registry.find(name), "optional", False)


def all_methods(budgets: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> Tried:
    """Every method that there is, but for those that cannot be had, or not without an option or a file.

    Raises:
        ValueError: an option that none has.
    """
    made = Tried([], {name: [why] for name, why in LEFT_OUT.items()}, named=False)
    classes = loadable(made)
    spec.check_known(options, {name: {name: cls} for name, cls in classes.items()})
    jobs: list[list[Job]] = []
    for name in sorted(classes.keys() - LEFT_OUT, key=lambda name: (place(classes[name]), name)):
        mine = {key: value for key, value in options.items() if spec.takers(key, {name: classes[name]})}
        try:
            jobs.append(some_methods([name], budgets, mine).jobs)
        except (TypeError, ValueError, FileNotFoundError) as error:
            made.refuse(name, str(error))
    by_budget = zip_longest(*jobs)  # should time be short, all methods were tried at some
    made.jobs = [job for some in by_budget for job in some if job is not None]
    return made


def loadable(made: Tried) -> dict[str, type]:
    """The classes of all methods, by name; those of other packages that cannot be loaded are refused."""
    classes = {}
    for name in registry.names():
        try:
            classes[name] = registry.find(name)
        except ValueError as error:
            made.refuse(name, str(error))
    return classes


def place(cls: type) -> int:
    """When a method's turn is; what another package made up comes last."""
    return (*ORDER, cls.looks_at).index(cls.looks_at)


def own_options(method: str, budgets: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> Tried:
    """A method at budgets, and those of its options that are searched: all with a range that are not given.

    Raises:
        UserError: it has none, or there is nothing to search with.
        ValueError, TypeError: as of `some_methods`.
    """
    found = {name: one for name, one in ranges(registry.find(method)).items() if name not in options}
    if not found:
        some = [name for name, other in registry.registered().items() if ranges(other)]
        raise UserError(f"{method} has no option with a range left to search. Who has some: {', '.join(some)}.")
    optuna()  # or what is missing
    return Tried(spec.jobs([method], budgets, options), ranges=found)
