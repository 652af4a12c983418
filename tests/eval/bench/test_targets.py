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


@pytest.mark.parametrize(("times", "met"), [(2.0, True), (1.9, False)])
def test_selection(times, met):
    one = {"objective": "max_min", "tokens": 2880, "keep": 320, "speedup": ratio(times)}
    assert [verdict.met for verdict in judge_selection([one])] == [met]


def test_the_page_gets_its_tables(tmp_path, monkeypatch, capsys):
    import copy
    import importlib.util
    import json
    from pathlib import Path

    root = Path(__file__).resolve().parents[3]
    path = root / "scripts" / "performance_tables.py"
    spec = importlib.util.spec_from_file_location("performance_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "benchmarks").mkdir()
    results = json.loads((root / "benchmarks" / "cpu-576.json").read_text())
    times = {who: dict.fromkeys(("median", "low", "high", "runs"), 7.0) for who in ("unpruned", "pruned", "oracle")}
    whole = results["cells"][0] | cell(
        overhead=ratio(1.2), tokens={"visual": 576, "layer_average": 144}, first_token_ms=times, decode_ms=times,
        speedup=ratio(3.0, 3), oracle_speedup=ratio(3.3, 3), amdahl={"bound": 3.5},
    )  # fmt: skip
    results["cells"] = [whole]
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
    assert "overhead: 15 pairs; speed-up and its oracle's: 3 unpruned runs" in once

    other = copy.deepcopy(results)
    other["cells"] = [whole | {"method": name, "budget": b} for name, b in (("m", "128"), ("globalcom2", "64"))]
    other["cells"].append(whole | {"method": "n", "budget": "-"})
    (tmp_path / "benchmarks" / "cpu-2880.json").write_text(json.dumps(other))
    script.main()
    missing = page.read_text().partition("Not measured yet: ")[2].partition(" (`make bench`)")[0].split(", ")
    assert missing == [
        "cpu-selection.json",
        "`m` 128 at 576 patches",
        "`n` - at 576 patches",
        "`m` 64 at 2880 patches",
        "`globalcom2` 128 at 2880 patches",
    ]
