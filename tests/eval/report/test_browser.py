"""The report of a run in headless Chromium."""

from __future__ import annotations

import pytest
import run_folders as made
from browser import address, chromium, opened

from vlmprune.eval import report

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")
TASKS = ("vlmprune_scene_llava_colour", "vlmprune_scene_llava_count")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cells = made.grid_of(
        ("none", "fopru", "fastv", "random"),
        keeps=(0.5, 0.25, 0.1),
        tasks=("vlmprune_scene_llava_colour", "vlmprune_scene_llava_count"),
    )
    made.write(folder, cells)
    report.write(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_draws(page_file, browser, width, scheme):
    with opened(browser, address(page_file), width, scheme) as page:
        first = page.locator("h2").first
        assert first.text_content() == "In short"
        box = page.locator(".plot .main-svg").first.bounding_box()
        assert 0 < box["width"] <= width
        ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtitle')).fill")
        fore = page.evaluate("getComputedStyle(document.body).color")
        assert ink == fore


def test_methods_axes_and_tasks_are_the_readers(page_file, browser):
    with opened(browser, address(page_file)) as page:
        plot = page.locator(".plot").first
        lines = plot.locator(".scatterlayer .trace")
        many = lines.count()
        plot.locator(".legendtoggle").nth(1).click()
        page.wait_for_function(f"document.querySelectorAll('.plot .scatterlayer .trace').length === {many - 1}")
        axis, task = plot.get_by_label("axis"), plot.get_by_label("task")
        axis.select_option(label="measured time to first token, ms")
        assert plot.locator(".xtitle").text_content() == "measured time to first token, ms"
        assert task.locator("option").all_text_contents() == ["all tasks", "colour", "count"]
        task.select_option(label="count")
        assert "retention" not in plot.locator(".ytitle").text_content()


def test_tables_sort_and_filter(page_file, browser):
    with opened(browser, address(page_file)) as page:
        table = page.locator("table").first
        column = table.locator("th").all_text_contents().index("layer average")
        shown = lambda: [float(t) for t in table.locator(f"td:nth-child({column + 1})").all_text_contents()]  # noqa: E731
        table.locator("th").nth(column).click()
        assert shown() == sorted(shown())
        table.locator("th").nth(column).click()
        assert shown() == sorted(shown(), reverse=True)
        page.get_by_label("filter rows").first.fill("random")
        table = page.locator(".filter + .wide table").first
        rows = table.locator("tbody tr")
        left = [row for row in rows.all() if row.is_visible()]
        assert 0 < len(left) < rows.count()
        assert all("random" in row.text_content() for row in left)


def test_pictures_grow(page_file, browser):
    with opened(browser, address(page_file)) as page:
        image = page.locator("img:visible").first
        image.click()
        assert image.bounding_box()["width"] >= 1260
        page.keyboard.press("Escape")
        assert image.get_attribute("class") == "drawn"
