"""The files of a report, read back: equal numbers everywhere, nothing dropped, nothing that data can break."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import run_folders as made

from vlmprune.eval import report
from vlmprune.eval.lmms.store import StoreError
from vlmprune.eval.report import document, page, render, tables

NASTY = '<script>alert("1")</script> | `a` *b* _c_ [d](http://e) & </td>'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags of a page, its tables and its text; complains about tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tables, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def markdown_tables(text):
    """Tables of a Markdown text as lists of rows, backslashes taken out."""
    found, last = [], None
    for number, line in enumerate(text.splitlines()):
        if line.startswith("| "):
            cells = [re.sub(r"\\(.)", r"\1", c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            if last != number - 1:
                found.append([])
            if not set("".join(cells)) <= set("-:"):
                found[-1].append(cells)
            last = number
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of two models, one of them with several tasks, a failed and a missing cell, and a ledger."""
    cells = made.grid_of(("none", "fopru", "fastv", "random", "pool"), tasks=("pope", "mme"))
    for one in [c for c in cells if c["cell"]["task"] == "mme"]:
        cells[cells.index(one)] = made.cell(
            one["cell"]["method"], (one["cell"]["budget"] or {}).get("keep"), "mme", one["cell"]["seed"],
            scale=1500.0, per_sample=False, metric="mme_score",
        )  # fmt: skip
    cells += [made.cell("grid", 0.1, "pope", error=NASTY)]
    cells += made.grid_of(("none", "fopru", "random"), keeps=(0.25,), model="scene-llava-next")
    published = [
        {"method": "fopru", "keep": 0.1, "task": "pope", "metric": "accuracy", "value": 84.5, "model": "scene-llava",
         "source": "arXiv 0000.00000, Table 1", "definition": "accuracy, per cent"},
        {"method": "none", "task": "mme", "metric": "mme_score", "value": 1500.5, "model": "scene-llava",
         "source": "the same", "definition": "sum"},
        {"method": "fopru", "keep": 64, "task": "pope", "metric": "accuracy", "value": 1, "model": "scene-llava",
         "source": "the same", "definition": "-"},
        {"method": "fopru", "keep": 0.1, "task": "pope", "metric": "f1", "value": 1, "model": "scene-llava",
         "source": "the same", "definition": "-"},
    ]  # fmt: skip
    folder = made.write(
        tmp_path_factory.mktemp("run"), cells, ["scene-llava--grid--keep-0.1--mme"], published=published,
        notes=[f"a note {NASTY}"],
        skipped=[{"model": "scene-llava", "label": "vtc_cls", "budget": {"keep": 1}, "reason": f"no CLS {NASTY}"}],
    )  # fmt: skip
    report.write(folder)
    return folder


def cells_of(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]


def test_csv_json_and_cells_have_the_same_numbers(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == lines
    for cell in cells_of(folder):
        about = cell["cell"]
        key = {"model": about["model"], "label": about["label"], "task": about["task"]}
        key["keep"] = (about["budget"] or {}).get("keep")
        (row,) = [r for r in rows if all(r[k] == v for k, v in key.items())]
        if cell["error"]:
            assert (row["state"], row["value"]) == ("failed", None)
        elif about["seed"] is None:
            assert row["value"] == cell["metrics"][cell["metric"]]["value"]
            assert row["tokens_after"] == cell["summary"]["tokens_after"]
            assert row["layer_average"] == pytest.approx(cell["summary"]["layer_average"])
            assert row["ttft_s"] == pytest.approx(cell["summary"]["ttft_s"])


def test_both_pages_show_the_same_tables_with_both_counts(folder):
    page = Page((folder / "report.html").read_text())
    text = markdown_tables((folder / "report.md").read_text())
    squeezed = [[[" ".join(cell.split()) for cell in row] for row in table] for table in page.tables]
    assert squeezed == text
    numbered = [table for table in page.tables if "method" in table[0] and "why" not in table[0]]
    assert len(numbered) >= 6
    for table in numbered:
        assert {"tokens entering the LLM", "layer average"} <= set(table[0])
    fastv = next(row for row in numbered[0] if row[0] == "fastv")
    assert fastv[2:4] == ["256", "128.0"]


def test_the_page_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    tags = Page(text).tags
    images = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(images) == 5 + 3
    assert all(source.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,iVBOR")) for source in images)
    assert not {tag for tag, _ in tags} & {"link", "iframe", "object"}
    assert not [a for tag, attributes in tags if tag == "script" for a in attributes if a == "src"]
    assert all(attributes["href"].startswith("#") for _, attributes in tags if "href" in attributes)
    assert not [a for _, attributes in tags for a in attributes if a in ("onclick", "onload")]
    assert "url(" not in text.partition("</style>")[0]
    assert "prefers-color-scheme: dark" in text
    markdown = (folder / "report.md").read_text()
    for name in re.findall(r"!\[[^\n]*?\]\(([^)\n]*\.(?:png|svg))\)", markdown):
        assert (folder / name).is_file()


def test_failed_missing_and_left_out_are_on_the_page(folder):
    page = Page((folder / "report.html").read_text())
    problems = next(table for table in page.tables if table[0] == ["cell", "state", "why"])
    assert [row[:2] for row in problems[1:]] == [
        ["scene-llava--grid--keep-0.1--pope", "failed"],
        ["scene-llava--grid--keep-0.1--mme", "missing"],
    ]
    assert problems[1][2] == NASTY
    left = next(table for table in page.tables if table[0] == ["model", "method", "budget", "why"])
    assert left[1] == ["scene-llava", "vtc_cls", "keep 1", f"no CLS {NASTY}"]
    grids = [row for table in page.tables for row in table if row[:2] == ["grid", "keep 0.1"]]
    assert len(grids) == 4
    assert all({"failed", "missing", "incomplete"} & set(row) for row in grids)
    text = " ".join(page.text)
    assert "31 of 33 planned cells" in text
    assert f"a note {NASTY}" in text


def test_what_data_says_cannot_become_markup(folder):
    text = (folder / "report.html").read_text()
    assert len(re.findall("<script", text)) == len(re.findall('<script type="application/json">', text)) + 2
    assert "<script>alert(" not in text
    assert "&lt;script&gt;alert(" in text
    said = (folder / "report.md").read_text()
    assert "<script" not in said.replace("\\<", "")
    assert "[d](" not in said
    block = render.markdown([document.Code("a ``` b")], folder)
    assert block == "````\na ``` b\n````\n"
    assert render.markdown([document.Text("# 1. not a heading"), document.Text("1. no list")], folder) == (
        "\\# 1. not a heading\n\n1\\. no list\n"
    )
    assert "<b>" not in render.html([document.Heading("<b>"), document.Bullets(["<b>"]), document.Code("<b>")], "<b>")


def test_the_ledger_compares_in_the_papers_unit(folder):
    lines = json.loads((folder / "results.json").read_text())["published"]
    rows = json.loads((folder / "results.json").read_text())["rows"]
    fopru = next(
        r for r in rows if (r["label"], r["keep"], r["task"], r["model"]) == ("fopru", 0.1, "pope", "scene-llava")
    )
    assert lines[0]["ours"] == pytest.approx(100 * fopru["value"])
    assert lines[0]["difference"] == pytest.approx(100 * fopru["value"] - 84.5)
    assert lines[0]["note"] == "ours times 100"
    full = next(r for r in rows if (r["method"], r["task"]) == ("none", "mme"))
    assert (lines[1]["ours"], lines[1]["note"]) == (full["value"], "")
    assert [(line["ours"], line["note"]) for line in lines[2:]] == [
        (None, "not evaluated here"), (None, "the task gave no f1, but accuracy, other"),
    ]  # fmt: skip
    table = next(t for t in Page((folder / "report.html").read_text()).tables if "paper" in t[0])
    assert table[1][-2:] == ["accuracy, per cent", "arXiv 0000.00000, Table 1"]
    assert table[1][5:8] == ["84.5", f"{lines[0]['ours']:.2f}", f"{lines[0]['difference']:+.2f}"]
    assert len(table) == 5


def test_everything_to_repeat_it(folder):
    text = " ".join(Page((folder / "report.html").read_text()).text)
    for part in ("vlmprune eval 'my config.yaml'", "5.23.0", "abc1234", "0, 1, 2", "# two", "2000 draws, seed 0"):
        assert part in text


def test_words_agree_with_the_numbers(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    text = (folder / "report.md").read_text()
    mine = {
        r["label"]: r["random_verdict"]
        for r in rows
        if (r["task"], r["keep"], r["model"]) == ("pope", 0.1, "scene-llava") and r["random_verdict"]
    }
    (sentence,) = re.findall(r"^- keep 0.1, against random at the same budget: (.*)\.$", text, re.M)
    said = dict(part.split(": ") for part in sentence.split("; "))
    assert mine["fopru"] == "better"
    assert mine["pool"] == "worse"
    assert said["better"].split(", ") == [label for label, verdict in mine.items() if verdict == "better"]
    assert said["worse"].split(", ") == [label for label, verdict in mine.items() if verdict == "worse"]


def test_the_terminal_table_fits(folder, tmp_path):
    text = report.summary(folder)
    assert max(map(len, text.splitlines())) <= 120
    assert "Not in this table, of 33 planned cells: 1 failed, 1 missing." in text
    long = "globalcom2-then-transprune-with-a-very-long-label"
    cells = [*made.grid_of(), made.cell("fopru", 64, label=long, word="average")]
    lines = report.summary(made.write(tmp_path, cells)).splitlines()
    assert max(map(len, lines)) <= 120
    fopru = next(line for line in lines if line.startswith("fopru") and "keep 0.1" in line)
    row = next(r for r in report.read(tmp_path).rows if r.name == "fopru keep 0.1" and r.task == "pope")
    assert f"{row.value:.3f}" in fopru
    assert f"{100 * row.retention:.1f} [{100 * row.retention_low:.1f}, {100 * row.retention_high:.1f}]" in fopru
    assert f"{row.random_verdict}" in fopru
    assert any(re.match(r"globalc\w*\.\.\.  +average 64", line) for line in lines)
    assert "Fewer than" not in text
    few = report.summary(made.write(tmp_path / "few", made.grid_of(samples=12)))
    assert "Fewer than 20 independent clusters of samples in a task" in few


def test_without_matplotlib_the_report_says_so(folder, tmp_path, monkeypatch):
    made.write(tmp_path, made.grid_of())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = report.write(tmp_path)
    assert [f.name for f in files] == ["report.html", "report.md", "results.csv", "results.json"]
    assert page.NO_PLOTS in " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "vlmprune[plot]" in (tmp_path / "report.md").read_text()


def test_a_run_without_any_result_still_has_a_report(tmp_path):
    files = report.write(made.write(tmp_path, [], ["scene-llava--none--full--pope"], finished=None))
    assert len(files) == 4
    text = files[1].read_text()
    assert "0 of 1 planned cells are in this report. The run is not finished." in text
    assert report.summary(tmp_path)


def test_no_run_there(tmp_path):
    with pytest.raises(StoreError, match=r"no run\.json"):
        report.write(tmp_path)


def test_numbers_as_text():
    assert tables.number(None) == "-"
    assert tables.with_interval(1.0, None, None, 1) == "1.0"
    assert tables.with_interval(0.5, -0.25, 1.0, 2, sign=True) == "+0.50 [-0.25, 1.00]"


def test_the_terminal_table_fits_a_narrow_terminal(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = report.summary(folder).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[:6] == [
        "scene-llava: mean over 2 tasks",
        "method:               full model",
        "  entering:           256.0",
        "  average:            256.0",
        "  retention % [95 %]: 100.0",
        "  first token:        35.6 ms",
    ]
