"""What goes to stderr while something runs: stdout has results only."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["Bar", "note", "noted_warnings", "quiet", "show", "status"]

_bars: list[Bar] = []  # the open one


class Bar:
    """A bar over steps of a known number with the time left, beside what `status` says. Silent if no terminal.

    It is drawn when something is told and by no thread, so that it takes nothing from what is being timed.
    """

    def __init__(self, total: float, done: float = 0, file: TextIO | None = None):
        self.total, self.done, self.file = total, done, file or sys.stderr
        self.rich: Any = None

    def __enter__(self) -> Bar:
        if self.file.isatty():
            self.rich = made(self.file)
            self.line = self.rich.add_task("", total=self.total, completed=self.done)
        _bars.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        _bars.remove(self)

    def at(self, done: float, total: float | None = None) -> None:
        """So many steps are done; a part of one counts too."""
        self.done, self.total = done, self.total if total is None else total
        self.draw(completed=done, total=self.total)

    def step(self) -> None:
        """One more is done."""
        self.at(self.done + 1)

    def draw(self, **what: Any) -> None:
        """Change something and show it."""
        if self.rich is not None:
            self.rich.update(self.line, **what)
            self.rich.start()
            self.rich.refresh()

    def say(self, text: str) -> None:
        """Print a line that stays, where the bar is."""
        self.clear()
        print(text, file=self.file, flush=True)

    def clear(self) -> None:
        """Take it off the terminal until something is told again."""
        if self.rich is not None:
            self.rich.stop()


def made(file: TextIO) -> Any:
    """Rich's display of one bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    return Progress(
        BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"), text,
        console=Console(file=file), auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
        speed_estimate_period=3600,
    )  # fmt: skip


def status(text: str = "") -> None:
    """Show what is going on in one line that the next one replaces; nothing clears it. Silent if no terminal."""
    if _bars and text:
        _bars[-1].draw(description=text)
    elif _bars:
        _bars[-1].clear()
    elif sys.stderr.isatty():
        room = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{text[:room]}", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a line that stays."""
    status()
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result on stdout, as it comes."""
    status()
    print(text, flush=True)


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
