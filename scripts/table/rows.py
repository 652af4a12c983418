"""All rows, the task with long answers, and what was not asked."""

from __future__ import annotations

from dataclasses import fields

from table_results import NATIVE

from vlmprune import registry
from vlmprune.methods.base import LOOKS_AT

from .lines import BUDGETS, Line, Model, Table
from .words import listed, markdown, name_of, percent

GROUPS = {**LOOKS_AT, "nothing": "nothing (controls)"}
#: Where positions lie on three axes (M-RoPE), none is renumbered.
THREE_AXES = ("scene-qwen",)


def overview(model: Model) -> str:
    """Accuracy of every method at every budget."""
    order = sorted(
        {(list(GROUPS).index(line.group), line.label) for line in model.lines if line is not model.full and line.budget}
    )
    rows = []
    for place, label in order:
        mine = {line.budget: line for line in model.lines if line.label == label}
        scores = [score_of(mine[budget]) if budget in mine else "" for budget in BUDGETS]
        one = next(iter(mine.values()))
        rows.append([name_of(one, model), GROUPS[list(GROUPS)[place]], positions(one, model), *scores])
    return markdown(["method", "looks at", "positions", *map(percent, BUDGETS)], rows, 3)


def positions(line: Line, model: Model) -> str:
    """What becomes of the positions of the tokens that stay."""
    if line.label == NATIVE or "positions" not in registry.options(registry.find(line.method)):
        return ""
    own = next(field for field in fields(registry.find(line.method)) if field.name == "positions").default
    return "kept" if own == "original" or (own is None and model.name in THREE_AXES) else "renumbered"


def score_of(line: Line) -> str:
    """A score, with arrows where it is certain against random."""
    against = line.against.get("random")
    return f"{line.score:.1f}{' ▲' if against and against.better else ' ▼' if against and against.worse else ''}"


def details(model: Model, budget: float | None) -> str:
    """All there is about the lines of a budget."""
    splits = list(dict.fromkeys(model.part)) if len(set(model.part)) > 1 else []
    rows = []
    for line in sorted(model.at(budget), key=lambda line: (list(GROUPS).index(line.group), line.control, -line.score)):
        ratio = line.cost and line.cost["speedup"]
        rows.append(
            [name_of(line, model), percent(line.share), "" if line.flops is None else percent(line.flops)]
            + [
                "" if not ratio else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                f"{line.score:.1f}",
            ]
            + [str(line.against[base]) if base in line.against else "" for base in ("full", "random")]
            + [f"{model.of(line, split):.1f}" for split in splits]
            + [f"{100 * line.said_yes.mean():.0f}" if len(line.said_yes) else ""]
        )
    header = [
        "method",
        "tokens",
        "FLOPs",
        "unpruned / pruned time",
        "all",
        "- unpruned",
        "- `random`",
        *splits,
        "false yes",
    ]
    return markdown(header, rows)


def long_captions(table: Table) -> str:
    """The task with long answers."""
    if table.long is None:
        return ""
    model = table.long
    length = model.full.tokens["output_tokens"]
    rows = []
    for budget in [one for one in BUDGETS if model.at(one)]:
        for line in sorted(model.at(budget), key=lambda line: (list(GROUPS).index(line.group), -line.score)):
            told = [str(line.against[base]) if base in line.against else "" for base in ("full", "random")]
            tokens = f"{line.tokens['output_tokens']:.0f}"
            lost = f"{100 * table.made_up(line):.1f}"
            rows.append([f"{name_of(line, model)}, {percent(budget)}", f"{line.score:.1f}", *told, lost, tokens])
    full = f"{100 * table.made_up(model.full):.1f}"
    rows.insert(0, ["unpruned", f"{model.full.score:.1f}", "", "", full, f"{length:.0f}"])
    told = f"""\
`{model.name}` is scene-llava, taught for a few minutes to describe a picture at length
([how](../eval/testbed/README.md#scene-llava-long)): {length:.0f} tokens on average, in which it says how many things
there are, what is in every quadrant, and what is beside and below each. Scored by the things named (F1 of colour and
shape or digit, in per cent) on {len(model.clusters)} pictures with three or four things; *made up* is the share of the
things named that are not there. Corrected for the {table.long_comparisons} comparisons of this table."""
    header = ["method, tokens left", "things", "- unpruned", "- `random`", "made up", "tokens written"]
    return f"## Long answers\n\n{told}\n\n{markdown(header, rows)}\n"


def left_out(table: Table) -> str:
    """What was not asked, and why."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in table.about["absent"]:
        at = "" if one["budget"] is None else f" at {percent(one['budget']['keep'])}"
        found.setdefault(one["why"], []).append((one["model"], f"`{one['method']}`{at}"))
    rows = []
    for why, some in found.items():
        who = listed(list(dict.fromkeys(name for _, name in some)))
        rows.append([who, ", ".join(dict.fromkeys(model for model, _ in some)), why.replace("|", "\\|")])
    return markdown(["not asked", "of", "why"], rows, 3)
