"""Files of `vlmprune bench`: not overwritten, not lost, gone on with, repeated, and refused where they are damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--pairs", 2, "--plain-runs", 1, "--stage-runs", 1, "--new-tokens", 4, "--prompt-tokens", 8)
FIRST = ("--method", "random", "--keep", 4)


@pytest.fixture
def bench(cli, folders):
    return lambda *argv: cli("bench", "--model", folders["llava"], *FAST, *argv)


@pytest.fixture(scope="module")
def committed():
    """Results as they were written before there were kernels in the settings."""
    return json.loads((ROOT / "benchmarks" / "cpu-576.json").read_text())


@pytest.fixture
def file(bench, tmp_path):
    """A file of one cell."""
    made = tmp_path / "r.json"
    assert bench(*FIRST, "--json", made)[0] == 0
    return made


@pytest.fixture
def unbuilt(monkeypatch):
    """Nothing may be loaded or built."""
    for name in ("eval.bench.run.subject", "runtime.loading.load"):
        monkeypatch.setattr(f"vlmprune.{name}", lambda *_: pytest.fail("a model was built"))


def cells(path):
    return [(cell["method"], cell["budget"], cell["batch"]) for cell in json.loads(path.read_text())["cells"]]


def test_results_are_not_overwritten(bench, file, unbuilt):
    before = file.read_text()
    code, _, err = bench(*FIRST, "--json", file)
    assert code == 2
    assert "--resume goes on with it, or name another file" in err
    assert file.read_text() == before


def test_selection_is_not_overwritten(cli, file, monkeypatch):
    code, _, err = cli("bench", "--selection", "--json", file)
    assert code == 2
    assert "nothing is overwritten: name another file" in err


def test_a_refused_resume_builds_nothing(bench, file, unbuilt):
    found = json.loads(file.read_text())
    found["machine"]["threads"] += 1
    file.write_text(json.dumps(found))
    code, _, err = bench(*FIRST, "--json", file, "--resume")
    assert code == 2
    assert "threads 2 there and 1 here" in err


def test_a_file_without_kernels_is_gone_on_with(bench, file):
    found = json.loads(file.read_text())
    del found["settings"]["kernels"], found["settings"]["replaced"], found["asked"]["kernels"]
    file.write_text(json.dumps(found))
    assert bench("--method", "random", "--keep", 8, "--json", file, "--resume")[0] == 0
    assert cells(file) == [("random", "4", 1), ("random", "8", 1)]
    code, _, err = bench("--method", "random", "--keep", 8, "--json", file, "--resume", "--kernels", "torch")
    assert code == 2
    assert "kernels auto there and torch here" in err


def test_two_runs_on_one_file_lose_nothing(bench, file, tmp_path, monkeypatch):
    """Another run stores two cells while this one measures its first; the one it wants too is not measured again."""
    from vlmprune.eval.bench import measure

    other = tmp_path / "other.json"
    assert bench("--method", "grid,pool", "--keep", 4, "--json", other)[0] == 0
    theirs, real, measured = json.loads(other.read_text()), measure.measure_method, []

    def beside(*args):
        found = json.loads(file.read_text())
        if not measured:
            file.write_text(json.dumps(found | {"cells": found["cells"] + theirs["cells"]}))
        measured.append(1)
        return real(*args)

    monkeypatch.setattr(measure, "measure_method", beside)
    assert bench("--method", "random,fopru,grid", "--keep", 4, "--json", file, "--resume")[0] == 0
    assert sorted(cells(file)) == [(name, "4", 1) for name in ("fopru", "grid", "pool", "random")]
    assert len(measured) == 1


def test_everything_in_the_file_is_repeated(bench, cli, file, tmp_path):
    """The flags of its last call say less than the file holds."""
    assert bench("--method", "fastv", "--option", "layer=1", "--keep", 8, "--json", file, "--resume")[0] == 0
    new = tmp_path / "new.json"
    code, out, err = cli("bench", "--compare", file, "--json", new)
    assert code == 0, err
    assert cells(new) == [("random", "4", 1), ("fastv", "8", 1)]
    assert json.loads(new.read_text())["cells"][1]["options"] == {"keep": 8, "layer": 1}
    assert "not measured alike" not in out
    some = tmp_path / "some.json"
    assert cli("bench", "--compare", file, "--batch", 1, "--method", "random", "--json", some)[0] == 0
    assert cells(some) == [("random", "4", 1)]


def test_what_older_files_repeat():
    from vlmprune.eval.bench.asked import asked_in

    found = json.loads((ROOT / "benchmarks" / "cpu-2880.json").read_text())
    asked = asked_in(found | {"asked": found["asked"] | {"method": "transprune", "keep": "25%"}})
    assert set(asked["method"].split(",")) >= {"fopru", "globalcom2", "fastv", "transprune", "vtc_cls", "todre"}
    assert asked["keep"] == "0.1,0.25"


@pytest.mark.parametrize("name", ["cpu-576.json", "cpu-2880.json"])
def test_committed_results_are_read(cli, name):
    path = ROOT / "benchmarks" / name
    code, out, err = cli("bench", "--from", path, "--compare", path)
    assert code == 0, err
    assert "globalcom2" in out or "576" in name
    assert "not measured alike" not in out


def damaged(committed, how):
    found = copy.deepcopy(committed)
    how(found)
    return json.dumps(found)


DAMAGE = {
    "no keys": lambda _: '{"bench": 1}',
    "a list": lambda _: "[1]",
    "no JSON": lambda _: "{",
    "no text": lambda _: "\x00\xff",
    "no overhead": lambda found: damaged(found, lambda f: f["cells"][3].pop("overhead")),
    "half a decode": lambda found: damaged(found, lambda f: f["cells"][0].pop("decode_overhead")),
    "text for a number": lambda found: damaged(found, lambda f: f["cells"][0]["speedup"].update(median="3")),
    "no unpruned": lambda found: damaged(found, lambda f: f["unpruned"].clear()),
    "cells as object": lambda found: damaged(found, lambda f: f.update(cells={})),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("flags", [("--from",), ("--compare",), ("--resume", "--json")], ids=" ".join)
def test_damaged_files_are_refused_in_a_line(cli, committed, tmp_path, damage, flags, unbuilt):
    path = tmp_path / "r.json"
    path.write_bytes(DAMAGE[damage](committed).encode("latin-1"))
    code, out, err = cli("bench", *flags, path)
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert "holds no results" in err or "is damaged" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--json", "/proc/r.json"), "--json /proc/r.json cannot be written"),
        (("--csv", "/proc/r.csv"), "--csv /proc/r.csv cannot be written"),
        (("--json", "r", "--csv", "./r"), "--json and --csv name the same file"),
        (("--csv", "r.svg", "--plot", "r.svg"), "--csv and --plot name the same file"),
        (("--compare", "r.json", "--json", "r.json"), "--compare and --json name the same file"),
    ],
)
def test_paths_are_tried_before_anything_is_built(cli, argv, said, tmp_path, monkeypatch, unbuilt):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("bench", *argv)
    assert code == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_says_how_to_go_on(bench, tmp_path, monkeypatch, stop):
    from vlmprune.eval.bench import measure

    real, done, file = measure.measure_method, [], tmp_path / "r.json"

    def once(*args):
        if done:
            raise stop
        done.append(1)
        return real(*args)

    monkeypatch.setattr(measure, "measure_method", once)
    code, _, err = bench("--method", "random,fopru", "--keep", 4, "--json", file)
    assert code == (130 if stop is KeyboardInterrupt else 1)
    assert f"{file} has 1 cells: the same call with --resume goes on" in err
    assert cells(file) == [("random", "4", 1)]


def test_a_page_of_a_file(cli, tmp_path, unbuilt):
    """Nothing is measured; the page says how what is in the file was."""
    page = tmp_path / "page.html"
    code, _, err = cli("bench", "--from", ROOT / "benchmarks" / "cpu-576.json", "--html", page)
    assert (code, f"written: {page}" in err) == (0, True), err
    text = page.read_text()
    assert "<title>Speed of small</title>" in text
    assert "vlmprune bench --method fopru,todre" in text
    code, _, err = cli("bench", "--selection", "--html", page)
    assert (code, "--html would have no effect" in err) == (2, True)
    code, _, err = cli("bench", "--html", tmp_path / "none" / "page.html")
    assert (code, "there is no folder" in err) == (2, True)


def test_a_page_of_a_run(bench, tmp_path):
    page, made = tmp_path / "page.html", tmp_path / "r.json"
    assert bench(*FIRST, "--json", made, "--html", page)[0] == 0
    text, (cell,) = page.read_text(), json.loads(made.read_text())["cells"]
    assert f"the first token comes {cell['speedup']['median']:.2f} times as soon" in text
