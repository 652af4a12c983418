"""Flags that several verbs share, declared once; what their values mean; and the kind of command all verbs are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, CallbackParam, Option
from typer.core import TyperCommand, TyperGroup

from vlmprune._version import __version__
from vlmprune.runtime.errors import UserError, brief, user_mistakes
from vlmprune.runtime.status import noted_warnings

if TYPE_CHECKING:
    from vlmprune.spec import Job

__all__ = ["Group", "Verb", "Wanted", "alone", "budget_of", "budgets_of", "flag", "folder", "least", "number", "one_of"]
__all__ += ["options_of", "refuse_family", "share_of", "versions", "wanted", "whole_numbers", "words_of"]


def number(text: str, lowest: int | None = None) -> Any:
    """A flag that takes a number; one under `lowest` is refused."""

    def checked(param: CallbackParam, value: Any) -> Any:
        if lowest is not None:
            least(lowest, **{param.name: value})
        return value

    return Option(metavar="N", help=text, callback=checked)


MODEL = Option(metavar="NAME", help="embedded model, folder or hub id")
METHOD = Option("--method", metavar="NAME[,NAME]", help="methods (`vlmprune ls methods`; a+b: one after the other)")
DEVICE = Option(metavar="NAME", help="cpu, cuda, cuda:N or auto")
DTYPE = Option(help="auto: float32 on a CPU, the checkpoint's own on a GPU")

Model = Annotated[str, MODEL]
SomeMethods = Annotated[str | None, METHOD]
PATCHES = "patches per image (64), or a fraction (0.1 or 10%)"
Keep = Annotated[str | None, Option(metavar="N[,N]", help=PATCHES)]
OneKeep = Annotated[str | None, Option(metavar="N", help=PATCHES)]
Average = Annotated[str | None, Option(metavar="N[,N]", help="the same as a mean over all decoder layers")]
Options = Annotated[
    list[str],
    Option(
        "--option",
        metavar="KEY=VALUE",
        help="an option of the methods that have it (`vlmprune ls methods NAME`); may be repeated; "
        "layer=3, tau=None, prune_layers=[7,9,12], fopru.keep=64 (of that method alone)",
    ),
]
Recipe = Annotated[
    str | None, Option(metavar="FILE", help="a recipe (a YAML file), instead of --method, budget and --option")
]
Images = Annotated[
    str | None, Option(metavar="DIR", help="folder of pictures, or a pattern ('photos/**/*.jpg'; default: ours)")
]
Data = Annotated[str | None, Option(metavar="FILE", help="JSON lines with image, prompt and answer")]
Metric = Annotated[
    Literal["exact", "contains", "anls", "choice"], Option(help="how answers are compared with those of --data")
]
Device = Annotated[str, DEVICE]
DTypes = Literal["auto", "float32", "bfloat16", "float16"]
DType = Annotated[DTypes, DTYPE]
Longest = Annotated[int, number("longest answer", 1)]
Limit = Annotated[int | None, number("only the first N pictures by name", 1)]
Frames = Annotated[int | None, number("frames of every video, spread over its length (default 8)", 1)]
Json = Annotated[bool, Option("--json", help="print JSON")]
Config = Annotated[str, Argument(metavar="CONFIG.yaml", help="a file, or the name of one that comes with vlmprune")]
Overrides = Annotated[
    list[str],
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="another value for a key (a.b.0=value; the value is read as YAML); may be repeated",
    ),
]


QUARTER = "0.25"  # the usual budget


class Told:
    """How a command tells about itself: examples keep their lines, so that they can be copied."""

    def format_usage(self, ctx, formatter):
        formatter.write_usage(ctx.command_path, " ".join(self.collect_usage_pieces(ctx)), "usage: ")

    def format_help(self, ctx, formatter):
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        if examples:
            print(examples)


class Verb(Told, TyperCommand):
    """One verb."""

    def invoke(self, ctx):
        with noted_warnings():
            return super().invoke(ctx)


class Group(Told, TyperGroup):
    """All verbs."""


def versions() -> str:
    """`vlmprune 0.1.0 (torch ..., transformers ..., Python ...)`, read from metadata."""
    found = []
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"vlmprune {__version__} ({', '.join(found)}, Python {sys.version.split()[0]})"


def flag(name: str) -> str:
    """A flag as it is typed."""
    return "--from" if name == "source" else f"--{name.replace('_', '-')}"


def one_of(**given: Any) -> None:
    """Refuse flags that exclude each other.

    Raises:
        UserError: more than one was given.
    """
    named = [flag(name) for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{named[1]} is not allowed with {named[0]}.")


@dataclass(frozen=True)
class Wanted:
    """What --method, --keep or --average, and --option say, as `spec.jobs` takes it, or what a recipe says."""

    methods: list[str]
    budgets: list[dict[str, Any]]
    options: dict[str, Any]
    named: bool
    recipe: Job | None

    def jobs(self) -> list[Job]:
        """What is to be run.

        Raises:
            UserError: an unknown method or option, or a bad value.
        """
        from vlmprune import spec

        if self.recipe is not None:
            return [self.recipe]
        with user_mistakes():
            return spec.jobs(self.methods, self.budgets, self.options, self.named)


def wanted(
    method: str | None,
    keep: str | None,
    average: str | None,
    option: Sequence[str],
    recipe: str | None,
    usual: str = "fopru",
) -> Wanted:
    """Read the flags that say what is to be run; without any: `usual` methods at a quarter of the patches.

    Raises:
        UserError: a mistake in one of them, or a recipe beside others.
    """
    methods = words_of(usual if method is None else method, "--method")
    budgets, named = budgets_of(keep, average, QUARTER)
    options = options_of(option)
    made = alone(recipe, method=method, keep=keep, average=average, option=option)
    return Wanted(methods, budgets, options, named, made)


def alone(recipe: str | None, **given: Any) -> Job | None:
    """What a recipe says, or None where there is none.

    Raises:
        UserError: a mistake in it, or flags beside it that say the same.
    """
    if recipe is None:
        return None
    from vlmprune.recipe import read_recipe

    if beside := [flag(name) for name, value in given.items() if value]:
        raise UserError(f"{', '.join(beside)} cannot be combined with --recipe, which says all of that.")
    with user_mistakes():
        return read_recipe(recipe).job


def refuse_family(model: str, made: Job) -> None:
    """Refuse a recipe for another family than a model's, before its weights are loaded.

    Raises:
        UserError: it is for another one, or there is no such model.
    """
    from vlmprune.recipe import check_family
    from vlmprune.runtime.loading import find_model, told, type_of

    if made.family is not None:
        source = find_model(model)
        with told(source), user_mistakes():
            check_family("the recipe", made.family, type_of(source))


def least(lowest: int, **given: int | None) -> None:
    """Refuse numbers that are too small; None is no number.

    Raises:
        UserError: one is.
    """
    for name, value in given.items():
        if value is not None and value < lowest:
            raise UserError(f"{flag(name)} must be at least {lowest}, not {value}.")


def folder(name: str) -> Path:
    """Make the folder for what comes out, before the work is done.

    Raises:
        UserError: it cannot be made, or written into.
    """
    made = Path(name).expanduser()
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {made}: {brief(error)}") from None
    if not os.access(made, os.W_OK):
        raise UserError(f"no permission to write into {made}")
    return made


def words_of(text: str, flag: str) -> list[str]:
    """The comma-separated parts of a flag's value, without repetitions.

    Raises:
        UserError: there is none.
    """
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{flag} is empty.")
    return parts


def budgets_of(keep: str | None, average: str | None, default: str) -> tuple[list[dict[str, Any]], bool]:
    """The budgets of `--keep` or `--average`, and whether the user named them; else `--keep` of `default`.

    Raises:
        UserError: both, something else than numbers, or one that cannot be meant.
    """
    from vlmprune.spec import read_budget

    one_of(keep=keep, average=average)
    word, given = ("keep", keep) if average is None else ("average", average)
    with user_mistakes():
        amounts = words_of(default if given is None else given, f"--{word}")
        return [{word: read_budget(text, word)} for text in amounts], given is not None


def budget_of(keep: str | None, average: str | None) -> dict[str, Any]:
    """The one budget of `--keep` or `--average`, if there is one; raises as `budgets_of` does."""
    from vlmprune.spec import read_budget

    one_of(keep=keep, average=average)
    with user_mistakes():
        given = {"keep": keep, "average": average}
        return {word: read_budget(text, word) for word, text in given.items() if text is not None}


def share_of(text: str, flag: str, zero: bool = False, whole: bool = False) -> float:
    """A share between 0 and 1, of which `zero` is one, or the `whole`.

    Raises:
        UserError: another number, or none.
    """
    from vlmprune.spec import read_share

    with user_mistakes():
        found = read_share(text, flag)
    if not 0 <= found <= 1 or (found == 0 and not zero) or (found == 1 and not whole):
        least, most = "at least" if zero else "above", "at most" if whole else "under"
        raise UserError(f"{flag} {text} must be {least} 0 and {most} 1 (100%).")
    return found


def whole_numbers(text: str, flag: str) -> list[int]:
    """The comma-separated numbers of a flag, each once.

    Raises:
        UserError: something else than whole numbers above 0.
    """
    parts = words_of(text, flag)
    if wrong := next((part for part in parts if not part.isdecimal() or int(part) < 1), None):
        raise UserError(f"{flag} {wrong!r} is not a whole number of at least 1.")
    return list(map(int, parts))


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """The options of all `--option`.

    Raises:
        UserError: one is not KEY=VALUE, is given twice, or has a flag of its own.
    """
    from vlmprune.spec import read_option

    made: dict[str, Any] = {}
    for text in texts:
        with user_mistakes():
            key, value = read_option(text)
        if key in made:
            raise UserError(f"--option {key} is given twice.")
        made[key] = value
    return made
