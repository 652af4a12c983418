"""What a processor's chat template tells of the prompts that it makes."""

from __future__ import annotations

from typing import Any

__all__ = ["system_prefix"]


def system_prefix(processor: Any) -> int | None:
    """Tokens that a chat template puts in front of whatever a user says or shows first, the start token included.

    Two prompts that begin with different words agree up to there. How the template's last letters are cut into tokens
    can hang on what comes next, so a prompt that begins with a picture is asked too, and the longer prefix counts.

    Args:
        processor: with a `tokenizer`, and a `chat_template` that takes lists of parts.

    Returns:
        The number, or None if the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        return None
    one, other = ([{"type": "text", "text": word}] for word in ("what", "7"))
    said, else_said, shown = (written(processor, parts) for parts in (one, other, [{"type": "image"}, *one]))
    token = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None) or "<image>")
    return max(common(said, else_said), shown.index(token) if token in shown else 0)


def written(processor: Any, parts: list[dict[str, str]]) -> list[int]:
    """The token ids of a prompt with one user's turn; a picture's placeholder is not yet repeated."""
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    bos = getattr(processor.tokenizer, "bos_token", None)
    once = {"add_special_tokens": False} if bos and text.startswith(bos) else {}  # never twice
    return processor.tokenizer(text, **once)["input_ids"]


def common(a: list[int], b: list[int]) -> int:
    """How many entries two lists have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
