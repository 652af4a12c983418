"""Exceptions of vlmprune; each message says what was wrong, what is allowed and what to do."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable

__all__ = ["CutNotRunError", "UnsupportedError", "check_first_run", "did_you_mean"]


class UnsupportedError(NotImplementedError):
    """A model, input or option that vlmprune refuses by name instead of guessing."""


class CutNotRunError(RuntimeError):
    """A call carried images but a cut of the method did not run, so nothing (or not all) was pruned."""


def check_first_run(index: int, done: int) -> None:
    """Refuse to enter layer `index` of a call whose first `done` layers have run already."""
    if index < done:
        raise UnsupportedError(
            "gradient checkpointing that runs pruned layers again in the backward pass, hooks included, is not "
            "supported: call model.gradient_checkpointing_disable(), or use a transformers that checkpoints inside the "
            "hooks (5.23 does) and its own checkpointing."
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `' Did you mean 'x'?'` for the closest of `known`, or an empty string, as for a pattern (`*.jpg`)."""
    if glob.has_magic(str(word)):
        return ""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
