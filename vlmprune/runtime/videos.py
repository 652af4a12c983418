"""Reading frames of any video file, uniformly, through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from vlmprune.runtime.errors import UserError, brief, extra, printable
from vlmprune.runtime.pictures import read_picture, refuse_no_file

__all__ = ["FRAMES", "VideoClip", "check_reader", "read_video", "read_visual"]

#: How many frames of a video are read where nobody says it.
FRAMES = 8


@dataclass(frozen=True)
class VideoClip:
    """Frames of a video, in time.

    Attributes:
        frames: as pictures, upright and RGB, all of one size.
        numbers: of the frames among all `total` of the file, from 0.
        seconds: when each is shown.
        rate: frames a second of the file.
    """

    frames: tuple[Image.Image, ...]
    numbers: tuple[int, ...]
    seconds: tuple[float, ...]
    total: int
    rate: float

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every frame."""
        return self.frames[0].size

    @property
    def about(self) -> dict[str, Any]:
        """What processors of transformers want to know of it, under their names."""
        return {"total_num_frames": self.total, "fps": self.rate, "frames_indices": list(self.numbers)}


def check_reader() -> ModuleType:
    """PyAV.

    Raises:
        UserError: it is not installed.
    """
    return extra("av", "reading videos needs PyAV: pip install 'vlmprune[video]' (or: pip install av).")


def read_visual(path: str | Path, frames: int | None = None) -> Image.Image | VideoClip:
    """Read a picture file, or so many frames of a video file.

    Raises:
        UserError: as of `read_picture` and `read_video`.
    """
    return read_picture(path) if frames is None else read_video(path, frames)


def read_video(path: str | Path, frames: int = FRAMES) -> VideoClip:
    """Read frames of a video file: the first of each of so many parts of equal length, as transformers samples.

    Args:
        path: the file; its first video stream is read.
        frames: how many, 1 or more.

    Raises:
        UserError: no PyAV, no such file, no video in it, or fewer frames than that.
    """
    path, av = Path(path).expanduser(), check_reader()
    name = printable(path)
    refuse_no_file(path, name, "video")
    try:
        total, rate = told_by(av, path, name)
        found = wanted(av, path, total, frames)
        if len(found) < min(frames, total):  # it breaks off, or two packets make one frame
            total = sum(1 for _ in decoded(av, path))
            found = wanted(av, path, total, frames)
    except PermissionError:
        raise UserError(f"no permission to read {name}") from None
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{name} cannot be read as a video: {brief(error)}") from None
    if not found:
        raise UserError(f"{name} has no frames.")
    if len(found) < frames:
        raise UserError(f"{name} has {total} frames, and --frames {frames} are asked for: ask for at most as many.")
    numbers, seconds, pictures = zip(*found, strict=True)
    return VideoClip(pictures, numbers, tuple(round(second - seconds[0], 6) for second in seconds), total, rate)


def told_by(av: ModuleType, path: Path, name: str) -> tuple[int, float]:
    """How many frames a file holds, counted without decoding them, and how many a second there are.

    Raises:
        UserError: no video in it, or it does not say how fast it is.
    """
    with av.open(str(path)) as file:
        if not file.streams.video:
            raise UserError(f"{name} has no video in it, only {', '.join(s.type for s in file.streams) or 'nothing'}.")
        stream = file.streams.video[0]
        rate: Fraction | None = stream.average_rate or stream.guessed_rate
        if not rate:
            raise UserError(f"{name} does not say how many frames a second it has.")
        return sum(packet.size > 0 for packet in file.demux(stream)), float(rate)


def wanted(av: ModuleType, path: Path, total: int, frames: int) -> list[tuple[int, float, Image.Image]]:
    """(number, second, picture) of the frames that are read, or of those of them that there are."""
    numbers = {total * part // frames for part in range(frames)} if total else set()
    last, found = max(numbers, default=-1), []
    for number, frame in enumerate(decoded(av, path)):
        if number > last:
            break
        if number in numbers:
            found.append((number, float(frame.time or 0), upright(frame)))
    return found


def decoded(av: ModuleType, path: Path) -> Iterator[Any]:
    """All frames of a file's first video stream."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        yield from file.decode(stream)


def upright(frame: Any) -> Image.Image:
    """A frame as a picture, turned as the file says that it was held."""
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
