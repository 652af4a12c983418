"""Exceptions of vlmprune; each message says what was wrong, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CutNotRunError", "UnsupportedError", "did_you_mean"]


class UnsupportedError(NotImplementedError):
    """A model, input or option that vlmprune refuses by name instead of guessing."""


class CutNotRunError(RuntimeError):
    """A call carried images but a cut of the method did not run, so nothing (or not all) was pruned."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `' Did you mean 'x'?'` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
