"""What a benchmark is asked for, by the names of its flags: given ones, those of earlier results, the usual ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vlmprune import spec
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.spec import Job

__all__ = ["DEFAULTS", "QUICK", "again", "asked_in", "known_kernels", "option_texts", "settings_of", "word_of"]

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
EITHER = {"model": "shape", "shape": "model", "keep": "average", "average": "keep"}  # one takes the other off


def settings_of(
    given: dict[str, Any], old: dict[str, Any] | None, quick: bool = False, methods: Collection[str] | None = None
) -> dict[str, Any]:
    """All settings: the flags given, else those of the old results, else the defaults.

    Args:
        given: flags; what is no setting is passed over.
        old: results.
        quick: few runs, where no flag says how many.
        methods: as of `asked_in`.

    Raises:
        UserError: as `known_kernels`.
    """
    settings = DEFAULTS | {"shape": "small", "model": None, "average": None, "option": [], "kernels": None}
    earlier = {} if old is None else asked_in(old, methods)
    mine = {name: value for name, value in given.items() if name in settings}
    settings |= {name: value for name, value in earlier.items() if name in settings} | (QUICK if quick else {})
    settings |= {EITHER[name]: None for name in mine if name in EITHER} | mine
    beside = {name: min(settings[name], settings["pairs"]) for name in ("plain_runs", "stage_runs")}
    return settings | beside | {"kernels": known_kernels(settings["kernels"])}


def known_kernels(given: str | None) -> str:
    """The implementation of --kernels, else of the environment, else "auto".

    Raises:
        UserError: an unknown name in the environment.
    """
    from vlmprune.kernels.choice import named

    try:
        return named(given)
    except ValueError as error:
        raise UserError(str(error)) from None


def asked_in(old: dict[str, Any], methods: Collection[str] | None = None) -> dict[str, Any]:
    """What results were asked for in all calls that filled their file, which keeps the last call's flags alone.

    Args:
        old: results.
        methods: whose budgets, options and batches are meant; None for all.
    """
    mine = [cell for cell in old["cells"] if methods is None or cell["method"] in methods]
    options = dict.fromkeys(text for cell in mine for text in option_texts(cell["options"]))
    return old["asked"] | united(mine or old["cells"], word_of(old["asked"])) | {"option": list(options)}


def united(cells: list[dict[str, Any]], word: str) -> dict[str, str]:
    """The methods, budgets and batches of cells, as their flags take them."""
    found = {
        "method": [cell["method"] for cell in cells],
        word: [str(cell["options"][word]) for cell in cells if word in cell["options"]],
        "batch": [str(cell["batch"]) for cell in cells],
    }
    return {name: ",".join(dict.fromkeys(values)) for name, values in found.items() if values}


def word_of(asked: dict[str, Any]) -> str:
    """Which kind of budget was asked for."""
    return "keep" if asked.get("average") is None else "average"


def option_texts(options: dict[str, Any]) -> list[str]:
    """Options as --option takes them; budgets have flags of their own."""
    return [f"{name}={spec.write_value(value)}" for name, value in options.items() if name not in spec.BUDGETS]


def again(cells: list[dict[str, Any]]) -> list[tuple[Job, int]]:
    """The jobs that made cells, those of one batch together."""
    order = list(dict.fromkeys(cell["batch"] for cell in cells))
    with user_mistakes():
        made = [(spec.jobs([cell["method"]], [{}], cell["options"])[0], cell["batch"]) for cell in cells]
    return sorted(made, key=lambda one: order.index(one[1]))
