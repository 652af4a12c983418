"""Targets are judged by medians of enough pairs."""

from __future__ import annotations

import pytest

from vlmprune.eval.bench.targets import judge, judge_selection


def ratio(median, pairs=15):
    return {"median": median, "low": median, "high": median, "pairs": pairs}


def cell(first_layer=0, **ratios):
    usual = {"overhead": ratio(1.04), "cost_share": ratio(0.02), "decode_overhead": ratio(1.01)}
    parts = [{"first_layer": 0}, {"first_layer": first_layer}]
    return {"method": "m", "budget": "64", "tokens": {"visual": 576}, "stretches": parts} | usual | ratios


@pytest.mark.parametrize(
    ("made", "met"),
    [
        (cell(), [True, True, True]),
        (cell(overhead=ratio(1.051)), [False, True, True]),
        (cell(cost_share=ratio(0.031)), [True, False, True]),
        (cell(decode_overhead=ratio(1.021)), [True, True, False]),
        (cell(first_layer=2, overhead=ratio(1.09), cost_share=ratio(0.5)), [True, True]),
        (cell(first_layer=2, overhead=ratio(1.11)), [False, True]),
        (cell(overhead=ratio(1.0, pairs=14)), [False, True, True]),
    ],
)
def test_cells(made, met):
    assert [verdict.met for verdict in judge({"cells": [made]})] == met


@pytest.mark.parametrize(("times", "met"), [(10.0, True), (9.9, False)])
def test_selection(times, met):
    one = {"objective": "max_min", "tokens": 2880, "keep": 320, "speedup": ratio(times)}
    assert [verdict.met for verdict in judge_selection([one])] == [met]


def test_the_page_gets_its_tables(tmp_path, monkeypatch, capsys):
    import importlib.util
    import json
    from pathlib import Path

    path = Path(__file__).resolve().parents[3] / "scripts" / "performance_tables.py"
    spec = importlib.util.spec_from_file_location("performance_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "benchmarks").mkdir()
    times = {who: {"median": 7.0} for who in ("unpruned", "pruned", "oracle")}
    whole = cell(
        overhead=ratio(1.2), tokens={"visual": 576, "layer_average": 144}, first_token_ms=times, decode_ms=times,
        speedup=ratio(3.0), oracle_speedup=ratio(3.3), amdahl={"bound": 3.5},
    )  # fmt: skip
    machine = {"processor": "P", "threads": 2, "cores": 2, "torch": "t", "transformers": "u"}
    results = {"bench": 1, "settings": {"model": "small", "dtype": "float32"}, "machine": machine, "cells": [whole]}
    (tmp_path / "benchmarks" / "cpu-576.json").write_text(json.dumps(results))
    page = tmp_path / "performance.md"
    page.write_text(f"above\n{script.BEGIN}\nold\n{script.END}\nbelow\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PAGE", page)
    script.main()
    once = page.read_text()
    script.main()
    assert page.read_text() == once
    assert once.startswith("above\n")
    assert once.endswith("\nbelow\n")
    assert "old" not in once
    assert "| `m` 64 | 144 | 7 | 7 | 3.00x | 3.30x | 3.50x | 1.200 [1.200, 1.200] | 2.00% |" in once
    assert "2 of 3 are met" in capsys.readouterr().out
    assert "cpu-2880.json" in once
