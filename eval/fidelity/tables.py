"""What `vlmprune fidelity` measured, as a table and in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress

from vlmprune.eval import statistics
from vlmprune.eval.fidelity.costs import EntryCosts
from vlmprune.eval.fidelity.measure import Scored, StudyLine
from vlmprune.eval.statistics import Estimate
from vlmprune.runtime import fewer_pixels
from vlmprune.runtime.tables import counted

__all__ = ["COSTS", "DEFINITIONS", "in_words", "spread", "table_of"]

DEFINITIONS = (
    ("first token", "how often the likeliest first token is that of the unpruned model, in per cent"),
    (
        "answer",
        "how often the greedy answer is the unpruned model's, token for token and with the same end, in per cent",
    ),
    (
        "KL first",
        "KL(unpruned || pruned) of the distributions of the first token, in nats: 0 is the same, and 0.1 means that "
        "the pruned model gives what the unpruned one would say a tenth less probability (geometric mean)",
    ),
    (
        "KL answer",
        "the same, averaged over the tokens of the unpruned answer, which both models read (teacher-forced): two "
        "models that read their own answers are soon asked different questions",
    ),
    ("entering", "visual tokens of a picture that enter the language model, newlines included"),
    ("layer average", "visual tokens that a decoder layer sees, averaged over all layers"),
    ("answer - random", "difference to `random` at the same budget in percentage points, paired prompt by prompt"),
    ("unpruned score", "how right the unpruned model's answers are by the labels, in per cent"),
    ("score", "how right the pruned model's answers are"),
    ("score - unpruned", "the difference of the two in percentage points, paired prompt by prompt"),
)
BASIC = ("method", "budget", "entering", "layer average", "first token", "answer", "KL first", "KL answer")
BESIDE = ("answer - random",)
SCORES = ("unpruned score", "score", "score - unpruned")
#: Columns of what was timed, and what they are.
COSTS = {
    "speed-up first": "how many times as soon as the unpruned model's the first token is there, in pairs run in turns "
    "on this machine; in brackets the 95 % interval of the median",
    "speed-up answer": "the same for a whole answer, as long for both models",
    "memory": "bytes above the weights while the prompt is read, as a share of the unpruned model's",
    "cache": "bytes that the cache holds behind the prompt, as a share of the unpruned model's",
}


def spread(estimate: Estimate, number: str, scale: float = 1.0) -> str:
    """`97.5 [95.0, 99.2]`; no brackets where there is no interval."""
    value = format(scale * estimate.value, number)
    if estimate.low is None:
        return value
    return f"{value} [{format(scale * estimate.low, number)}, {format(scale * estimate.high, number)}]"


def whole(number: float) -> str:
    """`256`, or `91.3` where a mean is not whole."""
    return f"{number:.1f}".removesuffix(".0")


def table_of(
    lines: Sequence[StudyLine], costs: Mapping[str, EntryCosts] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of a study; columns that would be empty are left out."""
    rows = [cells_of(line, (costs or {}).get(line.entry.label)) for line in lines]
    used = [any(column) or i < len(BASIC) for i, column in enumerate(zip(*rows, strict=True))]
    header = [*BASIC, *BESIDE, *SCORES, *COSTS]
    return list(compress(header, used)), [list(compress(row, used)) for row in rows]


def cells_of(line: StudyLine, costs: EntryCosts | None) -> list[str]:
    """A row of the table."""
    return [*basic_cells(line), *beside_cells(line), *score_cells(line.score), *cost_cells(costs)]


def basic_cells(line: StudyLine) -> list[str]:
    """The cells of the columns `BASIC`."""
    seeds = f" ({len(line.entry.seeds)} seeds)" if len(line.entry.seeds) > 1 else ""
    measured = line.measures
    return [
        f"{line.entry.method}{smaller(line)}{seeds}",
        line.entry.budget,
        f"{whole(line.tokens_before)} -> {whole(line.tokens_after)}",
        f"{line.layer_average:.1f}",
        spread(measured["first_agrees"], ".1f", 100),
        spread(measured["answer_agrees"], ".1f", 100),
        spread(measured["kl_first"], ".3f"),
        spread(measured["kl_answer"], ".3f"),
    ]


def beside_cells(line: StudyLine) -> list[str]:
    """The cell of the column `BESIDE`."""
    return ["" if line.over_random is None else spread(line.over_random, "+.1f", 100)]


def score_cells(score: Scored | None) -> list[str]:
    """The cells of the columns `SCORES`."""
    if score is None:
        return [""] * len(SCORES)
    both = [spread(one, ".1f", 100) for one in (score.unpruned, score.pruned)]
    return [*both, spread(score.change, "+.1f", 100)]


def smaller(line: StudyLine) -> str:
    """What stands beside `downsample` where it made the pictures themselves smaller."""
    made = line.entry.method == "downsample" and line.tokens_after < line.tokens_before
    return f" ({fewer_pixels.SAID})" if made else ""


def cost_cells(costs: EntryCosts | None) -> list[str]:
    """The cells of the columns `COSTS`."""
    if costs is None:
        return [""] * len(COSTS)
    fast = [f"{one['median']:.2f}x [{one['low']:.2f}, {one['high']:.2f}]" for one in (costs.first, costs.answer)]
    return [*fast, *(f"{100 * share:.0f} %" for share in (costs.memory, costs.cache))]


def in_words(line: StudyLine, pictures: int) -> str:
    """One sentence about an entry and `random`."""
    same = spread(line.measures["answer_agrees"], ".1f", 100)
    told = f"{line.entry.label}: {same} % of the answers stay the same"
    few = f" (only {counted(pictures, 'picture')}: trust neither numbers nor intervals much)"
    few = few if pictures < statistics.FEW_CLUSTERS else ""
    few += "" if line.score is None else f". {score_in_words(line.score)}"
    if line.over_random is None:
        return f"{told}{few}."
    gap = spread(line.over_random, "+.1f", 100)
    verdicts = {
        "better": f"more than with random patches ({gap} points)",
        "worse": f"fewer than with random patches ({gap} points)",
        "noise": f"which cannot be told from random patches ({gap} points)",
        "equal": "exactly as with random patches, prompt by prompt",
        None: f"with random patches the difference is {gap} points, and one picture gives no interval",
    }
    return f"{told}, {verdicts[line.verdict]}{few}."


def score_in_words(score: Scored) -> str:
    """What became of the score."""
    verdicts = {
        "better": "better than the unpruned model's",
        "worse": "worse than the unpruned model's",
        "noise": "which cannot be told from the unpruned model's",
        "equal": "prompt by prompt the unpruned model's",
        None: "beside the unpruned model's, and one picture gives no interval",
    }
    change = spread(score.change, "+.1f", 100)
    return f"The score is {spread(score.pruned, '.1f', 100)} %, {verdicts[score.verdict]} ({change} points)"
