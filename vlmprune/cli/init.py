"""`vlmprune init`: the template of a config, which explains every key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlmprune.runtime.errors import UserError, brief

__all__ = ["add_to"]


def add_to(verbs: Any) -> None:
    """Add this verb's parser."""
    made = verbs.add_parser(
        "init",
        help="write the template of an evaluation's YAML file",
        description="Write the template of the YAML file of `vlmprune eval`, which names and explains every key.",
        allow_abbrev=False,
    )
    made.add_argument("file", metavar="FILE.yaml", help="where to; a file that is there is left alone")
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Write the file, and say what comes next."""
    from vlmprune import configs

    target = Path(args.file).expanduser()
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(configs.TEMPLATE.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{target} is there already: name another file.") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {brief(error)}") from None
    print(f"{target} explains every key. When it says what you want: vlmprune validate {target}")
