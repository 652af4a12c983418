"""What pruning brings in an engine: requests in flight, in turns with the unpruned model and what is possible at best.

Two engines in this process take turns: vLLM's own class (pictures as they are, and embeddings of as many rows as are
kept: the ceiling, which pays neither tower nor choice), and the pruned one, whose requests bring their budgets.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmprune import embedded
from vlmprune.eval.bench import serving_model
from vlmprune.eval.bench.results import describe_machine
from vlmprune.eval.bench.shapes import find_shape
from vlmprune.eval.bench.stats import ratio
from vlmprune.runtime.status import status
from vlmprune.serving.settings import KEEP
from vlmprune.vllm import overrides

__all__ = ["Engines", "Runner", "Timed", "compare", "embedding", "measured", "rival_size"]

#: One process, so that two engines can take turns and a request is not waited for by another process.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
WHOLE, PRUNED, CEILING, RIVAL = "unpruned", "pruned", "ceiling", "fewer pixels"


@dataclass(frozen=True)
class Timed:
    """One run: so many requests, so many of them in flight.

    Attributes:
        seconds: from the first request to the end of the last.
        first: seconds from every request's arrival to its first token.
        tokens: generated.
        prompt: tokens of a prompt.
    """

    seconds: float
    first: list[float]
    requests: int
    tokens: int
    prompt: int


@dataclass(frozen=True)
class Runner:
    """One who takes part: what it is called, in which engine it runs, and what its requests are."""

    name: str
    keep: int | float | None
    engine: Any
    request: Any  # a number -> a prompt


class Engines:
    """The two engines and what they are asked.

    Args:
        folder: a model whose weights have the names that vLLM's own classes know.
        method, options: as of `overrides`, without a budget.
        keeps: budgets; the first is the engine's own.
        prompt_tokens: text of a prompt, half of it before the picture.
    """

    def __init__(
        self, folder: Path, method: str, options: dict[str, Any], keeps: Sequence[int | float], prompt_tokens: int
    ):
        from transformers import AutoConfig

        from vlmprune.serving import host

        self.config, self.text = AutoConfig.from_pretrained(folder), prompt_tokens
        settings = {
            "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "mm_processor_cache_gb": 0,
            "max_model_len": 4096, "limit_mm_per_prompt": {"image": 1}, "distributed_executor_backend": "uni",
        }  # fmt: skip
        status("starting vLLM's own class")
        self.plain = host.LLM(str(folder), enable_mm_embeds=True, **settings)
        status("starting the pruned one")
        self.pruned = host.LLM(str(folder), **overrides(str(folder), method, keep=keeps[0], **options), **settings)
        self.block = self.pruned.llm_engine.vllm_config.cache_config.block_size

    @property
    def served(self) -> Any:
        """The pruned model."""
        return self.model(self.pruned)

    @staticmethod
    def model(engine: Any) -> Any:
        """The model that runs in an engine."""
        return engine.llm_engine.model_executor.driver_worker.worker.model_runner.model

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures: the tower's, or twice that where there are crops."""
        tile = self.config.vision_config.image_size
        return (2 * tile, 2 * tile) if self.served.served.family.views else (tile, tile)

    def prompt(self, number: int, pictures: Any, keep: int | float | None = None) -> dict[str, Any]:
        """A prompt with text of its own around a picture."""
        rng, token = np.random.default_rng(number), self.config.image_token_index
        text = [int(t) for t in rng.integers(10, self.config.text_config.vocab_size, self.text) if t != token]
        half = len(text) // 2
        made = {"prompt_token_ids": [*text[:half], token, *text[half:]], "multi_modal_data": {"image": pictures}}
        return made if keep is None else made | {"mm_processor_kwargs": {KEEP: keep}}

    def picture(self, number: int, size: tuple[int, int]) -> Image.Image:
        """A picture of noise that nobody has seen."""
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def rows(self, number: int, kept: int) -> torch.Tensor:
        """Embeddings of as many rows as are kept of a picture."""
        generator = torch.Generator().manual_seed(number)
        return torch.randn(1, kept, self.config.text_config.hidden_size, generator=generator) * 0.02

    def runners(self, keeps: Sequence[int | float]) -> list[Runner]:
        """All who take part."""
        served, size = self.served.served, self.size
        packed = size if served.family.needs_sizes else None
        made = [Runner(WHOLE, None, self.plain, lambda n: self.prompt(n, self.picture(n, size)))]
        for keep in keeps:
            kept = served.kept(packed, keep)
            made.append(Runner(PRUNED, keep, self.pruned, lambda n, k=keep: self.prompt(n, self.picture(n, size), k)))
            made.append(Runner(CEILING, keep, self.plain, lambda n, k=kept: self.prompt(n, self.rows(n, k))))
            if smaller := rival_size(served, size, kept):
                made.append(Runner(RIVAL, keep, self.plain, lambda n, s=smaller: self.prompt(n, self.picture(n, s))))
        return made


def measured(
    asked: dict[str, Any], options: dict[str, Any], keeps: Sequence[int | float], flying: Sequence[int]
) -> dict[str, Any]:
    """All rows, with the settings and the machine.

    Args:
        asked: settings by the names of their flags.
        options: of the method.
        flying: requests at a time.

    Raises:
        ValueError: something that cannot be served.
    """
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    pairs, rows = asked["pairs"], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = servable(asked["model"], asked["shape"], Path(scratch))
        engines = Engines(folder, asked["method"], options, keeps, asked["prompt_tokens"])
        for number in flying:
            rows += compare(engines, keeps, number, pairs, max(number, 2), asked["new_tokens"])
        costs = embedding(engines, keeps, 2 * pairs + 1, 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"asked": asked, "rows": rows, "embed_multimodal": costs, "machine": describe_machine(device)}


def servable(model: str | None, shape: str | None, scratch: Path) -> Path:
    """A folder that vLLM can serve: the user's own, or one made in `scratch`."""
    if model is None:
        serving_model.save(find_shape(shape), scratch)
    elif model in embedded.NAMES:
        serving_model.with_older_names(embedded.path(model), scratch)
    else:
        return Path(model)
    return scratch


def rival_size(served: Any, size: tuple[int, int], kept: int) -> tuple[int, int] | None:
    """The size to which a picture is shrunk beforehand to have about `kept` tokens; None where none has fewer."""
    if not served.family.needs_sizes:
        return None
    sizes = {tuple(max(1, round(edge * share / 32)) for edge in size) for share in range(1, 33)}
    fewer = [one for one in sizes if served.grid(one).tokens < served.grid(size).tokens]
    return min(fewer, key=lambda one: (abs(served.grid(one).tokens - kept), -one[0] * one[1]), default=None)


def run(runner: Runner, numbers: Iterator[int], requests: int, flying: int, longest: int) -> Timed:
    """Serve requests, `flying` of them in flight until none is left to send."""
    from vlmprune.serving import host

    engine = runner.engine.llm_engine
    params = host.SamplingParams(temperature=0, max_tokens=longest, ignore_eos=True, detokenize=False)
    prompts = [(str(number), runner.request(number)) for number in (next(numbers) for _ in range(requests))]
    sent, first, tokens, length, start = {}, {}, 0, 0, time.perf_counter()
    waiting = iter(prompts)

    def send() -> None:
        if (one := next(waiting, None)) is not None:
            sent[one[0]] = time.perf_counter()
            (rendered,) = engine.renderer.render_cmpl([one[1]])
            engine.add_request(one[0], rendered, params)

    for _ in range(flying):
        send()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].token_ids and output.request_id not in first:
                first[output.request_id] = time.perf_counter() - sent[output.request_id]
            if output.finished:
                tokens, length = tokens + len(output.outputs[0].token_ids), len(output.prompt_token_ids)
                send()
    if len(first) != requests:
        raise RuntimeError(f"{requests} requests were sent and {len(first)} answered.")
    return Timed(time.perf_counter() - start, list(first.values()), requests, tokens, length)


def compare(
    engines: Engines, keeps: Sequence[int | float], flying: int, rounds: int, requests: int, longest: int
) -> list[dict[str, Any]]:
    """Rows of the table at one concurrency: every round all take part once, beginning with another one."""
    runners, numbers = engines.runners(keeps), count(1)
    for runner in runners:  # warm up
        run(runner, numbers, 1, 1, 2)
    found: list[list[Timed]] = [[] for _ in runners]
    for turn, step in product(range(rounds), range(len(runners))):
        i = (turn + step) % len(runners)
        status(f"{flying} in flight, round {turn + 1} of {rounds}: {runners[i].name} {runners[i].keep or ''}")
        found[i].append(run(runners[i], numbers, requests, flying, longest))
    whole = [one.seconds for one in found[0]]
    return [row(*one, whole, flying, longest, engines.block) for one in zip(runners, found, strict=True)]


def row(runner: Runner, runs: list[Timed], whole: list[float], flying: int, longest: int, block: int) -> dict[str, Any]:
    """What is said of one who took part; seconds but for `speedup`, which is paired by rounds."""
    first = [seconds for one in runs for seconds in one.first]
    return {
        "runner": runner.name,
        "keep": runner.keep,
        "in_flight": flying,
        "requests": runs[0].requests,
        "rounds": len(runs),
        "prompt": runs[0].prompt,
        "blocks": ceil((runs[0].prompt + longest) / block),
        "requests_per_second": median(one.requests / one.seconds for one in runs),
        "tokens_per_second": median(one.tokens / one.seconds for one in runs),
        "first_median": median(first),
        "first_95": quantiles(first, n=20, method="inclusive")[-1] if len(first) > 1 else first[0],
        "speedup": ratio(whole, [one.seconds for one in runs]),
    }


def embedding(engines: Engines, keeps: Sequence[int | float], rounds: int, pictures: int) -> list[dict[str, Any]]:
    """What `embed_multimodal` costs pruned, over vLLM's own on the same pictures, in turns."""
    served, own = engines.served, engines.model(engines.plain)
    size = engines.size
    packed = size if served.served.family.needs_sizes else None
    views = (served.served.grid(packed).views,) if packed else ()
    tile = engines.config.vision_config.image_size
    pixels = torch.randn(pictures, *views, 3, tile, tile, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pixels} | ({"image_sizes": torch.tensor([size] * pictures)} if packed else {})
    notes = {keep: served.note(keep, packed, pictures) for keep in keeps}
    runs = {None: partial(own.embed_multimodal, **given)}
    runs |= {keep: partial(served.embed_multimodal, **given, **{KEEP: notes[keep]}) for keep in keeps}
    times = in_turns(runs, rounds)
    return [{"keep": keep, "pictures": pictures, "cost": ratio(times[keep], times[None])} for keep in keeps]


@torch.inference_mode()
def in_turns(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of every run in every round but a first one, which warms up."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run_it in runs.items():
            start = time.perf_counter()
            run_it()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times
