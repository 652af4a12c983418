"""A plot as values and as a still picture, from made-up points."""

from __future__ import annotations

import pytest

from vlmprune.eval.report import render
from vlmprune.eval.report.chart import Chart, Mark

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")


@pytest.fixture
def chart():
    points = [Mark("", "unpruned", {"tokens": 100.0, "time": 9.0}, 1.0, full=True)]
    for label in ("b", "a", "random"):
        points += [
            Mark(label, f"{label} {x}", {"tokens": x, "time": x / 10}, x / 100, x / 200, x / 90) for x in (40.0, 5.0)
        ]
    points.append(Mark("a", "a in the second panel", {"time": 1.0}, 2.0, panel=1))
    return Chart({"tokens": "visual tokens", "time": "time, ms"}, {"score": "score", "kl": "KL"}, points, {"random"})


def test_values(chart):
    told = chart.values()
    assert [one["name"] for one in told["axes"]] == ["tokens", "time"]
    assert [one["title"] for one in told["panels"]] == ["score", "KL"]
    assert list(told["looks"]) == ["b", "a", "random"]
    assert told["looks"]["random"]["color"] is None  # the page's own grey
    assert told["looks"]["a"]["color"] != told["looks"]["b"]["color"]
    assert [one["label"] for one in told["points"]][:2] == ["full model", "b"]
    assert told["points"][1] | {"x": None} == {
        "label": "b", "name": "b 40.0", "x": None, "y": 0.4, "low": 0.2, "high": 40 / 90, "panel": 0, "full": False,
    }  # fmt: skip


def test_still_picture(chart, tmp_path):
    first, second = (axes for axes in chart.figure().axes if axes.get_visible())
    lines = {line.get_label(): line.get_xydata().tolist() for line in first.lines if len(line.get_xdata()) == 2}
    assert [[5.0, 0.05], [40.0, 0.4]] in lines.values()  # from left to right
    assert (first.get_xlabel(), first.get_ylabel(), second.get_ylabel()) == ("visual tokens", "score", "KL")
    assert not second.lines  # that point has no such x
    block = chart.block(tmp_path / "still.svg", "What it shows.")
    assert (tmp_path / "still.svg").read_text().startswith("<?xml")
    assert "](still.svg)" in render.markdown([block], tmp_path)
    assert "visual tokens" in render.html([block], "title")
