"""What lmms-eval returns for one cell, as the cell file has it; results that are not whole are errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

__all__ = ["Incomplete", "NoMetric", "cell_of_results", "failed_cell"]

#: Where data sets name the picture that a question is about: several questions about one are not independent.
PICTURE = ("picture_id", "image_id", "imageId", "img_id", "image_name", "image_source")


class Incomplete(Exception):
    """lmms-eval came back without an error and without everything it was asked for."""


class NoMetric(Incomplete):
    """A task without the metric that the config names: no other cell of the task would have it."""


def failed_cell(about: Mapping[str, Any], error: str, elapsed_s: float) -> dict[str, Any]:
    """The content of a cell that could not be measured."""
    return {
        **about,
        "metrics": {},
        "metric": None,
        "samples": [],
        "summary": {},
        "elapsed_s": elapsed_s,
        "error": error,
    }


def cell_of_results(
    about: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    records: Iterable[Mapping[str, Any]],
    task: Any,
    wanted: str | None,
    elapsed_s: float,
) -> dict[str, Any]:
    """The content of a cell file.

    Args:
        about: its first entries: format, cell, key, depends.
        results: what `simple_evaluate` returned.
        records: what the requests cost, as of `VlmPrune.take_records`.
        task: lmms-eval's task object.
        wanted: the main metric, or None for the first of the task's list.
        elapsed_s: seconds that the cell took.

    Raises:
        NoMetric: the task has no metric called `wanted`.
        Incomplete: documents without an answer, no metric that is a number.
    """
    name = about["cell"]["task"]
    if not results or name not in results.get("results", {}):
        raise Incomplete("lmms-eval returned no results")
    metrics, filters = metrics_of(results["results"][name], results["higher_is_better"].get(name, {}))
    main = main_metric(results["results"][name], metrics, task, wanted)
    costs: dict[int, Mapping[str, Any]] = {}
    for record in records:
        costs.setdefault(record["doc"], record)
    samples = samples_of(results["samples"][name], costs, main, list(filters.values()), filters[main], task)
    wanted_count = results["n-samples"][name]["effective"]
    if len(samples) != wanted_count:
        raise Incomplete(f"{len(samples)} of {wanted_count} documents were answered")
    return {
        **about,
        "metrics": metrics,
        "metric": main,
        "samples": samples,
        "documents": results["n-samples"][name]["original"],
        "summary": summary_of(samples, list(costs.values())),
        "elapsed_s": elapsed_s,
        "error": None,
    }


def main_metric(found: Mapping[str, Any], metrics: Mapping[str, Any], task: Any, wanted: str | None) -> str:
    """The metric that a cell is about: the one that is wanted, or the first of the task's list.

    Args:
        found: all that lmms-eval computed.
        metrics: those of it that are numbers.

    Raises:
        NoMetric, Incomplete: as of `cell_of_results`.
    """
    named = {key.partition(",")[0] for key in found}
    if wanted is not None and wanted.partition(" (")[0] not in named:
        raise NoMetric(f"this task has no metric {wanted!r}; it has {', '.join(metrics) or 'none that is a number'}")
    if not metrics:
        raise Incomplete("no metric of this task is a number (does it only write a file to submit?)")
    main = wanted or first_of(task, metrics)
    if main not in metrics:
        raise Incomplete(f"{main} is not a number here; this task has {', '.join(metrics)}")
    return main


def number_of(value: Any) -> float | None:
    """A value that lmms-eval computed as a finite number; None where it is none."""
    number = math.nan if isinstance(value, bool) or not hasattr(value, "__float__") else float(value)
    return number if math.isfinite(number) else None


def metrics_of(found: Mapping[str, Any], higher: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Metrics that are numbers, and the filter that each was computed behind; a second filter is named in brackets."""
    metrics: dict[str, Any] = {}
    filters: dict[str, str] = {}
    for key, value in found.items():
        metric, comma, behind = key.partition(",")
        number = number_of(value)
        if not comma or "_stderr" in metric or number is None:
            continue
        shown = metric if metric not in metrics else f"{metric} ({behind})"
        up = higher.get(metric)
        metrics[shown] = {"value": number, "higher_is_better": True if up is None else bool(up)}
        filters[shown] = behind
    return metrics, filters


def first_of(task: Any, metrics: Mapping[str, Any]) -> str:
    """The first metric of a task's list that is there, else the first there is."""
    listed = (entry.get("metric") for entry in task.config.metric_list or ())
    return next((name for name in listed if name in metrics), next(iter(metrics)))


def samples_of(
    logged: Sequence[Mapping[str, Any]],
    costs: Mapping[int, Mapping[str, Any]],
    main: str,
    filters: Sequence[str],
    behind: str,
    task: Any,
) -> list[dict[str, Any]]:
    """One entry per document, in the order of the data set.

    With several filters lmms-eval logs a document once for each, in their order; that of the main metric is taken.
    """
    by_doc: dict[int, list[Mapping[str, Any]]] = {}
    for sample in logged:
        by_doc.setdefault(sample["doc_id"], []).append(sample)
    place = list(dict.fromkeys(filters)).index(behind)
    samples = []
    for doc, several in sorted(by_doc.items()):
        if doc not in costs:
            raise Incomplete(f"nothing was measured for document {doc}")
        sample, cost = several[min(place, len(several) - 1)], costs[doc]
        answers = sample["filtered_resps"]
        samples.append(
            {
                "doc": doc,
                "cluster": cluster_of(sample.get("doc") or {}, doc, task),
                "score": score_of(sample.get(main.partition(" (")[0])),
                "answer": str(answers[0] if len(answers) == 1 else answers),
                "target": str(sample["target"]),
                **{word: cost[word] for word in cost if word not in ("task", "doc", "peak_memory_bytes")},
            }
        )
    return samples


def cluster_of(document: Mapping[str, Any], doc: int, task: Any) -> str:
    """What a sample is resampled by: its picture where the data set names it, else itself."""
    own = getattr(task.config, "cluster_key", None)
    for word in (own, *PICTURE) if own else PICTURE:
        if isinstance(value := document.get(word), str | int) and str(value):
            return str(value)
    return str(doc)


def score_of(value: Any) -> float | None:
    """A sample's score: a number, or the `score` of what a task's aggregation is given."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if not hasattr(value, "__float__") or not math.isfinite(float(value)):
        return None
    return float(value)


def summary_of(samples: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean token counts, median times, the largest peak memory."""
    speeds = [speed for s in samples if (speed := s["decode_tokens_per_s"]) is not None]
    peaks = [peak for c in costs if (peak := c["peak_memory_bytes"]) is not None]
    return {
        **{word: fmean(s[word] for s in samples) for word in ("tokens_before", "tokens_after", "layer_average")},
        "ttft_s": median(s["ttft_s"] for s in samples),
        "decode_tokens_per_s": median(speeds) if speeds else None,
        "peak_memory_bytes": max(peaks, default=None),
    }
