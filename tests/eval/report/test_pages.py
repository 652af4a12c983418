"""The pages of `fidelity`, `tune` and `bench` in headless Chromium, from made-up results and measured ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import address, chromium, opened
from PIL import Image

from vlmprune.eval.bench import page as bench_page
from vlmprune.eval.bench.compare import changes, differing_settings
from vlmprune.eval.fidelity import report as fidelity
from vlmprune.eval.fidelity.cards import Card
from vlmprune.eval.fidelity.costs import EntryCosts
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import Compared, StudyEntry, StudyRow
from vlmprune.eval.report import render
from vlmprune.eval.tune import report as tune
from vlmprune.eval.tune.judge import judge
from vlmprune.eval.tune.run import Candidate, Goal
from vlmprune.runtime.draw import Panel

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[3]
ENTRIES = [
    StudyEntry(method, {"keep": keep}, method == "random")
    for method in ("fopru", "todre", "random")
    for keep in (0.5, 0.25, 0.1)
]
PICTURES = [f"a folder with a long name/picture number {i} of the afternoon.png" for i in range(24)]


def rows_of(entry):
    """A row per picture: the fewer tokens, the sooner the answers differ."""
    made = []
    for i, name in enumerate(PICTURES):
        agrees = i % 10 < 10 * entry.options["keep"]
        parts = tuple((n, n - (not agrees and n > 1), 0.01 * n * (2 - agrees)) for n in (1, 1, 2, 4, 8))
        left = 144 * entry.options["keep"]
        compared = Compared(True, agrees, 0.05, 0.1, [], 144, left, left, 16 if agrees else 3, parts)
        said = ("a red circle beside a blue square", "a red circle")[: 1 + (not agrees)]
        made.append(StudyRow(name, "what is there ?", entry.label, None, said[0], said[-1], compared))
    return made


def costs_of(entry):
    """Faster with fewer tokens."""
    times = 1.2 / entry.options["keep"] ** 0.5
    one = {"median": times, "low": 0.95 * times, "high": 1.05 * times, "pairs": 5}
    return EntryCosts(
        (9, 9 / times), (20, 20 / times), one, one, (100, 60), (100, int(100 * entry.options["keep"])), 4, 1
    )


def fidelity_page(folder):
    rows = [row for entry in ENTRIES for row in rows_of(entry)]
    picture = Panel("", [], [Image.new("RGB", (256, 256), "gray")])
    cards = {entry.label: [Card(rows_of(entry)[-1], picture, picture, ("a red circle",))] for entry in ENTRIES[:6]}
    about = {
        "model": "m",
        "max_new_tokens": 16,
        "prompts_skipped": 0,
        "command": f"vlmprune fidelity {'--flag x ' * 40}",
    }
    labels = Labels("contains", {(name, "what is there ?"): ["a blue square"] for name in PICTURES})
    costs = {entry.label: costs_of(entry) for entry in ENTRIES}
    fidelity.write(folder, fidelity.Study(about, ENTRIES, rows, [], cards, len(PICTURES), costs, labels))


def tune_page(folder):
    goal = Goal(2.0, 0.05, "first")
    found = [Candidate(entry, costs_of(entry), rows_of(entry), rung=1, kl=0.1) for entry in ENTRIES]
    ends = [
        replace(one, verdict=judge([float(not row.compared.answer_agrees) for row in one.rows], 0.05))
        for one in found[:4]
    ]
    about = {
        "model": "m",
        "family": "llava",
        "device": "cpu",
        "dtype": "float32",
        "versions": "1",
        "command": "vlmprune tune",
    }
    refused = {"globalcom2": ["it needs several views, and this model has a single view."]}
    result = tune.Result(about, goal, False, [*ends, *found[4:]], ends, {}, refused, complete=True)
    blocks = tune.build(result, "Tuning of m", [], folder)
    for name, content in render.pages(blocks, "Tuning of m", folder).items():
        (folder / name).write_bytes(content)


def bench_file(folder):
    old, new = (json.loads((ROOT / "benchmarks" / f"cpu-{n}.json").read_text()) for n in (576, 2880))
    changed = "cpu-576.json", changes(old, new), differing_settings(old, new)
    (folder / "report.html").write_bytes(bench_page.page(new, changed))


PAGES = {"fidelity": fidelity_page, "tune": tune_page, "bench": bench_file}


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a verb."""
    files = {}
    for verb, write in PAGES.items():
        folder = tmp_path_factory.mktemp(verb)
        write(folder)
        files[verb] = folder / "report.html"
    return files


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("verb", PAGES)
def test_it_fits_and_draws(made, browser, verb, width, scheme):
    with opened(browser, address(made[verb]), width, scheme) as page:
        above = page.locator("h1 ~ *").first.bounding_box()
        assert above["y"] < 300
        drawing = page.locator(".plot .main-svg").first.bounding_box()
        table = page.locator("table").first.bounding_box()
        assert 0 < drawing["width"] <= width
        assert drawing["y"] < table["y"]  # one picture first
        assert page.evaluate("getComputedStyle(document.querySelector('.plot .xtitle')).fill") == page.evaluate(
            "getComputedStyle(document.body).color"
        )
        assert page.locator(".plot .scatterlayer .point").count() > 4


def test_bench_says_what_its_file_says(made, browser):
    cells = json.loads((ROOT / "benchmarks" / "cpu-2880.json").read_text())["cells"]
    with opened(browser, address(made["bench"])) as page:
        fastest = max((cell for cell in cells if cell["method"] == "fopru"), key=lambda cell: cell["speedup"]["median"])
        sentence = page.locator("li", has_text=re.compile("^fopru,")).text_content()
        assert f"{fastest['speedup']['median']:.2f} times as soon" in sentence
        titles = page.locator("h2").all_text_contents()
        assert titles[:3] == ["In short", "First token", "Tokens after the first"]
        assert "Changes since cpu-576.json" in titles
        first = page.locator("table").first
        assert first.locator("tbody tr").count() == len(cells)
        column = first.locator("th").all_text_contents().index("tokens")
        first.locator("th").nth(column).click()
        tokens = [float(text) for text in first.locator(f"td:nth-child({column + 1})").all_text_contents()]
        assert tokens == sorted(tokens)
        axis = page.locator(".plot").first.get_by_label("axis")
        axis.select_option(label="cache, MB")
        assert page.locator(".plot .xtitle").first.text_content() == "cache, MB"


def test_answers_along_the_way_can_be_turned_over(made, browser):
    with opened(browser, address(made["fidelity"])) as page:
        plot = page.locator(".plot").nth(1)
        assert plot.get_by_label("task").locator("option").all_text_contents() == ["next token", "same so far", "KL"]
        plot.get_by_label("task").select_option(label="same so far")
        assert plot.locator(".ytitle").text_content() == "same so far, %"
        assert "What lost score first." in page.locator("body").text_content()


def test_methods_that_do_not_go_are_named(made):
    assert "globalcom2: it needs several views" in made["tune"].read_text()
