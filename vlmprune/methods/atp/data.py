"""Questions to train ATP's modules on.

A user's data are a JSON list or JSON lines of objects with an image (a path, relative to the file unless a folder is
given), a question and an answer:

    {"image": "pictures/0001.png", "question": "What colour is the cat?", "answer": "black"}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["IGNORE", "Questions", "Row", "encode", "prompt_text"]

IGNORE = -100
Row = tuple[Any, str, str]  # PIL image, question, answer


class Questions(Sequence[Row]):
    """A user's questions, from a JSON or JSON lines file."""

    def __init__(self, file: str | Path, images: str | Path | None = None):
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file} (a JSON list or JSON lines of image, question, answer).")
        self.folder = Path(images) if images is not None else file.parent
        try:
            self.rows = json_rows(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is neither a JSON list nor JSON lines: {error}") from error
        check_rows(file, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        from PIL import Image

        row = self.rows[index]
        with Image.open(self.folder / row["image"]) as image:
            return image.convert("RGB"), str(row["question"]), str(row["answer"])


def check_rows(file: Path, rows: list[Any]) -> None:
    """Raise ValueError for a file without entries, or with one that lacks something."""
    if not rows:
        raise ValueError(f"{file} has no entries.")
    for number, row in enumerate(rows, 1):
        given = row if isinstance(row, dict) else {}
        if wrong := [key for key in ("image", "question", "answer") if not given.get(key)]:
            raise ValueError(f"{file}: entry {number} has no {wrong[0]!r}; each needs image, question and answer.")


def json_rows(text: str) -> list[Any]:
    """The entries of a JSON list, or of JSON lines."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def prompt_text(processor: Any, question: str, template: str | None) -> str:
    """The prompt of one question, by the model's chat template or one that holds <image> and {question}."""
    if template is not None:
        return template.replace("{question}", question).replace("<image>", processor.image_token)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            "this model's processor has no chat template: give one with <image> and {question}, such as "
            "'USER: <image>\\n{question} ASSISTANT:'."
        )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode(rows: Sequence[Row], processor: Any, template: str | None = None) -> dict[str, torch.Tensor]:
    """A left-padded batch with labels on the answers and the end-of-text token alone."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    prompts = [prompt_text(processor, question, template) for _, question, _ in rows]
    texts = [
        prompt + ("" if prompt[-1:].isspace() else " ") + answer + tokenizer.eos_token
        for prompt, (_, _, answer) in zip(prompts, rows, strict=True)
    ]
    inputs = dict(processor(text=texts, images=[row[0] for row in rows], padding=True, return_tensors="pt"))
    # the image token stands for itself in both, so the difference is the answer's
    answers = [len(tokenizer(t).input_ids) - len(tokenizer(p).input_ids) for t, p in zip(texts, prompts, strict=True)]
    left = torch.arange(inputs["input_ids"].shape[1]).flip(0)
    inputs["labels"] = torch.where(left < torch.tensor(answers)[:, None], inputs["input_ids"], IGNORE)
    return inputs
