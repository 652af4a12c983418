"""Three small models that were really trained, and a versioned test split: vlmprune's testbed.

They are made so that pruning methods can be compared in minutes on a CPU, without any download. They answer
questions about drawn scenes and nothing else; see `README.md` beside this file for what they are not.

    from vlmprune.eval import testbed
    model = AutoModelForImageTextToText.from_pretrained(testbed.path("scene-llava"), dtype=torch.float32)
    for record in testbed.questions("sparse"): ...
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmprune.embedded import EVERY, NAMES, path

__all__ = ["EVERY", "NAMES", "SPLITS", "VERSION", "Question", "path", "pictures", "questions"]

#: Version of the shipped test split; results of different versions must not be compared.
VERSION = "1"
#: The shipped splits. `next` is for scene-llava-next, `qwen` for scene-qwen, the others are for scene-llava.
SPLITS: tuple[str, ...] = ("sparse", "crowded", "unseen", "next", "qwen")

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """One question of a shipped split; `picture` is the encoded file (lossless WebP)."""

    id: str
    split: str
    category: str
    picture_id: str
    picture: bytes
    question: str
    answer: str

    @property
    def image(self) -> Image.Image:
        """The picture, decoded anew at every access."""
        return Image.open(io.BytesIO(self.picture)).convert("RGB")


def questions(split: str = "sparse") -> list[Question]:
    """The shipped questions of one split, in a fixed order.

    Args:
        split: one of `SPLITS`.

    Raises:
        ValueError: no such split; the message lists them.
        RuntimeError: the file on disk is of another version than this code.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    with zipfile.ZipFile(_HERE / "questions.zip") as archive:
        found = archive.read("VERSION").decode().strip()
        if found != VERSION:
            raise RuntimeError(f"questions.zip is version {found}, this code expects {VERSION}")
        lines = archive.read(f"{split}.jsonl").decode().splitlines()
        rows = [json.loads(line) for line in lines]
        pictures = {name: archive.read(f"{name}.webp") for name in {row["picture_id"] for row in rows}}
    return [Question(split=split, picture=pictures[row["picture_id"]], **row) for row in rows]


def pictures() -> list[dict]:
    """A few held-out pictures for demonstrations: dicts with `file` (Path), `model`, `question` and `answer`."""
    folder = _HERE / "pictures"
    return [row | {"file": folder / row["file"]} for row in json.loads((folder / "pictures.json").read_text())]
