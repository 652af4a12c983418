"""Settings of a benchmark: flags before earlier results, these before the usual ones."""

from __future__ import annotations

from vlmprune.eval.bench.asked import DEFAULTS, QUICK, settings_of

CELL = {"method": "grid", "options": {"keep": 8, "layer": 1}, "batch": 2}
OLD = {"asked": DEFAULTS | {"keep": "8", "pairs": 7, "kernels": "torch"}, "cells": [CELL]}


def test_the_usual_ones():
    made = settings_of({}, None)
    assert {name: made[name] for name in DEFAULTS} == DEFAULTS
    assert (made["shape"], made["model"], made["kernels"]) == ("small", None, "auto")


def test_those_of_earlier_results_and_flags_before_them():
    made = settings_of({}, OLD)
    assert (made["method"], made["keep"], made["batch"], made["option"]) == ("grid", "8", "2", ["layer=1"])
    assert (made["pairs"], made["kernels"]) == (7, "torch")
    made = settings_of({"batch": "4", "resume": True}, OLD)
    assert (made["batch"], made["pairs"]) == ("4", 7)
    assert "resume" not in made


def test_one_takes_the_other_off():
    assert settings_of({"average": "0.2"}, OLD)["keep"] is None
    made = settings_of({"model": "m"}, None)
    assert (made["model"], made["shape"]) == ("m", None)


def test_few_runs_and_no_more_of_them_than_pairs():
    made = settings_of({}, OLD, quick=True)
    assert {name: made[name] for name in QUICK} == QUICK
    made = settings_of({"pairs": 2}, None)
    assert (made["plain_runs"], made["stage_runs"]) == (2, 2)
