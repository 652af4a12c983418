"""Ctrl-C, which other people's code may turn into an error of another kind or swallow."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["check", "heeded", "interrupted"]

_pressed = threading.Event()


@contextmanager
def heeded() -> Iterator[None]:
    """Remember that Ctrl-C was pressed, beside raising KeyboardInterrupt as ever.

    A signal that arrives while a module is imported can come out as anything: transformers' lazy imports, for one,
    turn what goes wrong in them into a ModuleNotFoundError.
    """
    _pressed.clear()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else's handler, or none: it stays
        return

    def note(number: int, frame: object) -> None:
        _pressed.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(error: BaseException | None = None) -> bool:
    """Whether Ctrl-C was pressed, or `error` came of a KeyboardInterrupt."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return _pressed.is_set()


def check(error: BaseException | None = None) -> None:
    """Raise the KeyboardInterrupt that was turned into `error`, or swallowed."""
    if interrupted(error):
        raise KeyboardInterrupt from error
