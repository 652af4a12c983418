"""Write scripts/first_patch.ipynb from docs/tutorials/first-patch.md: its text and code as cells, in order."""

from __future__ import annotations

import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "first-patch.md"
NOTEBOOK = Path(__file__).parent / "first_patch.ipynb"
SITE = "https://github.com/vlmprune/vlmprune/blob/main/docs/tutorials/"


def cell(kind: str, text: str, number: int) -> dict:
    """One cell."""
    about = {"execution_count": None, "outputs": []} if kind == "code" else {}
    lines = text.strip().splitlines(keepends=True)
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines, **about}


def made() -> str:
    """The notebook as text."""
    parts = re.split(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    absolute = [re.sub(r"\]\((?!http)([^)]+)\)", rf"]({SITE}\1)", part) for part in parts[::2]]
    texts = [text for pair in zip(absolute, [*parts[1::2], ""], strict=True) for text in pair]
    kinds = ["markdown", "code"] * len(absolute)
    cells = [cell(kind, text, i) for i, (kind, text) in enumerate(zip(kinds, texts, strict=True)) if text.strip()]
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    found = {"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(made(), encoding="utf-8")
