"""What `vlmprune bench` is asked to do: flags, the file of --compare and defaults, put together and checked."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vlmprune import spec
from vlmprune.cli.flags import options_of, words_of
from vlmprune.runtime.errors import UserError, user_mistakes

if TYPE_CHECKING:
    from vlmprune.spec import Job

__all__ = ["DEFAULTS", "QUICK", "check_least", "effective_kernels", "refuse_idle_flags", "settings_of", "wanted"]

#: What a run does if neither a flag nor the file of --compare says otherwise.
DEFAULTS: dict[str, Any] = {
    "method": "fopru,random",
    "keep": "64",
    "batch": "1",
    "prompt_tokens": 60,
    "new_tokens": 32,
    "device": "auto",
    "dtype": "auto",
    "pairs": 15,
    "plain_runs": 3,
    "stage_runs": 3,
}
QUICK = {"pairs": 5, "plain_runs": 5, "stage_runs": 1, "new_tokens": 16}
LEAST = {"prompt_tokens": 2, "new_tokens": 1, "pairs": 1, "plain_runs": 1, "stage_runs": 1, "sizes": 1}
CELLS = ("method", "keep", "average", "option", "batch")  # the flags that say which cells there are
#: Flags that say that no model is measured, what happens instead, and the flags that count then.
INSTEAD = {
    "selection": ("times greedy selection alone", {"json", "device", "pairs", "quick", "kernels"}),
    "source": ("measures nothing", {"csv", "plot", "compare"}),
}


def flag(name: str) -> str:
    """A flag as it is typed."""
    return "--from" if name == "source" else f"--{name.replace('_', '-')}"


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect.

    Raises:
        UserError: there are some.
    """
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for mode, (what, used) in INSTEAD.items():
        idle = sorted(given - used - {mode, "verb"})
        if mode in given and idle:
            raise UserError(f"{flag(mode)} {what}: {', '.join(map(flag, idle))} would have no effect.")
    if args.resume and not args.json:
        raise UserError("--resume needs the --json file to go on with.")


def check_least(settings: dict[str, Any]) -> None:
    """Refuse numbers that are too small.

    Raises:
        UserError: one is.
    """
    for name, low in LEAST.items():
        if settings.get(name, low) < low:
            raise UserError(f"{flag(name)} must be at least {low}.")


def effective_kernels(given: str | None) -> str:
    """The implementation of --kernels, else of the environment, else "auto".

    Raises:
        UserError: an unknown name in the environment.
    """
    from vlmprune.kernels.choice import named

    try:
        return named(given)
    except ValueError as error:
        raise UserError(str(error)) from None


def settings_of(args: argparse.Namespace, old: dict[str, Any] | None) -> dict[str, Any]:
    """All settings: the flags given, else those of the old results, else the defaults.

    Raises:
        UserError: a number out of range.
    """
    settings = DEFAULTS | {"shape": "small", "model": None, "average": None, "option": [], "kernels": None}
    if old is not None:
        settings |= {name: value for name, value in asked_in(old, args.method).items() if name in settings}
    settings |= QUICK if args.quick else {}
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    for one, other in (("model", "shape"), ("shape", "model"), ("keep", "average"), ("average", "keep")):
        if one in given:
            settings[other] = None
    settings |= given
    check_least(settings | ({} if args.sizes is None else {"sizes": args.sizes}))
    for name in ("plain_runs", "stage_runs"):  # they stand beside pairs
        settings[name] = min(settings[name], settings["pairs"])
    return settings | {"kernels": effective_kernels(settings["kernels"])}


def asked_in(old: dict[str, Any], methods: str | None = None) -> dict[str, Any]:
    """What results were asked for in all calls that filled their file, which keeps the last call's flags alone.

    Args:
        old: results.
        methods: the value of --method, if only the budgets, options and batches of these are meant.
    """
    mine = [cell for cell in old["cells"] if methods is None or cell["method"] in words_of(methods, "--method")]
    cells, word = mine or old["cells"], "keep" if old["asked"].get("average") is None else "average"
    options = [
        f"{k}={spec.write_value(v)}" for cell in mine for k, v in cell["options"].items() if k not in spec.BUDGETS
    ]
    found = {
        "method": [cell["method"] for cell in cells],
        word: [str(cell["options"][word]) for cell in cells if word in cell["options"]],
        "batch": [str(cell["batch"]) for cell in cells],
    }
    union = {name: ",".join(dict.fromkeys(values)) for name, values in found.items() if values}
    return old["asked"] | union | {"option": list(dict.fromkeys(options))}


def wanted(args: argparse.Namespace, asked: dict[str, Any], old: dict[str, Any] | None) -> list[tuple[Job, int]]:
    """Jobs and batch sizes, those of one batch together: the cells of the old results unless a flag names others.

    Methods without a budget are one job each, unless a budget was named for them alone.

    Raises:
        UserError: an unknown method or option, or a bad value.
    """
    if old is not None and old["cells"] and all(getattr(args, name) is None for name in CELLS):
        again = [(one_job(cell), cell["batch"]) for cell in old["cells"]]
        order = list(dict.fromkeys(batch for _, batch in again))
        return sorted(again, key=lambda pair: order.index(pair[1]))
    word = "keep" if asked["average"] is None else "average"
    methods = words_of(asked["method"], "--method")
    budgets = [budget_of(text, word) for text in words_of(asked[word], f"--{word}")]
    options = options_of(asked["option"])
    batches = [batch_size(text) for text in words_of(asked["batch"], "--batch")]
    with user_mistakes():
        todo = spec.jobs(methods, budgets, options, named=False)
        if getattr(args, word) is not None and not any(word in job.options for job in todo) and any(budgets):
            todo = spec.jobs(methods, budgets, options)  # says whose budget this cannot be
    return [(job, batch) for batch in batches for job in todo]


def one_job(cell: dict[str, Any]) -> Job:
    """The job that made a cell."""
    with user_mistakes():
        return spec.jobs([cell["method"]], [{}], cell["options"])[0]


def budget_of(text: str, word: str) -> dict[str, Any]:
    """A budget of --keep or --average; `none` is the method's own."""
    with user_mistakes():
        return {} if text == "none" else {word: spec.read_budget(text, word)}


def batch_size(text: str) -> int:
    """A batch size of --batch."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch {text!r} is not a whole number of at least 1.")
    return int(text)
