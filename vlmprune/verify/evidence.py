"""What the checks are judged from: runs of the plain model, of the patched one, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from vlmprune.api import Handle
from vlmprune.engine.finite import WAY_OUT, each_finite
from vlmprune.patches import Family
from vlmprune.patches.language_models import window_of
from vlmprune.trace import CutTrace, Trace
from vlmprune.verify.prompts import SAID, batch
from vlmprune.verify.runs import (
    FORCED,
    Hand,
    Rows,
    Run,
    by_hand,
    changes,
    dropped_by,
    has_pictures,
    masked,
    other_positions,
    rows_of,
    run,
    wrong,
)
from vlmprune.verify.verdict import STRANGE, Noise, worst, worst_logits

__all__ = [
    "SIDES",
    "Answer",
    "Evidence",
    "Plain",
    "Pruned",
    "attempt",
    "forced_tokens",
    "gathered",
    "plain_of",
    "pruned_of",
    "same_so_far",
    "steps_of",
]

SIDES = ("left", "right")
INTRUDERS = 4  # columns of padding that a deliberate mistake lets through


@dataclass(frozen=True)
class Answer:
    """A greedy answer: `(new,)` tokens, and `(new, vocab)` raw logits they were taken from."""

    tokens: torch.Tensor
    logits: torch.Tensor


@contextmanager
def default_generation(model: nn.Module) -> Iterator[None]:
    """Generation by transformers' own defaults, not by the user's `generation_config`; nothing ends an answer."""
    users, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = users


def generated(model: nn.Module, prompt: dict[str, Any], static: bool) -> Answer:
    """Let the model generate `FORCED` + 1 tokens, whatever ends its answers."""
    more = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with default_generation(model):
        out = model.generate(
            **prompt, **more, max_new_tokens=FORCED + 1, return_dict_in_generate=True, output_logits=True
        )
    return Answer(out.sequences[0, prompt["input_ids"].shape[1] :], torch.stack(out.logits)[:, 0])


def same_so_far(one: Answer, other: Answer) -> int:
    """How many of the logits were computed after the same tokens."""
    differ = (one.tokens != other.tokens).nonzero().flatten().tolist()
    return differ[0] + 1 if differ else len(one.tokens)


@dataclass(frozen=True)
class Plain:
    """The unpatched model on the prompts, and how far apart two ways of computing the same thing are (the noise).

    Attributes:
        prompts: as of `prompts_for`.
        rows: the first prompt.
        run: of the first prompt.
        noises: relative differences between two of these ways, by line of the check; `static` is a static cache against
            a dynamic one, and `batch 0` and so on the rows of the padded batches.
        repeats: whether the same call gives the same bits.
        no_static: why the model cannot generate with a static cache, or "".
    """

    prompts: list[dict[str, Any]]
    rows: Rows
    run: Run
    noises: dict[str, float]
    repeats: bool
    no_static: str

    def noise(self, name: str) -> Noise:
        """How far apart the two ways of this name are, and any two that are the same but for rounding."""
        rounding = [off for off in self.noises.values() if off <= STRANGE[self.run.hidden.dtype]]
        return Noise(self.noises[name], max(rounding, default=0.0))


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception that it raised: a broken engine may raise anything.

    Raises:
        torch.OutOfMemoryError, MemoryError: this is not the engine's fault.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return error


def forced_tokens(prompt: dict[str, Any]) -> list[int]:
    """Tokens to decode with: the first text of a prompt's end, which are no placeholders."""
    return prompt["input_ids"][0, -FORCED:].tolist()


def steps_of(family: Family, model: nn.Module, side: str) -> int | None:
    """How many logits of a padded batch can be compared: padding inside a sliding window takes a token's place."""
    layers = family.decoder_layers(family.inner(model))
    return 1 if side == "right" and any(window_of(layer) is not None for layer in layers) else None


def demand_numbers(computed: Sequence[torch.Tensor], where: str) -> None:
    """Raise unless the unpruned model computed numbers: against NaN no difference would ever be large."""
    if not each_finite(computed, computed[0].device).all():
        raise ValueError(
            f"the unpruned model computes NaN or infinite numbers{where}: nothing can be compared with it. {WAY_OUT}."
        )


def plain_of(family: Family, model: nn.Module, prompts: list[dict[str, Any]]) -> Plain:
    """Run the unpatched model in all the ways that are compared later.

    Raises:
        ValueError: it computes NaN or infinite numbers.
    """
    forced = forced_tokens(prompts[0])
    ran = [run(family, model, prompt, forced) for prompt in prompts]
    demand_numbers([x for one in ran for x in (one.hidden, one.logits)], "")
    again = run(family, model, prompts[0], forced)
    first, rows = ran[0], rows_of(family, model, prompts[0])
    hand = by_hand(family, model, rows, [], forced)
    dynamic, static = generated(model, prompts[0], False), attempt(lambda: generated(model, prompts[0], True))
    noises = {
        "rows": max(worst(first.hidden[0], hand.hidden), worst_logits(first.logits[0, :1], hand.logits[:1])),
        "cache": max(worst(a[0], b) for a, b in zip(first.values, hand.values, strict=True)),
        "positions": max(worst(a[0], b) for a, b in zip(first.keys, hand.keys, strict=True)),
        "decode": worst_logits(first.logits[0], masked(family, model, rows, [], forced)),
    }
    tokens = dynamic.tokens[:FORCED].tolist()
    noises["generate"] = worst_logits(dynamic.logits, by_hand(family, model, rows, [], tokens).logits)
    noises |= batch_noises(family, model, prompts, ran, forced)
    no_static = ""
    if isinstance(static, Answer):
        same = same_so_far(dynamic, static)
        noises["static"] = worst_logits(static.logits[:same], dynamic.logits[:same])
    else:
        no_static = f"the plain model generates with no static cache ({type(static).__name__})"
    repeats = torch.equal(first.hidden, again.hidden) and torch.equal(first.logits, again.logits)
    return Plain(prompts, rows, first, noises, repeats, no_static)


def batch_noises(
    family: Family, model: nn.Module, prompts: list[dict[str, Any]], ran: list[Run], forced: list[int]
) -> dict[str, float]:
    """How far the rows of padded batches are from the prompts alone, as of `Plain.noises`."""
    found: dict[str, float] = {}
    for side in SIDES:
        steps = steps_of(family, model, side)
        together = run(family, model, batch(prompts, side), forced).logits  # hidden states of padding may be anything
        demand_numbers([together[:, :steps]], f" in a batch padded {side}")
        for i, one in enumerate(ran):
            off = worst_logits(together[i, :steps], one.logits[0, :steps])
            found[f"batch {i}"] = max(off, found.get(f"batch {i}", 0.0))
    return found


@dataclass(frozen=True)
class Pruned:
    """What the patched model did; an exception stands where something raised one.

    Attributes:
        answer, static: greedy answers with a dynamic and with a static cache (None if the plain model has none).
        forced: tokens that all runs decode with.
        rows: the first prompt, its pictures seen by the patched tower.
        singles: a run and its trace for every prompt; text alone is not pruned and has no trace.
        batches: the same for the padded batches, by side.
        intruded: the prompts with more tokens near their end.
    """

    answer: Answer | Exception
    static: Answer | Exception | None
    forced: list[int]
    rows: Rows | Exception
    singles: list[tuple[Run, Trace | None] | Exception]
    batches: dict[str, tuple[Run, Trace] | Exception]
    intruded: list[Run | Exception]

    @property
    def run(self) -> Run | Exception:
        """The first prompt's."""
        first = self.singles[0]
        return first if isinstance(first, Exception) else first[0]

    @property
    def trace(self) -> Trace | None:
        """The first prompt's, if it ran."""
        first = self.singles[0]
        return None if isinstance(first, Exception) else first[1]


def intruded(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt as a batch would show it whose mask lets padding through, near enough for any window."""

    def longer(row: torch.Tensor) -> torch.Tensor:
        return torch.cat((row[:, :-2], row[:, -1:].expand(-1, INTRUDERS), row[:, -2:]), 1)

    rows = {"input_ids", "attention_mask", *SAID}
    return prompt | {name: longer(prompt[name]) for name in rows.intersection(prompt)}


def pruned_of(family: Family, handle: Handle, plain: Plain) -> Pruned:
    """Run the patched model in all the ways that are judged."""
    model, prompts = handle.model, plain.prompts
    answer = attempt(lambda: generated(model, prompts[0], False))
    static = None if plain.no_static else attempt(lambda: generated(model, prompts[0], True))
    forced = answer.tokens[:FORCED].tolist() if isinstance(answer, Answer) else forced_tokens(prompts[0])

    def traced(inputs: dict[str, Any]) -> tuple[Run, Trace | None] | Exception:
        made = attempt(lambda: run(family, model, inputs, forced, alone=has_pictures(inputs)))
        return made if isinstance(made, Exception) else (made, handle.trace if has_pictures(inputs) else None)

    return Pruned(
        answer,
        static,
        forced,
        attempt(lambda: rows_of(family, model, prompts[0])),
        [traced(prompt) for prompt in prompts],
        {side: traced(batch(prompts, side)) for side in SIDES},
        [
            attempt(lambda prompt=prompt: run(family, model, intruded(prompt), forced, alone=has_pictures(prompt)))
            for prompt in prompts
        ],
    )


@dataclass(frozen=True)
class Evidence:
    """All that the lines are judged from.

    Attributes:
        model: unpatched again.
        rows: the first prompt's embeddings: by the unpatched tower, or, where a method changes what the tower does, by
            the patched one.
        behind: words for the latter, or "".
        hand: what the first prompt comes to by hand.
        mistake: rows and cuts with a deliberate mistake, None where nothing is pruned.
        twin: what these come to.
        astray: what the prompt comes to with its forced tokens at other positions, None where nothing is pruned.
        moved: what the prompt comes to at other positions (of `elsewhere`), None where no cut took anything.
    """

    family: Family
    model: nn.Module
    plain: Plain
    pruned: Pruned
    rows: Rows
    behind: str
    hand: Hand
    mistake: tuple[Rows, list[CutTrace]] | None
    twin: Hand | None
    astray: Hand | None
    moved: Hand | None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def rows_of(self, prompt: int) -> Rows:
        """The embeddings of a prompt, its pictures seen by the unpatched tower."""
        return rows_of(self.family, self.model, self.plain.prompts[prompt])


def elsewhere(hand: Callable[[Rows, Sequence[CutTrace]], Hand], rows: Rows, trace: Trace) -> Hand:
    """What the prompt comes to at other positions: another policy, or, on several axes, a plain count."""
    if rows.places.ndim == 1:
        return hand(rows, other_positions(trace))
    count = torch.arange(rows.places.shape[-1], device=rows.places.device)
    return hand(replace(rows, places=count.expand_as(rows.places)), trace.cuts)


def gathered(family: Family, model: nn.Module, plain: Plain, pruned: Pruned, in_tower: bool) -> Evidence:
    """Carry out by hand what the trace says, and the same with deliberate mistakes.

    Args:
        in_tower: whether the method changes what the tower computes.
    """
    rows, trace = pruned.rows if in_tower else plain.rows, pruned.trace
    if isinstance(rows, Exception):  # `compared` makes lines of it
        raise rows
    changed = bool(changes(trace))
    mistake = (rows, wrong(trace)) if changed else (plain.rows, trace.cuts) if in_tower else None

    def hand(rows: Rows, cuts: Sequence[CutTrace], astray: int = 0) -> Hand:
        return by_hand(family, model, rows, cuts, pruned.forced, astray)

    return Evidence(
        family,
        model,
        plain,
        pruned,
        rows,
        "behind the tower" if in_tower else "",
        hand(rows, trace.cuts),
        mistake,
        hand(*mistake) if mistake else None,
        hand(rows, trace.cuts, dropped_by(trace)) if mistake else None,
        elsewhere(hand, rows, trace) if changed else None,
    )
