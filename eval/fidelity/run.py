"""The measuring of `vlmprune fidelity`, prompt by prompt, into its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.eval.fidelity import measure as fidelity
from vlmprune.patches import family_of
from vlmprune.runtime.answering import guarded, patch, seen_by
from vlmprune.runtime.errors import CommandError, UserError
from vlmprune.runtime.loading import model_inputs, strange_pictures, warn_of_photographs
from vlmprune.runtime.prompts import Pair
from vlmprune.runtime.status import Bar, note, status
from vlmprune.runtime.tables import counted
from vlmprune.runtime.videos import read_visual
from vlmprune.spec import Job

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.eval.fidelity.journal import Journal
    from vlmprune.eval.fidelity.measure import StudyEntry, StudyRow
    from vlmprune.runtime.loading import Loaded
    from vlmprune.runtime.videos import VideoClip

__all__ = ["Shown", "Todo", "inputs_of", "measure", "padding_of", "prepared"]


class Todo:
    """What is to be measured, and what of it the journal has."""

    def __init__(self, journal: Journal, entries: Sequence[StudyEntry], pairs: Sequence[Pair]):
        self.journal, self.pairs = journal, pairs
        self.steps = [(entry, seed) for entry in entries for seed in entry.seeds]

    def keys(self, pair: Pair) -> list[str]:
        """Of the rows of a prompt, in the order of `steps`."""
        return [self.journal.key(pair.picture, pair.path, pair.prompt, *step) for step in self.steps]

    def left(self) -> list[Pair]:
        """The prompts that lack a row."""
        return [pair for pair in self.pairs if any(key not in self.journal.rows for key in self.keys(pair))]

    def rows(self) -> list[StudyRow]:
        """All rows of the prompts that lack none."""
        return self.journal.having(map(self.keys, self.pairs))


def measure(loaded: Loaded, todo: Todo, batch: int, longest: int, skipped: dict[str, str]) -> bool:
    """Every prompt under every entry and seed, batch by batch, into the journal; what is there already is left out.

    Args:
        batch: prompts at a time; halved when memory is short, for the rest of the run.
        longest: tokens of an answer.
        skipped: gets the pictures that could not be read, and why.

    Returns:
        Whether the user interrupted.
    """
    left = todo.left()
    if len(left) < len(todo.pairs):
        note(f"{counted(len(todo.pairs) - len(left), 'prompt')} of {len(todo.pairs)} measured before")
    with Bar(len(left)) as bar:
        try:
            in_batches(loaded, todo, left, batch, longest, skipped, bar)
        except KeyboardInterrupt:
            note("interrupted: reporting on what is finished (--resume goes on)")
            return True
    return False


def in_batches(
    loaded: Loaded, todo: Todo, left: list[Pair], batch: int, longest: int, skipped: dict[str, str], bar: Bar
) -> None:
    """`measure`, of prompts that lack a row."""
    ready, waiting = prepared(loaded, left, skipped), []
    while True:
        waiting += islice(ready, max(0, batch - len(waiting)))
        if not waiting:
            return
        some, done = waiting[:batch], bar.done

        def tell(step: int, label: str, some: Sequence = some, done: float = done) -> None:
            status(f"step {step + 1} of {1 + len(todo.steps)}: {label}")
            bar.at(done + len(some) * step / (1 + len(todo.steps)), sum(pair.picture not in skipped for pair in left))

        try:
            guarded(one_batch, loaded, todo, some, longest, tell)
        except CommandError as error:
            bar.at(done)
            if batch == 1 or not isinstance(error.__context__, torch.OutOfMemoryError | MemoryError):
                raise
            batch = max(1, len(some) // 2)
            note(f"out of memory: going on with {counted(batch, 'prompt')} at a time")
            continue
        bar.at(done + len(some))
        del waiting[: len(some)]


@dataclass(frozen=True)
class Shown:
    """A prompt with its picture or video, and the model's inputs."""

    pair: Pair
    visual: Image.Image | VideoClip
    inputs: dict[str, Any]

    def as_seen_by(self, loaded: Loaded) -> dict[str, Any]:
        """The inputs by another processor."""
        return model_inputs(loaded, [self.visual], self.pair.prompt)


def padding_of(loaded: Loaded) -> int:
    """The token that prompts of a batch are padded with."""
    tokenizer = loaded.processor.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def prepared(loaded: Loaded, pairs: Sequence[Pair], skipped: dict[str, str]) -> Iterator[Shown]:
    """Pairs with the model's inputs, each picture read once; pictures that cannot be read are noted and left out."""
    name, image, strange = None, None, 0
    for pair in pairs:
        if pair.picture in skipped:
            continue
        try:
            if pair.picture != name:
                name, image = pair.picture, read_visual(pair.path, pair.frames)
                strange += strange_pictures(loaded, [image])
            yield Shown(pair, image, model_inputs(loaded, [image], pair.prompt))
        except UserError as error:
            skipped[pair.picture] = str(error)
            note(f"left out: {error}")
    warn_of_photographs(loaded.source.name, strange)


def one_batch(loaded: Loaded, todo: Todo, some: Sequence[Shown], longest: int, tell: Callable) -> None:
    """Measure one batch under all entries; the unpruned model answers once for all of them."""
    tokenizer, journal, pairs = loaded.processor.tokenizer, todo.journal, [one.pair for one in some]
    inputs = fidelity.collate([one.inputs for one in some], padding_of(loaded))
    tell(0, "full model")
    full = fidelity.reference(loaded.model, inputs, longest)
    answers = [answer_text(tokenizer, full.answer(i)) for i in range(len(pairs))]
    keys = [todo.keys(pair) for pair in pairs]
    for step, (entry, seed) in enumerate(todo.steps):
        if all(mine[step] in journal.rows for mine in keys):
            continue
        tell(step + 1, entry.label)
        compared = compared_with(loaded, Job(entry.method, entry.seeded(seed)), some, inputs, full, longest)
        made = {}
        for pair, said, one, mine in zip(pairs, answers, compared, keys, strict=True):
            if mine[step] not in journal.rows:
                pruned = answer_text(tokenizer, one.tokens)
                made[mine[step]] = fidelity.StudyRow(pair.picture, pair.prompt, entry.label, seed, said, pruned, one)
        journal.add(made)


def compared_with(
    loaded: Loaded,
    job: Job,
    some: Sequence[Shown],
    inputs: dict[str, Any],
    full: fidelity.Reference,
    longest: int,
) -> list[fidelity.Compared]:
    """What a job makes of a batch, beside what the unpruned model said."""
    own = inputs_of(loaded, job, some, inputs)
    with patch(loaded, job) as handle:
        compared = fidelity.compare(handle, own, full, longest)
    if own is inputs:
        return compared
    whole = [len_of(loaded, one.inputs) for one in some]  # the pictures themselves are smaller
    return [replace(one, tokens_before=tokens) for one, tokens in zip(compared, whole, strict=True)]


def inputs_of(loaded: Loaded, job: Job, some: Sequence[Shown], inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch as a job is to see it: `inputs`, or pictures made smaller."""
    mine = seen_by(loaded, job)
    return inputs if mine is loaded else fidelity.collate([one.as_seen_by(mine) for one in some], padding_of(loaded))


def len_of(loaded: Loaded, inputs: dict[str, Any]) -> int:
    """Visual tokens of a prompt about a picture."""
    family = family_of(loaded.model)
    return int((inputs["input_ids"] == family.token(family.inner(loaded.model))).sum())


def answer_text(tokenizer: Any, tokens: list[int]) -> str:
    """An answer's tokens as text."""
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()
