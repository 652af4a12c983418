"""Options are checked by the types of their fields, as any method declares them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import pytest

from vlmprune.methods.base import Method, Pruner
from vlmprune.parts.options import Must, Range, Seed, Share, ascending, checked, falling, hints, is_whole, ranges

if TYPE_CHECKING:
    from decimal import Decimal

Colour = Literal["red", "blue"]


@dataclass(frozen=True)
class Typed(Pruner):
    colour: Colour = "red"
    maybe: Literal["yes"] | None = None
    either: Literal["a"] | Colour = "a"
    colours: tuple[Colour, ...] = ()
    pair: tuple[Colour, bool] | None = None
    layer: int | tuple[int, ...] | None = None
    switch: bool = False
    seed: Seed = 0
    share: Share = 0.5
    half: Share | None = None
    even: Annotated[int | None, Must("an even number or None", lambda n: n % 2 == 0)] = None
    some: Annotated[int | None, Must("an odd number", lambda n: n % 2 == 1)] = None
    few: Annotated[int, "a note that is no rule", Must("at most 3", partial(is_whole, most=3))] = 3
    layers: Annotated[tuple[int, ...], ascending(32)] = (1, 2)
    ratios: Annotated[tuple[float, ...], falling()] = (0.5,)
    untold: float = 0.0


@dataclass(frozen=True)
class Narrower(Typed):
    newlines: Literal["none"] = "none"
    colour: Literal["blue"] = "blue"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"colour": "green"}, "colour='green' is not one of 'red', 'blue'."),
        ({"colour": None}, "colour=None is not one of 'red', 'blue'."),
        ({"colour": ["red"]}, "colour=['red'] is not one of 'red', 'blue'."),
        ({"maybe": "no"}, "maybe='no' is not one of 'yes', None."),
        ({"either": "b"}, "either='b' is not one of 'a', 'red', 'blue'."),
        ({"colours": ("red", "green")}, "colours[1]='green' is not one of 'red', 'blue'."),
        ({"pair": ("green", True)}, "pair[0]='green' is not one of 'red', 'blue'."),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0."),
        ({"seed": True}, "seed=True must be a whole number of at least 0."),
        ({"share": 1.5}, "share=1.5 must be a number between 0 and 1."),
        ({"share": None}, "share=None must be a number between 0 and 1."),
        ({"half": "x"}, "half='x' must be a number between 0 and 1, or None."),
        ({"half": float("nan")}, "half=nan must be a number between 0 and 1, or None."),
        ({"even": 3}, "even=3 must be an even number or None."),
        ({"some": 2}, "some=2 must be an odd number, or None."),
        ({"few": 4}, "few=4 must be at most 3."),
        ({"layers": (2, 1)}, "layers=(2, 1) must be one or more ascending layer numbers from 1 to 32"),
        ({"ratios": ()}, "ratios=() must be one or more numbers in (0, 1] that do not grow."),
        ({"positions": "kept"}, "positions='kept' is not one of 'original', 'contiguous', None."),
        ({"newlines": "candidates"}, "newlines='candidates' is not one of 'all', 'row', 'none'."),
    ],
    ids=str,
)
def test_what_is_refused(options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        Typed(keep=4, **options)


@pytest.mark.parametrize("options", [{"switch": 1}, {"pair": ("red", 1)}], ids=str)
def test_a_switch_is_true_or_false(options):
    with pytest.raises(TypeError, match="=1 must be True or False"):
        Typed(keep=4, **options)


def test_what_is_taken():
    made = Typed(
        keep=4,
        maybe="yes",
        either="blue",
        colours=["red", "blue"],
        pair=["red", True],
        layer=[1, -2],
        half=0,
        even=2,
        layers=range(3, 5),
        ratios=[1, 0.5],
        untold="anything",
    )
    assert (made.colours, made.pair, made.layer, made.layers) == (("red", "blue"), ("red", True), (1, -2), (3, 4))
    assert made.ratios == (1, 0.5)
    assert Typed(keep=4, maybe=None, half=None, even=None, pair=None, layer=3).layer == 3
    assert Typed(keep=4).layer is None


def test_a_subclass_narrows():
    assert Narrower(keep=4).newlines == "none"
    for options in ({"newlines": "all"}, {"colour": "red"}):
        with pytest.raises(ValueError, match="is not one of"):
            Narrower(keep=4, **options)


def test_types_that_nobody_can_read():
    @dataclass(frozen=True)
    class Hidden(Method):
        amount: Decimal | None = None

    with pytest.raises(TypeError, match=r"Hidden\.amount: its type, 'Decimal | None', cannot be read .*TYPE_CHECKING"):
        Hidden()


def test_types_are_read_where_they_were_written():
    """`Colour` means nothing in the base's module, and `Positions` nothing here."""
    found = hints(Narrower)
    assert found["positions"] == Literal["original", "contiguous"] | None
    assert found["either"] == Literal["a"] | Colour
    assert found["colour"] == Literal["blue"]


def test_options_do_not_wait_for_torch():
    code = "import sys, vlmprune.parts.options, vlmprune.parts.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_ranges_stand_beside_rules():
    @dataclass
    class Some:
        plain: float = 1.0
        free: Annotated[float, Range(0, 4)] = 1.0
        ruled: Annotated[float | None, Must("above 0", lambda x: x > 0), Range(1, 50, log=True)] = None

    assert ranges(Some) == {"free": Range(0, 4), "ruled": Range(1, 50, log=True)}
    assert checked("ruled", hints(Some)["ruled"], 60.0) == 60.0  # a range refuses nothing
    with pytest.raises(ValueError, match="ruled=-1 must be above 0"):
        checked("ruled", hints(Some)["ruled"], -1)
