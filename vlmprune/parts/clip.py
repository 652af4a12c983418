"""Both halves of a CLIP model, which say how much a patch has to do with a text. Only what asks for one imports it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from vlmprune.errors import UnsupportedError

__all__ = ["Clip", "clip_from"]


class Clip:
    """A CLIP model and its tokenizer.

    Args:
        model: a `CLIPModel`: of its vision tower the last norm and the projection are used.
        tokenizer: of its text tower.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def texts(self, text: str, device: torch.device) -> torch.Tensor:
        """`(pieces, dim)` embeddings of a text, in pieces that the text tower takes."""
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        room = self.model.config.text_config.max_position_embeddings - 2
        pieces = [tokens[i : i + room] for i in range(0, len(tokens), room)] or [[]]
        made = []
        for piece in pieces:
            ids = [self.tokenizer.bos_token_id, *piece, self.tokenizer.eos_token_id]
            output = self.model.to(device).text_model(input_ids=torch.tensor([ids], device=device))
            made.append(self.model.text_projection(output.pooler_output))
        return torch.cat(made)

    @torch.no_grad()
    def patches(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` of the tower's features `(..., hidden)`.

        Raises:
            UnsupportedError: another tower's.
        """
        vision = self.model.config.vision_config.hidden_size
        if features.shape[-1] != vision:
            raise UnsupportedError(
                f"the CLIP model has a vision tower of {vision} numbers a patch, and this model's has "
                f"{features.shape[-1]}: give the checkpoint that its tower came from."
            )
        model = self.model.to(features.device)
        kind = model.visual_projection.weight.dtype
        return model.visual_projection(model.vision_model.post_layernorm(features.to(kind)))


@lru_cache(maxsize=2)
def clip_from(where: str) -> Clip:
    """Load a CLIP model from a folder or the hub.

    Raises:
        UnsupportedError: there is none.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        return Clip(CLIPModel.from_pretrained(where), AutoTokenizer.from_pretrained(where))
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"CLIP's text tower cannot be loaded from {where!r} ({told}): give clip= a folder or an id on the hub, or "
            "use relevance='embeddings', which needs none."
        ) from error
