"""The embedded models' questions as ordinary lmms-eval tasks: a group for each split, a task for each category, and
one, GROUP_mixed, with all questions of a split, one about every picture first. Two more ask for captions.

    lmms-eval eval --model vlmprune --model_args pretrained=scene-llava,method=fopru,keep=26 \\
        --include_path "$(python -c 'from vlmprune.eval import tasks; print(tasks.path())')" \\
        --tasks vlmprune_scene_llava

Any lmms-eval model can be asked. Written by `scripts/make_testbed_tasks.py`.
"""

from __future__ import annotations

from pathlib import Path

from vlmprune.eval import testbed
from vlmprune.eval.testbed.words import CATEGORIES

__all__ = ["CAPTIONS", "GROUPS", "mixed", "path"]

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


def mixed(split: str) -> list[testbed.Question]:
    """A split's questions in the order in which its mixed task asks them.

    Raises:
        ValueError: no such split; the message lists them.
    """
    return sorted(testbed.questions(split), key=lambda record: int(record.id.rpartition("-")[2]))


def names(split: str) -> list[str]:
    """The tasks of a split's group, in the order of the categories.

    Raises:
        ValueError: no such split; the message lists them.
    """
    present = {record.category for record in testbed.questions(split)}
    return [f"{GROUPS[split]}_{category}" for category in CATEGORIES if category in present]
