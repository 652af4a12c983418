"""The files of `vlmprune fidelity`, from made-up rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from vlmprune.eval.fidelity import report
from vlmprune.eval.fidelity.cards import Card
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import Compared, StudyEntry, StudyRow
from vlmprune.runtime.draw import Panel

STRANGE = "caf\udce9 <b>|.png"  # a file name that is no text, and would be markup
ENTRY, RANDOM = StudyEntry("a", {"keep": 1}), StudyEntry("random", {"keep": 1}, control=True, seeds=(0, 1))


def row(picture, label, seed=None, agrees=True):
    return StudyRow(
        picture, "p ?", label, seed, "yes", "yes" if agrees else "", Compared(True, agrees, 0.1, 0.2, [], 9, 3, 3.0)
    )


@pytest.fixture
def study():
    pictures = (STRANGE, "b.png")
    rows = [row(name, ENTRY.label, agrees=name != STRANGE) for name in pictures]
    rows += [row(name, RANDOM.label, seed, agrees=False) for name in pictures for seed in (0, 1)]
    panels = [Panel("", lines, [Image.new("RGB", (8, 8))]) for lines in ([], ["1 of 9 patches"])]
    cards = {ENTRY.label: [Card(one, *panels) for one in rows[:2]]}
    about = {
        "model": "m",
        "max_new_tokens": 4,
        "prompts_skipped": 1,
        "command": f"vlmprune fidelity --images '{STRANGE}'",
    }
    return report.Study(about, [ENTRY, RANDOM], rows, [("c.png", "no picture")], cards, 5)


def test_files(study, tmp_path):
    (tmp_path / "worst-old.png").write_bytes(b"")
    files = report.write(tmp_path, study)
    names = ["report.html", "report.md", "results.json", "worst-a-keep-1.png", "agreement.svg"]
    assert [file.name for file in files] == names
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert json.loads(files[2].read_text())["rows"][0]["picture"] == STRANGE


def test_what_stands_on_both_pages(study, tmp_path):
    page, text = (file.read_text() for file in report.write(tmp_path, study)[:2])
    assert "<title>Fidelity of m</title>" in page
    assert '<p class="note">Interrupted: 2 of 5 prompts were not measured.</p>' in page
    assert "> **Note:** Interrupted: 2 of 5 prompts were not measured." in text
    assert re.findall(r'<tr class="(\w+)"><td class="left">([^<]*)</td>', page) == [("control", "random (2 seeds)")]
    assert "<li>c.png: no picture</li>" in page
    assert "- c.png: no picture" in text
    assert r"<p><b>1. caf\udce9 &lt;b&gt;|.png</b></p>" in page
    assert r"| 1 | caf\udce9 \<b>\|.png | p ? | yes | (empty) | 0.200 |" in text
    assert r"| 2 | b.png | p ? | yes | yes (the same) | 0.200 |" in text
    assert '<p class="soft">KL first 0.100, 1 of 9 patches</p>' in page
    assert '<pre tabindex="0">vlmprune fidelity --images &#39;' in page


def test_nothing_was_lost(study, tmp_path):
    study.cards.clear()
    page, text, *rest = report.write(tmp_path, study)
    told = "Every picture got the same answer and the same distributions."
    assert told in page.read_text()
    assert told in text.read_text()
    assert [file.name for file in rest] == ["results.json", "agreement.svg"]


def longer(one, same_for):
    """The row with an answer of six tokens."""
    parts = ((1, 1, 0.1), (1, 1, 0.1), (2, 1, 0.4), (2, 0, 2.0))
    return replace(one, compared=replace(one.compared, along=parts, same_for=same_for))


def test_long_answers_are_told_along_the_way(study, tmp_path):
    page, text, data, *_ = report.write(tmp_path, study)
    assert "Along the answer" not in page.read_text()
    rows = [longer(one, 6 if one.compared.answer_agrees else 3) for one in study.rows]
    page, text, data, *pictures = report.write(tmp_path, replace(study, rows=rows))
    assert [file.name for file in pictures][-2:] == ["agreement.svg", "along.svg"]
    assert "Along the answer" in page.read_text()
    assert re.search(r"\| a, keep 1 \| 3 to 4 \| 2 \| 50\.0 \[.*\] \| 50\.0 \[.*\] \| 0\.200 \|", text.read_text())
    told = json.loads(data.read_text())["summary"][0]["along"]
    assert [(one["first"], one["last"], one["next_agrees"]["value"]) for one in told] == [
        (1, 1, 1.0), (2, 2, 1.0), (3, 4, 0.5), (5, 8, 0.0),
    ]  # fmt: skip


def test_labels_are_on_the_page(study, tmp_path):
    labels = Labels("exact", {(name, "p ?"): ["Yes."] for name in (STRANGE, "b.png")})
    cards = {label: [replace(card, right=("Yes.",)) for card in mine] for label, mine in study.cards.items()}
    page, text, data, *_ = report.write(tmp_path, replace(study, labels=labels, cards=cards))
    assert "The score is 50.0 [0.0, 100.0] %" in text.read_text()
    assert "<p><b>right:</b> Yes.</p>" in page.read_text()
    assert "Answers are scored by &#39;exact&#39;" in page.read_text()
    results = json.loads(data.read_text())
    assert results["metric"] == "exact"
    assert results["summary"][0]["score"]["change"]["value"] == -0.5
    row = results["rows"][0]
    assert (row["right"], row["unpruned_score"], row["pruned_score"]) == (["Yes."], 1.0, 0.0)
