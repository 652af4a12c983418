"""Prompts of random text and random pictures: a model is all that is needed, no processor and no file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import ImageGrid
from vlmprune.patches import Family
from vlmprune.patches.host import reads_pixel_values

__all__ = [
    "SAID",
    "batch",
    "check_placeholders",
    "check_rotary",
    "joined",
    "make_prompt",
    "pictures_of",
    "prompts_for",
    "random_pixels",
    "random_text",
    "side_of",
]

Pictures = tuple[dict[str, torch.Tensor], list[list[ImageGrid]]]

FRAMES = 2  # of a video
SIDE = 6  # tokens along a side of a picture, where pictures have any size
#: What processors say of every token beside its id (`Family.said_of`).
SAID = frozenset({"mm_token_type_ids", "token_type_ids"})
ROOM = 16  # positions beside those of a prompt: tokens that are decoded, columns that a mistake lets through


def random_text(family: Family, inner: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Token ids of `shape` that are no placeholders."""
    vocabulary = inner.config.text_config.vocab_size
    ids = torch.randint(3, vocabulary - 1, shape, generator=generator)
    holes = [family.token(inner, modality) for modality in family.modalities]
    spare = next(token for token in (vocabulary - 1, *range(2, vocabulary)) if token not in holes)
    for hole in holes:
        ids[ids == hole] = spare
    return ids


def random_pixels(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Pixels of `(..., height, width)`: coarse blobs under noise, so that patches differ."""
    flat = torch.randn(*shape, generator=generator).flatten(0, -4)
    coarse = torch.randn(*flat.shape[:2], 5, 5, generator=generator)
    return (torch.nn.functional.interpolate(coarse, flat.shape[-2:], mode="bilinear") + 0.5 * flat).view(shape)


def side_of(family: Family, inner: nn.Module) -> int:
    """Pixels along a side of a small picture: of a view, or of some tokens where pictures have any size."""
    vision = inner.config.vision_config
    if family.packed:
        return SIDE * vision.patch_size * getattr(vision, "spatial_merge_size", family.unit(inner))
    return vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]


def make_prompt(
    family: Family, model: nn.Module, parts: Sequence[int | str], sizes: Sequence[tuple[int, int]], seed: int
) -> dict[str, Any]:
    """The arguments of one call of `model`.

    Args:
        parts: numbers of text tokens, "image" (the next of `sizes`) and "video".
        sizes: (height, width) of the pictures in pixels.
    """
    inner, generator = family.inner(model), torch.Generator().manual_seed(seed)
    if not reads_pixel_values(inner):
        raise UnsupportedError(
            f"the self-test of {family.model_type} models needs transformers 5.23 or newer: before, they call the "
            "pixels of images by a name of their own."
        )
    pictures, images = pictures_of(family, inner, sizes, generator)
    films, frames = videos_of(family, inner, sum(part == "video" for part in parts), generator)
    features = {"image": (sum(grid.tokens for grid in picture) for picture in images), "video": repeat(frames)}
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids.append(random_text(family, inner, (part,), generator))
        else:
            ids.append(placeholders(family, inner, part, next(features[part]), generator))
    tokens = torch.cat(ids)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | pictures | films
    inputs |= family.said_of(inner, tokens)
    if family.alike and "video" in parts:  # what their ids do not tell
        inputs["mm_token_type_ids"] = 2 * inputs["mm_token_type_ids"]
    return moved(model, inputs)


def moved(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on a model's device, floating-point ones in its dtype."""
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}


def placeholders(
    family: Family, inner: nn.Module, modality: str, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """Ids of the tokens of a picture; between the frames of a video stands text where a family has it so."""
    token = family.token(inner, modality)
    if modality == "image" or not family.stamped:
        return torch.full((tokens,), token)
    frame = torch.full((tokens // FRAMES,), token)
    return torch.cat([torch.cat((random_text(family, inner, (2,), generator), frame)) for _ in range(FRAMES)])


def packed_pictures(
    family: Family, inner: nn.Module, modality: str, sizes: Sequence[tuple[int, int, int]], generator: torch.Generator
) -> Pictures:
    """As `pictures_of`, of (frames, height, width) each, for towers that read patches of any number in one sequence."""
    vision, pixels = inner.config.vision_config, {"image": "pixel_values", "video": "pixel_values_videos"}
    patch, grid = (
        vision.patch_size,
        [(t, height // vision.patch_size, width // vision.patch_size) for t, height, width in sizes],
    )
    patches = [
        random_pixels((t, 3, rows * patch, cols * patch), generator).unfold(2, patch, patch).unfold(3, patch, patch)
        for t, rows, cols in grid
    ]
    flat = [x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1) for x in patches]
    for picture, (frames, rows, cols) in zip(flat, grid, strict=True):
        # a margin that repeats, as pages have one: the last column of tokens is the one beside it
        raster = picture.view(frames, rows // vision.spatial_merge_size, cols // vision.spatial_merge_size, -1)
        raster[:, :, -1:] = raster[:, :, -2:-1]
    values = torch.cat(flat).repeat(1, vision.temporal_patch_size)
    layouts = [[family.packing(inner, modality, size).trace()] for size in grid]
    return {pixels[modality]: values, f"{modality}_grid_thw": torch.tensor(grid)}, layouts


def videos_of(
    family: Family, inner: nn.Module, count: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], int]:
    """The arguments that bring so many random videos, and how many tokens each becomes."""
    if not count:
        return {}, 0
    tile = side_of(family, inner)
    if family.packed:
        given, layouts = packed_pictures(family, inner, "video", [(FRAMES, tile, tile // 2)] * count, generator)
        return given, layouts[0][0].tokens
    pixels = random_pixels((count, FRAMES, 3, tile, tile), generator)
    return {"pixel_values_videos": pixels}, family.video_grid(inner, FRAMES).tokens


def pictures_of(
    family: Family, inner: nn.Module, sizes: Sequence[tuple[int, int]], generator: torch.Generator
) -> Pictures:
    """The arguments that bring random pictures of some sizes, and the layouts that each is made of: mostly one."""
    if not sizes:
        return {}, []
    if family.axes > 1:
        return packed_pictures(family, inner, "image", [(1, *size) for size in sizes], generator)
    if family.packed:
        return filled_up(family, inner, sizes, generator)
    if family.runs or family.listed:
        return tiled(family, inner, sizes, generator)
    given: dict[str, torch.Tensor] = {}
    known: Sequence[tuple[int, int]] = sizes
    if family.needs_sizes:
        given["image_sizes"] = torch.tensor(sizes)
        if "batch_num_images" in inspect.signature(inner.get_image_features).parameters:
            given["batch_num_images"] = torch.tensor([len(sizes)])
        known = family.sizes("image", given)
    views = (max(family.grid(inner, size)[0] for size in known),) if family.views else ()
    tile = side_of(family, inner)
    given["pixel_values"] = random_pixels((len(sizes), *views, 3, tile, tile), generator)
    return given, [[family.image_grid(inner, size)] for size in known]


def filled_up(
    family: Family, inner: nn.Module, sizes: Sequence[tuple[int, int]], generator: torch.Generator
) -> Pictures:
    """As `pictures_of`, for pictures of any size that are filled up to the largest."""
    most = [max(size[axis] for size in sizes) for axis in (0, 1)]
    pixels = random_pixels((len(sizes), 3, *most), generator)
    layouts = [[family.packing(inner, "image", size).trace()] for size in sizes]
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, layouts


def tiled(family: Family, inner: nn.Module, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> Pictures:
    """As `pictures_of`, for pictures that come as tiles: as many as lie in them, one at least."""
    tile = side_of(family, inner)
    tiles = [(height // tile) * (width // tile) or 1 for height, width in sizes]
    pixels = random_pixels((sum(tiles), 3, tile, tile), generator)
    if family.runs:
        return {"pixel_values": pixels}, [[family.packing(inner, "image", n).trace()] for n in tiles]
    return {"pixel_values": pixels[None]}, [[family.image_grid(inner, None)] * n for n in tiles]


def prompts_for(family: Family, model: nn.Module, videos: bool) -> list[dict[str, Any]]:
    """Three prompts that differ in all they can: two pictures (a video and one, with `videos`), one, and none."""
    tile = side_of(family, family.inner(model))
    wide, tall = (tile, 2 * tile), (2 * tile, tile - tile // 3)
    if videos:
        one = [] if family.alike else ["image", 9]
        first = make_prompt(family, model, [7, "video", 5, *one], [tall] if one else [], 1)
    else:
        first = make_prompt(family, model, [7, "image", 5, "image", 9], [wide, tall], 1)
    films = videos and family.alike  # a batch has pictures or videos
    return [
        first,
        make_prompt(family, model, ["video" if films else "image", 12], [] if films else [tall], 2),
        make_prompt(family, model, [11], [], 3),
    ]


def check_placeholders(family: Family, model: nn.Module) -> None:
    """Raise for a placeholder that the embeddings have no row for: no prompt with pictures could be made.

    Raises:
        ValueError: it names the token and the ways out.
    """
    inner, known = family.inner(model), model.get_input_embeddings().weight.shape[0]
    for modality in family.modalities:
        if not 0 <= (token := family.token(inner, modality)) < known:
            what = "an image" if modality == "image" else f"a {modality}"
            raise ValueError(
                f"the placeholder of {what} is token {token}, and the model has embeddings for 0 to {known - 1}: "
                f"set config.{modality}_token_id to the one that the processor writes, or, where that is it, make room "
                f"for it with model.resize_token_embeddings({token + 1})."
            )


def check_rotary(language_model: nn.Module, prompts: Sequence[dict[str, Any]]) -> None:
    """Raise where the prompts reach positions at which rotary embeddings depend on what was read before.

    Dynamic NTK and longrope take other frequencies for a longer text, while the keys in the cache keep theirs: the
    unpruned model computes something else with a cache than without, and cannot be a reference.

    Raises:
        UnsupportedError: it names the kind and the limit.
    """
    rotary, config = language_model.rotary_emb, language_model.config
    given = getattr(rotary, "rope_type", None)
    kinds = given.values() if isinstance(given, dict) else [given]
    settings = getattr(config, "rope_parameters", None) or {}
    limit = settings.get("original_max_position_embeddings") or config.max_position_embeddings
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts) + ROOM
    if (changing := {"dynamic", "longrope"}.intersection(kinds)) and longest > limit:
        raise UnsupportedError(
            f"this language model has rotary embeddings of rope_type {changing.pop()!r}, whose frequencies change "
            f"behind position {limit}: unpruned, it computes something else with a cache than without, so there is "
            f"nothing to compare with, and the prompts of this check take {longest} positions. What pruning does "
            "to layers and cache does not depend on it: load the model with rope_type 'default' in "
            "config.text_config.rope_parameters and check that."
        )


def batch(prompts: Sequence[dict[str, Any]], side: str) -> dict[str, Any]:
    """Single prompts as one batch, padded on the left or right side; views are padded as processors pad them."""
    if "image_sizes" in prompts[0] and prompts[0]["pixel_values"].ndim == 4:
        prompts = equal_sizes(prompts)
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    rows = [padded_prompt(prompt, width, side) for prompt in prompts]
    names = dict.fromkeys(chain(*rows))
    return {name: joined(name, [row[name] for row in rows if name in row]) for name in names}


def padded_prompt(prompt: dict[str, Any], width: int, side: str) -> dict[str, Any]:
    """A prompt with all that has an entry per token at a width."""
    # padding is hidden: any token will do, and the last one of the row is no placeholder
    fills = {"input_ids": int(prompt["input_ids"][0, -1]), "attention_mask": 0} | dict.fromkeys(SAID, 0)
    return {name: padded(x, width, side, fills[name]) if name in fills else x for name, x in prompt.items()}


def joined(name: str, values: list[torch.Tensor]) -> torch.Tensor:
    """What several prompts say under one name, one after the other."""
    return torch.cat(equal_views(values) if name == "pixel_values" else values)


def padded(row: torch.Tensor, width: int, side: str, value: int) -> torch.Tensor:
    """`(1, length)` at a width."""
    fill = width - row.shape[1]
    return torch.nn.functional.pad(row, (fill, 0) if side == "left" else (0, fill), value=value)


def equal_sizes(prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts whose pixels, of pictures of any size, are filled up to the largest height and width."""
    shown = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
    height, width = (max(pixels.shape[axis] for pixels in shown) for axis in (-2, -1))

    def filled(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    return [
        prompt | {"pixel_values": filled(prompt["pixel_values"])} if "pixel_values" in prompt else prompt
        for prompt in prompts
    ]


def equal_views(pixels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pixels of several prompts, with as many views of every image."""
    if pixels[0].ndim < 5:
        return pixels
    most = max(value.shape[1] for value in pixels)
    return [torch.nn.functional.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in pixels]
