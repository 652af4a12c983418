"""How far a pruned model strays from the unpruned one, on pictures with and without labels.

The unpruned model is the reference. Four measures per prompt, each of one pruned model:

- `first_agrees`: the likeliest first token is the same;
- `answer_agrees`: the greedy answer of `generate` is the same, token for token, its end included;
- `kl_first`: KL(unpruned || pruned) of the distributions of the first token, in nats;
- `kl_answer`: the same, averaged over the tokens of the unpruned greedy answer (its end included), in nats per token.

`kl_answer` is teacher-forced: both models read the unpruned answer. Two models that each read their own answer are
soon asked different questions, and their distributions cannot be compared. The first token is reported apart because
short answers ("yes", "B", "3") are decided by it, and because in a long answer the words already written make the
others easy, which hides what was lost: `Compared.along` has agreement and KL by position in the answer. KL is taken in
this direction since it weighs by what the unpruned model would say: it is the log-likelihood that the pruned model
loses on it.

The answer to teach is appended to the cache of the pruned prompt, not to the prompt: methods that look at the prompt's
last token must see the prompt that they would see in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from vlmprune.api import Handle
from vlmprune.eval import statistics
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.statistics import Estimate
from vlmprune.patches import family_of
from vlmprune.patches.host import returned_cache, with_cache
from vlmprune.spec import Job, budget_text, budgets_in

__all__ = ["MEASURES", "Compared", "Reference", "Scored", "StudyEntry", "StudyLine", "StudyRow", "collate", "compare"]
__all__ += ["entries_of", "reference", "stretches", "summarise", "worst"]

#: The measures, and what they cannot go beyond, none being below 0.
TOPS: dict[str, float | None] = {"first_agrees": 1.0, "answer_agrees": 1.0, "kl_first": None, "kl_answer": None}
MEASURES = tuple(TOPS)

Inputs = dict[str, torch.Tensor]
#: Pixels that lie packed, all pictures of a batch one behind another, where their grids come with them.
PACKED = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
#: What was measured, in the order of `MEASURES`, by picture and prompt.
Values = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Reference:
    """What the unpruned model says to a batch.

    Attributes:
        tokens: `(rows, longest)` long, the greedy answers; what stands behind an answer's end means nothing.
        real: `(rows, longest)` bool, tokens of the answers, the end-of-sequence token included.
        log_probs: `(rows, longest, vocabulary)` float32, natural logarithms, along the answers.
        pure: `(rows,)` bool, rows whose generation was a bare argmax: no repetition penalty or the like had a say.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    log_probs: torch.Tensor
    pure: torch.Tensor

    def answer(self, row: int) -> list[int]:
        """The tokens of one answer."""
        return self.tokens[row][self.real[row]].tolist()


@dataclass(frozen=True)
class Compared:
    """One prompt under one pruned model; the measures are this module's. Token counts have newlines in them.

    Attributes:
        same_for: tokens, from the first on, that the greedy answers of both models share.
        along: per stretch (`stretches`) that the unpruned answer reaches: its tokens there; how many of them are the
            pruned model's likeliest, which has read the unpruned answer up to each; and the sum of their KL.
    """

    first_agrees: bool
    answer_agrees: bool
    kl_first: float
    kl_answer: float
    tokens: list[int]
    tokens_before: int
    tokens_after: int
    layer_average: float
    same_for: int = 0
    along: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class StudyEntry:
    """A method at a budget, run with one or several seeds (`(None,)` without); `name` is of its options."""

    method: str
    options: dict[str, Any]
    control: bool = False
    seeds: tuple[int | None, ...] = (None,)
    name: str = ""

    @property
    def budget(self) -> str:
        """`keep 0.25`, `average 64`, or nothing."""
        return budget_text(budgets_in(self.options))

    @property
    def label(self) -> str:
        """`fopru, keep 0.25`."""
        return ", ".join(part for part in (self.method, self.budget, self.name) if part)

    def seeded(self, seed: int | None) -> dict[str, Any]:
        """The options for one seed."""
        return self.options if seed is None else {**self.options, "seed": seed}


def entries_of(todo: Iterable[Job], control: bool, seeds: int) -> list[StudyEntry]:
    """One entry per job; `random` runs with several seeds unless one was asked for."""
    several = {True: tuple(range(seeds)), False: (None,)}
    return [
        StudyEntry(job.method, job.options, control, several[job.method == "random" and "seed" not in job.options])
        for job in todo
    ]


@dataclass(frozen=True)
class StudyRow:
    """One prompt about one picture under one entry and seed, with both answers as text."""

    picture: str
    prompt: str
    label: str
    seed: int | None
    unpruned: str
    pruned: str
    compared: Compared

    def as_json(self) -> dict[str, Any]:
        """Flat, without the token numbers."""
        told = {k: v for k, v in asdict(self).items() if k != "compared"} | asdict(self.compared)
        told.pop("tokens")
        return told


# Measuring


def stretches(longest: int) -> list[tuple[int, int]]:
    """First and last positions, counted from 1: 1, 2, 3 to 4, 5 to 8, ... up to the one that has the longest."""
    found = [(1, 1)]
    while found[-1][1] < longest:
        last = found[-1][1]
        found.append((last + 1, 2 * last))
    return found


def collate(prompts: Sequence[Inputs], pad: int) -> Inputs:
    """Pad single prompts, one picture each, on the left into one batch.

    Args:
        prompts: of batch size 1: input_ids, attention_mask, pixel_values `(1, [views,] channels, height, width)` or
            packed `(patches, values)`, or those of a video, and whatever else has one row per picture.
        pad: token to pad with; it is masked.
    """
    return {name: torch.cat(equally_long(name, [p[name] for p in prompts], pad)) for name in prompts[0]}


def equally_long(name: str, parts: Sequence[torch.Tensor], pad: int) -> Sequence[torch.Tensor]:
    """The inputs called `name` of several prompts, padded to the longest of them where they may differ."""
    longest = max(x.shape[1] for x in parts) if parts[0].ndim > 1 else 0
    if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        return padded(parts, longest, pad if name == "input_ids" else 0)
    if name == "pixel_values" and parts[0].ndim == 5:  # pictures of different numbers of views
        return [torch.cat((x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])), 1) for x in parts]
    return parts


def padded(parts: Sequence[torch.Tensor], longest: int, fill: int) -> list[torch.Tensor]:
    """`(1, length)` each, with `fill` in front."""
    return [torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=fill) for x in parts]


def chosen(inputs: Inputs, rows: list[int]) -> Inputs:
    """Some prompts of a batch, of one picture or video each; packed patches lie one picture behind another."""
    some = dict(inputs)
    for pixels, grids in PACKED.items():
        if grids in inputs:
            patches = some[pixels].split(inputs[grids].prod(1).tolist())
            some[pixels] = torch.cat([patches[row] for row in rows])
    return {name: value if PACKED.get(name) in inputs else value[rows] for name, value in some.items()}


def greedy(model: Any, inputs: Inputs, max_new_tokens: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """`generate`'s greedy answers: tokens and which of them are real, both `(rows, longest)`, and all it returned."""
    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True, **more
    )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    eos = model.generation_config.eos_token_id
    ends = torch.isin(tokens, torch.tensor([] if eos is None else eos, device=tokens.device, dtype=tokens.dtype))
    return tokens, ends.cumsum(1) - ends.long() == 0, out


def along(model: Any, inputs: Inputs, answers: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token along given answers: `(rows, longest, vocabulary)` float32.

    The prompt is prefilled by itself (and pruned, if the model is patched), the answers go onto its cache. A host whose
    positions have several axes counts those of the prompt itself, and says how far they are ahead of its columns.
    """
    mask, family = inputs["attention_mask"], family_of(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    places = {"position_ids": positions} if family.axes == 1 else {}
    first = model(**inputs, **places, use_cache=True, logits_to_keep=1)
    logits = [first.logits[:, -1:]]
    if family.axes > 1:
        positions = (positions + family.inner(model).rope_deltas.to(positions.device)).expand(family.axes, -1, -1)
    if answers.shape[1] > 1:
        said = answers[:, :-1]
        more = model(
            input_ids=said,
            attention_mask=torch.cat((mask, torch.ones_like(said)), 1),
            position_ids=positions[..., -1:] + torch.arange(1, said.shape[1] + 1, device=said.device),
            use_cache=True,
            **with_cache(returned_cache(first)),
        )
        logits.append(more.logits)
    return torch.cat(logits, 1).float().log_softmax(-1)


def divergence(full: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """KL(full || pruned) in nats over the last axis of two tensors of log-probabilities, never below 0."""
    share = full.exp()
    return torch.where(share == 0, 0, share * (full - pruned)).sum(-1).clamp(min=0)


@torch.no_grad()
def reference(model: Any, inputs: Inputs, max_new_tokens: int) -> Reference:
    """Let the unpruned model answer a batch.

    Args:
        model: without a patch.
        inputs: a batch with left padding, of `collate`.
        max_new_tokens: longest answer, at least 1.
    """
    tokens, real, out = greedy(model, inputs, max_new_tokens, output_logits=True, output_scores=True)
    pure = torch.stack([(a == b).all(1) for a, b in zip(out.logits, out.scores, strict=True)]).all(0)
    del out
    return Reference(tokens, real, along(model, inputs, tokens), pure)


@torch.no_grad()
def compare(handle: Handle, inputs: Inputs, full: Reference, max_new_tokens: int) -> list[Compared]:
    """Measure the pruned model of `handle` against what the unpruned one said to the same batch.

    A row whose likeliest tokens along the whole unpruned answer are that answer would generate it: it is not generated
    again. This holds where generation is a bare argmax; any other row is generated.

    Raises:
        ValueError: a model's outputs are no numbers (an overflow in half precision).
    """
    log_probs = along(handle.model, inputs, full.tokens)
    trace = handle.trace
    kl = divergence(full.log_probs, log_probs)
    if not torch.isfinite(kl[full.real]).all():
        raise ValueError(
            f"the model's outputs are no numbers in {handle.model.dtype}: try another dtype, such as float32."
        )
    mean = (kl * full.real).sum(1) / full.real.sum(1)
    first = log_probs[:, 0].argmax(-1) == full.log_probs[:, 0].argmax(-1)
    alike = log_probs.argmax(-1) == full.tokens
    same = (alike | ~full.real).all(1) & full.pure
    said = {row: full.answer(row) for row in range(len(same))}
    if rows := (~same).nonzero().flatten().tolist():
        tokens, real, _ = greedy(handle.model, chosen(inputs, rows), max_new_tokens)
        said |= {row: tokens[i][real[i]].tolist() for i, row in enumerate(rows)}
    measured = zip(first.tolist(), kl[:, 0].tolist(), mean.tolist(), by_stretch(full.real, alike, kl), strict=True)
    return [
        Compared(
            first_agrees=agrees,
            answer_agrees=said[row] == full.answer(row),
            kl_first=at_first,
            kl_answer=on_average,
            tokens=said[row],
            tokens_before=trace.grids[row].tokens,
            tokens_after=trace.entering(row),
            layer_average=trace.layer_average(row),
            same_for=shared(said[row], full.answer(row)),
            along=along_it,
        )
        for row, (agrees, at_first, on_average, along_it) in enumerate(measured)
    ]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many entries, from the first on, are the same in both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def by_stretch(real: torch.Tensor, alike: torch.Tensor, kl: torch.Tensor) -> list[tuple[tuple[int, int, float], ...]]:
    """`Compared.along` of every row of three `(rows, longest)` tensors."""
    parts = [slice(first - 1, last) for first, last in stretches(real.shape[1])]
    counts, same, sums = (
        torch.stack([x[:, part].sum(1) for part in parts], 1).tolist() for x in (real, alike & real, kl.where(real, 0))
    )
    return [
        tuple((n, agree, round(total, 6)) for n, agree, total in zip(*row, strict=True) if n)
        for row in zip(counts, same, sums, strict=True)
    ]


# What the measurements say together


@dataclass(frozen=True)
class Scored:
    """Scores by the labels, 0 to 1, on the same prompts.

    Attributes:
        unpruned, pruned: of the two models.
        change: pruned minus unpruned, paired.
        verdict: of it: better, worse, noise or equal; None with a single picture.
    """

    unpruned: Estimate
    pruned: Estimate
    change: Estimate
    verdict: str | None


@dataclass(frozen=True)
class StudyLine:
    """One entry in sum.

    Attributes:
        measures: by the names of `MEASURES`; shares are 0 to 1.
        over_random: `answer_agrees` minus that of the random control at the same budget, paired; None without one.
        verdict: of that difference: better, worse, noise or equal; None without one or with a single picture.
        score: by the labels, where there are some.
    """

    entry: StudyEntry
    tokens_before: float
    tokens_after: float
    layer_average: float
    measures: dict[str, Estimate]
    over_random: Estimate | None = None
    verdict: str | None = None
    score: Scored | None = None


def summarise(entries: Sequence[StudyEntry], rows: Iterable[StudyRow], labels: Labels | None = None) -> list[StudyLine]:
    """One line per entry that has rows, in the order of `entries`; the order of `rows` means nothing.

    A prompt counts once: seeds are averaged first. Pictures are drawn with replacement, each with all its prompts.
    Where all pictures have the same value (all agree, or half of every picture's prompts), drawing again shows no
    spread: there the interval is Clopper and Pearson's exact one for so many pictures (`bounded_interval`), so that ten
    pictures that agree do not pass for a proof.
    """
    by_entry = by_prompt(rows)
    values = {label: {pair: mean_of(some, MEASURES) for pair, some in by.items()} for label, by in by_entry.items()}
    return [line_of(entry, by_entry[entry.label], values, labels) for entry in entries if entry.label in by_entry]


def line_of(
    entry: StudyEntry,
    by_prompt: Mapping[tuple[str, str], Sequence[StudyRow]],
    values: Mapping[str, Values],
    labels: Labels | None,
) -> StudyLine:
    """The line of one entry, of its own rows and the values of all by label."""
    every = [row for some in by_prompt.values() for row in some]
    tokens = mean_of(every, ("tokens_before", "tokens_after", "layer_average"))
    mine, control = values[entry.label], values.get(StudyEntry("random", entry.options).label)
    beside = (None, None) if control is None or entry.method == "random" else over(mine, control)
    score = None if labels is None else scored({pair: scores_of(some, labels) for pair, some in by_prompt.items()})
    return StudyLine(entry, *tokens, estimates(mine), *beside, score)


def by_prompt(rows: Iterable[StudyRow]) -> dict[str, dict[tuple[str, str], list[StudyRow]]]:
    """The rows of every label by picture and prompt, the seeds of one in order."""
    found: dict[str, dict[tuple[str, str], list[StudyRow]]] = {}
    for row in sorted(rows, key=lambda row: (row.picture, row.prompt, row.seed or 0)):
        found.setdefault(row.label, {}).setdefault((row.picture, row.prompt), []).append(row)
    return found


def mean_of(rows: Sequence[StudyRow], names: Sequence[str]) -> list[float]:
    """Means of what was measured."""
    return [float(np.mean([getattr(row.compared, name) for row in rows])) for name in names]


def estimates(values: Values) -> dict[str, Estimate]:
    """Means over prompts with their intervals over pictures, by the names of `MEASURES`."""
    pictures, table = [picture for picture, _ in values], np.array(list(values.values()))
    draws, means, count = drawn(pictures, table), table.mean(0).tolist(), len(set(pictures))
    return {name: statistics.mean(draws[i], means[i], count, top) for i, (name, top) in enumerate(TOPS.items())}


def scores_of(rows: Sequence[StudyRow], labels: Labels) -> list[float]:
    """The scores of both models on a prompt, and their difference; seeds are averaged."""
    unpruned, pruned = np.mean([labels.scores(row) for row in rows], 0).tolist()
    return [unpruned, pruned, pruned - unpruned]


def scored(values: Values) -> Scored:
    """Means over prompts of `scores_of`, with their intervals over pictures."""
    pictures, table = [picture for picture, _ in values], np.array(list(values.values()))
    draws, means, count = drawn(pictures, table), table.mean(0).tolist(), len(set(pictures))
    both = [statistics.mean(draws[i], means[i], count, 1.0) for i in range(2)]
    return Scored(*both, *statistics.difference(draws[2], means[2], count, 1.0, same=not table[:, 2].any()))


def over(mine: Values, control: Values) -> tuple[Estimate, str | None]:
    """`answer_agrees` minus the control's on the same prompts, and in a word."""
    pairs, which = [pair for pair in mine if pair in control], MEASURES.index("answer_agrees")
    pictures = [picture for picture, _ in pairs]
    gap = np.array([[mine[pair][which] - control[pair][which]] for pair in pairs])
    (draws,), count = drawn(pictures, gap), len(set(pictures))
    return statistics.difference(draws, float(gap.mean()), count, TOPS["answer_agrees"], same=not gap.any())


def drawn(pictures: Sequence[str], values: np.ndarray) -> Sequence[np.ndarray | None]:
    """Bootstrap values of the means of the columns of `(prompts, columns)` values; a single picture gives none."""
    if len(set(pictures)) < 2:
        return [None] * values.shape[1]
    return list(statistics.Resampler(pictures).means(pictures, values).T)


def worst(rows: Iterable[StudyRow], count: int, labels: Labels | None = None) -> list[StudyRow]:
    """The worst row of each of the `count` worst pictures, worst first.

    With labels it is worst to lose score. Then, and without them, changed answers are worse than others; among them,
    and among the others, the larger `kl_answer` is worse. Pictures that lost nothing (the same answer, no KL) are never
    shown.
    """
    order = sorted(
        (row for row in rows if row.compared.kl_answer > 0 or not row.compared.answer_agrees),
        key=lambda r: (
            0 if labels is None else -labels.loss(r),
            r.compared.answer_agrees,
            -r.compared.kl_answer,
            r.picture,
            r.prompt,
            r.seed or 0,
        ),
    )
    first: dict[str, StudyRow] = {}
    for row in order:
        first.setdefault(row.picture, row)
    return list(first.values())[:count]
