"""`vlmprune init`: the template of a config, which explains every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from vlmprune.runtime.errors import UserError, brief

__all__ = ["verb"]


def verb(
    file: Annotated[str, Argument(metavar="FILE.yaml", help="where to; a file that is there is left alone")],
) -> None:
    """Write the template of the YAML file of `vlmprune eval`, which names and explains every key."""
    from vlmprune import configs

    target = Path(file).expanduser()
    try:
        with open(target, "x", encoding="utf-8") as made:
            made.write(configs.TEMPLATE.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{target} is there already: name another file.") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {brief(error)}") from None
    print(f"{target} explains every key. When it says what you want: vlmprune validate {target}")
