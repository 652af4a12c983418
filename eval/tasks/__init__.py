"""The embedded models' questions as ordinary lmms-eval tasks: a group for each split, a task for each category, and
two across them: GROUP_mixed has all questions of a split, one about every picture first and categories in turns, and
GROUP_absent those about things that are not there. Two more ask for captions.

    lmms-eval eval --model vlmprune --model_args pretrained=scene-llava,method=fopru,keep=26 \\
        --include_path "$(python -c 'from vlmprune.eval import tasks; print(tasks.path())')" \\
        --tasks vlmprune_scene_llava

Any lmms-eval model can be asked. Written by `scripts/make_testbed_tasks.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlmprune.eval import testbed
from vlmprune.eval.testbed.words import CATEGORIES

__all__ = ["CAPTIONS", "GROUPS", "absent", "in_turns", "is_absent", "mixed", "names", "path"]

#: Tasks that ask for captions, short and long ones, of pictures with three or four objects; scored by objects named.
CAPTIONS: tuple[str, ...] = ("vlmprune_scene_llava_caption", "vlmprune_scene_llava_long")

#: The group of every split of `testbed.SPLITS`; its tasks have the category's name appended.
GROUPS: dict[str, str] = {
    "sparse": "vlmprune_scene_llava",
    "crowded": "vlmprune_scene_llava_crowded",
    "unseen": "vlmprune_scene_llava_unseen",
    "next": "vlmprune_scene_llava_next",
    "qwen": "vlmprune_scene_qwen",
}


def path() -> str:
    """The folder for `--include_path`, and for `TaskManager(include_path=...)`."""
    return str(Path(__file__).resolve().parent)


def in_turns(pictures: Sequence[str], categories: Sequence[str]) -> list[int]:
    """An order of questions in which the first so many are about as many pictures, and as many of every category.

    One question is asked about every picture before a second one about any, and of a picture's questions the one whose
    category was asked least so far. Which category begins moves on with every round of them, lest one of them should
    always meet the same of what recurs among the pictures (their sizes, say).

    Args:
        pictures: the picture of every question; pictures keep the order in which they first come.
        categories: its category, one of `CATEGORIES`.

    Returns:
        Places of all questions.
    """
    left: dict[str, list[int]] = {}
    for place, picture in enumerate(pictures):
        left.setdefault(picture, []).append(place)
    order: list[int] = []
    asked = Counter[str]()

    def turn(place: int) -> tuple[int, int]:
        times = asked[categories[place]]
        return times, (CATEGORIES.index(categories[place]) + times) % len(CATEGORIES)

    while len(order) < len(categories):
        for mine in filter(None, left.values()):
            mine.remove(place := min(mine, key=turn))
            asked[categories[place]] += 1
            order.append(place)
    return order


def mixed(split: str) -> list[testbed.Question]:
    """A split's questions in the order in which its mixed task asks them (`in_turns`).

    Raises:
        ValueError: no such split; the message lists them.
    """
    found = testbed.questions(split)
    order = in_turns([record.picture_id for record in found], [record.category for record in found])
    return [found[place] for place in order]


def is_absent(category: str, answer: str) -> bool:
    """Whether a question asks if there is a thing, and there is none."""
    return (category, answer) == ("exist", "no")


def absent(split: str) -> list[testbed.Question]:
    """A split's questions about things that are not there, as its absent task asks them; `unseen` has none.

    Raises:
        ValueError: no such split; the message lists them.
    """
    return [record for record in testbed.questions(split) if is_absent(record.category, record.answer)]


def names(split: str) -> list[str]:
    """The tasks of a split's group, in the order of the categories.

    Raises:
        ValueError: no such split; the message lists them.
    """
    present = {record.category for record in testbed.questions(split)}
    return [f"{GROUPS[split]}_{category}" for category in CATEGORIES if category in present]
