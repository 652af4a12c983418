"""Small video files, written with PyAV."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def write(path, pictures, rate=10):
    """Write pictures of one size, sides of whole macroblocks, as the frames of a video; returns the path."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), format="rgb24")))
        file.mux(stream.encode())
    return path


def greys(count, size=(48, 32)):
    """Pictures in shades of grey, ten apart, from 10."""
    return [Image.new("RGB", size, (10 + 10 * number,) * 3) for number in range(count)]


def moving(count, colour=(200, 30, 30), size=(128, 96)):
    """A drawn circle that moves to the right."""
    made = []
    for number in range(count):
        picture = Image.new("RGB", size, (235, 235, 230))
        left = 8 + 80 * number // count
        ImageDraw.Draw(picture).ellipse((left, 30, left + 32, 62), fill=colour)
        made.append(picture)
    return made
