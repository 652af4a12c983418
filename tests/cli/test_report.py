"""`vlmprune report`."""

from __future__ import annotations

import json

import run_folders as made

from vlmprune.cli import main


def test_writes_again_and_prints_the_table(tmp_path, capsys):
    made.write(tmp_path, made.grid_of(keeps=(0.25,)))
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "fopru" in out
    assert "- random, points" in out
    for line in out.splitlines():
        if line.startswith("report: "):
            name = line.removeprefix("report: ")
            assert (tmp_path / name).is_file()
    assert out.count("report: ") == 7


def test_no_run_is_a_users_mistake(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "not the output folder of `vlmprune eval`" in err
    assert "Traceback" not in err
    assert main(["report"]) == 2


def test_damaged_cells_are_missing(tmp_path, capsys):
    made.write(tmp_path, made.grid_of(keeps=(0.25,)))
    cells = sorted((tmp_path / "cells").glob("*random*.json"))
    for path, spoil in zip(cells, ({"metrics": {}}, {"cell": None}, {"samples": []}), strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "of 5 planned cells: 3 damaged" in out
    assert all(str(path) in out.replace("\n", "") for path in cells)
    (tmp_path / "run.json").write_text(json.dumps(json.loads((tmp_path / "run.json").read_text()) | {"keys": {}}))
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is damaged" in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    made.write(tmp_path, made.grid_of(keeps=(0.25,)))
    (tmp_path / "report.md").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "cannot write the report" in capsys.readouterr().err
