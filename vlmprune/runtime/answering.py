"""What the verbs do with a loaded model: answer, with and without pruning, and time the prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from vlmprune.runtime.errors import CommandError, UserError, brief, user_mistakes
from vlmprune.runtime.fewer_pixels import SAID, fitted
from vlmprune.runtime.loading import Loaded
from vlmprune.runtime.status import Bar, quiet, status

if TYPE_CHECKING:
    from vlmprune.api import Handle
    from vlmprune.methods.base import Method
    from vlmprune.spec import Job
    from vlmprune.trace import Trace

__all__ = ["Outcome", "check", "guarded", "one_pair", "patch", "prefill_times", "run_jobs", "seen_by"]

T = TypeVar("T")


Prepare = Callable[[Loaded], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a job did.

    Attributes:
        pairs: (plain, pruned) seconds of prefill through the first token.
        whole: visual tokens of every image as the full model sees it, where the job made the pictures smaller.
    """

    job: Job
    answer: str
    trace: Trace
    pairs: list[tuple[float, float]]
    whole: list[int] | None = None

    @property
    def counts(self) -> list[dict[str, int]]:
        """As `Trace.counts`, of the pictures as the full model sees them."""
        before = self.whole or [image["patches_before"] for image in self.trace.counts]
        return [image | {"patches_before": n} for image, n in zip(self.trace.counts, before, strict=True)]

    @property
    def total(self) -> dict[str, int]:
        """`counts`, summed over images."""
        return {name: sum(image[name] for image in self.counts) for name in self.counts[0]}

    @property
    def name(self) -> str:
        """The method as tables call it."""
        return f"{self.job.method} ({SAID})" if self.whole else self.job.method

    @property
    def layer_average(self) -> float:
        """Visual tokens, newlines included, of all images, averaged over the decoder's layers."""
        return sum(self.trace.layer_average(i) for i in range(len(self.trace.grids)))

    @property
    def times(self) -> dict[str, float] | None:
        """Median milliseconds, and the median over pairs of plain / pruned."""
        return times_of(self.pairs) if self.pairs else None


def seen_by(loaded: Loaded, job: Job) -> Loaded:
    """The model with the processor that prepares what a job is to see: itself, or one of smaller pictures.

    Raises:
        UserError: an unknown method, or an option that it does not take.
    """
    from vlmprune import spec
    from vlmprune.patches import family_of

    with user_mistakes():
        methods = spec.build(job.method, job.options)
    processor = fitted(loaded.processor, methods, family_of(loaded.model))
    return loaded if processor is loaded.processor else replace(loaded, processor=processor)


def patch(loaded: Loaded, job: Job) -> Handle:
    """Patch the model for a job; what it is shown then is prepared by the processor of `seen_by`.

    Raises:
        UserError: the method does not fit the model.
    """
    import vlmprune
    from vlmprune import spec
    from vlmprune.recipe import check_family

    with user_mistakes(f"{job.method} on {loaded.source.name}: "):
        check_family("the recipe", job.family, loaded.model.config.model_type)
        methods = spec.build(job.method, job.options)
        processor = seen_by(loaded, job).processor
        return vlmprune.patch(loaded.model, [made.told_by(processor) for made in methods])


def check(loaded: Loaded, todo: Sequence[Job]) -> None:
    """Raise UserError if a job does not fit the model, before any work is done."""
    for job in todo:
        patch(loaded, job).unpatch()


def guarded(run, *args: Any) -> Any:
    """Call `run` and turn what may go wrong in a model into a CommandError."""
    import torch

    import vlmprune

    try:
        with quiet(), torch.no_grad():
            return run(*args)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CommandError(f"out of memory: {brief(error)}") from None
    except (vlmprune.UnsupportedError, vlmprune.CutNotRunError) as error:
        raise CommandError(str(error)) from error
    except ValueError as error:  # a budget that this picture cannot meet, too long a prompt
        raise UserError(brief(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch says it on a CPU
            raise
        raise CommandError(f"out of memory: {brief(error)}") from None


def answer(loaded: Loaded, inputs: dict[str, Any], max_new_tokens: int) -> str:
    """The model's greedy answer, by whatever patch is on it."""

    def generate() -> str:
        made = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        new = made[:, inputs["input_ids"].shape[1] :]
        return loaded.processor.batch_decode(new, skip_special_tokens=True)[0].strip()

    return guarded(generate)


def seconds(model: Any, inputs: dict[str, Any]) -> float:
    """Time one prefill through its first token; reading the token waits for the device."""
    start = time.perf_counter()
    model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - start


def paired_times(
    handle: Handle, inputs: dict[str, Any], repeats: int, label: str, whole: dict[str, Any] | None = None
) -> list[tuple[float, float]]:
    """(plain, pruned) seconds of `repeats` pairs run one after the other, the order alternating, after a warm-up.

    `whole` is what the plain model gets, where that is something else.
    """
    given = {True: inputs if whole is None else whole, False: inputs}
    pairs = []
    for i in range(repeats + 1 if repeats else 0):
        status(f"{label}: timing {i}/{repeats}" if i else f"{label}: warming up")
        pairs.append(one_pair(handle, i, lambda plain: seconds(handle.model, given[plain])))
    return pairs[1:]


def one_pair(handle: Handle, number: int, measured: Callable[[bool], T]) -> tuple[T, T]:
    """What is measured of the plain model (True) and of the pruned one; who is first alternates with the number."""
    found: dict[bool, T] = {}
    for plain in (True, False) if number % 2 else (False, True):
        with handle.disabled() if plain else nullcontext():
            found[plain] = measured(plain)
    return found[True], found[False]


def prefill_times(loaded: Loaded, methods: Sequence[Method], inputs: dict[str, Any], repeats: int) -> dict[str, float]:
    """Milliseconds of prefills with and without methods, in interleaved pairs; as `Outcome.times`."""
    import vlmprune

    with vlmprune.patch(loaded.model, methods) as handle:
        return times_of(paired_times(handle, inputs, repeats, "prefill"))


def times_of(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median milliseconds of (plain, pruned) seconds, and the median over pairs of plain / pruned."""
    plain, pruned = zip(*pairs, strict=True)
    return {
        "plain_ms": 1e3 * median(plain),
        "pruned_ms": 1e3 * median(pruned),
        "ratio": median(a / b for a, b in pairs),
        "pairs": len(pairs),
    }


def run_job(
    loaded: Loaded,
    job: Job,
    inputs: dict[str, Any],
    max_new_tokens: int,
    repeats: int = 0,
    prepare: Prepare | None = None,
) -> Outcome:
    """Answer with one method, time it and leave the model as it was; as of `run_jobs`."""
    status(f"{job.label}: answering")
    mine, whole = seen_by(loaded, job), None
    own = inputs if mine is loaded or prepare is None else prepare(mine)
    if own is not inputs:
        whole = token_counts(inputs["image_grid_thw"], loaded.processor.image_processor.merge_size)
    with patch(loaded, job) as handle:
        said = answer(loaded, own, max_new_tokens)
        trace = handle.trace
        pairs = guarded(paired_times, handle, own, repeats, job.label, inputs)
    status()
    return Outcome(job, said, trace, pairs, whole)


def token_counts(grids: Any, merge: int) -> list[int]:
    """Visual tokens of packed pictures with these grids `(pictures, 3)` of patches."""
    return (grids.prod(1) // merge**2).tolist()


def run_jobs(
    loaded: Loaded,
    todo: Sequence[Job],
    inputs: dict[str, Any],
    max_new_tokens: int,
    bar: Bar,
    repeats: int = 0,
    prepare: Prepare | None = None,
) -> tuple[str, list[Outcome]]:
    """The full model's answer, and what every job did; a step of the bar each.

    Args:
        inputs: of the full model.
        prepare: makes them again by the processor of what it gets, where a job is to see something else.
    """
    plain, outcomes = answer(loaded, inputs, max_new_tokens), []
    bar.step()
    for job in todo:
        outcomes.append(run_job(loaded, job, inputs, max_new_tokens, repeats, prepare))
        bar.step()
    return plain, outcomes
