"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["PREFIX", "has_content", "write_whole"]

PREFIX = ".writing-"  # of files that are being written; what a killed process left behind


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step: a temporary file beside it, flushed to the disk, then renamed.

    After a crash at any moment the file is the old one or the new one. A link stays one; what is no regular file
    (/dev/stdout, a pipe) is written to as it is.

    Raises:
        OSError: no such folder, no room or no permission.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PREFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def has_content(path: str) -> bool:
    """Whether there is a file with something in it."""
    target = Path(path).expanduser()
    return target.is_file() and target.stat().st_size > 0


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
