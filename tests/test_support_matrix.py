"""The page on support: what results make of it, and what of it results contradict."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from vlmprune import registry

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "support_matrix.py"


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    """The script, with a page of its own."""
    spec = util.spec_from_file_location("support_matrix", SCRIPT)
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "support_matrix", module)
    spec.loader.exec_module(module)
    marks = [mark for section in module.SECTIONS for mark in section.marks]
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    module.PAGE.write_text("# Page\n" + "\n\n".join(marks) + "\nend\n")
    return module


def claims(family, method, features, **more):
    return [{"feature": f, "family": family, "method": method, "outcome": "works", "tests": 1} | more for f in features]


def run(matrix, tmp_path, made, *options):
    file = tmp_path / "made.json"
    file.write_text(json.dumps(made))
    matrix.main([str(file), *options])
    return matrix.PAGE.read_text()


WHY = "crops are needed"


def whole(matrix):
    """Of a LLaVA family and of two others."""
    return [
        *claims("llava", "fopru", matrix.EXACT),
        *claims("llava", "fopru", ["static cache"]),
        *claims("internvl", "fopru", matrix.EXACT),
        *claims("internvl", "fastv", matrix.EXACT[:2]),
        *claims("internvl", "globalcom2", ["exact"], outcome="refused", why=WHY),
        *claims("qwen2-vl", "evs", ["exact"], outcome="refused", why="of videos alone"),
        *claims("qwen2-vl-video", "evs", matrix.EXACT),
        *claims("internvl", "fopru", ["static cache"]),
        *claims("gemma3", "fastv", ["static cache"]),
    ]


def test_what_is_written(matrix, tmp_path):
    page = run(matrix, tmp_path, whole(matrix))
    said = matrix.Said.of(matrix.SECTIONS[1].read(page))
    cells = said.cells
    assert cells["method", "fopru", "InternVL"] == "✓"
    assert cells["method", "fastv", "InternVL"] == "(✓)"
    assert cells["method", "fopru", "Qwen2-VL"] == "·"
    number = re.fullmatch(r"–<sup>(\d)</sup>", cells["method", "globalcom2", "InternVL"])[1]
    assert said.notes[number] == WHY
    assert re.fullmatch(r"✓<sup>\d</sup>", cells["method", "evs", "Qwen2-VL"])
    assert cells["feature", "static cache", "InternVL"] == "✓ fopru"
    assert cells["feature", "static cache", "Ovis2"] == ""
    assert matrix.Said.of(matrix.SECTIONS[0].read(page)).cells["method", "fopru", "1.5"] == "✓"
    assert page.startswith("# Page\n")
    assert page.endswith("end\n")
    rows = [row for corner, row, _ in cells if corner == "method" and not row.startswith("**")]
    assert sorted({*rows}) == registry.names()


def test_a_section_of_which_nothing_is_known_stays(matrix, tmp_path):
    before = run(matrix, tmp_path, whole(matrix))
    after = run(matrix, tmp_path, claims("llava", "fastv", matrix.EXACT))
    first, second = matrix.SECTIONS
    assert second.read(after) == second.read(before)
    assert first.read(after) != first.read(before)


def test_a_part_is_added_to_what_is_there(matrix, tmp_path):
    run(matrix, tmp_path, whole(matrix))
    more = [
        *claims("internvl", "fopru", ["exact"]),  # less than is known
        *claims("internvl", "fastv", matrix.EXACT),
        *claims("ovis2", "grid", ["exact"]),
        *claims("internvl", "globalcom2", ["exact"], outcome="refused", why="other words"),
        *claims("gemma3", "fopru", ["static cache"]),
        *claims("ovis2", "grid", ["sampling"]),
    ]
    cells = matrix.Said.of(matrix.SECTIONS[1].read(run(matrix, tmp_path, more))).cells
    assert cells["method", "fopru", "InternVL"] == cells["method", "fastv", "InternVL"] == "✓"
    assert cells["method", "grid", "Ovis2"] == "(✓)"
    assert cells["feature", "static cache", "Gemma 3"] == "✓ fastv, fopru"
    assert cells["feature", "static cache", "InternVL"] == "✓ fopru"
    assert cells["feature", "sampling", "Ovis2"] == "✓ grid"
    run(matrix, tmp_path, more, "--check")
    many = [one for name in ("grid", "pool", "random") for one in claims("gemma3", name, ["static cache"])]
    cells = matrix.Said.of(matrix.SECTIONS[1].read(run(matrix, tmp_path, many))).cells
    assert cells["feature", "static cache", "Gemma 3"] == "✓ 5 methods"
    run(matrix, tmp_path, many + more, "--check")


def test_videos_that_were_not_run_are_not_called_refused(matrix, tmp_path):
    made = [*whole(matrix)[:-4], *claims("qwen2-vl-video", "fopru", ["exact"])]
    refused = claims("qwen2-vl", "evs", ["exact"], outcome="refused", why="of videos alone")
    made = [claim for claim in made if claim["method"] != "evs"] + refused
    cells = matrix.Said.of(matrix.SECTIONS[1].read(run(matrix, tmp_path, made))).cells
    assert re.fullmatch(r"·<sup>\d</sup>", cells["method", "evs", "Qwen2-VL"])
    run(matrix, tmp_path, refused, "--check")


def test_a_part_agrees(matrix, tmp_path):
    run(matrix, tmp_path, whole(matrix))
    for part in (whole(matrix), whole(matrix)[6:], claims("internvl", "fopru", ["batches"])):
        run(matrix, tmp_path, part, "--check")


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        (("internvl", "grid", ["exact"]), "'exact' with grid on InternVL"),  # nobody ran it
        (("internvl", "globalcom2", ["exact"]), "with globalcom2"),  # refused there
        (("gemma3", "fopru", ["static cache"]), "'static cache' with fopru on Gemma 3"),  # by another method
        (("internvl", "fopru", ["streaming"]), "'streaming'"),  # no such row
    ],
)
def test_a_part_that_says_something_else(matrix, tmp_path, claim, told):
    run(matrix, tmp_path, whole(matrix))
    with pytest.raises(SystemExit, match=re.escape(told)):
        run(matrix, tmp_path, claims(*claim), "--check")


def test_other_reasons_and_failures(matrix, tmp_path):
    run(matrix, tmp_path, whole(matrix))
    for given in ({"outcome": "refused", "why": "other words"}, {"outcome": "fails"}):
        with pytest.raises(SystemExit, match="with fopru on"):
            run(matrix, tmp_path, claims("internvl", "fopru", ["exact"], **given), "--check")
    with pytest.raises(SystemExit, match="no column for strange"):
        run(matrix, tmp_path, claims("strange", "fopru", ["exact"]), "--check")


def test_tables_of_llava_must_be_the_same(matrix, tmp_path):
    run(matrix, tmp_path, whole(matrix))
    with pytest.raises(SystemExit, match="the tables of the LLaVA families"):
        run(matrix, tmp_path, claims("llava", "fopru", matrix.EXACT), "--check")


def test_a_method_that_is_gone_is_noticed(matrix, tmp_path):
    page = run(matrix, tmp_path, whole(matrix))
    matrix.PAGE.write_text(page.replace("| fastv |", "| slowv |"))
    with pytest.raises(SystemExit, match="methods that there are not: slowv"):
        run(matrix, tmp_path, claims("internvl", "fopru", ["exact"]), "--check")


def test_every_scene_has_a_column(matrix):
    import kin
    import scenes

    for name in (*scenes.FAMILIES, *scenes.QWEN, *kin.KIN):
        assert any(section.column(name) for section in matrix.SECTIONS), f"{name}: scripts/support_matrix.py, OTHERS"


def test_every_scene_has_a_piece(matrix):
    """What `make support` runs piece by piece is all of it."""
    import kin
    import scenes

    done = subprocess.run(["make", "-n", "-B", "-C", ROOT, "support"], capture_output=True, text=True, check=True)
    words = [word for line in re.findall(r'-k "(.*?)"', done.stdout) for word in line.split(" or ")]
    for name in (*scenes.QWEN, *kin.KIN):
        assert any(word in name for word in words), f"{name}: PIECES (or CALLED_...) of the Makefile"
