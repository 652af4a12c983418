"""What the command says instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from vlmprune.errors import UnsupportedError

__all__ = ["CommandError", "UserError", "brief", "extra", "printable", "user_mistakes"]


class CommandError(Exception):
    """Ends the command with this message."""

    code = 1


class UserError(CommandError):
    """The user's mistake."""

    code = 2


def extra(module: str, why: str) -> ModuleType:
    """A module of a package that is no requirement.

    Raises:
        UserError: it is not installed: `why`.
    """
    try:
        return import_module(module)
    except ImportError:
        raise UserError(why) from None


@contextmanager
def user_mistakes(start: str = "") -> Iterator[None]:
    """Around what reads options, makes methods or patches a model: what these raise is the user's mistake."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError, UnsupportedError) as error:
        raise UserError(f"{start}{error}") from None


def printable(name: object, limit: int = 300) -> str:
    """A file's name on one line, whatever is in it (line breaks, bytes that are no text); a long one is shortened."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def brief(error: BaseException, limit: int = 300) -> str:
    """The first lines of an exception's message, on one line; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
