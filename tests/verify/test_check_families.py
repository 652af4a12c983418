"""The self-test on tiny models of every family beyond LLaVA, with every method that runs there.

The full product runs in `make test-all`; every run has two methods of it a family, other ones in each.
"""

from __future__ import annotations

from functools import cache

import pytest
from checked import passes
from kin import KIN, options
from scenes import STILL

from vlmprune.patches import paligemma
from vlmprune.verify import Subject

KINDS = {name: kin for name, kin in KIN.items() if not name.endswith("-video")}


@cache
def subject(kind):
    return Subject(KINDS[kind].model())


def runnable(kin):
    return [name for name in STILL if not kin.refusal(name)]


def chosen(number, kin, name):
    """Whether every run has a cell of the product."""
    able = runnable(kin)
    return (able.index(name) - 2 * number) % len(able) < 2


def cells():
    for number, (kind, kin) in enumerate(KINDS.items()):
        for name in runnable(kin):
            left = [] if chosen(number, kin, name) else [pytest.mark.exhaustive]
            yield pytest.param(kind, name, marks=left, id=f"{kind}-{name}")


@pytest.mark.parametrize(("kind", "name"), list(cells()))
def test_a_sound_engine_passes(kind, name, support):
    support("vlmprune check", kind, name)
    # fewer pixels, and every token: nothing in the language model to have positions
    but = ("positions",) if name == "downsample" else ()
    passes(subject(kind).check(name, **options(KINDS[kind], name)), but)


def test_every_run_has_each_family():
    for number, kin in enumerate(KINDS.values()):
        assert sum(chosen(number, kin, name) for name in runnable(kin)) == 2


@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
def test_an_engine_that_forgets_who_sees_whom(monkeypatch, kind):
    from vlmprune.engine.sequence import Sequence

    monkeypatch.setattr(Sequence, "blocks_of", lambda self, index, mask: None)
    assert {"rows", "decode"} <= set(Subject(KINDS[kind].model()).check("random", keep=0.4).failed)


def test_positions_that_do_not_begin_where_the_host_counts_from(monkeypatch):
    monkeypatch.setattr(paligemma.PaliGemma, "origin", 0)
    assert "generate" not in passed(Subject(KINDS["paligemma"].model()).check("random", keep=0.4))


def passed(report):
    return {line.check for line in report.lines if line.outcome == "pass"}
