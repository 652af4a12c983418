"""The pictures of lmms-eval's documents as a model gets them, and a count of those that others read differently."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from PIL import Image

from vlmprune.runtime.errors import UserError
from vlmprune.runtime.pictures import plainly_wrong, upright_rgb
from vlmprune.runtime.tables import counted

__all__ = ["Reader"]


class Reader:
    """Opens pictures as `vlmprune run` does, or plainly.

    Args:
        plain: by Pillow's `convert("RGB")`, as most of lmms-eval's models do. It shows 16-bit pictures white, pictures
            of small floats black, the colours under transparent pixels, and turns nothing upright by EXIF.
    """

    def __init__(self, plain: bool):
        self.plain = plain
        self.odd: Counter[str] = Counter()  # pictures that the two ways read differently, by what goes wrong

    def __call__(self, given: Any) -> Image.Image:
        """A picture as the processor wants it; tasks give pictures or files.

        Raises:
            UserError: numbers in it that are no colours (NaN, infinity).
        """
        image = given if isinstance(given, Image.Image) else Image.open(given)
        if wrong := plainly_wrong(image):
            self.odd[wrong] += 1
        try:
            return image.convert("RGB") if self.plain else upright_rgb(image)
        except ValueError as error:
            raise UserError(f"a picture cannot be read: {error}") from None

    def tell(self) -> None:
        """Warn of the pictures since the last time that the two ways read differently."""
        if not self.odd:
            return
        how = ", ".join(f"{count} {why}" for why, count in self.odd.items())
        they = counted(self.odd.total(), "picture")
        self.odd.clear()
        if self.plain:
            told = f"{they} converted plainly, which reads them wrong ({how}): the benchmark asked for it."
        else:
            told = (
                f"{they} read as they are to be seen, where a plain conversion to RGB goes wrong ({how}). Published "
                "numbers may come from one: plain_pictures (true in a YAML file) gives it."
            )
        warnings.warn(told, stacklevel=3)
