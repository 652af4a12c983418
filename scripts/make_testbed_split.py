"""Writes the testbed's shipped test split (questions.zip) and its demonstration pictures (pictures/).

python scripts/make_testbed_split.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from testbed import asking, scenes, split

from vlmprune.eval import testbed

#: Held-out scenes that look good: (file, model, seed, objects, (width, height), category of the question).
DEMO = (
    ("scene1.png", "scene-llava", 1, 3, (128, 128), "where"),
    ("scene2.png", "scene-llava", 2, 4, (128, 128), "relation"),
    ("scene3.png", "scene-llava", 3, 3, (128, 128), "digit"),
    ("scene4.png", "scene-llava", 44, 4, (128, 128), "count"),
    ("wide1.png", "scene-llava-next", 5, 4, (256, 128), "digit"),
    ("wide2.png", "scene-llava-next", 6, 4, (256, 128), "shape"),
    ("tall.png", "scene-qwen", 7, 4, (112, 224), "colour"),
    ("flat.png", "scene-qwen", 8, 3, (243, 101), "where"),
)


def write_demo(folder: Path) -> None:
    """Draws the demonstration pictures and their index, `pictures.json`."""
    folder.mkdir(exist_ok=True)
    rows = []
    for file, model, seed, count, (width, height), category in DEMO:
        size = (12, 17) if model == "scene-llava-next" else (19, 24)
        look = {"size": size, "width": width, "height": height, "lit": model == "scene-qwen"}
        look |= {"digits": 0.0} if model == "scene-qwen" else {}
        asked, attempt = None, 0
        while asked is None:  # not every scene allows every category
            rng = np.random.default_rng(scenes.TEST_SEED + 5_000_000 + 1000 * attempt + seed)
            scene = scenes.quadrant_scene(rng, count=count, test=True, **look)
            asked, attempt = asking.ASK[category](rng, scene), attempt + 1
        scene.image().save(folder / file, optimize=True)
        rows.append({"file": file, "model": model, "question": asked[0], "answer": asked[1]})
    (folder / "pictures.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Writes the archive and the pictures; prints how many questions each split has of each category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(testbed.__file__).parent)
    parser.add_argument("--demo-only", action="store_true", help="leave questions.zip as it is")
    args = parser.parse_args()
    write_demo(args.out / "pictures")
    if args.demo_only:
        return
    counts = split.write(args.out / "questions.zip", testbed.VERSION)
    for name in split.SIZES:
        mine = {category: n for (s, category), n in counts.items() if s == name}
        print(name, sum(mine.values()), json.dumps(mine))


if __name__ == "__main__":
    main()
