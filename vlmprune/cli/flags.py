"""Flags that several verbs share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from vlmprune.runtime.errors import UserError, user_mistakes

#: What an option may look like.
VALUES = "layer=3, tau=None, prune_layers=[7,9,12], fopru.keep=64 (of that method alone)"

__all__ = ["VALUES", "add_budget", "add_device", "add_model", "budgets_of", "options_of", "words_of"]


def add_model(parser: ArgumentParser) -> None:
    """`--model` and `--method`."""
    parser.add_argument(
        "--model", default="scene-llava", metavar="NAME", help="embedded model, folder or hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        default="fopru",
        metavar="NAME[,NAME]",
        help="methods (`vlmprune ls methods`; a+b: one after the other; default: %(default)s)",
    )


def add_budget(parser: ArgumentParser, keep: str, option: str, metavar: str = "N[,N]") -> None:
    """`--keep` or `--average`, and `--option`; `keep` and `option` are their help."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", metavar=metavar, help=keep)
    budget.add_argument("--average", metavar=metavar, help="the same as a mean over all decoder layers")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=f"{option}; {VALUES}")


def add_device(parser: ArgumentParser) -> None:
    """`--device` and `--dtype`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on a CPU, the checkpoint's own on a GPU (default: %(default)s)",
    )


def words_of(text: str, flag: str) -> list[str]:
    """The comma-separated parts of a flag's value, without repetitions.

    Raises:
        UserError: there is none.
    """
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{flag} is empty.")
    return parts


def budgets_of(args: Namespace, default: str) -> tuple[list[dict[str, Any]], bool]:
    """The budgets of `--keep` or `--average`, and whether the user named them; else `--keep` of `default`.

    Raises:
        UserError: something else than numbers, or one that cannot be meant.
    """
    from vlmprune.spec import read_budget

    word = "keep" if args.average is None else "average"
    named = getattr(args, word) is not None
    with user_mistakes():
        amounts = words_of(getattr(args, word) if named else default, f"--{word}")
        return [{word: read_budget(text, word)} for text in amounts], named


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
