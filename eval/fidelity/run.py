"""The measuring of `vlmprune fidelity`, prompt by prompt, into its journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.eval.fidelity import measure as fidelity
from vlmprune.runtime.answering import guarded, patch
from vlmprune.runtime.errors import CommandError, UserError
from vlmprune.runtime.loading import model_inputs, strange_pictures, warn_of_photographs
from vlmprune.runtime.pictures import read_picture
from vlmprune.runtime.prompts import Pair
from vlmprune.runtime.status import note, status
from vlmprune.runtime.tables import counted
from vlmprune.spec import Job

if TYPE_CHECKING:
    from vlmprune.eval.fidelity.journal import Journal
    from vlmprune.eval.fidelity.measure import Entry, Row
    from vlmprune.runtime.loading import Loaded

__all__ = ["Todo", "measure"]


class Todo:
    """What is to be measured, and what of it the journal has."""

    def __init__(self, journal: Journal, entries: Sequence[Entry], pairs: Sequence[Pair]):
        self.journal, self.pairs = journal, pairs
        self.steps = [(entry, seed) for entry in entries for seed in entry.seeds]

    def keys(self, pair: Pair) -> list[str]:
        """Of the rows of a prompt, in the order of `steps`."""
        return [self.journal.key(pair.picture, pair.path, pair.prompt, *step) for step in self.steps]

    def left(self) -> list[Pair]:
        """The prompts that lack a row."""
        return [pair for pair in self.pairs if any(key not in self.journal.rows for key in self.keys(pair))]

    def rows(self) -> list[Row]:
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
    waiting: list[tuple[Pair, dict[str, torch.Tensor]]] = []
    left = todo.left()
    if len(left) < len(todo.pairs):
        note(f"{counted(len(todo.pairs) - len(left), 'prompt')} of {len(todo.pairs)} measured before")
    ready, progress = prepared(loaded, left, skipped), Progress(len(left), 1 + len(todo.steps))
    try:
        while True:
            while len(waiting) < batch and (next_one := next(ready, None)):
                waiting.append(next_one)
            if not waiting:
                break
            lost = sum(pair.picture in skipped for pair in left)
            try:
                guarded(one_batch, loaded, todo, waiting[:batch], longest, progress.at(lost))
            except CommandError as error:
                if batch == 1 or not isinstance(error.__context__, torch.OutOfMemoryError | MemoryError):
                    raise
                batch = max(1, min(batch, len(waiting)) // 2)
                note(f"out of memory: going on with {counted(batch, 'prompt')} at a time")
                continue
            progress.done += len(waiting[:batch])
            waiting = waiting[batch:]
    except KeyboardInterrupt:
        note("interrupted: reporting on what is finished (--resume goes on)")
        return True
    finally:
        status()
    return False


def prepared(loaded: Loaded, pairs: Sequence[Pair], skipped: dict[str, str]) -> Iterator[tuple[Pair, dict[str, Any]]]:
    """Pairs with the model's inputs, each picture read once; pictures that cannot be read are noted and left out."""
    name, image, strange = None, None, 0
    for pair in pairs:
        if pair.picture in skipped:
            continue
        try:
            if pair.picture != name:
                name, image = pair.picture, read_picture(pair.path)
                strange += strange_pictures(loaded, [image])
            yield pair, model_inputs(loaded, [image], pair.prompt)
        except UserError as error:
            skipped[pair.picture] = str(error)
            note(f"left out: {error}")
    warn_of_photographs(loaded.source.name, strange)


def one_batch(
    loaded: Loaded, todo: Todo, some: Sequence[tuple[Pair, dict[str, Any]]], longest: int, tell: Callable
) -> None:
    """Measure one batch under all entries; the unpruned model answers once for all of them."""
    tokenizer, journal = loaded.processor.tokenizer, todo.journal

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    inputs = fidelity.collate([prompt for _, prompt in some], pad)
    tell(0, "full model")
    full = fidelity.reference(loaded.model, inputs, longest)
    keys = [todo.keys(pair) for pair, _ in some]
    for step, (entry, seed) in enumerate(todo.steps):
        if all(mine[step] in journal.rows for mine in keys):
            continue
        tell(step + 1, entry.label)
        with patch(loaded, Job(entry.method, entry.seeded(seed))) as handle:
            compared = fidelity.compare(handle, inputs, full, longest)
        made = {}
        for i, ((pair, _), one, mine) in enumerate(zip(some, compared, keys, strict=True)):
            said = text(full.answer(i)), text(one.tokens)
            made[mine[step]] = fidelity.Row(pair.picture, pair.prompt, entry.label, seed, *said, one)
        journal.add({key: row for key, row in made.items() if key not in journal.rows})


class Progress:
    """A bar over prompts, and how long it will take."""

    def __init__(self, total: int, steps: int):
        self.total, self.steps, self.done, self.start = total, steps, 0, time.monotonic()

    def at(self, lost: int) -> Callable[[int, str], None]:
        """What shows step `step` of the next batch, `lost` prompts having been left out."""
        total = max(1, self.total - lost)

        def tell(step: int, label: str) -> None:
            share = min(1.0, self.done / total)
            bar = "#" * round(20 * share)
            left = ""
            if self.done:
                minutes = (time.monotonic() - self.start) / self.done * (total - self.done) / 60
                left = f", {minutes:.0f} min left" if minutes >= 1 else f", {60 * minutes:.0f} s left"
            status(f"[{bar:.<20}] {self.done}/{total} prompts{left} (step {step + 1} of {self.steps}: {label})")

        return tell
