"""The pictures: every method has a look of its own, every point is where its numbers say, the front is marked."""

from __future__ import annotations

import numpy as np
import pytest
import run_folders as made
from PIL import Image

from vlmprune.eval import report, statistics
from vlmprune.eval.report import plots

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
    files = [path.name for path in report.write(tmp_path) if path.suffix == ".png"]
    assert files == ["scene-llava-tokens.png", "scene-llava-time.png"]  # no full model: no retention
    for name in files:
        with Image.open(tmp_path / "plots" / name) as image:
            assert image.width > 800
            assert np.asarray(image.convert("L")).std() > 5


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
