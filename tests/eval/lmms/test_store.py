"""Files of a run: whole or not there, read back with what belongs together, one writer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vlmprune.eval.lmms import store


def cell(name="a", key="k", error=None, value=1.0):
    return {
        "format": 1,
        "cell": {
            "id": name, "model": "x", "method": "fopru", "label": "fopru", "options": {}, "budget": {"keep": 4},
            "seed": None, "task": "pope", "control": False,
        },
        "key": key,
        "depends": {},
        "metrics": {"m": {"value": value, "higher_is_better": True}},
        "metric": "m",
        "samples": [{"doc": 0, "cluster": "0", "target": "yes", "score": 1.0}],
        "summary": {
            "tokens_before": 9, "tokens_after": 4, "layer_average": 4.0, "ttft_s": 0.1, "decode_tokens_per_s": None,
            "peak_memory_bytes": None,
        },
        "elapsed_s": 1.0,
        "error": error,
    }  # fmt: skip


def run_info(**keys):
    return {"format": 1, "cells": list(keys), "keys": keys}


def test_round_trip(tmp_path):
    store.write_run(tmp_path, run_info(b="k", a="k", c="k"))
    store.write_cell(tmp_path, cell("a"))
    store.write_cell(tmp_path, cell("b", error="no ä"))
    run = store.load_run(tmp_path)
    assert [found["cell"]["id"] for found in run.cells] == ["b", "a"]
    assert run.cells[0]["error"] == "no ä"
    assert run.missing == ["c"]
    assert run.info["keys"]["a"] == "k"


def test_cells_of_another_config_are_missing(tmp_path):
    store.write_run(tmp_path, run_info(a="new", b="new"))
    store.write_cell(tmp_path, cell("a", key="old"))
    store.write_cell(tmp_path, cell("b", key="new"))
    store.write_cell(tmp_path, cell("of-an-earlier-plan", key="new"))
    run = store.load_run(tmp_path)
    assert [found["cell"]["id"] for found in run.cells] == ["b"]
    assert run.missing == ["a"]


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', "[]", '{"format": 2, "cell": {}}'])
def test_damaged_cells_are_as_if_they_were_not_there(tmp_path, text):
    store.write_run(tmp_path, run_info(a="k"))
    store.write_cell(tmp_path, cell("a"))
    (tmp_path / "cells" / "a.json").write_text(text)
    assert store.load_run(tmp_path).missing == ["a"]


@pytest.mark.parametrize(
    "spoil",
    [
        {"metrics": {}}, {"metrics": {"m": {}}}, {"metrics": {"m": {"value": "x"}}}, {"metrics": None},
        {"metric": None},
        {"cell": None}, {"cell": {"id": "a"}}, {"cell": cell("b")["cell"]}, {"cell": cell("a")["cell"] | {"budget": 4}},
        {"key": None}, {"depends": []}, {"samples": []}, {"samples": None}, {"samples": [3]},
        {"samples": [{"doc": 1}]}, {"samples": [cell()["samples"][0] | {"score": "x"}]},
        {"summary": {}}, {"summary": cell()["summary"] | {"layer_average": None}},
        {"summary": cell()["summary"] | {"ttft_s": "x"}}, {"elapsed_s": None}, {"error": 3},
    ],
    ids=str,
)  # fmt: skip
def test_cells_of_another_shape_are_as_if_they_were_not_there(tmp_path, spoil):
    store.write_run(tmp_path, run_info(a="k"))
    path = store.write_cell(tmp_path, cell("a"))
    assert store.load_run(tmp_path).missing == []
    path.write_text(json.dumps(cell("a") | spoil))
    assert store.load_run(tmp_path).missing == ["a"]


def test_a_number_that_is_none_is_damage(tmp_path):
    path = store.write_cell(tmp_path, cell("a"))
    path.write_text(path.read_text().replace("4.0", "NaN"))
    assert store.read_cell(tmp_path, "a") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no run.json"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1, "cells": ["a"], "keys": {}}', "damaged"),
        ('{"format": 1, "cells": "a", "keys": {"a": "k"}}', "damaged"),
        ('{"format": 1, "cells": [["a"]], "keys": {}}', "damaged"),
        ('{"format": 1, "cells": ["a"], "keys": null}', "damaged"),
        ('{"format": 1, "cells": [], "keys": {}, "published": [3]}', "damaged"),
        ('{"format": 1, "cells": [], "keys": {}, "notes": 3}', "damaged"),
        ('{"format": 1, "cells": [], "keys": {}, "config": [1]}', "damaged"),
        ('{"format": 7, "cells": [], "keys": {}}', "format 7"),
    ],
)
def test_folders_that_are_no_runs(tmp_path, text, words):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(store.StoreError, match=words):
        store.load_run(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    store.write_cell(tmp_path, cell(value=1.0))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(store.StoreError, match="No space left"):
        store.write_cell(tmp_path, cell(value=2.0))
    monkeypatch.undo()
    assert store.read_cell(tmp_path, "a")["metrics"]["m"]["value"] == 1.0
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a.json"]


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        store.write_cell(tmp_path, cell(value=float("nan")))
    assert not (tmp_path / "cells").exists()


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "other").write_text("")
    path = store.write_cell(tmp_path, cell())
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_one_writer_at_a_time(tmp_path):
    code = "import sys; from pathlib import Path; from vlmprune.eval.lmms import store\n"
    code += "with store.locked(Path(sys.argv[1])): pass"

    def other():
        return subprocess.run([sys.executable, "-P", "-c", code, tmp_path], capture_output=True, text=True)

    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / ".writing-x").write_text("of a run that was killed")
    with store.locked(tmp_path):
        assert "another `vlmprune eval` is writing" in other().stderr
        with pytest.raises(store.StoreError, match="another"), store.locked(tmp_path):
            pass
        assert not list((tmp_path / "cells").iterdir())
    assert other().returncode == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(store.StoreError, match="cannot use"), store.locked(tmp_path / "file"):
        pass
    with pytest.raises(store.StoreError, match="cannot write"):
        store.write_run(tmp_path / "file", json.loads("{}"))
