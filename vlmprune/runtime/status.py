"""What goes to stderr while something runs: stdout has results only."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["note", "noted_warnings", "quiet", "status"]


def status(text: str = "") -> None:
    """Show what is going on in one line that the next one replaces; nothing clears it. Silent if no terminal."""
    if sys.stderr.isatty():
        room = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{text[:room]}", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a line that stays."""
    status()
    print(text, file=sys.stderr, flush=True)


@contextmanager
def noted_warnings() -> Iterator[None]:
    """Say our own warnings about budgets as notes, each once."""
    from vlmprune.parts.budget import SmallBudgetWarning

    with warnings.catch_warnings():
        others, told = warnings.showwarning, set()

        def show(message: Warning | str, category: type[Warning], *more: Any) -> None:
            if not issubclass(category, SmallBudgetWarning):
                others(message, category, *more)
            elif str(message) not in told:
                told.add(str(message))
                note(f"note: {message}")

        warnings.showwarning = show
        warnings.simplefilter("always", SmallBudgetWarning)
        yield


@contextmanager
def quiet(downloads: bool = False) -> Iterator[None]:
    """Keep the warnings and progress bars of transformers and of the hub's client away.

    Args:
        downloads: leave the bars on, for a terminal's user who waits for a download.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, bars, hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not (downloads and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub)
        if bars:
            logging.enable_progress_bar()
