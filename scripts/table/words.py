"""How names, shares and tables are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from table_results import NATIVE

from .lines import Line, Model

RIVALS = {"scene-qwen": "fewer pixels", "scene-llava-next": "one crop"}


def name_of(line: Line, model: Model) -> str:
    """What tables call a line."""
    return RIVALS[model.name] if line.label == NATIVE else f"`{line.label}`"


def percent(share: float) -> str:
    """`5 %`."""
    return f"{100 * share:.0f} %"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are flush left."""
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def budget_name(budget: float | None) -> str:
    """What headings call a budget."""
    return "own budget" if budget is None else percent(budget)


def title(model: Model, budget: float) -> str:
    """What a row about a model at a budget is called."""
    return f"{model.name}, {percent(budget)}"
