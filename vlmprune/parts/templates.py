"""What a processor's chat template tells of the prompts that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmprune.parts.options import is_whole

__all__ = ["QuestionMarks", "image_token", "question_of", "started_once", "system_prefix", "told_question"]
__all__ += ["told_system"]


@dataclass(frozen=True, eq=False)
class QuestionMarks:
    """How a question is told from the rest of a prompt: what a chat template writes around a user's words.

    Attributes:
        opens: ids in front of what a user says or shows in any turn.
        closes: ids behind it, up to where the answer begins.
        silent: ids of tokens without a letter or digit, special ones included.
        tokenizer: which turns ids into text.
    """

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    silent: tuple[int, ...]
    tokenizer: Any = field(repr=False)

    def words(self, words: Sequence[str]) -> tuple[int, ...]:
        """The ids of words that are one token, in a sentence or at its beginning, with a capital or without."""
        silent, found = set(self.silent), set()
        for word in words:
            for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
                ids = [i for i in self.ids(text) if i not in silent]
                found |= set(ids) if len(ids) == 1 else set()
        return tuple(sorted(found))

    def sentence(self, text: str) -> tuple[int, ...]:
        """The ids of a sentence without those that hang on what stands in front of it."""
        return tuple(self.ids(text)[1:])

    def ids(self, text: str) -> list[int]:
        """Of a text as it is."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """What ids say."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def question_of(processor: Any) -> QuestionMarks | None:
    """How a model's processor marks questions, or None if it has no chat template."""
    if not getattr(processor, "chat_template", None):
        return None
    said = [written(processor, [{"type": "text", "text": word}]) for word in ("what", "7")]
    before, behind = common(*said), common(*(ids[::-1] for ids in said))
    opens = said[0][:before]
    later = [written(processor, [{"type": "text", "text": word}], later=True) for word in ("what", "7")]
    if None not in later:  # what stands in front of every user's turn, not of the first one alone
        opens = opens[len(opens) - common(opens[::-1], later[0][: common(*later)][::-1]) :] or opens
    tokenizer = processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    silent = {i for i, token in enumerate(tokens) if not any(c.isalnum() for c in (token or "").strip("\u2581\u0120"))}
    silent |= set(tokenizer.all_special_ids)
    return QuestionMarks(tuple(opens), tuple(said[0][len(said[0]) - behind :]), tuple(sorted(silent)), tokenizer)


def told_question(name: str, given: Any) -> QuestionMarks:
    """The rule of an option that says how questions are marked: a `QuestionMarks`, or a processor.

    Raises:
        ValueError: neither.
    """
    if isinstance(given, QuestionMarks):
        return given
    if not hasattr(given, "apply_chat_template"):
        raise ValueError(
            f"{name}={given!r} must be a processor, whose chat template marks the question, or None for all text "
            "behind the last picture."
        )
    if (told := question_of(given)) is None:
        raise ValueError(f"{name}: {type(given).__name__} has no chat template that marks a question: give none.")
    return told


def told_system(name: str, given: Any) -> int:
    """The rule of an option that says how long the system prefix is: a number, or a processor, which is asked.

    Raises:
        ValueError: neither.
    """
    if not hasattr(given, "apply_chat_template"):
        if is_whole(given):
            return given
        raise ValueError(
            f"{name}={given!r} must be a number of tokens of at least 0, a processor whose chat template tells it, or "
            "None for all that stands in front of the first image."
        )
    if (length := system_prefix(given)) is None:
        raise ValueError(f"{type(given).__name__} has no chat template that tells the system prefix: give a number.")
    return length


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
    token = processor.tokenizer.convert_tokens_to_ids(image_token(processor))
    return max(common(said, else_said), shown.index(token) if token in shown else 0)


def written(processor: Any, parts: list[dict[str, str]], later: bool = False) -> list[int] | None:
    """The token ids of a prompt with one user's turn; a picture's placeholder is not yet repeated.

    `later` puts a turn and its answer in front; None then means a template that takes no answers.
    """
    turns = [{"role": "user", "content": parts}]
    if later:
        turns = [{"role": role, "content": [{"type": "text", "text": "yes"}]} for role in ("user", "assistant")] + turns
    from jinja2 import TemplateError  # what chat templates are written in

    try:
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    except (TemplateError, ValueError):
        if not later:
            raise
        return None
    return processor.tokenizer(text, **started_once(processor, text))["input_ids"]


def image_token(processor: Any) -> str:
    """The placeholder of a picture in a prompt's text."""
    return getattr(processor, "image_token", None) or "<image>"


def started_once(processor: Any, text: str) -> dict[str, bool]:
    """Arguments of a tokenizer: where a template writes the first token itself, there must be no second one."""
    bos = getattr(processor.tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def common(a: list[int], b: list[int]) -> int:
    """How many entries two lists have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
