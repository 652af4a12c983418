"""From what a user says to methods and budgets: the one front end of Python, the command, YAML and lmms-eval.

Text is read here and nowhere else. A value is None, true or false, a number, a list of these, or text; `tau=None` is
something that was said (todre without its second stage), and what was not said is not there at all. Every mistake is a
TypeError or a ValueError with the same words wherever it is made; commands turn them into exit code 2.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmprune import registry
from vlmprune.errors import did_you_mean
from vlmprune.parts.budget import SmallBudgetWarning, check_keep, unlikely

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["BUDGETS", "NONE", "Job", "budget_text", "budgets_in", "build", "jobs", "names_of"]
__all__ += ["read_budget", "read_given", "read_option", "read_share", "read_value", "shares", "takes", "write_value"]

NONE = "none"  # the method that leaves the model as it is
BUDGETS = ("keep", "average")
#: Words that are values. `none` in small letters is text: `newlines` and the like take it.
WORDS = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
WHOLE = re.compile(r"[+-]?\d+")
QUOTED = re.compile(r"""(["'])(.*)\1""", re.DOTALL)
CLOSING = {"[": "]", "(": ")"}


# Text


def read_value(value: Any) -> Any:
    """The value that a text means: `-2`, `0.1`, `true`, `None`, `[7, 9, 12]` (a tuple), or the text itself.

    What is no text stays as it is, but for whole negative floats: lmms-eval has made -2.0 of `-2` before we see it.

    Raises:
        ValueError: a list that is not closed or has a list in it.
    """
    if isinstance(value, str):
        return read_text(value.strip(), value)
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def read_text(text: str, whole: str) -> Any:
    """`read_value` of a text without the spaces around it; errors call it `whole`."""
    if text[:1] in CLOSING:
        return read_list(whole)
    if text in WORDS:
        return WORDS[text]
    number, quoted = read_number(text), QUOTED.fullmatch(text)
    if number is not None:
        return number
    return quoted[2] if quoted else text


def read_list(value: str) -> tuple:
    """`[7, 9, 12]` or `(7, 9, 12)`.

    Raises:
        ValueError: it is not closed, or has a list in it.
    """
    text = value.strip()
    inside = text[1:-1].strip()
    if len(text) < 2 or not text.endswith(CLOSING[text[0]]) or re.search(r"[][()]", inside):
        raise ValueError(f"{value!r} is no list such as [7, 9, 12].")
    return tuple(read_value(part) for part in inside.removesuffix(",").split(",")) if inside else ()


def read_number(text: str) -> int | float | None:
    """`-2` or `0.1`; None for text that is no number."""
    if not NUMBER.fullmatch(text):
        return None
    return int(text) if WHOLE.fullmatch(text) else float(text)


def write_value(value: Any) -> str:
    """The text that `read_value` reads as `value`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write_value, value))}]"
    quoted = isinstance(value, str) and read_value(value) != value
    return f'"{value}"' if quoted else str(value)


def read_budget(given: Any, word: str = "keep") -> int | float:
    """`36` is a count; `0.1` and `10%` are fractions; numbers are taken as they are.

    Raises:
        TypeError, ValueError: no such number, or one that cannot be meant.
    """
    if not isinstance(given, str):
        return check_keep(given, word)
    text = given.strip()
    number = read_number(text.removesuffix("%").strip())
    if number is None:
        raise ValueError(f"{word}={given!r} is neither a count (36) nor a fraction (0.1, 10%).")
    return check_keep(number / 100 if text.endswith("%") else number, word)


def read_share(given: str, word: str) -> float:
    """`0.5` or `50%` as a number; whether it can be meant is for others to say.

    Raises:
        ValueError: no number.
    """
    number = read_number(given.strip().removesuffix("%").strip())
    if number is None:
        raise ValueError(f"{word} {given!r} is no share (0.5, 50%).")
    return number / 100 if given.strip().endswith("%") else number


def read_given(key: str, value: Any) -> Any:
    """The value of an option given as text: a budget's, `fopru.keep` too, may be in per cent.

    Raises:
        ValueError: as `read_value` and `read_budget`; the option is named.
    """
    try:
        value = read_value(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return read_budget(value, key) if key.rpartition(".")[2] in BUDGETS and isinstance(value, str) else value


def read_option(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of `--option`.

    Raises:
        ValueError: no `=`, a bad value, or an option that has a flag of its own.
    """
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise ValueError(f"--option {text!r} is not KEY=VALUE.")
    if key in BUDGETS:
        raise ValueError(f"the budget is given by --{key}.")
    return key, read_given(key, value)


def budgets_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The budgets among options, `fopru.keep` too."""
    return {key: value for key, value in options.items() if key.rpartition(".")[2] in BUDGETS}


def budget_text(budget: Mapping[str, Any] | None) -> str:
    """`keep 0.25`; empty for none."""
    return ", ".join(f"{word} {amount}" for word, amount in (budget or {}).items())


# Methods


def names_of(method: str) -> list[str]:
    """The methods that a text names: one, or several joined by `+`, which run one after the other.

    Raises:
        ValueError: one of them twice, or `none` among others.
    """
    names = [name.strip() for name in method.split("+")]
    if named_twice(names) is not None:
        raise ValueError(f"method {method!r} names a method twice.")
    if NONE in names and len(names) > 1:
        raise ValueError(f"method {method!r}: 'none' is the whole model and cannot be combined.")
    return names


def takes(method: str) -> set[str]:
    """The options that the methods of a text have, without their names before them.

    Raises:
        ValueError: an unknown method.
    """
    names = names_of(method)
    return set() if names == [NONE] else {option for name in names for option in registry.options(registry.find(name))}


def build(
    method: str | Method | Iterable[str | Method], options: Mapping[str, Any], none: bool = False
) -> list[Method]:
    """Make the method objects that a user means.

    Args:
        method: a name, names joined by `+`, a method object, or a list of these, which run one after the other.
        options: an option goes to the one named method that has it; `globalcom2.keep` says whose. What is in here was
            given, None too. Lists become tuples.
        none: whether "none", the whole model, may be asked for; it makes no method.

    Raises:
        TypeError: something that is no method, an option with a method object, or a required option missing.
        ValueError: an unknown method or option (with a suggestion), an ambiguous one, or a bad value.

    Warns:
        SmallBudgetWarning: a count below 4.
    """
    parts = parts_of(method)
    if parts == [NONE] and none:
        check_without(options)
        return []
    if NONE in parts:
        raise ValueError("method 'none' is the whole model: there is nothing to prune.")
    classes = {part: find(part, none) for part in parts if isinstance(part, str)}
    shares = shared_out(options, classes)
    made = [make(part, classes[part], shares[part]) if isinstance(part, str) else part for part in parts]
    for one in made:
        one.check_fields()
    for text in small_budgets(made):
        warnings.warn(text, SmallBudgetWarning, stacklevel=3)
    return made


def small_budgets(made: Iterable[Method]) -> list[str]:
    """What to say of counts that were hardly meant."""
    told = (unlikely(getattr(one, word, None), word) for one in made for word in BUDGETS)
    return list(filter(None, told))


def parts_of(method: Any) -> list[str | Method]:
    """The names and objects of what was passed as method."""
    several = isinstance(method, Iterable) and not isinstance(method, str | type | Mapping | Set)
    parts = [part for one in (method if several else [method]) for part in parts_in(one)]
    if not parts:
        raise ValueError("the list of methods is empty.")
    if (twice := named_twice([part for part in parts if isinstance(part, str)])) is not None:
        raise ValueError(f"method {twice!r} is named twice: pass method objects.")
    return parts


def named_twice(names: list[str]) -> str | None:
    """The first name that stands there again."""
    return next((name for name in names if names.count(name) > 1), None)


def parts_in(one: Any) -> list[str | Method]:
    """The names in a text, or a method object."""
    from vlmprune.methods.base import Method

    if isinstance(one, str):
        return names_of(one)
    if isinstance(one, Method):
        return [one]
    if isinstance(one, type) and issubclass(one, Method):
        raise TypeError(f"method {one.__name__} is a class: pass an object, {one.__name__}(keep=64), or its name.")
    raise TypeError(f"method must be a name, a method object or a list of them, not {type(one).__name__}.")


def shares(methods: Iterable[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of every method of several, each as that method calls it; errors as of `build`."""
    return shared_out(options, {name: find(name) for name in methods})


def check_without(options: Mapping[str, Any]) -> None:
    """Refuse options beside "none"."""
    if options:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"method 'none' is the whole model and takes no options, and here is {given}.")


def shared_out(options: Mapping[str, Any], classes: Mapping[str, type[Method]]) -> dict[str, dict[str, Any]]:
    """The options of every named method, each as that method calls it."""
    if options and not classes:
        raise TypeError(
            f"{next(iter(options))}= cannot be combined with a method object: set it when making the object."
        )
    shares: dict[str, dict[str, Any]] = {name: {} for name in classes}
    for key, value in options.items():
        name, option = owner(key, value, classes)
        if option in shares[name]:
            raise ValueError(f"{name}.{option}= is given twice.")
        shares[name][option] = tuple(value) if isinstance(value, list) else value
    return shares


def find(name: str, none: bool = False) -> type[Method]:
    """`registry.find`, with "none" among what is known where it may be asked for."""
    if none and name not in registry.names():
        known = [NONE, *registry.names()]
        raise ValueError(f"unknown method {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return registry.find(name)


def owner(key: str, value: Any, classes: Mapping[str, type[Method]]) -> tuple[str, str]:
    """Whose option `key` is, and what that method calls it.

    Raises:
        ValueError: nobody's, or several methods'.
    """
    name, dot, option = key.rpartition(".")
    if dot and name not in classes:
        hint = did_you_mean(name, classes)
        raise ValueError(f"option {key!r}: {name!r} is not one of the methods {', '.join(classes)}.{hint}")
    found = takers(key, classes)
    if not found:
        raise no_option(option, value, {name: classes[name]} if dot else classes)
    if len(found) > 1:
        ways = " or ".join(f"{name}.{option}=" for name in found)
        objects = ", ".join(f"{classes[name].__name__}(...)" for name in found)
        who = ", ".join(map(repr, found))
        raise ValueError(f"{option}= could mean any of {who}: write {ways} (in Python, or pass [{objects}]).")
    return found[0], option


def takers(key: str, classes: Mapping[str, type[Method]]) -> list[str]:
    """Which of these methods have an option; `fopru.layer` is fopru's alone."""
    name, dot, option = key.rpartition(".")
    asked = {name} & set(classes) if dot else classes
    return [name for name in asked if option in registry.options(classes[name])]


def no_option(option: str, value: Any, classes: Mapping[str, type[Method]]) -> ValueError:
    """What to say where no method has an option."""
    who = " and ".join(map(repr, classes))
    if why := next((cls.refuses[option] for cls in classes.values() if option in cls.refuses), None):
        return ValueError(f"{who} refuses {option}={value!r}: {why}")
    known = sorted({option for cls in classes.values() for option in registry.options(cls)})
    return ValueError(f"{who} has no option {option!r}.{did_you_mean(option, known)} Options: {', '.join(known)}.")


def make(name: str, cls: type[Method], options: dict[str, Any]) -> Method:
    """One method object."""
    if missing := [option for option in registry.required(cls) if option not in options]:
        raise TypeError(f"method {name!r} needs {missing[0]}=.")
    return cls(**options)


# Many methods at many budgets


@dataclass(frozen=True)
class Job:
    """A method, or several joined by `+`, with options; a recipe's may be for one family of models alone."""

    method: str
    options: dict[str, Any]
    family: str | None = None

    @property
    def budget(self) -> str:
        """As a table shows it."""
        return " + ".join(str(amount) for amount in budgets_in(self.options).values()) or "-"

    @property
    def label(self) -> str:
        """As a title names it: `fopru, keep 0.1`."""
        return ", ".join(filter(None, [self.method, budget_text(budgets_in(self.options))]))

    def build(self) -> list[Method]:
        """The method objects; raises as `build` does."""
        return build(self.method, self.options)


def jobs(
    methods: Sequence[str],
    budgets: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    named: bool = True,
) -> list[Job]:
    """One job for every method and budget; an option goes to all methods that have it, `fopru.layer` to fopru alone.

    Args:
        methods: names, or names joined by `+`.
        budgets: `{"keep": 64}`, `{"average": 0.1}`, ...
        options: all other options. `fopru.keep` among them is fopru's own budget instead of `budgets`; joined methods
            that have several budgets need that.
        named: whether the user named the budgets, so that a method without budgets is a mistake. They go to methods
            that have none of their own among `options`.

    Raises:
        ValueError: an unknown method or option, a bad value, or budgets that would go to nobody; the method is named.
    """
    classes = {method: {name: find(name) for name in single(method)} for method in methods}
    check_known(options, classes)
    if named and any(budgets):
        check_taken(budgets[0], options, classes)
    made = [job_of(method, mine, budget, options, named) for budget in budgets for method, mine in classes.items()]
    return [job for i, job in enumerate(made) if job not in made[:i]]


def check_taken(
    budget: Mapping[str, Any], options: Mapping[str, Any], classes: Mapping[str, Mapping[str, type[Method]]]
) -> None:
    """Refuse a budget beside options that give every method one of its own."""
    if not any(without_budget(mine, options) for mine in classes.values()):
        raise ValueError(
            f"{budget_text(budget)} would go to nobody: {budget_text(budgets_in(options))} is given too, and every "
            "method has a budget of its own."
        )


def check_known(options: Mapping[str, Any], classes: Mapping[str, Mapping[str, type[Method]]]) -> None:
    """Refuse an option that no method has; `classes` of every (joined) method, by name."""
    everyone = {name: cls for mine in classes.values() for name, cls in mine.items()}
    for key in (key for key in options if not takers(key, everyone)):
        owner(key, options[key], everyone)  # which says so


def job_of(
    method: str, classes: Mapping[str, type[Method]], budget: Mapping[str, Any], options: Mapping[str, Any], named: bool
) -> Job:
    """One of `jobs`."""
    own = own_options(options, classes)
    fitting = {word: amount for word, amount in budget.items() if takers(word, classes)}
    if named and len(fitting) < len(budget):
        raise ValueError(f"method {method!r} has no budget {', '.join(budget)}{why_refused(budget, classes)}")
    if budgets_in(own):
        fitting = left_over(fitting, classes, own) if named else {}
    job = Job(method, fitting | own)
    try:
        job.build()
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{method}: {error}") from None
    return job


def why_refused(budget: Mapping[str, Any], classes: Mapping[str, type[Method]]) -> str:
    """What methods say of a budget that they refuse."""
    told = [f": {cls.refuses[word]}" for word in budget for cls in classes.values() if word in cls.refuses]
    return " ".join(told) or "."


def without_budget(classes: Mapping[str, type[Method]], options: Mapping[str, Any]) -> list[str]:
    """The methods of a job that `options` gives no budget."""
    own = {name for key in budgets_in(options) for name in takers(key, classes)}
    return [name for name in classes if name not in own]


def left_over(budget: Mapping[str, Any], classes: Mapping[str, type[Method]], own: Mapping[str, Any]) -> dict[str, Any]:
    """A budget as an option of the one joined method that has none of its own; of several it says nobody's name."""
    left = without_budget(classes, own)
    takes_it = {word: [name for name in left if name in takers(word, classes)] for word in budget}
    return {
        f"{names[0]}.{word}" if len(names) == 1 else word: budget[word] for word, names in takes_it.items() if names
    }


def own_options(options: Mapping[str, Any], classes: Mapping[str, type[Method]]) -> dict[str, Any]:
    """The options that a job's methods have, of a single method without its name before them.

    Raises:
        ValueError: `layer` and `fopru.layer` for fopru alone.
    """
    made: dict[str, Any] = {}
    for key, value in options.items():
        if takers(key, classes):
            short = key.rpartition(".")[2] if len(classes) == 1 else key
            if short in made:
                raise ValueError(f"{'+'.join(classes)}.{short}= is given twice.")
            made[short] = value
    return made


def single(method: str) -> list[str]:
    """`names_of` where the whole model is no method."""
    names = names_of(method)
    if NONE in names:
        raise ValueError("method 'none' is the whole model, which stands beside the others anyway: leave it out.")
    return names
