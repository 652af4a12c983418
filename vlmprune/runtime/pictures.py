"""Reading any picture file as RGB, and writing one whole or not at all."""

from __future__ import annotations

import io
import math
import os
import warnings
from array import array
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from vlmprune.runtime import interruption
from vlmprune.runtime.errors import CommandError, UserError, brief, printable
from vlmprune.runtime.prompts import VIDEOS

__all__ = ["check_target", "plainly_wrong", "read_picture", "refuse_no_file", "to_rgb", "upright_rgb"]
__all__ += ["write_picture"]


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file (the first frame of an animation) upright and as RGB.

    Raises:
        UserError: no such file, a folder, a pipe or a device, or no picture.
    """
    path = Path(path).expanduser()
    name = printable(path)
    refuse_no_file(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata, which are read all the same
            with Image.open(path) as image:
                image.load()
                return upright_rgb(image)
    except PermissionError:
        raise UserError(f"no permission to read {name}") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels and is not read: a small file may claim any "
            "size. Models see a few thousand pixels a side at most, so shrink it first, for example by ImageMagick: "
            "magick big.png -resize 8000x8000 small.png"
        ) from None
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in VIDEOS:
            raise UserError(f"{name} is a video, not a picture: give it to `run` or `fidelity` by --video.") from None
        raise UserError(f"{name} is not a picture that Pillow can read.") from None
    except Exception as error:  # decoders raise nearly anything when a file is damaged
        interruption.check(error)
        raise UserError(f"{name} cannot be read as a picture: {brief(error)}") from None


def refuse_no_file(path: Path, name: str, kind: str = "picture") -> None:
    """Refuse what is no plain file.

    Raises:
        UserError: it says what it is.
    """
    try:
        if not path.exists():
            raise UserError(f"no such {kind}: {name}")
    except OSError as error:  # a name that is too long
        raise UserError(f"no such {kind}: {name} ({error.strerror})") from None
    if path.is_dir():
        raise UserError(f"{name} is a folder: name a {kind} file.")
    if not path.is_file():  # to open a pipe would wait for somebody who writes
        raise UserError(f"{name} is a pipe or a device: name a {kind} file.")


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as a model is to see it: turned as its EXIF data say, and as RGB by `to_rgb`.

    Raises:
        ValueError: as `to_rgb`.
    """
    return to_rgb(ImageOps.exif_transpose(image))


def plainly_wrong(image: Image.Image) -> str | None:
    """What Pillow's plain `convert("RGB")` does wrong with a picture; None where it is the same as `upright_rgb`."""
    if image.mode.startswith(("I", "F")):
        return "more than 8 bits clipped"
    if image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
        return "not turned upright"
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        return "transparent pixels shown"
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency onto white, more than 8 bits scaled down instead of clipped.

    Raises:
        ValueError: NaN or infinity in a picture of floats, or a mode that Pillow cannot convert.
    """
    if image.mode.startswith(("I", "F")):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of more than 8 bits as grey of 8, by `brightness`.

    Raises:
        ValueError: NaN or infinity in a picture of floats.
    """
    if image.mode == "F" and not math.isfinite(sum(array("f", image.tobytes()))):
        raise ValueError("it holds NaN or infinite numbers.")
    found = image.convert("F")
    low, high = brightness(image.mode, *found.getextrema())
    scale = 255 / (high - low) if high > low else 1
    return found.point(lambda v: v * scale + (0.5 - low * scale)).convert("L")


def brightness(mode: str, low: float, high: float) -> tuple[float, float]:
    """What is black and white: 16-bit pictures by their range, others (32 bits, float) by what they hold."""
    if mode.startswith("I;16") or (mode == "I" and low >= 0 and 255 < high <= 65535):
        return 0, 65535
    whites = (1, 255) if mode == "F" else (255,)
    return next(((0, white) for white in whites if low >= 0 and high <= white), (low, high))


def check_target(path: str | Path) -> Path:
    """The file a picture will be written to, checked before the work is done.

    Raises:
        UserError: no such folder, no permission, or an ending that is no picture format.
    """
    path = Path(path).expanduser()
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long
        raise UserError(f"{printable(path)} cannot be written: {error.strerror}.") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder: --save needs the name of a picture file, such as {path / 'kept.png'}.")
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path} does not end like a picture file: name it .png, .jpg or .webp.")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to save {path.name} in.")
    if not os.access(path if there else folder, os.W_OK):
        raise UserError(f"no permission to write {path}")
    return path


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of the file's ending, whole or not at all.

    Raises:
        CommandError: no room or no permission.
    """
    from vlmprune.runtime.files import write_whole

    made = io.BytesIO()
    try:
        picture.save(made, Image.registered_extensions()[path.suffix.lower()])
        write_whole(path, made.getvalue())
    except (OSError, ValueError) as error:  # formats have limits to a picture's size
        raise CommandError(f"cannot write {printable(path)}: {brief(error)}") from None
