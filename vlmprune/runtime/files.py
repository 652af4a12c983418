"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vlmprune.runtime.errors import UserError, brief

__all__ = ["PREFIX", "check_writable", "has_content", "write_all", "write_whole"]

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


def write_all(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by name into a folder, each as `write_whole` does."""
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def check_writable(path: str, flag: str) -> Path:
    """The file that a flag names, found to be one that can be written before the work is done.

    Raises:
        UserError: a folder, no folder for it, or no permission.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{flag} {path} is a folder: name a file.")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} to write {target.name} in.")
    try:
        try_to_write(target)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {brief(error)}") from None
    return target


def try_to_write(target: Path) -> None:
    """Raise OSError where a file cannot be written."""
    if not target.exists() or target.is_file():
        # files are written beside their place and renamed: permission bits do not tell whether that works
        tempfile.TemporaryFile(dir=Path(os.path.realpath(target)).parent).close()
    elif not os.access(target, os.W_OK):  # /dev/stdout, a pipe
        raise PermissionError("no permission")


def has_content(path: str) -> bool:
    """Whether there is a file with something in it."""
    target = Path(path).expanduser()
    return target.is_file() and target.stat().st_size > 0


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
