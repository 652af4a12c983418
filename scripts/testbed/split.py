"""Makes the shipped test split. Deterministic: the same code gives the same questions and the same pixels."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlmprune.eval.testbed.words import CATEGORIES

from .asking import ASK
from .scenes import TEST_SEED, TILE, Scene, crowded_scene, quadrant_scene

#: Split: number of pictures, questions a picture, first seed.
SIZES: dict[str, tuple[int, int, int]] = {
    "sparse": (200, 6, TEST_SEED),
    "crowded": (60, 6, TEST_SEED + 1_000_000),
    "unseen": (60, 5, TEST_SEED + 2_000_000),
    "next": (90, 6, TEST_SEED + 3_000_000),
    "qwen": (90, 6, TEST_SEED + 4_000_000),
}
#: Sizes of the pictures of `next`, as (width, height), cycled through.
NEXT_SIZES = [(2 * TILE, TILE), (TILE, 2 * TILE)] * 4 + [(2 * TILE, 2 * TILE)]
#: Those of `qwen`: squares, wide and tall ones, of sides that the window divides or not, and two that are resized.
QWEN_SIZES = [(160, 160), (224, 112), (112, 224), (176, 144), (128, 208), (150, 170), (256, 96), (192, 128), (101, 243)]


def test_scene(split: str, seed: int) -> Scene:
    """The scene of one test picture: held-out seeds and held-out handwriting."""
    rng = np.random.default_rng(seed)
    if split == "crowded":
        return crowded_scene(rng, test=True)
    if split == "next":
        width, height = NEXT_SIZES[seed % len(NEXT_SIZES)]
        return quadrant_scene(rng, size=(11, 17), width=width, height=height, test=True)
    if split == "qwen":
        width, height = QWEN_SIZES[seed % len(QWEN_SIZES)]
        return quadrant_scene(rng, size=(18, 26), width=width, height=height, test=True, lit=True, digits=0.0)
    return quadrant_scene(rng, test=True, unseen=split == "unseen")


def rows(split: str) -> Iterator[tuple[Scene, list[dict]]]:
    """Scenes and their questions, categories and answers kept in balance as they are drawn."""
    number, each, first = SIZES[split]
    unseen = split == "unseen"
    categories: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    for p in range(number):
        seed = first + p
        scene = test_scene(split, seed)
        rng = np.random.default_rng(seed + 500_000_000)
        found: list[dict] = []
        for category in sorted(CATEGORIES, key=lambda c: (categories[c], CATEGORIES.index(c))):
            drawn = [ASK[category](rng, scene, unseen) for _ in range(12)]
            options = sorted({qa for qa in drawn if qa})
            if not options or len(found) == each:
                continue
            question, answer = min(options, key=lambda qa: answers[category, qa[1]])
            categories[category] += 1
            answers[category, answer] += 1
            found.append({"category": category, "question": question, "answer": answer})
        name = f"{split}-{p:04d}"
        yield scene, [{"id": f"{name}-{i}", "picture_id": name, **row} for i, row in enumerate(found)]


def write(target: Path, version: str) -> Counter:
    """Writes questions.zip: VERSION, one .jsonl a split, one lossless .webp a picture. Returns counts."""
    counts: Counter = Counter()
    stamp = (2024, 1, 1, 0, 0, 0)  # a fixed date keeps the archive byte-identical
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("VERSION", stamp), version + "\n")
        for split in SIZES:
            lines = []
            for scene, found in rows(split):
                buffer = io.BytesIO()
                scene.image().save(buffer, "WEBP", lossless=True, method=6, exact=True)
                archive.writestr(zipfile.ZipInfo(found[0]["picture_id"] + ".webp", stamp), buffer.getvalue())
                lines += [json.dumps(row) for row in found]
                counts.update((split, row["category"]) for row in found)
            archive.writestr(zipfile.ZipInfo(f"{split}.jsonl", stamp), "\n".join(lines) + "\n")
    return counts
