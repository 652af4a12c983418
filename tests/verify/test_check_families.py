"""The self-test on tiny models of every family beyond LLaVA, with every method that runs there.

The full product runs in `make test-all`; every run has two methods of it a family, other ones in each.
"""

from __future__ import annotations

from functools import cache

import pytest
from checked import passes
from kin import KIN
from kin.family import options
from scenes import STILL

from vlmprune import UnsupportedError
from vlmprune.patches.host import reads_pixel_values
from vlmprune.verify import Subject

KINDS = {name: kin for name, kin in KIN.items() if not name.endswith("-video")}


#: The only layer behind these methods' last cut has no rotary embedding in these families: positions count for nothing.
NO_ROTARY, LAST = ("aya_vision", "cohere2_vision"), ("atp", "sparsevlm", "todre", "transprune", "v2drop")


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
    if not reads_pixel_values(KINDS[kind].model().model):
        with pytest.raises(UnsupportedError, match=r"needs transformers 5\.23 or newer"):
            subject(kind).check(name, **options(KINDS[kind], name))
        return
    support("vlmprune check", kind, name)
    # fewer pixels, and every token: nothing in the language model to have positions
    but = ("positions",) if name == "downsample" else ()
    report = subject(kind).check(name, **options(KINDS[kind], name))
    if kind in NO_ROTARY and name in LAST:
        told = {line.check: line.outcome for line in report.lines}
        assert told.pop("positions") == "?"
        assert {*told.values()} == {"pass", "-"}
        return
    passes(report, but)


def test_every_run_has_each_family():
    for number, kin in enumerate(KINDS.values()):
        assert sum(chosen(number, kin, name) for name in runnable(kin)) == 2


# PaliGemma's language model is not causal where nothing tells it to be: a prompt without padding is right by itself
@pytest.mark.parametrize(("kind", "lines"), [("gemma3", {"rows", "decode"}), ("paligemma", {"batch", "generate"})])
def test_an_engine_that_forgets_who_sees_whom(monkeypatch, kind, lines):
    from vlmprune.engine.sequence import Sequence

    monkeypatch.setattr(Sequence, "blocks_of", lambda self, index, mask: None)
    assert lines <= {*Subject(KINDS[kind].model()).check("random", keep=0.4).failed}


def test_tokens_of_squares_of_patches_that_are_taken_for_patches(monkeypatch):
    from vlmprune.patches import base

    monkeypatch.setattr(base, "pooled", lambda values, side, unit: values[:, :: unit**2])
    assert subject("aya_vision").check("fopru", keep=0.4).failed == ["taps"]
