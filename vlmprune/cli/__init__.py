"""The `vlmprune` command: one module per verb; torch and transformers are imported after the arguments are read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata

from vlmprune._compat import VersionError
from vlmprune._version import __version__
from vlmprune.cli import bench, check, demo, eval, fidelity, init, ls, report, run, validate
from vlmprune.runtime.errors import CommandError, brief
from vlmprune.runtime.interruption import check as check_interruption
from vlmprune.runtime.interruption import heeded, interrupted
from vlmprune.runtime.status import noted_warnings

__all__ = ["main"]

EPILOG = """\
examples:
  vlmprune demo
  vlmprune run --image photo.jpg --prompt "what is this?" --model llava-hf/llava-1.5-7b-hf --keep 64
  vlmprune ls methods

exit codes: 0 done, 1 failed, 2 wrong usage (a missing file, an unknown method, ...), 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    made = argparse.ArgumentParser(
        prog="vlmprune",
        description="Visual token pruning for LLaVA-style Hugging Face models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="store_true", help="show the versions of vlmprune and what it runs on")
    verbs = made.add_subparsers(title="verbs", metavar="VERB")
    for verb in (run, init, eval, validate, report, fidelity, bench, check, ls, demo):
        verb.add_to(verbs)
    return made


def versions() -> str:
    """`vlmprune 0.1.0 (torch ..., transformers ..., Python ...)`, read from metadata."""
    found = []
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"vlmprune {__version__} ({', '.join(found)}, Python {sys.version.split()[0]})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal has no letters for must not end the command
            stream.reconfigure(errors="backslashreplace")
    with heeded():
        try:
            return run_verb(argv)
        except KeyboardInterrupt:
            pass
        except Exception as error:  # what Ctrl-C became in somebody's code; anything else is a fault of this command
            if not interrupted(error):
                raise
    print("\nvlmprune: interrupted", file=sys.stderr)
    # a KeyboardInterrupt that left an `exec` of text (dataclasses and named tuples are made by one) makes Python end
    # itself by the signal when it is done, whatever the exit code; the next `exec` takes that back
    exec("pass")
    return 130


def run_verb(argv: Sequence[str] | None) -> int:
    """Read the arguments, run the verb, and say in one line what went wrong."""
    try:
        made = parser()
        args = made.parse_args(argv)
        if args.version:
            print(versions())
            return 0
        if not hasattr(args, "verb"):
            made.print_help(sys.stderr)
            return 2
        with noted_warnings():
            args.verb(args)
        sys.stdout.flush()
        check_interruption()  # swallowed somewhere on the way
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a mistake
        return stop.code if isinstance(stop.code, int) else 2
    except CommandError as error:
        check_interruption(error)
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
