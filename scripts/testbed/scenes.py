"""Draws the scenes: a few saturated objects on a muted, textured, cluttered background.

A scene is drawn at any size from one `numpy.random.Generator`; the same seed gives the same pixels. Beside the
picture comes a map of which object owns each pixel, from which the training targets of every view (the whole
picture, one crop, the thumbnail) follow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from vlmprune.eval.testbed.words import COLOUR_NAMES, COLOURS, PLACES, SHAPES, UNSEEN_PAIRS, VALUES

PATCH = 8
TILE = 128
GRID = TILE // PATCH
#: Handwritten digits with an index below this are for training only, the others for testing only.
DIGIT_SPLIT = 1400
#: Seeds at and above this are reserved for test pictures.
TEST_SEED = 1_000_000_000


@dataclass(frozen=True)
class Thing:
    """One object: its colour and value, its top-left corner and size in pixels, the digit instance drawn."""

    colour: str
    value: str
    x: int
    y: int
    size: int
    digit_index: int = -1

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and value."""
        return self.colour, self.value


@dataclass
class Scene:
    """A picture and what is in it."""

    width: int
    height: int
    things: list[Thing] = field(default_factory=list)
    pixels: np.ndarray | None = None  # (height, width, 3) uint8
    owner: np.ndarray | None = None  # (height, width) uint8: 0 background, i + 1 the i-th thing

    def place(self, thing: Thing) -> str:
        """The quadrant in which the thing's centre lies."""
        right = thing.x + thing.size / 2 >= self.width / 2
        low = thing.y + thing.size / 2 >= self.height / 2
        return PLACES[2 * low + right]

    def by_place(self) -> dict[str, Thing]:
        """Thing by quadrant (for scenes with one thing a quadrant)."""
        return {self.place(t): t for t in self.things}

    def image(self) -> Image.Image:
        """The picture as PIL image."""
        return Image.fromarray(self.pixels)


@functools.cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """The UCI digits of scikit-learn: (1797, 8, 8) uint8 grey levels, and (1797,) labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * 15.9375).astype(np.uint8), digits.target


@functools.cache
def _digit_indices(test: bool) -> dict[int, np.ndarray]:
    """Instances of each digit in one half of the split."""
    labels = handwriting()[1]
    index = np.arange(len(labels))
    half = index >= DIGIT_SPLIT if test else index < DIGIT_SPLIT
    return {d: index[half & (labels == d)] for d in range(10)}


@functools.cache
def _shape_mask(value: str, size: int) -> np.ndarray:
    """Coverage of a shape in its box: (size, size) float32 in 0..1, antialiased."""
    big = size * 4
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if value == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif value == "square":
        draw.rectangle((big * 0.06, big * 0.06, big * 0.94, big * 0.94), fill=255)
    elif value == "triangle":
        draw.polygon(((big / 2, 0), (big - 1, big - 1), (0, big - 1)), fill=255)
    else:
        draw.rectangle((big * 0.36, 0, big * 0.64, big), fill=255)
        draw.rectangle((0, big * 0.36, big, big * 0.64), fill=255)
    return np.asarray(mask.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _digit_mask(index: int, size: int, angle: float = 0.0) -> np.ndarray:
    """Coverage of one handwritten digit in its box: (size, size) float32 in 0..1."""
    glyph = Image.fromarray(handwriting()[0][index])
    if angle:
        glyph = glyph.resize((32, 32), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BILINEAR)
    mask = np.asarray(glyph.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return np.clip(mask * 1.6 - 0.2, 0, 1)  # a harder edge keeps thin strokes visible on a noisy background


@functools.cache
def _noise() -> np.ndarray:
    """A bank of textures: (48, 320, 320, 1) int8, white noise mixed with smooth noise of several scales."""
    rng = np.random.default_rng(7)
    bank = np.empty((48, 320, 320, 1), np.int8)
    for i in range(len(bank)):
        white = rng.normal(0, 1, (320, 320))
        cell = int(rng.choice([3, 5, 8, 12]))
        coarse = rng.normal(0, 1, (320 // cell + 2,) * 2).astype(np.float32)
        smooth = np.asarray(Image.fromarray(coarse).resize((320, 320), Image.Resampling.BICUBIC))
        bank[i, ..., 0] = np.clip(white * rng.uniform(3, 6) + smooth * rng.uniform(4, 9), -40, 40)
    return bank


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A greyish colour, (3,) float: too little saturation to be taken for an object's."""
    return rng.uniform(75, 180) + rng.uniform(-16, 16, 3)


def _lit(rng: np.random.Generator) -> np.ndarray:
    """Four corners' colours, (2, 2, 3) float: light and warm at the top left, dark and cool at the bottom right."""
    down, across = np.array([38.0, -38.0])[:, None, None], np.array([1.0, -1.0])[None, :, None]
    return rng.uniform(118, 138) + rng.uniform(-5, 5, (2, 2, 3)) + down + across * np.array([16.0, 0.0, -16.0])


def background(rng: np.random.Generator, width: int, height: int, lit: bool = False) -> np.ndarray:
    """Gradient, texture and clutter without any object: (height, width, 3) float32.

    A `lit` one says in every part where in the picture that part is, for a tower that knows no places: rotary
    embeddings tell two patches' distance, and nothing tells it how large the picture is.
    """
    corners = _lit(rng) if lit else np.stack([_muted(rng) for _ in range(4)]).reshape(2, 2, 3)
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    top = corners[0, 0] * (1 - across) + corners[0, 1] * across
    low = corners[1, 0] * (1 - across) + corners[1, 1] * across
    canvas = Image.fromarray((top * (1 - down) + low * down).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    area = width * height / TILE**2
    for _ in range(rng.integers(2, 6) * round(area)):  # blobs
        x, y = rng.integers(0, width), rng.integers(0, height)
        rx, ry = rng.integers(2, 9, 2)
        draw.ellipse((int(x - rx), int(y - ry), int(x + rx), int(y + ry)), fill=tuple(_muted(rng).astype(int).tolist()))
    for _ in range(rng.integers(2, 6) * round(area)):  # thin lines
        ends = rng.integers(0, [width, height, width, height])
        draw.line(ends.tolist(), fill=tuple(_muted(rng).astype(int).tolist()), width=int(rng.integers(1, 3)))
    pixels = np.asarray(canvas, np.float32)
    count = int(rng.integers(10, 50) * area)  # specks
    rows, columns = rng.integers(0, height, count), rng.integers(0, width, count)
    pixels = pixels.copy()
    pixels[rows, columns] = rng.uniform(40, 215, (count, 1))
    bank = _noise()
    oy, ox = rng.integers(0, 320 - height + 1), rng.integers(0, 320 - width + 1)
    return pixels + bank[rng.integers(len(bank)), oy : oy + height, ox : ox + width]


def render(scene: Scene, rng: np.random.Generator, lit: bool = False) -> Scene:
    """Draws the things over a fresh background; fills `pixels` and `owner`."""
    canvas = background(rng, scene.width, scene.height, lit)
    owner = np.zeros((scene.height, scene.width), np.uint8)
    for i, thing in enumerate(scene.things):
        if thing.digit_index >= 0:
            mask = _digit_mask(thing.digit_index, thing.size, float(rng.uniform(-12, 12)))
        else:
            mask = _shape_mask(thing.value, thing.size)
        # Things of crop-like views may hang over the picture's edge.
        x0, y0 = max(thing.x, 0), max(thing.y, 0)
        x1, y1 = min(thing.x + thing.size, scene.width), min(thing.y + thing.size, scene.height)
        mask = mask[y0 - thing.y : y1 - thing.y, x0 - thing.x : x1 - thing.x, None]
        colour = np.asarray(COLOURS[thing.colour], np.float32) * rng.uniform(0.88, 1.08) + rng.uniform(-8, 8, 3)
        grain = rng.uniform(-10, 10, (*mask.shape[:2], 1))
        window = canvas[y0:y1, x0:x1]
        window += mask * (colour + grain - window)
        owner[y0:y1, x0:x1][mask[..., 0] > 0.5] = i + 1
    # 32 grey levels: invisible, and a noisy PNG takes a third of the room.
    scene.pixels = (np.clip(canvas, 0, 255).astype(np.uint8) & 0xF8) | 4
    scene.owner = owner
    return scene


def choose_pairs(
    rng: np.random.Generator, count: int, test: bool, unseen: bool = False, digits: float = 0.38
) -> list[tuple[str, str, int]]:
    """Colour, value and digit instance of `count` different objects, which often share a colour or a value.

    With `unseen` at least one pair is of UNSEEN_PAIRS; without, none is.
    """
    chosen: list[tuple[str, str, int]] = []
    taken: set[tuple[str, str]] = set()
    held_out = sorted(UNSEEN_PAIRS)
    while len(chosen) < count:
        if unseen and not chosen:
            colour, value = held_out[rng.integers(len(held_out))]
        else:
            colour = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
            value = str(rng.integers(10)) if rng.random() < digits else SHAPES[rng.integers(len(SHAPES))]
            if chosen and rng.random() < 0.45:  # distractors which share one attribute make questions hard
                other = chosen[rng.integers(len(chosen))]
                colour, value = (other[0], value) if rng.random() < 0.5 else (colour, other[1])
        pair = (colour, value)
        if pair in taken or (pair in UNSEEN_PAIRS and not unseen):
            continue
        taken.add(pair)
        instance = int(rng.choice(_digit_indices(test)[int(value)])) if value in VALUES[4:] else -1
        chosen.append((colour, value, instance))
    return chosen


def quadrant_scene(
    rng: np.random.Generator,
    *,
    count: int | None = None,
    size: tuple[int, int] = (18, 24),
    width: int = TILE,
    height: int = TILE,
    test: bool = False,
    unseen: bool = False,
    digits: float = 0.38,
    lit: bool = False,
) -> Scene:
    """A scene with at most one object in each quadrant, jittered inside it: the pictures that questions are about."""
    count = int(rng.integers(1, 5)) if count is None else count
    scene = Scene(width, height)
    places = rng.permutation(4)[:count]
    for place, (colour, value, instance) in zip(places, choose_pairs(rng, count, test, unseen, digits), strict=True):
        side = int(rng.integers(size[0], size[1] + 1))
        low, right = divmod(int(place), 2)
        x = right * (width // 2) + int(rng.integers(2, width // 2 - side - 1))
        y = low * (height // 2) + int(rng.integers(2, height // 2 - side - 1))
        scene.things.append(Thing(colour, value, x, y, side, instance))
    return render(scene, rng, lit)


def crowded_scene(rng: np.random.Generator, *, test: bool = False) -> Scene:
    """Three or four large objects: about a third of the tokens are theirs."""
    return quadrant_scene(rng, count=int(rng.integers(3, 5)), size=(30, 42), test=test)


def loose_scene(
    rng: np.random.Generator,
    *,
    cells: int | tuple[int, int],
    fill: float,
    size: tuple[int, int],
    width: int = TILE,
    height: int = TILE,
    lit: bool = False,
    digits: float = 0.38,
) -> Scene:
    """Objects anywhere on a jittered grid of `cells` (rows and columns), edges included: for the tower only."""
    scene = Scene(width, height)
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    side_x, side_y = width / columns, height / rows
    spots = [c for c in range(rows * columns) if rng.random() < fill]
    for spot in spots:
        colour, value, instance = choose_pairs(rng, 1, False, digits=digits)[0]
        side = int(rng.integers(size[0], size[1] + 1))
        row, column = divmod(spot, columns)
        slack_x, slack_y = side_x - side, side_y - side
        x = int(column * side_x + rng.uniform(-0.1, 1.1) * slack_x)
        y = int(row * side_y + rng.uniform(-0.1, 1.1) * slack_y)
        x, y = min(max(x, -side // 3), width - side * 2 // 3), min(max(y, -side // 3), height - side * 2 // 3)
        scene.things.append(Thing(colour, value, x, y, side, instance))
    return render(scene, rng, lit)


_PATCH_OF_PIXEL = (np.arange(TILE) // PATCH)[:, None] * GRID + (np.arange(TILE) // PATCH)[None]


def patch_owner(owner: np.ndarray, minimum: int = 6) -> np.ndarray:
    """Which thing each patch of a 128 x 128 view shows: (256,) int64, 0 where no thing covers `minimum` pixels.

    Args:
        owner: (128, 128) uint8 map of pixel owners.
        minimum: pixels of an object that make the patch the object's.
    """
    kinds = int(owner.max()) + 1
    counts = np.bincount((_PATCH_OF_PIXEL * kinds + owner).ravel(), minlength=GRID * GRID * kinds)
    counts = counts.reshape(GRID * GRID, kinds)
    if kinds == 1:
        return np.zeros(GRID * GRID, np.int64)
    best = counts[:, 1:].argmax(1)
    return np.where(counts[np.arange(len(best)), best + 1] >= minimum, best + 1, 0)
