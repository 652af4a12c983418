"""What an entry costs on a user's own prompts, interleaved with the unpruned model: time, memory, cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlmprune.api import Handle
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.counting import kv_bytes, peak_bytes
from vlmprune.eval.bench.stats import ratio
from vlmprune.eval.fidelity import measure as fidelity
from vlmprune.eval.fidelity import run as fidelity_run
from vlmprune.eval.fidelity.journal import Journal
from vlmprune.eval.fidelity.measure import StudyEntry
from vlmprune.runtime.answering import guarded, one_pair, patch
from vlmprune.runtime.files import write_whole
from vlmprune.runtime.loading import Loaded
from vlmprune.runtime.prompts import Pair
from vlmprune.spec import Job

__all__ = ["AXES", "UNPRUNED", "CostBook", "EntryCosts", "measure_costs"]

FILE = "costs.json"
#: What plots show of costs (`EntryCosts.place`), and where the unpruned model stands there.
AXES = {"first": "first token, times as fast", "answer": "answer, times as fast", "cache": "cache, % of all"}
UNPRUNED = {"first": 1.0, "answer": 1.0, "cache": 100.0}


@dataclass(frozen=True)
class EntryCosts:
    """What a batch costs, unpruned and pruned.

    Attributes:
        first_ms, answer_ms: (unpruned, pruned) medians: through the first token, and of a whole answer of `tokens`.
        first, answer: unpruned / pruned, the median over pairs with its 95 % interval (`bench.stats.ratio`).
        peak, kv: bytes above the weights while it is prefilled, and in the cache behind it: (unpruned, pruned).
        tokens: of the timed answer, the same for both.
        batch: prompts.
    """

    first_ms: tuple[float, float]
    answer_ms: tuple[float, float]
    first: dict[str, float]
    answer: dict[str, float]
    peak: tuple[int, int]
    kv: tuple[int, int]
    tokens: int
    batch: int

    @property
    def memory(self) -> float:
        """The share of the unpruned model's bytes while a prompt is read."""
        return self.peak[1] / self.peak[0]

    @property
    def cache(self) -> float:
        """The share of its bytes in the cache."""
        return self.kv[1] / self.kv[0]

    @property
    def place(self) -> dict[str, float]:
        """Where it stands on `AXES`."""
        return {"first": self.first["median"], "answer": self.answer["median"], "cache": 100 * self.cache}


@torch.no_grad()
def measure_costs(
    handle: Handle,
    inputs: dict[str, Any],
    tokens: int,
    pairs: int,
    clock: Clock | None = None,
    whole: dict[str, Any] | None = None,
) -> EntryCosts:
    """Run pairs of the unpruned and the pruned model, in turns, after one of each that is not counted.

    Args:
        handle: of the patched model.
        inputs: a batch.
        tokens: of an answer; both models write as many.
        pairs: how often.
        clock: of the model's device, by default.
        whole: the batch that the unpruned model gets, where that is another one.
    """
    model = handle.model
    clock = clock or Clock(model.device)
    given = {True: inputs if whole is None else whole, False: inputs}
    cache: dict[bool, int] = {}

    def first(plain: bool) -> None:
        out = model(**given[plain], use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        cache[plain] = kv_bytes(out.past_key_values)

    def answer(plain: bool) -> None:
        model.generate(**given[plain], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1)

    took: dict[Callable, list[tuple[float, float]]] = {first: [], answer: []}
    for number, call in product(range(pairs + 1), took):
        took[call].append(one_pair(handle, number, lambda plain, call=call: clock.time(partial(call, plain))[1]))
    peaks = one_pair(handle, 1, lambda plain: peak_bytes(model.device, partial(first, plain)))
    told = {}
    for call, times in took.items():
        above, below = zip(*times[1:], strict=True)
        name = call.__name__
        told |= {name: ratio(above, below), f"{name}_ms": (1e3 * median(above), 1e3 * median(below))}
    batch = inputs["input_ids"].shape[0]
    return EntryCosts(**told, peak=peaks, kv=(cache[True], cache[False]), tokens=tokens, batch=batch)


class CostBook:
    """What entries cost, beside the rows of a journal; what is there is not measured again.

    Args:
        loaded: the model.
        journal: of the same folder and setting.
        pairs: prompts, of which the first that can be read are timed.
        batch: how many of them at a time.
        longest: tokens of an answer at most.
        repeats: timed pairs.
        skipped: gets the pictures that could not be read, and why.
    """

    def __init__(
        self,
        loaded: Loaded,
        journal: Journal,
        pairs: Sequence[Pair],
        batch: int,
        longest: int,
        repeats: int,
        skipped: dict[str, str],
    ):
        self.loaded, self.journal, self.pairs, self.skipped = loaded, journal, pairs, skipped
        self.batch, self.longest, self.repeats = batch, longest, repeats
        self.path = journal.path.with_name(FILE)
        self.known = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def __contains__(self, entry: StudyEntry) -> bool:
        return self.key(entry) in self.known

    def key(self, entry: StudyEntry) -> str:
        """What the costs of an entry are found by again."""
        method = self.journal.key("", Path(), "", entry, entry.seeds[0])
        about = [method, self.journal.setting, self.batch, self.repeats]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]

    @cached_property
    def timed(self) -> tuple[list[fidelity_run.Shown], dict[str, Any], int]:
        """The prompts that are timed, as a batch, and the length of an answer: what the unpruned model says to them."""
        some = list(islice(fidelity_run.prepared(self.loaded, self.pairs, self.skipped), self.batch))
        inputs = fidelity.collate([one.inputs for one in some], fidelity_run.padding_of(self.loaded))
        full = guarded(fidelity.reference, self.loaded.model, inputs, self.longest)
        return some, inputs, int(full.real.sum(1).max())

    def of_all(self, entries: Iterable[StudyEntry]) -> dict[str, EntryCosts]:
        """What entries cost, by label."""
        return {entry.label: self.of(entry) for entry in entries}

    def of(self, entry: StudyEntry) -> EntryCosts:
        """What an entry costs, measured where that is not known, and kept."""
        key = self.key(entry)
        if key not in self.known:
            some, inputs, tokens = self.timed
            job = Job(entry.method, entry.seeded(entry.seeds[0]))
            own = fidelity_run.inputs_of(self.loaded, job, some, inputs)
            both = () if own is inputs else (None, inputs)
            with patch(self.loaded, job) as handle:
                self.known[key] = asdict(guarded(measure_costs, handle, own, tokens, self.repeats, *both))
            write_whole(self.path, json.dumps(self.known, indent=1).encode())
        return EntryCosts(**self.known[key])
