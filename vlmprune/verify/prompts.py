"""Prompts of random text and random pictures: a model is all that is needed, no processor and no file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.patches import Family

__all__ = ["batch", "check_placeholders", "check_rotary", "make_prompt", "prompts_for", "random_pixels", "random_text"]
__all__ += ["TYPES", "tile_of"]

FRAMES = 2  # of a video
PACKED = 6  # tokens along the side of a picture where towers take any
TYPES = "mm_token_type_ids"  # 1 for tokens of images, 2 for those of videos
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


def tile_of(family: Family, inner: nn.Module) -> int:
    """Pixels along the side of a square picture that a model reads as it is."""
    vision = inner.config.vision_config
    if family.packed:
        return PACKED * vision.patch_size * vision.spatial_merge_size
    return vision.image_size


def make_prompt(
    family: Family, model: nn.Module, parts: Sequence[int | str], sizes: Sequence[tuple[int, int]], seed: int
) -> dict[str, Any]:
    """The arguments of one call of `model`.

    Args:
        parts: numbers of text tokens, "image" (the next of `sizes`) and "video".
        sizes: (height, width) of the pictures in pixels.
    """
    inner, generator = family.inner(model), torch.Generator().manual_seed(seed)
    pictures, images = pictures_of(family, inner, sizes, generator) if sizes else ({}, [])
    videos = sum(part == "video" for part in parts)
    clips, frames = videos_of(family, inner, videos, generator) if videos else ({}, [])
    features, ids = {"image": iter(images), "video": iter(frames)}, []
    for part in parts:
        if isinstance(part, int):
            ids.append(random_text(family, inner, (part,), generator))
            continue
        shown = torch.full((next(features[part]),), family.token(inner, part))
        if part == "video" and family.stamped:
            for frame in shown.chunk(FRAMES):
                ids += [random_text(family, inner, (2,), generator), frame]
        else:
            ids.append(shown)
    tokens = torch.cat(ids)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | pictures | clips
    if family.axes > 1:
        inputs[TYPES] = sum(n * (tokens == family.token(inner, m)) for n, m in enumerate(family.modalities, 1))
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def pictures_of(
    family: Family, inner: nn.Module, sizes: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The arguments that bring random pictures of some sizes, and how many tokens each becomes."""
    if family.packed:
        clips = [random_pixels((1, 3, *whole_cells(inner, size)), generator) for size in sizes]
        return packed_of(family, inner, "image", clips)
    given, tile = {"image_sizes": torch.tensor(sizes)}, inner.config.vision_config.image_size
    if "batch_num_images" in family_arguments(inner):
        given["batch_num_images"] = torch.tensor([len(sizes)])
    known = family.sizes("image", given) if family.needs_sizes else list(sizes)
    views = max(family.grid(inner, size)[0] for size in known)
    pixels = random_pixels((len(sizes), *((views,) if family.views else ()), 3, tile, tile), generator)
    inputs = {"pixel_values": pixels} | (given if family.needs_sizes else {})
    return inputs, [family.image_grid(inner, size).tokens for size in known]


def videos_of(
    family: Family, inner: nn.Module, videos: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The same for videos of `FRAMES` frames that the language model is shown."""
    tile = tile_of(family, inner)
    if family.packed:
        frames = FRAMES * inner.config.vision_config.temporal_patch_size
        clips = [random_pixels((frames, 3, tile // 2, tile), generator) for _ in range(videos)]
        return packed_of(family, inner, "video", clips)
    pixels = random_pixels((videos, FRAMES, 3, tile, tile), generator)
    return {"pixel_values_videos": pixels}, [family.video_grid(inner, FRAMES).tokens] * videos


def packed_of(
    family: Family, inner: nn.Module, modality: str, clips: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The same from pixels, where the tower reads pictures of any size as one sequence."""
    given = family.given(inner, modality, clips)
    return given, [family.packing(inner, modality, size).trace().tokens for size in family.sizes(modality, given)]


def whole_cells(inner: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels, at least one token each, that the model's tokens cover."""
    vision = inner.config.vision_config
    cell = vision.patch_size * vision.spatial_merge_size
    height, width = (max(1, round(side / cell)) * cell for side in size)
    return height, width


def family_arguments(inner: nn.Module) -> list[str]:
    """Names that the model's image encoder takes."""
    import inspect

    return list(inspect.signature(inner.get_image_features).parameters)


def prompts_for(family: Family, model: nn.Module, videos: bool) -> list[dict[str, Any]]:
    """Three prompts that differ in all they can: two pictures (a video and one, with `videos`), one, and none."""
    tile = tile_of(family, family.inner(model))
    wide, tall = (tile, 2 * tile), (2 * tile, tile - tile // 3)
    if videos:
        first = make_prompt(family, model, [7, "video", 5, "image", 9], [tall], 1)
    else:
        first = make_prompt(family, model, [7, "image", 5, "image", 9], [wide, tall], 1)
    return [
        first,
        make_prompt(family, model, ["image", 12], [tall], 2),
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
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    # padding is hidden: any token will do, and the last one of the row is no placeholder
    ids = [padded(prompt["input_ids"], width, side, int(prompt["input_ids"][0, -1])) for prompt in prompts]
    masks = [padded(prompt["attention_mask"], width, side, 0) for prompt in prompts]
    out = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    if TYPES in prompts[0]:
        out[TYPES] = torch.cat([padded(prompt[TYPES], width, side, 0) for prompt in prompts])
    for name in [name for name in dict.fromkeys(chain(*prompts)) if name not in out]:
        values = [prompt[name] for prompt in prompts if name in prompt]
        out[name] = torch.cat(equal_views(values) if name == "pixel_values" else values)
    return out


def padded(row: torch.Tensor, width: int, side: str, value: int) -> torch.Tensor:
    """`(1, length)` at a width."""
    fill = width - row.shape[1]
    return torch.nn.functional.pad(row, (fill, 0) if side == "left" else (0, fill), value=value)


def equal_views(pixels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pixels of several prompts, with as many views of every image."""
    if pixels[0].ndim < 5:
        return pixels
    most = max(value.shape[1] for value in pixels)
    return [torch.nn.functional.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in pixels]
