"""Both halves of a CLIP model, which say how much a patch has to do with a text. Only what asks for one imports it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from vlmprune.errors import UnsupportedError

__all__ = ["Clip", "clip_for", "clip_from", "told_clip"]


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


def told_clip(name: str, given: Any) -> Any:
    """The rule of an option that says which: a folder or an id of the hub, a `Clip`, or None."""
    if not isinstance(given, str | Clip | None):
        raise ValueError(f"{name}={given!r} must be a folder, an id on the hub, or a vlmprune.parts.Clip.")
    return given


def clip_for(method: str, given: str | Clip | None, tower_from: str | None, question: Any) -> Clip:
    """The CLIP model that an option `clip` says, or else the one whose tower a model has (`ModelFacts.tower_from`).

    Raises:
        UnsupportedError: there is none, or no `question` marks whose text it is to read.
    """
    way_out = "or use relevance='embeddings', which needs none"
    if given is None and tower_from is None:
        raise UnsupportedError(
            f"{method} reads the question by the text half of the CLIP model whose tower the model has, and nothing "
            f"tells which that is: give clip= a folder or an id on the hub, {way_out}."
        )
    if question is None:
        raise UnsupportedError(
            f"{method} reads the question as text, which takes the model's tokenizer: give question= the processor "
            f"(the command and the evaluation do), {way_out}."
        )
    found = given or tower_from
    return clip_from(found) if isinstance(found, str) else found


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
