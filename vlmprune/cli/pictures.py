"""Reading any picture file as RGB, and finding out early whether one can be written."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageOps

from vlmprune.cli.errors import UserError, brief

__all__ = ["check_target", "read_picture", "to_rgb"]

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file (the first frame of an animation) upright and as RGB.

    Raises:
        UserError: no such file, a folder, or no picture.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no such picture: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a picture file.")
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except PermissionError:
        raise UserError(f"no permission to read {path}") from None
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in VIDEOS:
            raise UserError(
                f"{path} is a video: this command takes pictures. Videos are pruned from Python (README, Videos)."
            ) from None
        raise UserError(f"{path} is not a picture that Pillow can read.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {brief(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency onto white, more than 8 bits scaled down instead of clipped."""
    if image.mode.startswith(("I", "F")):
        low, high = image.convert("F").getextrema()
        # 16-bit pictures by their range, others (32 bits, float) by what they hold
        if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
            low, high = 0, 65535
        elif low >= 0 and high <= 1 and image.mode == "F":
            low, high = 0, 1
        elif low >= 0 and high <= 255:
            low, high = 0, 255
        scale = 255 / (high - low) if high > low else 1
        image = image.convert("F").point(lambda v: v * scale + (0.5 - low * scale)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def check_target(path: str | Path) -> Path:
    """The file a picture will be written to, checked before the work is done.

    Raises:
        UserError: no such folder, no permission, or an ending that is no picture format.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder: --save needs the name of a picture file, such as {path / 'kept.png'}.")
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path} does not end like a picture file: name it .png, .jpg or .webp.")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to save {path.name} in.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"no permission to write {path}")
    return path
