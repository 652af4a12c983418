"""What the page says in sentences: definitions, and which differences are noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from vlmprune.eval import statistics
from vlmprune.eval.report.rows import NEAR, Row
from vlmprune.runtime.tables import OVERHEAD

__all__ = ["chance", "definitions", "differences", "few", "in_short", "no_bases", "own_schedules", "short_names"]

VERDICTS = {
    "better": "better",
    "worse": "worse",
    "noise": "noise, no difference can be told",
    "equal": "the same in every sample",
    None: "difference without an interval",
}
BASES = {"full": "the full model", "random": "random at the same budget"}
OWN = "random of about the same layer average"


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Every task's name without the words with which all of them begin."""
    parts = [task.split("_") for task in tasks]
    shared = 0
    if len(parts) > 1:
        least = min(map(len, parts)) - 1
        while shared < least and len({tuple(words[: shared + 1]) for words in parts}) == 1:
            shared += 1
    return {task: "_".join(words[shared:]) for task, words in zip(tasks, parts, strict=True)}


def in_short(rows: Sequence[Row]) -> list[str]:
    """A sentence per budget: which method holds most, what `random` holds, and who is better than that.

    Args:
        rows: of one model over all its tasks, or over its only one.
    """
    pruned = [row for row in rows if not row.full and row.retention is not None]
    full = next((row.ttft_s for row in rows if row.full), None)
    budgets = dict.fromkeys(row.budget for row in pruned if not row.control)
    return [at_budget(budget, [row for row in pruned if row.budget == budget], full) for budget in budgets]


def at_budget(budget: str, rows: Sequence[Row], full: float | None) -> str:
    """The sentence about one budget; `full` is the time to the unpruned model's first token."""
    methods = [row for row in rows if not row.control]
    best = max(methods, key=lambda row: row.retention or 0)
    text = f"{budget or 'Own budgets'}: {best.label} holds most, {held(best)}"
    if best.ttft_s and full:
        text += f", with {best.ttft_s / full:.2f} times its time to first token"
    chance = next((row for row in rows if row.method == "random"), None)
    if chance is not None:
        text += f"; random holds {held(chance, '')}"
    return f"{text}{above_random(methods)}."


def above_random(methods: Sequence[Row]) -> str:
    """Who is better than `random`, as the end of a sentence; empty where nobody was compared."""
    better = [row.label for row in methods if row.random_verdict == "better"]
    if not any(row.random_verdict for row in methods):
        return ""
    return f". Better than random: {', '.join(better) if better else 'none that can be told'}"


def held(row: Row, of: str = " of the full model's score") -> str:
    """`97.9 % of the full model's score [96.0, 99.1]`."""
    ends = ""
    if row.retention_low is not None and row.retention_high is not None:
        ends = f" [{100 * row.retention_low:.1f}, {100 * row.retention_high:.1f}]"
    return f"{100 * (row.retention or 0):.1f} %{of}{ends}"


def definitions(batched: bool, embedded: bool) -> list[str]:
    """How to read the tables.

    Args:
        batched: whether requests were answered several at a time.
        embedded: whether one of the package's own small models was run.
    """
    times = "Time to first token: from the call of generate, pictures not encoded yet, to the first token; median over "
    times += "requests, mean over tasks and seeds; the first batch after loading is answered twice and measured once. "
    times += "Methods ran one after the other, so a machine that others use as well, or that heats up, distorts the "
    times += "comparison; vlmprune bench compares times in interleaved pairs."
    if batched:
        times += " Requests were answered in batches: a time belongs to the whole batch."
    if embedded:
        times += f" {OVERHEAD}"
    return [
        "Tokens entering the LLM: visual tokens of a request (all its pictures) at the input of the language model's "
        "first layer, newline tokens included, before -> after pruning; mean over requests. Layer average: the same, "
        "averaged over the language model's layers: a method that prunes inside the language model starts with all "
        "tokens, and this is its cost.",
        "Retention: score / score of the unpruned model on the same samples (inverted where less is better), in per "
        "cent; over all tasks, the mean of the tasks' ratios. It has no unit, so tasks with different scales count "
        "alike. It is not given where a task is missing, since means over different tasks cannot be compared.",
        "Intervals: 95 %, paired. All methods answered the same samples; whole clusters of samples (all questions "
        f"about a picture where the task names its pictures, else single samples) are drawn with replacement, "
        f"{statistics.DRAWS} times with seed {statistics.SEED}, the same draws for all methods, and differences are "
        "taken within each draw. They cover the choice of samples, not the training of a model.",
        "Words: a difference is noise if its interval contains 0, else better or worse; the interval says by how much. "
        "Every interval stands for itself, with no correction for making many of them.",
        "Metrics that are not the mean of their samples' scores (sums such as MME's, F1) have a value and no interval.",
        "The same budget is the same keep (patches left in the end) or average (mean over layers): it need not be "
        "the same cost, which both token counts show. A method on a schedule of its own is compared with the random of "
        f"the nearest layer average, if that is within {NEAR:.0%}; a note says which.",
        "Random and other methods with seeds: mean over seeds, ± the standard deviation over seeds; per sample, the "
        "mean over seeds goes into the intervals.",
        times,
    ]


def no_bases(rows: Sequence[Row]) -> list[str]:
    """Warnings where there is nothing to compare with; the rows are those over all tasks."""
    done = {row.method for row in rows if row.value is not None}
    missing = {
        "none": "The unpruned model has no complete results: no retention can be given.",
        "random": "There is no complete random to compare with.",
    }
    return [text for method, text in missing.items() if method not in done]


def few(rows: Sequence[Row]) -> list[str]:
    """A warning where intervals rest on too little, or nothing."""
    if all(row.clusters is None or row.clusters >= statistics.FEW_CLUSTERS for row in rows):
        return []
    return [
        f"Fewer than {statistics.FEW_CLUSTERS} independent clusters of samples in a task: the intervals are too narrow "
        "and so better or worse is said too easily."
    ]


def own_schedules(rows: Sequence[Row]) -> list[str]:
    """With which `random` the methods without a budget were compared, in a sentence."""
    mine = [row for row in rows if not (row.full or row.budget or row.value is None)]
    if not mine or not any(row.method == "random" for row in rows):
        return []
    none = f"none (none is within {NEAR:.0%})"
    told = ", ".join(f"{row.label} with {row.random_base or none}" for row in mine)
    return [f"Own schedules are compared with the random of the nearest layer average: {told}."]


def differences(rows: Sequence[Row]) -> list[str]:
    """A sentence per budget and base: who is better, who is worse, what is noise."""
    pruned = [row for row in rows if not row.full]
    told = []
    for base, budget in product(BASES, dict.fromkeys(row.budget for row in pruned)):
        if said := verdicts(pruned, base, budget):
            other = BASES[base] if budget or base != "random" else OWN
            told.append(f"{budget or 'Own budget'}, against {other}: {said}.")
    return told


def verdicts(rows: Sequence[Row], base: str, budget: str) -> str:
    """Whose differences to a base at a budget mean what; empty where no row has a verdict."""
    compared = [row for row in rows if row.budget == budget and getattr(row, f"{base}_difference") is not None]
    by_word = [(word, [r.label for r in compared if getattr(r, f"{base}_verdict") == word]) for word in VERDICTS]
    said = {word: f"{VERDICTS[word]}: {', '.join(names)}" for word, names in by_word if names}
    return "; ".join(said.values()) if any(said) else ""


def chance(rows: Sequence[Row]) -> str | None:
    """How many differences would look real by chance alone."""
    made = [v for r in rows for base in BASES if (v := getattr(r, f"{base}_verdict")) is not None]
    if not made:
        return None
    real = sum(v in ("better", "worse") for v in made)
    return (
        f"{len(made)} differences were tested, and {real} of them are not noise. If nothing differed at all, about "
        f"{0.05 * len(made):.0f} would look real by chance."
    )
