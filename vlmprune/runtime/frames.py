"""Preparing frames of videos as pictures, by Pillow, where a family's own video processor cannot be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmprune.runtime.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FramesAsPictures"]

#: Types of models whose bounds of pixels are of all frames of a video together.
WHOLE = ("qwen3_vl", "qwen3_vl_moe", "glm4v")
#: What a plain image processor is told of a video processor's settings.
PLAIN = ("do_resize", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb")
#: What an image processor is told of them, and of how packed towers read.
LIKE = ("image_mean", "image_std", "resample")
PACKED = ("patch_size", "merge_size", "temporal_patch_size")


def size_in(fields: Mapping[str, Any]) -> Any:
    """How large frames are, by a video processor's settings.

    Raises:
        UserError: they do not say it, or bound frames in another way.
    """
    low, high = fields.get("min_pixels"), fields.get("max_pixels")
    size = fields.get("size") or ({"shortest_edge": low, "longest_edge": high} if low and high else None)
    if not size:
        raise UserError("the model's files do not say how large its video processor makes frames.")
    if fields.get("cap_pixels_per_frame"):
        raise UserError("its video processor caps the pixels of frames (cap_pixels_per_frame).")
    return size


class FramesAsPictures:
    """Stands where a processor has its part for videos, which needs torchvision.

    Frames go one by one through an image processor of transformers, with the settings of the video processor. What
    comes out is its but for rounding: Pillow scales eight-bit pictures, torchvision tensors.

    Args:
        fields: the settings, of the model's files.
        image_processor: the model's, for what these leave out.
        model_type: of the model.

    Raises:
        UserError: settings that do not say how large frames are, or bound them in another way.
    """

    def __init__(self, fields: Mapping[str, Any], image_processor: Any, model_type: str):
        from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

        told = {name: fields.get(name, getattr(image_processor, name, None)) for name in (*LIKE, *PACKED)}
        self.size = size_in(fields)
        self.patch_size, self.merge_size = told["patch_size"], told["merge_size"]
        self.packed = self.merge_size is not None
        self.whole = model_type in WHOLE
        self.temporal_patch_size = told["temporal_patch_size"] or 1
        same = {name: told[name] for name in LIKE if told[name] is not None}
        if self.packed:
            # of one frame at a time: pairs of them are made here
            same |= {"patch_size": self.patch_size, "merge_size": self.merge_size, "temporal_patch_size": 1}
            self.pictures = Qwen2VLImageProcessorPil(size=self.size, **same)
        else:
            given = {name: fields[name] for name in PLAIN if fields.get(name) is not None}
            plain = {"do_center_crop": False, "default_to_square": False} | given
            self.pictures = CLIPImageProcessorPil(size=self.size, **same, **plain)

    def __call__(self, videos: Sequence[Sequence[Image.Image]], **asked: Any) -> dict[str, Any]:
        """Prepare videos.

        Args:
            videos: frames of each.
            asked: `video_metadata`, which comes back, and whatever else a video processor takes.

        Returns:
            `pixel_values_videos` `(videos, frames, 3, height, width)`, or `(patches of all, values)` float32 and
            `video_grid_thw` `(videos, 3)` long; and `video_metadata`.
        """
        only = {name: asked[name] for name in ("do_rescale", "do_normalize") if name in asked}
        made = [self.packed_frames(frames, only) if self.packed else self.plain(frames, only) for frames in videos]
        found: dict[str, Any] = {"video_metadata": [metadata_of(told) for told in asked.get("video_metadata") or ()]}
        if not self.packed:
            return found | {"pixel_values_videos": torch.stack(made)}
        rows, grids = zip(*made, strict=True)
        return found | {"pixel_values_videos": torch.cat(rows), "video_grid_thw": torch.tensor(grids)}

    def plain(self, frames: Sequence[Image.Image], only: dict[str, Any]) -> torch.Tensor:
        """`(frames, 3, height, width)`."""
        return self.pictures(list(frames), return_tensors="pt", **only)["pixel_values"]

    def packed_frames(self, frames: Sequence[Image.Image], only: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
        """`(patches, values)`, and how many frames of tokens, rows and columns of patches there are."""
        together = self.temporal_patch_size
        frames = [*frames, *[frames[-1]] * (-len(frames) % together)]
        share = len(frames) if self.whole else 1  # the bounds are of all frames, or of each
        size = {name: edge // share for name, edge in dict(self.size).items()}
        made = self.pictures(frames, size=size, return_tensors="np", **only)
        _, rows, cols = (int(n) for n in made["image_grid_thw"][0])
        values = np.asarray(made["pixel_values"]).reshape(-1, together, rows * cols, 3, self.patch_size**2)
        # a patch's values are colour by colour, and of every colour frame by frame
        flat = values.transpose(0, 2, 3, 1, 4).reshape(-1, 3 * together * self.patch_size**2)
        return torch.from_numpy(np.ascontiguousarray(flat)), [len(values), rows, cols]


def metadata_of(told: Any) -> Any:
    """What processors know of a video, by transformers' own class."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(**told) if isinstance(told, dict) else told
