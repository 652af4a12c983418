"""What a reader who decides should know, before all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from table_results import NATIVE

from vlmprune import registry

from .differences import correct, differences
from .lines import BUDGETS, COSTS_BY, Line, Model, Table, cells, pareto, score
from .words import RIVALS, listed, markdown, name_of, percent, title

#: The groups of methods that are compared as groups, by what they look at (`vlmprune ls methods`). They and `kind_of`
#: were here before any of the answers that the page is written from.
KINDS = {"tower": "attention", "features": "likeness", "question": "question", "decoder": "inside the LLM"}
#: Whose pages say why they are below `random`.
WHY = ("v2drop", "sparsevlm")


def summary(table: Table) -> list[str]:
    """What a reader who decides should know, in order."""
    parts = (verdicts, fronts, losses, rivals, lengths, kinds, false_yes, times)
    return [told for part in parts if (told := part(table))]


def verdicts(table: Table) -> str:
    """How many methods are told apart from what."""
    rows = []
    for model, budget, mine in cells(table):
        over, under = (sum(getattr(line.against["random"], word) for line in mine) for word in ("better", "worse"))
        lost, base, top = sum(line.against["full"].worse for line in mine), model.random(budget), max(mine, key=score)
        tops = listed([name_of(line, model) for line in mine if line.score == top.score])
        counts = [len(mine), over, len(mine) - over - under, under, len(mine) - lost]
        rows.append([title(model, budget), *map(str, counts), f"{base.score:.1f}", f"{top.score:.1f}", tops])
    header = ["model, tokens left", "methods", "above `random`", "not told apart", "below it", "not told from unpruned"]
    told = """\
**How many are better than chance.** Methods above three seeds of `random` at the same budget, those that cannot be
told apart from it, those below, and those that cannot be told from the unpruned model (no proof that they are as
good):"""
    return f"{told}\n\n{markdown([*header, '`random`', 'best', 'which'], rows)}"


def fronts(table: Table) -> str:
    """Which rows nothing beats, by what they cost."""
    rows = []
    for model in table.models:
        for kind, cost in COSTS_BY.items():
            found = [
                f"{name_of(line, model)}{'' if line.budget is None else f' {percent(line.budget)}'} "
                f"({percent(cost(line))}: {line.score:.1f})"
                for line in pareto(model, cost)
                if line is not model.full
            ]
            if found:
                rows.append([model.name, kind, "; ".join(found)])
    told = """\
**What to take**, as far as such models tell. `keep` counts what is left after the last cut, and a method that cuts
late has run most layers on all tokens by then; so rows are compared by their tokens in the mean over layers, by the
FLOPs of a whole prefill (tower, language model and the method's own work), and by its time. On a front no other row
of the model has at least its accuracy for at most its cost (in brackets: cost as a share of the unpruned model's, and
accuracy). Neighbours on it need not differ for certain:"""
    return f"{told}\n\n{markdown(['model', 'by', 'front, cheapest first'], rows, 3)}"


def losses(table: Table) -> str:
    """Who is below random."""
    made = []
    for model in table.models:
        below: dict[str, list[str]] = {}
        for line in (one for budget in BUDGETS for one in model.at(budget) if "random" in one.against):
            if line.against["random"].worse:
                told = f"{percent(line.budget)}: {line.against['random'].value:+.1f}"
                below.setdefault(name_of(line, model), []).append(told)
        found = [f"{name} ({', '.join(some)})" for name, some in below.items()]
        made += [f"- {model.name}: {listed(found)}."] if found else []
    told = "**Below `random`** at the same budget for certain, controls included (in points):"
    if not made:
        return f"{told} none."
    why = [f"[`{name}`](methods/{name}.md)" for name in WHY if any(f"`{name}` (" in line for line in made)]
    reasons = [f"\nWhy, and the command that shows it: {listed(why)}."] if why else []
    return "\n".join([told, "", *made, *reasons])


def rivals(table: Table) -> str:
    """The native rival beside the best, and how many it beats."""
    made = []
    for model in table.models:
        for line in (one for one in model.lines if one.label == NATIVE and model.at(one.budget, controls=False)):
            others = model.at(line.budget, controls=False)
            apart = model.differences([other.scores for other in others], [line.scores] * len(others))
            correct(apart)
            best = max(others, key=score)
            flops = ["" if one.flops is None else f", {percent(one.flops)} of the FLOPs" for one in (line, best)]
            better, worse = (sum(getattr(one, word) for one in apart) for word in ("better", "worse"))
            made.append(
                f"- {model.name} at {percent(line.budget)}: {RIVALS[model.name]} {line.score:.1f} "
                f"({percent(line.share)} of the tokens{flops[0]}). Of {len(others)} methods {better} are better for "
                f"certain, {worse} worse; the best is {name_of(best, model)}, {best.score:.1f} "
                f"({percent(best.share)} of the tokens{flops[1]})."
            )
    told = "**The native rival**, fewer pixels or crops, which spares the tower too (corrected within each budget):"
    return "\n".join([told, "", *made]) if made else ""


def kind_of(line: Line) -> str:
    """Its group of `KINDS`, if any: likeness is that of the tower's states, and what compares raw pixels is in none."""
    return "" if line.group not in KINDS or registry.find(line.method).needs == "pixels" else line.group


def means(lines: Sequence[Line], what: Callable[[Line], np.ndarray], whole: bool = False) -> dict[str, np.ndarray]:
    """Something of every sample, averaged over the methods of a group; `whole`: with those of pixels among likeness."""
    of: dict[str, list[np.ndarray]] = {}
    for line in lines:
        of.setdefault(line.group if whole else kind_of(line), []).append(what(line))
    return {group: np.mean(of[group], 0) for group in KINDS if group in of}


def kinds(table: Table) -> str:
    """Attention of the tower against diversity, on sparse and on crowded pictures."""
    model = next((one for one in table.models if "crowded" in one.part), None)
    rows, told = attention_or_likeness(model, whole=False) if model is not None else ([], "")
    if not rows:
        return ""
    with_pixels = attention_or_likeness(model, whole=True)[1]
    text = f"""\
**Attention or diversity?** Public findings: the tower's attention does better on simple pictures, diversity on
crowded ones. Here ({model.name}, means over the methods of a group) the two differ for certain {told}; a plus is for
diversity. The groups are those of `vlmprune ls methods`, without what compares raw pixels (`showui`). They were fixed
before these answers, but after others, in which `showui` was far off (it spent a budget on a picture's top rows, and no
longer does). With it among likeness the two differ
{with_pixels}. Last column: likeness
minus attention, corrected within this table:"""
    return f"{text}\n\n{markdown(['scenes, tokens left', *KINDS.values(), 'difference'], rows)}"


def attention_or_likeness(model: Model, whole: bool) -> tuple[list[list[str]], str]:
    """Rows of the table of groups, and on which pictures at which budgets two of them differ; `whole`: see `means`."""
    rows, apart = [], []
    for split in ("sparse", "crowded"):
        mine = np.array(model.part) == split
        for budget in BUDGETS:
            found = means(model.at(budget, controls=False), lambda line: line.scores, whole)
            if {"tower", "features"} <= set(found):
                apart += model.differences([found["features"]], [found["tower"]], mine)
                told = [f"{100 * found[group][mine].mean():.1f}" if group in found else "" for group in KINDS]
                rows.append([f"{split}, {percent(budget)}", *told])
    correct(apart)
    words = []
    for split in ("sparse", "crowded"):
        mine = [(row[0].partition(", ")[2], one) for row, one in zip(rows, apart, strict=True) if split in row[0]]
        sure = [f"{budget} ({one.value:+.1f})" for budget, one in mine if one.sure]
        words.append(f"on {split} pictures at {listed(sure) if sure else 'no budget'}")
    return [[*row, str(one)] for row, one in zip(rows, apart, strict=True)], listed(words)


def lengths(table: Table) -> str:
    """What methods lose on short and on long answers."""
    short = next((one for one in table.models if one.name == "scene-llava"), None)
    made = []
    for budget in BUDGETS if short is not None and table.long is not None else ():
        lost = [
            {line.label: -line.against["full"].value for line in model.at(budget, controls=False)}
            for model in (short, table.long)
        ]
        both = [label for label in lost[1] if label in lost[0]]
        if both:
            least = sorted(both, key=lambda label: lost[1][label])[:3]
            told = listed([f"`{label}` ({lost[1][label]:.1f})" for label in least])
            means = [np.mean([one[label] for label in both]) for one in lost]
            made.append(
                f"- at {percent(budget)}, {len(both)} methods lose {means[0]:.1f} points on average on scene-llava's "
                f"short answers, and {means[1]:.1f} on [long ones](#long-answers), where {told} lose least."
            )
    told = (
        "**Short answers hide the damage**, on another model, other pictures and by another score, so read the order:"
    )
    return "\n".join([told, "", *made]) if made else ""


def false_yes(table: Table) -> str:
    """Whether diversity hallucinates more: a yes where there is nothing."""
    rows, apart, count, most = [], [], {}, 0.0
    for model, budget, lines in cells(table):
        rates = means(lines, lambda line: line.said_yes)
        if not {"tower", "features"} <= set(rates) or not len(model.full.said_yes):
            continue
        # no picture is in two of these questions
        names = [str(place) for place in range(len(model.full.said_yes))]
        apart += differences(names, [rates["features"]], [rates["tower"]])
        told = [f"{100 * rates[group].mean():.0f}" if group in rates else "" for group in KINDS]
        most = max(most, *(100 * rate.mean() for rate in rates.values()))
        shown = [f"{100 * one.said_yes.mean():.0f}" for one in (model.full, model.random(budget))]
        rows.append([title(model, budget), *shown, *told])
        count[model.name] = len(model.full.said_yes)
    correct(apart)
    named = list(zip(rows, apart, strict=True))
    more, less = ([row[0] for row, one in named if getattr(one, word)] for word in ("better", "worse"))
    asked_of = listed([f"{number} of {name}" for name, number in count.items()])
    told = f"""\
**Does diversity hallucinate more?** Public findings say so. Per cent of the questions `is there a ... ?` about things
that are not in the picture ({asked_of}) which are answered yes, as means over the same methods: {most:.0f} at most, for
these models say no to what they do not see. Methods that go by likeness say yes more often for certain at:
{listed(more)}; less often at: {listed(less)}.{made_up(table)} Last column: likeness minus attention, corrected within
this table:"""
    rows = [[*row, str(one)] for row, one in named]
    header = ["model, tokens left", "unpruned", "`random`", *KINDS.values(), "difference"]
    return f"{told}\n\n{markdown(header, rows)}" if rows else ""


def made_up(table: Table) -> str:
    """What long answers name that is not there, by groups."""
    found = []
    for budget in BUDGETS if table.long is not None else ():
        shares = means(table.long.at(budget, controls=False), lambda line: np.array(table.made_up(line)))
        if {"tower", "features"} <= set(shares):
            two = [percent(float(shares[group])) for group in ("tower", "features")]
            found.append(f"{two[0]} by attention and {two[1]} by likeness with {percent(budget)} of the tokens")
    if not found:
        return ""
    whole = percent(table.made_up(table.long.full))
    return f" Of the things named in [long answers](#long-answers) are made up: {'; '.join(found)}; unpruned {whole}."


def times(table: Table) -> str:
    """What was measured in time."""
    rows = []
    for model, budget, lines in cells(table):
        if timed := [line.cost["speedup"] for line in lines if line.cost is not None]:
            ratios = sorted(one["median"] for one in timed)
            told = [f"{ratios[place]:.2f}" for place in (0, len(ratios) // 2, -1)]
            sure = (sum(one["low"] > 1 for one in timed), sum(one["high"] < 1 for one in timed), len(timed))
            rows.append([title(model, budget), *told, *map(str, sure)])
    if not rows:
        return ""
    loads, about = [row["load"] for row in table.costs["rows"]], table.costs["machine"]
    kept = "kept to one of them, " if about.get("kept") == 1 else ""
    told = f"""\
**Time.** One prefill of one prompt, in turns with the unpruned model's ({table.costs["pairs"]} pairs: the median of
their ratios, with its 95 % interval by order statistics), on one thread of {about["processor"]} with {about["cores"]}
cores, {kept}**while other work ran** on the machine (load average {min(loads)} to {max(loads)}). At two million
parameters time is overhead, and the tower most of the work: [performance.md](performance.md) has real sizes.
Unpruned / pruned, over the methods:"""
    header = ["model, tokens left", "least", "median", "most", "faster for certain", "slower for certain", "methods"]
    return f"{told}\n\n{markdown(header, rows)}"
