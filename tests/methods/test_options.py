"""Options that cannot be meant: each refused when the method is made, with its name, its value and what is allowed."""

from __future__ import annotations

from dataclasses import replace

import probes
import pytest
import tiny

from vlmprune.methods import FoPru, Random, ToDRE, TransPrune
from vlmprune.patches import family_of

ASCENDING = r"must be one or more ascending layer numbers from 1 to 3[12]"
RATIOS = r"must be one or more numbers in \(0, 1\] that do not grow"


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        *(
            ("accumulate_layers", value, ASCENDING)
            for value in ((), (-3,), (0, 1), (7, 99), (7, 7), (9, 8), (7.0, 8), ("a",), 7, "abc", (True, 7))
        ),
        *(
            ("prune_layers", value, ASCENDING)
            for value in ((), (7.5, 9, 12), 7, ("a", "b", "c"), (0, 9, 12), (7, 9, 32), (9, 7, 12), (7, 7, 12), None)
        ),
        *(
            ("keep_ratios", value, RATIOS)
            for value in ((), "abc", ("a",) * 3, 0.5, (0.5, 0.6, 0.1), (0.5, 0.2, 0.0), (1.5, 0.5, 0.2), (True,) * 3)
        ),
        ("keep_ratios", (0.9, float("nan"), 0.1), RATIOS),
        ("keep_ratios", (0.5, 0.2), " has 2 entries, prune_layers 3: one per cut"),
        *(("alpha", value, "must be a number between 0 and 1") for value in ("x", -0.1, 1.5, True, None, float("nan"))),
    ],
    ids=str,
)
def test_transprune(option, value, match):
    with pytest.raises(ValueError, match=rf"{option}.*{match}"):
        TransPrune(**{option: value})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accumulate_layers": (7, 13)}, "end by the last one, after layer 12: what comes later is never read"),
        ({"accumulate_layers": (8, 9)}, "must start by the first cut, after layer 7"),
        ({"prune_layers": (2, 3, 4), "accumulate_layers": (7, 8)}, "must start by the first cut, after layer 2"),
    ],
    ids=str,
)
def test_transprune_accumulates_up_to_its_last_cut(options, match):
    with pytest.raises(ValueError, match=match):
        TransPrune(**options)
    assert TransPrune().accumulate_layers == (7, 8, 9, 10, 11, 12)
    assert TransPrune(prune_layers=(2, 4, 5)).accumulate_layers == (2, 3, 4, 5)


@pytest.mark.parametrize("budget", [{"average": 0.6}, {"average": 100}, {"keep": 0.5}, {"keep": 9}], ids=str)
def test_transprune_has_nothing_to_stretch(budget):
    with pytest.raises(ValueError, match=r"keep_ratios=\(1\.0, 1\.0, 1\.0\) remove nothing that"):
        TransPrune(keep_ratios=(1.0, 1.0, 1.0), **budget)
    assert probes.left(TransPrune(keep_ratios=(1.0, 1.0, 1.0)), 10, 2) == 10


def test_transprune_takes_lists_and_ranges():
    made = TransPrune(accumulate_layers=range(7, 13), prune_layers=[7, 9, 12], keep_ratios=[0.875, 0.625, 0.125])
    assert made == TransPrune()


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True, None], ids=str)
@pytest.mark.parametrize("method", [ToDRE, Random])
def test_seed(method, seed):
    with pytest.raises(ValueError, match=r"seed=.* must be a whole number of at least 0"):
        method(keep=4, seed=seed)
    assert method(keep=4, seed=7).seed == 7


@pytest.mark.parametrize("tau", [True, "0.1", -0.1, 1.1, float("nan"), [0.1]], ids=str)
def test_todre_tau(tau):
    with pytest.raises(ValueError, match=r"tau=.* must be a number between 0 and 1 \(a share of attention\), or None"):
        ToDRE(keep=4, tau=tau)
    assert [ToDRE(keep=4, tau=t).tau for t in (0, 1, 0.5, None)] == [0, 1, 0.5, None]


@pytest.mark.parametrize(
    ("layer", "kind", "match"),
    [
        ((), ValueError, r"layer=\(\) must name at least one"),
        ((4, -2), ValueError, r"layer=\(4, -2\) must name .* each of them once"),
        ((1, 6), ValueError, r"layer=6 is out of range: this model allows 0\.\.5"),
        ((1, "a"), TypeError, "layer='a' must be an int"),
        ("abc", TypeError, "layer='abc' must be an int"),
    ],
    ids=str,
)
def test_fopru_layer(layer, kind, match):
    model = tiny.shared()
    facts = replace(family_of(model).facts(model.model), tower_layers=6)
    with pytest.raises(kind, match=match):
        FoPru(keep=4, layer=layer).cuts(facts)
    with pytest.raises(ValueError, match="ensemble='median' is not one of"):
        FoPru(keep=4, ensemble="median")
