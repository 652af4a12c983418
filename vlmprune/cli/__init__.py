"""The `vlmprune` command: one module per verb; torch and transformers are imported after the arguments are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.exceptions import TyperException

from vlmprune._compat import VersionError
from vlmprune.cli import app, bench, budget, check, demo, eval, fidelity, init, ls, report, run, serve, tune, validate
from vlmprune.cli.flags import Group, Verb, versions
from vlmprune.runtime.errors import CommandError, brief
from vlmprune.runtime.interruption import check as check_interruption
from vlmprune.runtime.interruption import heeded, interrupted
from vlmprune.runtime.status import status

__all__ = ["main"]

EXAMPLES = """\
examples:
  vlmprune demo
  vlmprune run --image photo.jpg --prompt "what is this?" --model llava-hf/llava-1.5-7b-hf --keep 64
  vlmprune ls methods

exit codes: 0 done, 1 failed, 2 wrong usage (a missing file, an unknown method, ...), 130 interrupted
"""

command = typer.Typer(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})


def tell_versions(wanted: bool) -> None:
    """Print them and be done."""
    if wanted:
        print(versions())
        raise typer.Exit


VERSION = typer.Option(
    "--version", callback=tell_versions, is_eager=True, help="Show the versions of vlmprune and what it runs on."
)


@command.callback(epilog=EXAMPLES)
def about(version: Annotated[bool, VERSION] = False) -> None:
    """Visual token pruning for LLaVA-style Hugging Face models."""


for module in (run, app, init, eval, validate, report, fidelity, tune, budget, bench, check, serve, ls, demo):
    name = module.__name__.rpartition(".")[2]
    command.command(name, cls=getattr(module, "COMMAND", Verb), epilog=getattr(module, "EXAMPLES", None))(module.verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal has no letters for must not end the command
            stream.reconfigure(errors="backslashreplace")
    with heeded():
        try:
            return run_verb(sys.argv[1:] if argv is None else list(argv))
        except KeyboardInterrupt:
            pass
        except Exception as error:  # what Ctrl-C became in somebody's code; anything else is a fault of this command
            if not interrupted(error):
                raise
        finally:
            status()
    print("\nvlmprune: interrupted", file=sys.stderr)
    # a KeyboardInterrupt that left an `exec` of text (dataclasses and named tuples are made by one) makes Python end
    # itself by the signal when it is done, whatever the exit code; the next `exec` takes that back
    exec("pass")
    return 130


def run_verb(argv: list[str]) -> int:
    """Read the arguments, run the verb, and say in one line what went wrong."""
    group = typer.main.get_command(command)
    try:
        if "_VLMPRUNE_COMPLETE" in os.environ:  # the shell asks what could come next
            group.main(argv, prog_name="vlmprune")
        with group.make_context("vlmprune", argv) as context:
            group.invoke(context)
        sys.stdout.flush()
        check_interruption()  # swallowed somewhere on the way
    except typer.Exit as stop:  # after --help
        return stop.exit_code
    except TyperException as error:  # a mistake on the command line
        if context := getattr(error, "ctx", None):
            print(context.get_usage(), f"try: {context.command_path} --help", sep="\n", file=sys.stderr)
        # pydantic, by which Typer reads values, says so of every refused one
        print(f"vlmprune: {brief(error.format_message()).replace(': Value error, ', ': ')}", file=sys.stderr)
        return error.exit_code
    except CommandError as error:
        check_interruption(error)
        status()
        print(f"vlmprune: {error}", file=sys.stderr)
        return error.code
    except VersionError as error:
        print(f"vlmprune: {error}", file=sys.stderr)
        return CommandError.code
    except BrokenPipeError:  # `vlmprune ls methods | head`: nobody reads on
        flush_nothing()
        return 0
    except OSError as error:  # a full disk, above all the one that stdout goes to
        check_interruption(error)
        flush_nothing()
        print(f"vlmprune: {brief(error)}", file=sys.stderr)
        return 1
    return 0


def flush_nothing() -> None:
    """Keep what stdout still holds from being written when the process ends, which would fail again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
