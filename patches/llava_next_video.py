"""LLaVA-NeXT-Video: images as LLaVA-NeXT packs them, and videos of pooled frames without newlines."""

from __future__ import annotations

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.patches.llava_next import LlavaNext

__all__ = ["LlavaNextVideo"]


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`."""

    model_type = "llava_next_video"
    title = "LLaVA-NeXT-Video (LlavaNextVideoForConditionalGeneration)"
    modalities = ("image", "video")
    shrinks = ("video",)

    def pack_video(self, inner: nn.Module, frames: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        if (mode := inner.config.spatial_pool_mode) != "average":
            raise UnsupportedError(f"spatial_pool_mode={mode!r} is not supported for videos; supported: 'average'.")
        return inner.vision_resampler(frames).flatten(0, 1)
