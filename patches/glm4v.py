"""GLM-4.1V: as Qwen2-VL, with norms around every block, and videos whose frames stand as pictures do."""

from __future__ import annotations

import torch
from torch import nn

from vlmprune.patches.qwen2_vl import Qwen2VL

__all__ = ["Glm4v"]


class Glm4v(Qwen2VL):
    """`Glm4vForConditionalGeneration`. Text stands between the frames of a video.

    Their placeholder is that of pictures, and the host counts both together: a prompt has pictures or videos.
    """

    model_type = "glm4v"
    title = "GLM-4.1V (Glm4vForConditionalGeneration)"
    usual_tower = "glm4v_vision"
    stamped, alike = True, True
    sparse, bounds_pixels = False, False  # its processor counts a picture as two frames

    def token(self, inner: nn.Module, modality: str = "image") -> int:
        return inner.config.image_token_id

    def said_of(self, inner: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (ids == self.token(inner)).long()}  # of pictures
