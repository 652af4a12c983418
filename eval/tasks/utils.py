"""What the YAML files beside this one name; lmms-eval loads it by its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image


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


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, as the embedded models were trained on it."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right is the exact answer, as in `testbed.scoring`."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
