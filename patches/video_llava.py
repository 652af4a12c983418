"""Video-LLaVA: images as LLaVA-1.5, and videos whose frames each begin with the tower's [CLS] token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmprune.patches.base import Family

__all__ = ["VideoLlava"]


class VideoLlava(Family):
    """`VideoLlavaForConditionalGeneration`, with a tower for images and one for videos.

    The host drops [CLS] of images alone. Of a frame it is a token of its own kind, as newlines elsewhere are: no part
    of a budget, kept by `newlines="all"`, with a kept patch of its frame by "row", and not by "none".
    """

    model_type = "video_llava"
    title = "Video-LLaVA (VideoLlavaForConditionalGeneration)"
    modalities = ("image", "video")
    trunk = "image_tower"
    image = "a picture, or a video with all its frames"

    def towers(self, inner: nn.Module) -> list[nn.Module]:
        return [inner.image_tower, inner.video_tower]

    def items(self, inner: nn.Module, modality: str, features: Any, known: list[Any]) -> list[int]:
        parts = super().items(inner, modality, features, known)
        if modality == "image":
            return parts
        frames = known[0]  # of every video of a call
        return [sum(parts[at : at + frames]) for at in range(0, len(parts), frames)]

    def pack_video(self, inner: nn.Module, frames: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        return torch.cat((frames[:, :1] + 2 * newline, frames), 1).flatten(0, 1)
