"""A cell's content from what lmms-eval returns, by hand: every number where right and wrong differ."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vlmprune.eval.lmms import outcome
from vlmprune.eval.lmms.outcome import Incomplete, NoMetric, cell_of_results, failed_cell

ABOUT = {"format": 1, "cell": {"task": "t"}, "key": "k", "depends": {}}


def task(metrics=("exact_match",), cluster_key=None):
    config = SimpleNamespace(metric_list=[{"metric": name} for name in metrics], cluster_key=cluster_key)
    return SimpleNamespace(config=config)


def record(doc, number=1, **more):
    return {
        "task": "t", "doc": doc, "tokens_before": 100 * number, "tokens_after": 10 * number,
        "layer_average": 5.0 * number, "ttft_s": 0.5 * number, "output_tokens": number,
        "decode_tokens_per_s": 2.0 * number, "peak_memory_bytes": 1000 * number,
    } | more  # fmt: skip


def logged(doc, answer="a", *, document=None, target="a", **scores):
    answers = answer if isinstance(answer, list) else [answer]
    return {"doc_id": doc, "doc": document or {}, "target": target, "filtered_resps": answers, **scores}


def results(metrics, samples, documents=None, higher=None, original=50):
    count = len({s["doc_id"] for s in samples}) if documents is None else documents
    return {
        "results": {"t": {"alias": "t", **metrics}},
        "higher_is_better": {"t": higher or {}},
        "samples": {"t": samples},
        "n-samples": {"t": {"original": original, "effective": count}},
    }


def cell(metrics, samples, records=None, wanted=None, about_task=None, **more):
    records = [record(doc) for doc in sorted({s["doc_id"] for s in samples})] if records is None else records
    return cell_of_results(ABOUT, results(metrics, samples, **more), records, about_task or task(), wanted, 9.0)


def test_a_cell_by_hand():
    records = [record(7, 4), record(2, 1), record(5, 3, decode_tokens_per_s=None), record(3, 20)]
    samples = [
        logged(doc, f"answer {doc}", target=doc, exact_match=doc / 10, document={"image_id": f"p{doc % 2}"})
        for doc in (7, 2, 5, 3)
    ]
    found = cell({"exact_match,none": 0.425, "exact_match_stderr,none": 0.1}, samples, records)
    assert {word: found[word] for word in ("format", "key", "metric", "documents", "elapsed_s", "error")} == {
        "format": 1, "key": "k", "metric": "exact_match", "documents": 50, "elapsed_s": 9.0, "error": None,
    }  # fmt: skip
    assert found["metrics"] == {"exact_match": {"value": 0.425, "higher_is_better": True}}
    assert [s["doc"] for s in found["samples"]] == [2, 3, 5, 7]
    assert found["samples"][0] == {
        "doc": 2, "cluster": "p0", "score": 0.2, "answer": "answer 2", "target": "2", "tokens_before": 100,
        "tokens_after": 10, "layer_average": 5.0, "ttft_s": 0.5, "output_tokens": 1, "decode_tokens_per_s": 2.0,
    }  # fmt: skip
    # of 1, 20, 3 and 4: the mean of tokens is 7, the median of times 3.5, and of the speeds that there are 4
    assert found["summary"] == {
        "tokens_before": 700, "tokens_after": 70, "layer_average": 35, "ttft_s": 1.75, "decode_tokens_per_s": 8,
        "peak_memory_bytes": 20000,
    }  # fmt: skip


def test_what_was_not_measured_is_none():
    records = [record(0, decode_tokens_per_s=None, peak_memory_bytes=None)]
    summary = cell({"exact_match,none": 1.0}, [logged(0, exact_match=1.0)], records)["summary"]
    assert summary["decode_tokens_per_s"] is None
    assert summary["peak_memory_bytes"] is None
    mixed = [record(0, 5), record(1, peak_memory_bytes=None)]
    samples = [logged(0, exact_match=1.0), logged(1, exact_match=1.0)]
    assert cell({"exact_match,none": 1.0}, samples, mixed)["summary"]["peak_memory_bytes"] == 5000


def test_the_peak_of_requests_that_were_asked_twice_is_in_the_summary_once():
    """The first record of a document counts: what is asked again (padding of the last batch) is left out."""
    records = [record(0, 1), record(1, 2), record(0, 9)]
    samples = [logged(0, exact_match=1.0), logged(1, exact_match=0.0)]
    found = cell({"exact_match,none": 0.5}, samples, records)
    assert [s["tokens_after"] for s in found["samples"]] == [10, 20]
    assert found["summary"]["peak_memory_bytes"] == 2000


@pytest.mark.parametrize(("wanted", "scores", "answers"), [
    (None, [0.1, 0.3], ["strict 0", "strict 1"]),
    ("exact_match", [0.1, 0.3], ["strict 0", "strict 1"]),
    ("exact_match (loose)", [0.2, 0.4], ["loose 0", "loose 1"]),
])  # fmt: skip
def test_samples_are_those_behind_the_filter_of_the_main_metric(wanted, scores, answers):
    samples = [
        logged(doc, f"{behind} {doc}", exact_match=score)
        for doc, pair in ((0, (0.1, 0.2)), (1, (0.3, 0.4)))
        for behind, score in zip(("strict", "loose"), pair, strict=True)
    ]
    found = cell({"exact_match,strict": 0.2, "exact_match,loose": 0.3}, samples, wanted=wanted)
    assert found["metric"] == (wanted or "exact_match")
    assert found["metrics"][found["metric"]]["value"] == (0.3 if wanted and "loose" in wanted else 0.2)
    assert [s["score"] for s in found["samples"]] == scores
    assert [s["answer"] for s in found["samples"]] == answers


def test_a_document_that_is_logged_once_for_all_filters():
    samples = [logged(0, "only", exact_match=0.5)]
    found = cell({"exact_match,one": 1.0, "exact_match,two": 2.0}, samples, wanted="exact_match (two)")
    assert found["samples"][0]["answer"] == "only"


def test_samples_may_be_logged_without_their_documents():
    sample = logged(4, exact_match=1.0)
    del sample["doc"]
    assert cell({"exact_match,none": 1.0}, [sample])["samples"][0]["cluster"] == "4"


def test_two_metrics_behind_each_filter():
    """The place of a filter is among the filters, not among the metrics."""
    samples = [logged(0, "x", em=0.1, f1=0.2), logged(0, "y", em=0.3, f1=0.4)]
    metrics = {"em,one": 1.0, "f1,one": 2.0, "em,two": 3.0, "f1,two": 4.0}
    picked = {
        wanted: cell(metrics, samples, wanted=wanted, about_task=task(("em", "f1")))
        for wanted in ("em", "f1", "em (two)", "f1 (two)")
    }
    assert [c["samples"][0]["score"] for c in picked.values()] == [0.1, 0.2, 0.3, 0.4]
    assert [c["metrics"][c["metric"]]["value"] for c in picked.values()] == [1, 2, 3, 4]
    assert [c["samples"][0]["answer"] for c in picked.values()] == ["x", "x", "y", "y"]


def test_the_main_metric_is_the_first_of_the_tasks_list_that_is_a_number():
    metrics = {"other,none": 1.0, "second,none": 2.0, "first,none": "file.json"}
    samples = [logged(0, other=1.0, second=2.0)]
    assert cell(metrics, samples, about_task=task(("first", "second", "other")))["metric"] == "second"
    assert cell(metrics, samples, about_task=task(()))["metric"] == "other"  # as lmms-eval lists them
    assert (
        cell(metrics, samples, about_task=SimpleNamespace(config=SimpleNamespace(metric_list=None)))["metric"]
        == "other"
    )
    assert cell(metrics, samples, wanted="other", about_task=task(("second",)))["metric"] == "other"


@pytest.mark.parametrize(
    ("said", "better"), [({}, True), ({"m": None}, True), ({"m": True}, True), ({"m": False}, False)]
)
def test_which_way_is_better(said, better):
    metrics = {"m,none": 1.0, "m,two": 2.0}
    found = cell(metrics, [logged(0, m=1.0)], higher=said, about_task=task(("m",)))["metrics"]
    assert [entry["higher_is_better"] for entry in found.values()] == [better, better]


def test_metrics_that_are_numbers():
    metrics = {
        "int,none": 3, "numpy,none": np.float32(0.5), "nan,none": float("nan"), "inf,none": float("inf"),
        "flag,none": True, "text,none": "0.5", "list,none": [1.0], "x_stderr,none": 0.1, "alias": 1.0,
    }  # fmt: skip
    found, filters = outcome.metrics_of(metrics, {})
    assert {name: entry["value"] for name, entry in found.items()} == {"int": 3.0, "numpy": 0.5}
    assert filters == {"int": "none", "numpy": "none"}


@pytest.mark.parametrize(
    ("document", "own", "cluster"),
    [
        ({"picture_id": "p", "image_id": "i"}, None, "p"),
        ({"image_id": "i"}, None, "i"),
        ({"image_id": 0}, None, "0"),
        ({"image_id": ""}, None, "4"),
        ({"image_id": [1], "img_id": "g"}, None, "g"),
        ({"scene": "s", "image_id": "i"}, None, "i"),
        ({"scene": "s", "image_id": "i"}, "scene", "s"),
        ({"image_id": "i"}, "scene", "i"),  # it has no such field
        ({}, "scene", "4"),
        ({"question": "q"}, None, "4"),
    ],
)
def test_what_a_sample_is_resampled_by(document, own, cluster):
    found = cell(
        {"exact_match,none": 1.0}, [logged(4, exact_match=1.0, document=document)], about_task=task(cluster_key=own)
    )
    assert [s["cluster"] for s in found["samples"]] == [cluster]


def test_tasks_without_a_cluster_key():
    about = SimpleNamespace(config=SimpleNamespace(metric_list=[]))
    assert outcome.cluster_of({"image_id": "i"}, 3, about) == "i"


@pytest.mark.parametrize(
    ("value", "score"),
    [(1, 1.0), (0.25, 0.25), (np.float64(0.5), 0.5), (True, 1.0), ({"score": 2, "id": 9}, 2.0), ({"id": 9}, None),
     (None, None), ("0.5", None), (float("nan"), None), (float("inf"), None), ([1.0], None)],
)  # fmt: skip
def test_scores(value, score):
    assert outcome.score_of(value) == score


def test_several_answers_of_one_sample():
    found = cell({"exact_match,none": 1.0}, [logged(0, ["a", "b"], exact_match=1.0)])
    assert found["samples"][0]["answer"] == "['a', 'b']"


def test_results_that_are_not_whole():
    samples = [logged(0, exact_match=1.0), logged(1, exact_match=1.0)]
    good = {"exact_match,none": 1.0}
    with pytest.raises(Incomplete, match="no results"):
        cell_of_results(ABOUT, None, [], task(), None, 1.0)
    with pytest.raises(Incomplete, match="no results"):
        cell_of_results(ABOUT, {"results": {"u": good}}, [], task(), None, 1.0)
    with pytest.raises(Incomplete, match="2 of 3 documents"):
        cell(good, samples, documents=3)
    with pytest.raises(Incomplete, match="nothing was measured for document 1"):
        cell(good, samples, [record(0)])
    with pytest.raises(NoMetric, match=r"no metric 'f1'; it has exact_match"):
        cell(good, samples, wanted="f1")
    with pytest.raises(Incomplete, match="no metric of this task is a number") as error:
        cell({"exact_match,none": "x"}, samples)
    assert not isinstance(error.value, NoMetric)
    with pytest.raises(Incomplete, match="exact_match is not a number here; this task has f1") as error:
        cell({"exact_match,none": "x", "f1,none": 1.0}, samples, wanted="exact_match")
    assert not isinstance(error.value, NoMetric)
    with pytest.raises(NoMetric, match="it has none that is a number"):
        cell({"exact_match,none": "x"}, samples, wanted="f1")


def test_a_failed_cell():
    assert failed_cell(ABOUT, "no memory", 3.0) == ABOUT | {
        "metrics": {}, "metric": None, "samples": [], "summary": {}, "elapsed_s": 3.0, "error": "no memory",
    }  # fmt: skip
