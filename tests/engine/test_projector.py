"""Cuts between tower and projector run whatever else a method asks for."""

from __future__ import annotations

import pytest
import tiny
import torch

import vlmprune
from vlmprune.parts.cuts import Pick, ProjectorCut
from vlmprune.parts.taps import BlockKeys, Hidden


class Alone(vlmprune.Method):
    """Nothing but a cut in front of the projector."""

    def __init__(self, tap):
        self.tap, self.seen = tap, []

    def cuts(self, facts):
        return [ProjectorCut((self.tap,), self.pick)]

    def pick(self, seen, views):
        self.seen.append(tuple(seen[self.tap].shape))
        return Pick(views.present)


@pytest.mark.parametrize(("tap", "width"), [(Hidden(), 24), (BlockKeys(3), 8)], ids=["hidden", "keys"])
def test_a_cut_runs_where_no_other_sees_the_tower(tap, width):
    model, alone = tiny.shared(), Alone(tap)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, alone):
        model(**prompt)
    assert alone.seen == [(1, 17, width)]
