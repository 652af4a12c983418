"""The pictures: every method has a look of its own, every point is where its numbers say, the front is marked."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
import run_folders as made

from vlmprune.eval import report, statistics
from vlmprune.eval.report import interactive, plots, tables, words

pytest.importorskip("matplotlib")
MANY = ["none", *(f"method{i}" for i in range(12)), "random", "grid", "pool", "downsample"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Twelve methods and the controls at three budgets on two tasks."""
    cells = made.grid_of(MANY, keeps=(0.5, 0.25, 0.1), tasks=("pope", "gqa"))
    return report.read(made.write(tmp_path_factory.mktemp("many"), cells))


def test_twelve_methods_look_different(many):
    looks = plots.styles(many.of("scene-llava", None))
    assert len(looks) == 16
    assert len({tuple(sorted(look.items())) for look in looks.values()}) == 16
    assert len({(look["color"], look.get("markerfacecolor")) for look in list(looks.values())[:12]}) == 12
    assert len({look["marker"] for look in looks.values()}) == 16
    assert [looks[name]["color"] for name in MANY[13:]] == list(plots.GREYS)


@pytest.mark.parametrize("axis", [plots.TOKENS, plots.TIME])
def test_points_and_front_are_where_the_numbers_say(many, axis):
    figure = plots.scatter(many, "scene-llava", axis, [None])
    (panel,) = figure.axes
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["full model", *MANY[1:], "Pareto front"]
    rows = [row for row in many.of("scene-llava", None) if not row.full]
    drawn = [line for line in panel.lines if line.get_marker() in plots.MARKERS and line.get_linestyle() != "None"]
    assert len(drawn) == 12
    for line, label in zip(drawn, MANY[1:13], strict=True):
        mine = sorted((axis.scale * getattr(r, axis.name), 100 * r.value) for r in rows if r.label == label)
        assert np.allclose(line.get_ydata(), [y for _, y in mine])
        assert np.allclose(line.get_xdata(), [x for x, _ in mine], rtol=axis.spread / 2 + 1e-9)
    every = many.of("scene-llava", None)
    front = statistics.pareto([getattr(r, axis.name) for r in every], [r.value for r in every])
    ring = next(line for line in panel.lines if line.get_markersize() == 14)
    assert sorted(ring.get_ydata()) == pytest.approx(
        sorted(100 * r.value for r, on in zip(every, front, strict=True) if on)
    )


def test_legend_lies_outside_the_panels(many):
    figure = plots.scatter(many, "scene-llava", plots.TOKENS, ["pope", "gqa"])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert all(not box.overlaps(panel.get_window_extent()) for panel in figure.axes)
    assert box.y0 >= 0


def test_retention_is_written_into_its_field(many):
    figure = plots.heat(many, "scene-llava")
    panel = figure.axes[0]
    rows = [row for row in many.of("scene-llava", None) if not row.full]
    texts = {text.get_position(): text.get_text() for text in panel.texts}
    for i, row in enumerate(rows):
        assert texts[(2, i)] == f"{100 * row.retention:.1f}"
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["pope", "gqa", "all tasks"]


def test_gaps_and_single_tasks(tmp_path):
    cells = [c for c in made.grid_of() if c["cell"]["label"] != "none"] + [made.cell("pool", 0.1, error="no")]
    made.write(tmp_path, cells, ["scene-llava--none--full--pope"])
    files = [path.name for path in report.write(tmp_path) if path.suffix == ".svg"]
    assert files == ["scene-llava-tokens.svg", "scene-llava-time.svg"]  # no full model: no retention
    for name in files:
        drawn = ElementTree.parse(tmp_path / "plots" / name).getroot()
        assert float(drawn.get("width").removesuffix("pt")) > 400
        assert len(drawn.findall(".//{http://www.w3.org/2000/svg}path")) > 20


def test_pictures_of_an_older_report_go(tmp_path):
    made.write(tmp_path, made.grid_of(keeps=(0.25,)))
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "other-model-tokens.png").write_bytes(b"old")
    report.write(tmp_path)
    assert "other-model-tokens.png" not in [p.name for p in (tmp_path / "plots").iterdir()]


def test_zero_tokens_fit_on_the_axis(tmp_path):
    cells = made.grid_of()
    for cell in cells:
        if cell["cell"]["label"] == "fopru":
            cell["summary"]["tokens_after"] = 0
    results = report.read(made.write(tmp_path, cells))
    (panel,) = plots.scatter(results, "scene-llava", plots.TOKENS, ["pope"]).axes
    assert panel.get_xscale() == "linear"


def test_points_to_turn_over_are_those_of_the_rows(many):
    found = interactive.points(many, "scene-llava")
    assert [panel["name"] for panel in found["panels"]] == ["all tasks", "pope", "gqa"]
    assert [axis["name"] for axis in found["axes"]] == ["layer_average", "ttft_s", "tokens_after"]
    named = {id(row): row.name.replace(row.label, tables.shown(row)) for row in many.rows if not row.full}
    rows = {(row.task, named.get(id(row), "none")): row for row in many.rows}
    for point in found["points"]:
        task = (None, "pope", "gqa")[point["panel"]]
        row = rows[task, "none" if point["full"] else point["name"]]
        scale = 100 if task is None else 1
        assert (point["y"], point["low"]) == (scale * row.value, None if row.low is None else scale * row.low)
        assert point["x"]["ttft_s"] == 1000 * row.ttft_s
        assert point["x"]["layer_average"] == row.layer_average
    assert len(found["points"]) == len(many.rows)
    assert len({tuple(look.items()) for look in found["looks"].values()}) == len(found["looks"]) == 16


def test_names_of_tasks_without_what_all_begin_with():
    assert words.short_names(["a_b_c", "a_b_d_e"]) == {"a_b_c": "c", "a_b_d_e": "d_e"}
    assert words.short_names(["a_b", "a_b_c"]) == {"a_b": "b", "a_b_c": "b_c"}
    assert words.short_names(["a_b"]) == {"a_b": "a_b"}
    assert words.short_names(["pope", "gqa"]) == {"pope": "pope", "gqa": "gqa"}
