"""Pictures of what a method kept: kept patches clear, dropped ones pale and dark, pooled ones in their mean colour.

What the model never sees, since its image processor cuts it off, is striped: no method dropped it.

Where a patch lies in the picture is asked of the image processor itself: a picture of its own coordinates goes through
it, so crops, padding and squashing need no reimplementation; of a video its video processor is asked. Only Pillow and
numpy are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from vlmprune.errors import UnsupportedError
from vlmprune.runtime.videos import VideoClip

if TYPE_CHECKING:
    from vlmprune.parts.layout import ImageGrid
    from vlmprune.trace import Trace

__all__ = [
    "Panel",
    "answer_panels",
    "cut_by_cut",
    "draw_kept",
    "eyes",
    "kept_panel",
    "patch_boxes",
    "plain_panel",
    "seen_share",
    "sheet",
]

LONGEST = 384  # pixels of a panel's longer side: small pictures are scaled up by a whole number, large ones down
GAP, TEXT, HEADING = 14, 15, 18
LINE = TEXT + 5  # from one line of text to the next
DARK = 0.45  # brightness of what was dropped
STRIPE = 10  # pixels from one stripe to the next on what no patch covers
ACROSS = 8  # frames of a video in one line of its strip

Box = tuple[float, float, float, float]
Visual = Image.Image | VideoClip


@dataclass(frozen=True)
class Panel:
    """Pictures side by side under a title and some lines."""

    title: str
    lines: list[str]
    pictures: list[Image.Image]


def probe(size: tuple[int, int]) -> Image.Image:
    """A picture of its own coordinates: red grows to the right, green downwards, blue is everywhere full."""
    width, height = size
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None, :]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def line_through(at: np.ndarray, shade: np.ndarray, length: int, whole: int) -> tuple[float, float]:
    """Slope and start of the line from a plane's pixels to the picture's, by least squares.

    Args:
        at: pixel centres in the plane.
        shade: the probe's brightness there, 0 to 255 over the picture's `length` pixels.
        whole: pixels of the plane, for a picture too thin to measure.
    """
    inner = (shade > 8) & (shade < 247)  # resampling bends the ends
    if inner.sum() > 1 and np.ptp(at[inner]) > 0:
        at, shade = at[inner], shade[inner]
    if length == 1 or np.ptp(at) == 0 or np.ptp(shade) == 0:
        return length / whole, 0.0
    slope, start = np.polyfit(at, shade * (length - 1) / 255 + 0.5, 1)
    return float(slope), float(start)


def seen_views(image_processor: Any, pictures: Any) -> np.ndarray:
    """`(views, 3, height, width)` pixels of what the tower sees of pictures, before they are normalised."""
    made = image_processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = np.asarray(made["pixel_values"], np.float64)
    if "image_grid_thw" in made:
        return unpacked(image_processor, pixels, made["image_grid_thw"])
    return pixels.reshape(-1, 3, *pixels.shape[-2:])


def unpacked(image_processor: Any, rows: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """`(1, 3, height, width)` of the first picture of `(patches, values)` rows, which lie block by block."""
    _, high, wide = (int(n) for n in grids[0])
    patch, merge = image_processor.patch_size, image_processor.merge_size
    cells = rows[: high * wide].reshape(high // merge, wide // merge, merge, merge, 3, -1, patch, patch)
    still = cells[:, :, :, :, :, 0]  # a picture is its own next frame
    return still.transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, high * patch, wide * patch)


def seen_frames(video_processor: Any, size: tuple[int, int], grid: ImageGrid) -> np.ndarray:
    """As `seen_views`, of the frames of a video, which are all alike."""
    together = getattr(video_processor, "temporal_patch_size", 1) if hasattr(video_processor, "merge_size") else 1
    made = video_processor(
        videos=[[probe(size)] * (grid.frames * together)], do_rescale=False, do_normalize=False,
        do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    pixels = np.asarray(made["pixel_values_videos"], np.float64)
    packed = "video_grid_thw" in made
    one = unpacked(video_processor, pixels, made["video_grid_thw"]) if packed else pixels[0, :1]
    return np.broadcast_to(one, (grid.views, *one.shape[1:]))


def eyes(processor: Any, grid: ImageGrid) -> Any:
    """The part of a processor that prepared what has this layout: for pictures, or for videos."""
    return getattr(processor, "video_processor" if grid.frames else "image_processor", processor)


def patch_boxes(image_processor: Any, size: tuple[int, int], grid: ImageGrid) -> list[Box]:
    """Where every visual token lies in the picture, or in its frame of the video.

    Args:
        image_processor: the model's, or its video processor (`eyes`); it is called once or twice.
        size: (width, height) of the picture, or of every frame.
        grid: the picture's layout, of `Trace.grids`.

    Returns:
        (left, top, right, bottom) in pixels of the picture for every token; empty boxes for newlines. Boxes of padded
        patches reach beyond the picture.
    """
    if grid.frames:
        views = seen_frames(image_processor, size, grid)
    else:
        views = seen_views(image_processor, probe(size))
        if len(views) > 1 and grid.views == 1:  # one of several in its prompt, which has no crops
            views = seen_views(image_processor, [[probe(size)] * 2])
    side_y, side_x = grid.side
    step_y, step_x = views.shape[2] / side_y, views.shape[3] / side_x
    view, plane_of, newline = grid.view.numpy(), grid.plane.numpy(), grid.newline.numpy()

    boxes = np.zeros((grid.tokens, 4))
    for plane in range(len(grid.planes)):
        mine = (plane_of == plane) & ~newline
        pitch = np.array(grid.pitch[plane])
        low = grid.centre.numpy() + 0.5 - pitch / 2  # upper left corners of the tokens, in patches
        corner = low[mine].min(0)
        xs, ys, shades = [], [], []
        for number in np.unique(view[mine]):
            # where the view's corner lies on the plane
            at = (0, 0) if grid.apart else divmod(max(number - 1, 0), max(grid.crops[1], 1))
            down, right = np.array(at) * (side_y, side_x) - corner
            red, green, blue = views[number]
            y, x = np.nonzero(blue > 250)  # padding is not blue
            xs.append(x + 0.5 + right * step_x)
            ys.append(y + 0.5 + down * step_y)
            shades.append(np.stack((red[y, x], green[y, x])))
        shade_x, shade_y = np.concatenate(shades, 1)
        (rows, cols), place = grid.planes[plane], (low - corner)[mine]
        slope_x, left = line_through(np.concatenate(xs), shade_x, size[0], round(cols * pitch[1] * step_x))
        slope_y, top = line_through(np.concatenate(ys), shade_y, size[1], round(rows * pitch[0] * step_y))
        edges = np.concatenate((place, place + pitch), 1)[:, [1, 0, 3, 2]] * (step_x, step_y, step_x, step_y)
        boxes[mine] = edges * (slope_x, slope_y, slope_x, slope_y) + (left, top, left, top)
    return [tuple(box) for box in boxes.tolist()]


def scaled(image: Image.Image, longest: int = LONGEST) -> tuple[Image.Image, float]:
    """The picture at panel size and the factor; small ones by a whole number, without new colours."""
    factor = longest / max(image.size)
    if factor >= 1:
        factor = max(1, round(factor))
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST), factor
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS), factor


def striped(pale: Image.Image) -> Image.Image:
    """What no patch covers: washed out under diagonal stripes."""
    x, y = np.arange(pale.width)[None, :], np.arange(pale.height)[:, None]
    stripes = Image.fromarray(((x + y) % STRIPE < 2).astype(np.uint8) * 255)
    washed = Image.blend(pale, Image.new("RGB", pale.size, "white"), 0.65)
    return Image.composite(Image.new("RGB", pale.size, (150, 150, 150)), washed, stripes)


def paint(
    image: Image.Image, boxes: Sequence[Box], kept: Sequence[float], longest: int = LONGEST, averaged: bool = False
) -> Image.Image:
    """Leave kept boxes as they are, with a thin line around them, dim dropped ones, and stripe what no box covers.

    Args:
        kept: for every box the share of the cuts that it outlived: 1 stays clear, 0 is darkest.
        averaged: fill every kept box with its mean colour.
    """
    base, factor = scaled(image, longest)
    inside = [(clipped(box, factor, base.size), float(level)) for box, level in zip(boxes, kept, strict=True)]
    levels: dict[float, list[tuple[int, int, int, int]]] = {0.0: [], 1.0: []}
    for at, level in inside:
        levels.setdefault(level, []).extend(() if at is None else (at,))
    alive = [at for at, level in inside if at is not None and level and averaged]
    for at in alive:
        base.paste(base.resize((1, 1), Image.Resampling.BOX, box=at).getpixel((0, 0)), at)
    made = shaded(base, {level: mask_of(mine, base.size) for level, mine in sorted(levels.items())})
    outline(made, alive)
    return made


def mask_of(boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Image.Image:
    """White where boxes are."""
    mask = Image.new("L", size)
    for at in boxes:
        mask.paste(255, at)
    return mask


def shaded(base: Image.Image, masks: dict[float, Image.Image]) -> Image.Image:
    """A picture as bright as the level of every mask, the darkest pale, and a white line around the brightest."""
    pale = ImageEnhance.Color(base).enhance(0.3)
    made = striped(pale)
    for level, mask in masks.items():
        bright = ImageEnhance.Brightness(base if level else pale).enhance(DARK + (1 - DARK) * level)
        made = Image.composite(bright, made, mask)
    # the line runs on what was dropped: what was kept stays untouched
    edge = ImageChops.subtract(masks[1.0].filter(ImageFilter.MaxFilter(3)), masks[1.0])
    made.paste((255, 255, 255), mask=edge)
    return made


def clipped(box: Box, factor: float, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """A box in whole pixels of a scaled picture of `size`; None where nothing of it lies in the picture."""
    left, top, right, bottom = (round(edge * factor) for edge in box)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    return (left, top, right, bottom) if right > left and bottom > top else None


def outline(picture: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> None:
    """Draw white lines around boxes."""
    canvas = ImageDraw.Draw(picture)
    for left, top, right, bottom in boxes:
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255))


def seen_share(image_processor: Any, size: tuple[int, int], grid: ImageGrid) -> float:
    """How much of a picture of `size` (width, height) any visual token covers: 1 unless the processor crops it."""
    return covered(patch_boxes(image_processor, size, grid), size)


def covered(boxes: Sequence[Box], size: tuple[int, int], fine: int = 512) -> float:
    """The share of a picture's area that boxes cover, to one pixel in `fine`."""
    mask = Image.new("1", (min(size[0], fine), min(size[1], fine)))
    canvas, (wide, tall) = ImageDraw.Draw(mask), (mask.width / size[0], mask.height / size[1])
    for left, top, right, bottom in boxes:
        at = round(left * wide), round(top * tall), round(right * wide) - 1, round(bottom * tall) - 1
        if at[2] >= at[0] and at[3] >= at[1]:
            canvas.rectangle(at, fill=1)
    return float(np.asarray(mask).mean())


def pooled(trace: Trace, index: int) -> dict[int, list[int]]:
    """For every token of image `index` that averages others, those that flow into it, itself included."""
    cells: dict[int, list[int]] = {}
    for cut in trace.cuts:
        if cut.merge is not None and cut.merge.source is None:
            into, weight = cut.merge.into[index].tolist(), cut.merge.weight[index].tolist()
            for token in range(trace.grids[index].tokens):
                if weight[token] > 0 and not trace.grids[index].newline[token]:
                    cells.setdefault(into[token], []).append(token)
    return cells


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box around boxes."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def area(box: Box) -> float:
    """Width times height."""
    return (box[2] - box[0]) * (box[3] - box[1])


def rectangles(boxes: Sequence[Box], cells: dict[int, list[int]]) -> dict[int, list[int]]:
    """The cells as boxes, where the members of each fill one; none where they are scattered: each patch is shown."""
    whole = {t: (around([boxes[m] for m in cell]), sum(area(boxes[m]) for m in cell)) for t, cell in cells.items()}
    found = {t: cells[t] for t, (box, filled) in whole.items() if filled > 0.99 * area(box)}
    return found if all(t in found for t, cell in cells.items() if len(cell) > 1) else {}


def joined(boxes: Sequence[Box], cells: dict[int, list[int]]) -> dict[int, Box]:
    """The boxes by token; those that one token of `cells` averages are one around all of them."""
    merged = {token for members in cells.values() for token in members}
    shown = {t: box for t, box in enumerate(boxes) if t not in merged}
    return shown | {t: around([boxes[m] for m in members]) for t, members in sorted(cells.items())}


def outlived(trace: Trace, index: int) -> list[float]:
    """For every token of image `index` the share of the cuts that it outlived."""
    cuts, tokens = [set(cut.tokens(index)) for cut in trace.cuts], trace.grids[index].tokens
    if not cuts:  # nothing was taken
        return [1.0] * tokens
    return [sum(token in kept for kept in cuts) / len(cuts) for token in range(tokens)]


def kept_pictures(
    image: Visual, trace: Trace, image_processor: Any, index: int = 0, longest: int = LONGEST
) -> list[Image.Image]:
    """The picture with what was kept of image `index`; of several cuts, what outlived more of them is brighter.

    What averages others that fill a box is drawn as that box in their mean colour. Of an image with crops: the canvas
    of crops first, then, smaller, the thumbnail. Of a video: its strip, of the first of the frames that each frame of
    tokens is made of.

    Raises:
        UnsupportedError: the layout of a video, and no `VideoClip`.
    """
    grid, kept = trace.grids[index], outlived(trace, index)
    refuse_other(image, grid, index)
    boxes = patch_boxes(image_processor, image.size, grid)
    cells = rectangles(boxes, pooled(trace, index))
    shown = joined(boxes, cells)
    planes = []
    for plane, shot in enumerate(shots_of(image, len(grid.planes))):
        mine = [t for t in shown if grid.plane[t] == plane and not grid.newline[t]]
        small = grid.frames or (len(grid.planes) > 1 and plane == 0)  # a frame, or the thumbnail
        size = longest // 2 if small else longest
        planes.append(paint(shot, [shown[t] for t in mine], [kept[t] for t in mine], size, bool(cells)))
    return [strip(planes)] if grid.frames else planes[::-1]


def refuse_other(image: Visual, grid: ImageGrid, index: int) -> None:
    """Refuse to draw what a picture's layout says on a video, and the reverse.

    Raises:
        UnsupportedError: that.
    """
    if bool(grid.frames) != isinstance(image, VideoClip):
        kind, give = (
            ("video", "it as runtime.videos.read_video reads it") if grid.frames else ("picture", "the picture")
        )
        raise UnsupportedError(f"what to draw on is no {kind}, as image {index} of the trace is: give {give}.")


def shots_of(clip: Visual, planes: int) -> list[Image.Image]:
    """What so many planes of tokens are of: the picture, or of a clip the first of the frames that each of them is."""
    if not isinstance(clip, VideoClip):
        return [clip] * planes
    together = -(-len(clip.frames) // planes)
    return [clip.frames[plane * together] for plane in range(planes)]


def strip(pictures: Sequence[Image.Image], gap: int = GAP // 2) -> Image.Image:
    """Pictures of one size side by side as one, in lines of `ACROSS`."""
    wide, tall = pictures[0].size
    lines = -(-len(pictures) // ACROSS)
    size = min(len(pictures), ACROSS) * (wide + gap) - gap, lines * (tall + gap) - gap
    made = Image.new("RGB", size, "white")
    for number, picture in enumerate(pictures):
        line, column = divmod(number, ACROSS)
        made.paste(picture, (column * (wide + gap), line * (tall + gap)))
    return made


def cut_by_cut(trace: Trace) -> list[tuple[int, Trace]]:
    """Every cut's layer, and the trace as if it had been the only one: what was left behind it."""
    return [(cut.layer, replace(trace, cuts=[cut])) for cut in trace.cuts]


def plain_panel(image: Visual, title: str, lines: Sequence[str] = (), longest: int = LONGEST) -> Panel:
    """The picture, or the frames of a video, as they are."""
    if isinstance(image, VideoClip):
        when = f"frames at {', '.join(f'{second:.1f}' for second in image.seconds)} s"
        return Panel(title, [when, *lines], [strip([scaled(frame, longest // 2)[0] for frame in image.frames])])
    return Panel(title, list(lines), [scaled(image, longest)[0]])


def kept_panel(
    image: Visual,
    trace: Trace,
    image_processor: Any,
    index: int,
    title: str,
    lines: Sequence[str] = (),
    longest: int = LONGEST,
) -> Panel:
    """The picture with what was kept, and the counts under the title."""
    grid = trace.grids[index]
    refuse_other(image, grid, index)
    about = counts_of(trace, index)
    if (share := seen_share(image_processor, image.size, grid)) < 0.99:
        about.append(f"the model sees {share:.0%} of the {'video' if grid.frames else 'picture'} (striped: cut off)")
    return Panel(title, about + list(lines), kept_pictures(image, trace, image_processor, index, longest))


def counts_of(trace: Trace, index: int) -> list[str]:
    """How much was kept of an image, or of a video frame by frame, in words."""
    grid, count = trace.grids[index], trace.counts[index]
    merged = ", the rest merged in" if any(cut.merge is not None for cut in trace.cuts) else ""
    planes = [int(grid.plane[t]) for t in trace.kept_patches(index)]
    if not grid.frames and len(grid.planes) > 1:
        small, whole = planes.count(0), grid.patches_per_view[0]
        return [f"crops {len(planes) - small} of {grid.patches - whole}, thumbnail {small} of {whole}{merged}"]
    steps = [str(len(trace.kept_patches(index, cut))) for cut in range(len(trace.cuts))]
    steps = steps or [str(count["patches_after"])]
    about = [f"{' -> '.join(steps)} of {count['patches_before']} patches{merged}"]
    if grid.frames:
        about.append(f"frame by frame: {', '.join(str(planes.count(frame)) for frame in range(len(grid.planes)))}")
    return about


def answer_panels(
    image: Visual,
    processor: Any,
    plain: str,
    answers: Sequence[tuple[str, Trace, str]],
    index: int = 0,
    longest: int = LONGEST,
) -> list[list[Panel]]:
    """The picture under the full model's answer, then what was kept of it for every (title, trace, answer).

    Returns:
        Rows of panels: one, or, of a video, whose strips are long, one for each.
    """
    panels = [plain_panel(image, "full model", [f"answer: {plain}"], longest)]
    for title, trace, said in answers:
        part = eyes(processor, trace.grids[index])
        panels.append(kept_panel(image, trace, part, index, title, [f"answer: {said}"], longest))
    return [[panel] for panel in panels] if isinstance(image, VideoClip) else [panels]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, in its only size where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def write(canvas: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, room: int) -> None:
    """Write one line, cut to `room` pixels."""
    used, text = font(size), " ".join(text.split())
    if isinstance(used, ImageFont.ImageFont):
        text = text.encode("latin-1", "replace").decode("latin-1")
    whole = text
    while text and canvas.textlength(text if text == whole else text + "...", used) > room:
        text = text[:-1]
    canvas.text(at, text if text == whole else text + "...", fill=(20, 20, 20), font=used)


def sheet(rows: Sequence[Sequence[Panel]], heading: str = "") -> Image.Image:
    """Put rows of panels onto one white picture, columns under each other."""
    wide = [max(panel_size(p)[0] for p in column if p) for column in zip_longest(*rows)]
    heights = [row_size(row) for row in rows]
    top = GAP + (HEADING + GAP if heading else 0)
    size = (sum(wide) + GAP * (len(wide) + 1), top + sum(words + tall + GAP for words, tall in heights))
    made = Image.new("RGB", size, "white")
    if heading:
        write(ImageDraw.Draw(made), (GAP, GAP), heading, HEADING, made.width - 2 * GAP)
    lefts = list(accumulate(wide, lambda left, room: left + room + GAP, initial=GAP))
    for row, (words, tall) in zip(rows, heights, strict=True):
        for panel, left, room in zip(row, lefts, wide, strict=False):
            put(made, panel, (left, top), room, words)
        top += words + tall + GAP
    return made


def row_size(row: Sequence[Panel]) -> tuple[int, int]:
    """How tall a row's words are, and its pictures."""
    lines = max(len(panel.lines) for panel in row)
    return LINE * (1 + lines) + 4, max(panel_size(panel)[1] for panel in row)


def panel_size(panel: Panel) -> tuple[int, int]:
    """Width and height of a panel's pictures; no panel is too narrow for words."""
    wide = sum(p.width for p in panel.pictures) + GAP // 2 * (len(panel.pictures) - 1)
    return max(wide, 12 * TEXT), max(p.height for p in panel.pictures)


def put(page: Image.Image, panel: Panel, corner: tuple[int, int], room: int, words: int) -> None:
    """Put a panel onto a page: its words, cut to `room` pixels, then its pictures, `words` pixels below the corner."""
    (x, y), canvas = corner, ImageDraw.Draw(page)
    for i, line in enumerate((panel.title, *panel.lines)):
        write(canvas, (x, y + i * LINE), line, TEXT, room)
    for picture in panel.pictures:
        page.paste(picture, (x, y + words))
        x += picture.width + GAP // 2


def draw_kept(image: Visual, trace: Trace, processor: Any, index: int = 0) -> Image.Image:
    """A picture of what the last pruned prefill kept of image `index`.

    Args:
        image: the picture that the processor got, or the video.
        trace: `handle.trace`.
        processor: the model's processor (or its image processor).
        index: the image's number in the batch.
    """
    title = " + ".join(dict.fromkeys(cut.method for cut in trace.cuts))
    plain, kept = (
        plain_panel(image, "picture"),
        kept_panel(image, trace, eyes(processor, trace.grids[index]), index, title),
    )
    return sheet([[plain], [kept]] if isinstance(image, VideoClip) else [[plain, kept]])
