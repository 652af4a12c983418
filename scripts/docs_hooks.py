"""What `make docs` fills into pages: the command line as it describes itself, files of the package, links to files.

Markers, each alone on its line: `<!-- cli -->` becomes all verbs with their options, `<!-- file: PATH -->` a file of
the repository. A link to a file outside of docs/ leads to the repository, and must be there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import typer
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOB = "https://github.com/vlmprune/vlmprune/blob/main/"
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
FILE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **given: Any) -> str:
    """Fill a page in before it is read."""
    markdown = markdown.replace("<!-- cli -->", command_line()) if "<!-- cli -->" in markdown else markdown
    markdown = FILE.sub(lambda found: included(found[1]), markdown)
    folder = (DOCS / page.file.src_uri).parent
    return LINK.sub(lambda found: link(found, folder, page.file.src_uri), markdown)


def link(found: re.Match[str], folder: Path, page: str) -> str:
    """A link as it is, or to the repository where it leaves docs/."""
    target = (folder / found[1]).resolve()
    if target.is_relative_to(DOCS):
        return found[0]
    if not target.is_relative_to(ROOT) or not target.exists():
        raise PluginError(f"{page}: there is no {found[1]}")
    return f"]({BLOB}{target.relative_to(ROOT)}{found[2] or ''})"


def included(name: str) -> str:
    """A file of the repository as a block of code."""
    path = ROOT / name
    return f"```{path.suffix[1:]}\n{path.read_text().rstrip()}\n```"


def command_line() -> str:
    """All verbs, from what they say of themselves."""
    from vlmprune.cli import command

    group = typer.main.get_command(command)
    with group.make_context("vlmprune", [], resilient_parsing=True) as context:
        return "\n\n".join(verb(name, group.get_command(context, name)) for name in group.list_commands(context))


def verb(name: str, command: Any) -> str:
    """One verb: what it does, its flags and its examples."""
    rows = [row(parameter) for parameter in command.params]
    table = ["| argument | | default |", "| --- | --- | --- |", *rows]
    examples = f"```text\n{command.epilog.strip()}\n```" if command.epilog else ""
    return "\n\n".join(filter(None, (f"## vlmprune {name}", (command.help or "").strip(), "\n".join(table), examples)))


def row(parameter: Any) -> str:
    """One argument or flag."""
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    elif parameter.metavar:
        names += f" `{parameter.metavar}`"
    elif choices := get_args(parameter.type_descriptor.annotation):
        names += " " + ", ".join(f"`{choice}`" for choice in choices)
    default = parameter.default
    shown = f"`{default}`" if isinstance(default, str | int) and default is not False else ""
    text = getattr(parameter, "help", None) or ""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in (names, text, shown)) + " |"
