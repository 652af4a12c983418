"""What the command says instead of a traceback."""

from __future__ import annotations

__all__ = ["CommandError", "UserError", "brief", "printable"]


class CommandError(Exception):
    """Ends the command with this message."""

    code = 1


class UserError(CommandError):
    """The user's mistake."""

    code = 2


def printable(name: object, limit: int = 300) -> str:
    """A file's name on one line, whatever is in it (line breaks, bytes that are no text); a long one is shortened."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def brief(error: BaseException, limit: int = 300) -> str:
    """The first lines of an exception's message, on one line; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
