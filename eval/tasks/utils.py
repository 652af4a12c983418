"""What the YAML files beside this one name; lmms-eval loads it by its path."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from PIL import Image

from vlmprune.eval.tasks import in_turns, is_absent
from vlmprune.eval.testbed.words import CAPTION, COLOUR_NAMES, DESCRIBE, VALUES


def only(category: str) -> Callable:
    """A `process_docs` that leaves the questions of one category."""

    def process_docs(dataset: Any) -> Any:
        return dataset.select([i for i, found in enumerate(dataset["category"]) if found == category])

    return process_docs


exist = only("exist")
colour = only("colour")
shape = only("shape")
where = only("where")
count = only("count")
digit = only("digit")
relation = only("relation")


def spread(dataset: Any) -> Any:
    """A `process_docs` that asks one question about every picture before a second one about any, categories in turns.

    Questions about one picture are not independent, and the shipped order begins with what is rarely possible.
    """
    return dataset.select(in_turns(dataset["picture_id"], dataset["category"]))


def absent(dataset: Any) -> Any:
    """A `process_docs` that leaves the questions about things that are not there."""
    pairs = zip(dataset["category"], dataset["answer"], strict=True)
    return dataset.select([i for i, pair in enumerate(pairs) if is_absent(*pair)])


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, as the embedded models were trained on it."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right is the exact answer, as in `testbed.scoring`."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}


def ask_caption(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """What asks for a short caption, whatever the picture."""
    return CAPTION


def ask_long_caption(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """What asks `scene-llava-long` for a long one."""
    return DESCRIBE


def named(text: str) -> set[tuple[str, str]]:
    """The things that a caption names: every colour with a shape or digit behind it."""
    said = text.split()
    return {pair for pair in itertools.pairwise(said) if pair[0] in COLOUR_NAMES and pair[1] in VALUES}


def score_caption(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`objects` is the F1 of the things named, once each; `made_up` the share of them that are not in the picture."""
    said, there = named(results[0]), named(doc["answer"])
    made_up = len(said - there) / len(said) if said else 0.0
    return {"objects": 2 * len(said & there) / (len(said) + len(there)), "made_up": made_up}
