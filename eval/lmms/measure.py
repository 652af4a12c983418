"""What a call of `generate` costs: time to first token, decode speed, peak memory.

Nothing is run twice: the clock rides along as a stopping criterion, which `generate` asks right after it has chosen a
token. On a GPU the clock waits for the device when it starts, at the first token (where `generate` waits anyway, to
learn whether all are done) and at the end, and nowhere else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

__all__ = ["Cost", "Record", "StopAt", "Stopwatch", "summary"]


@dataclass(frozen=True)
class Record:
    """What one request cost. Times, speed and memory are those of the batch that the request was in.

    Attributes:
        task, doc: lmms-eval's name of the task and number of the document.
        tokens_before: visual tokens of the prompt, newlines counted, summed over its images.
        tokens_after: those that entered the language model.
        layer_average: the same as a mean over the decoder's layers.
        ttft_s: seconds from the call of `generate` (inputs on the device; the images are not encoded yet) to the first
            token, chosen and on the device.
        output_tokens: tokens generated for this request, the end token counted.
        decode_tokens_per_s: tokens of all the batch's requests after their first ones, per second; None if there were
            none.
        peak_memory_bytes: on a GPU, the most that torch had allocated during the call, weights included, summed over
            GPUs; on a CPU, the most memory that the whole process had resident during the call (Linux; None elsewhere).
    """

    task: str
    doc: int
    tokens_before: int
    tokens_after: int
    layer_average: float
    ttft_s: float
    output_tokens: int
    decode_tokens_per_s: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """Seconds of one call of `generate` and its peak memory, as in `Record`."""

    ttft_s: float
    total_s: float
    peak_memory_bytes: int | None

    def decode_speed(self, output_tokens: Sequence[int]) -> float | None:
        """Tokens after the first ones per second; None if there were none. `output_tokens` has a row's count each."""
        after, seconds = sum(count - 1 for count in output_tokens if count), self.total_s - self.ttft_s
        return after / seconds if after > 0 and seconds > 0 else None


class Stopwatch(StoppingCriteria):
    """Measures the call of `generate` that it is given to as a stopping criterion; it never stops anything.

    with Stopwatch(model) as watch:
        model.generate(..., stopping_criteria=StoppingCriteriaList([watch]))
    watch.cost
    """

    def __init__(self, model: torch.nn.Module):
        self.devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.first: float | None = None
        self.cost: Cost | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = self.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def __enter__(self) -> Stopwatch:
        self.resettable = reset_peak(self.devices)
        self.first, self.cost = None, None
        self.start = self.now()
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None and self.first is not None:
            end = self.now()
            peak = read_peak(self.devices) if self.resettable else None
            self.cost = Cost(self.first - self.start, end - self.start, peak)

    def now(self) -> float:
        for device in self.devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()


def reset_peak(devices: Sequence[torch.device]) -> bool:
    """Start a new peak; whether that is possible here."""
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    if devices:
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    except OSError:
        return False
    return True


def read_peak(devices: Sequence[torch.device]) -> int | None:
    """Bytes since `reset_peak`."""
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None


class StopAt(StoppingCriteria):
    """Ends a row as soon as its new text holds one of some strings.

    Only a shortcut: whoever reads the text cuts it off at the string. So it is enough to look at the last tokens.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompt_length: int):
        self.strings, self.tokenizer, self.prompt_length = strings, tokenizer, prompt_length
        self.tail = max(map(len, strings)) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_length :][:, -self.tail :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        done = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def criteria(*given: StoppingCriteria | None) -> StoppingCriteriaList:
    """A list of those that are there; the first is asked first."""
    return StoppingCriteriaList([one for one in given if one is not None])


def summary(records: Sequence[Record]) -> dict[str, float]:
    """Means over requests (of peak memory the largest), as numbers for lmms-eval's `throughput` block."""
    names = {
        "visual_tokens_before": "tokens_before",
        "visual_tokens_entering_llm": "tokens_after",
        "visual_tokens_layer_average": "layer_average",
        "ttft_s": "ttft_s",
        "decode_tokens_per_s": "decode_tokens_per_s",
    }
    found = {shown: [v for r in records if (v := getattr(r, name)) is not None] for shown, name in names.items()}
    made = {shown: fmean(values) for shown, values in found.items() if values}
    if peaks := [r.peak_memory_bytes for r in records if r.peak_memory_bytes is not None]:
        made["max_peak_memory_bytes"] = float(max(peaks))
    return made
