"""The entries of `methods` and `controls`: a method, or several in a row, with options, budgets and seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationInfo
from pydantic.dataclasses import dataclass

from vlmprune import registry, spec
from vlmprune.eval.config.kinds import Average, Keep, Seeds
from vlmprune.yamls.kinds import Plain, Switch, Text
from vlmprune.yamls.told import as_mistake, mistakes, must_be

__all__ = ["STRICT", "Budget", "Entries", "Entry", "Part", "WithBudgets", "or_controls", "unique"]

#: ("keep" or "average", amount)
Budget = tuple[str, int | float]
CONTROLS = ("none", "random", "grid", "pool")
#: What an entry of `methods` may say besides the method's own options.
ENTRY = ("name", "label", "keep", "average", "own_budget", "seeds")
STRICT = ConfigDict(extra="forbid", validate_default=True)


def unique(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """Each budget once; 1 (a token) and 1.0 (all of them) are two."""
    return tuple({repr(budget): budget for budget in budgets}.values())


class WithBudgets:
    """Has budgets: `keep` and `average`, in this order."""

    keep: tuple[int | float, ...]
    average: tuple[int | float, ...]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return (*(("keep", amount) for amount in self.keep), *(("average", amount) for amount in self.average))


# Methods


@dataclass(frozen=True, config=STRICT)
class Part:
    """One method with its options; what the config says about it was not checked against the method yet."""

    name: Text
    options: dict[str, Plain] = field(default_factory=dict)


def looked_up(part: Part, info: ValidationInfo) -> Part:
    """Where anything else is wrong, a method and its options are looked up too; budgets are the plan's."""
    if info.context and info.context.thorough and part.name != spec.NONE:
        with as_mistake(f"{part.name}: "):
            options = {"keep": 0.5} if "keep" in spec.takes(part.name) else {}
            spec.build(part.name, options | {k: v for k, v in part.options.items() if k not in spec.BUDGETS})
    return part


def no_other_budget(own: bool, info: ValidationInfo) -> bool:
    if own and (info.data.get("keep") or info.data.get("average")):
        raise mistakes(((), "own_budget runs the method's own schedule: leave out keep and average."))
    return own


@dataclass(frozen=True, config=STRICT)
class Entry(WithBudgets):
    """One entry of `methods` or `controls`.

    Attributes:
        parts: the method, or several that run one after the other.
        label: what tables call it; unique in its setting.
        keep, average: its own budgets; without any, those of the setting.
        own_budget: run the method's own published schedule, once.
        seeds: one cell for each; None leaves it to the method.
        control: whether it stands under `controls`.
        where: file and line.
    """

    parts: tuple[Annotated[Part, AfterValidator(looked_up)], ...]
    label: Text
    keep: Keep = ()
    average: Average = ()
    own_budget: Annotated[Switch, AfterValidator(no_other_budget)] = False
    seeds: Seeds | None = None
    control: bool = False
    where: str = ""

    @property
    def alone(self) -> bool:
        return len(self.parts) == 1


def in_full(value: Any) -> dict[str, Any]:
    """`fopru`, `{name: todre, tau: null, label: todre-1}` or `[globalcom2, {name: transprune, keep: 64}]`."""
    given = value if isinstance(value, dict) else {"name": value}
    if "name" not in given:
        raise mistakes(((), "an entry needs a name (`vlmprune ls methods`)."))
    name = given["name"]
    names = name.split("+") if isinstance(name, str) and "+" in name else name
    made = in_row(given, names) if isinstance(names, list) else one_part(given)
    label = given.get("label")
    return made | {"label": "+".join(str(part["name"]) for part in made["parts"]) if label is None else label}


def one_part(given: dict[str, Any]) -> dict[str, Any]:
    """An entry of one method: what it says besides `ENTRY` are the method's options."""
    options = {word: inner for word, inner in given.items() if word not in ENTRY}
    own = {word: given[word] for word in ENTRY[2:] if word in given}
    return {"parts": [{"name": given["name"], "options": options}], **own}


def in_row(given: dict[str, Any], names: list[Any]) -> dict[str, Any]:
    """An entry of several methods, each of which has its own options."""
    way = "of several methods, known: name, label. Write options with each: name: [{name: fopru, keep: 64}, ...]"
    if more := [((word,), f"unknown key {word!r} {way}.") for word in given if word not in ("name", "label")]:
        raise mistakes(*more)
    if len(names) < 2:
        raise mistakes(((), "a list stands for several methods that run one after the other: name at least two."))
    return {"parts": [in_part(part) for part in names]}


def in_part(value: Any) -> dict[str, Any]:
    """One method of several: a name, or a mapping with its name and options, its budget among them."""
    given = value if isinstance(value, dict) else {"name": value.strip() if isinstance(value, str) else value}
    return {"name": given.get("name"), "options": {word: inner for word, inner in given.items() if word != "name"}}


def or_controls(value: Any, info: ValidationInfo) -> tuple[Any, ...]:
    """True for all, false for none, or a list of entries; what stands among the methods is not run twice."""
    if isinstance(value, bool):
        taken = {entry.label for entry in info.data.get("methods", ())}
        return tuple(name for name in CONTROLS if value and name not in taken)
    if not isinstance(value, list):
        raise must_be("true, false or a list of methods", value)
    return tuple(value)


def placed(entries: tuple[Entry, ...], info: ValidationInfo) -> tuple[Entry, ...]:
    """The entries with their lines; labels differ, among methods and controls, and none is another method's name: fopru
    called `random` would pass for the control."""
    word, methods = info.field_name or "", info.data.get("methods", ())
    made = tuple(
        replace(entry, where=info.context.where(word, i), control=word == "controls") for i, entry in enumerate(entries)
    )
    differ(made, methods if word == "controls" else ())
    if word == "controls" and not (methods or made) and "methods" in info.data:
        raise mistakes((info.context.where(), "there is nothing to run: `methods` is empty and `controls` are off."))
    return made


def differ(entries: tuple[Entry, ...], before: tuple[Entry, ...]) -> None:
    """Refuse a label that stands twice, or is another method's name."""
    taken = {spec.NONE, *registry.names()}
    seen = {entry.label.casefold(): entry.where for entry in before}
    for entry in entries:
        label = entry.label.casefold()
        if other := seen.get(label):
            raise mistakes(
                (entry.where, f"{entry.label!r} is the label of {other} too: give one of them another `label`.")
            )
        names = "+".join(part.name for part in entry.parts)
        if entry.label != names and label in taken - {names}:
            raise mistakes((entry.where, f"the label {entry.label!r} is another method's name: give another one."))
        seen[label] = entry.where


Entries = Annotated[tuple[Annotated[Entry, BeforeValidator(in_full)], ...], AfterValidator(placed)]
