"""Shortening and expanding a batch of sequences, against Python lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmprune.engine.sequence import Sequence

fast = settings(max_examples=150, deadline=None, derandomize=True)


class Rotary(nn.Module):
    def forward(self, hidden, position_ids):
        x = position_ids[..., None].double()
        return x + 0.25, x + 0.5


@st.composite
def batches(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rows = []
    for _ in range(batch):
        real = draw(st.integers(1, length))
        left = draw(st.booleans())
        mask = [False] * (length - real) + [True] * real
        rows.append(mask if left else mask[::-1])
    cuts = []
    for _ in range(draw(st.integers(1, 3))):
        drops = [[m and draw(st.booleans()) for m in mask] for mask in rows]
        cuts.append((drops, draw(st.sampled_from(["original", "contiguous"]))))
    return rows, cuts


@fast
@given(case=batches())
def test_shorten_and_expand(case):
    masks, cuts = case
    batch, length = len(masks), len(masks[0])
    real = torch.tensor(masks)
    ids = (real.long().cumsum(1) - 1).clamp(min=0)
    hidden = torch.arange(batch * length, dtype=torch.float64).view(batch, length, 1)
    lengths = real.sum(1).tolist()
    whole = all(n == length for n in lengths)
    sequence = Sequence(
        length, torch.arange(length).expand(batch, -1), None if whole else real, lengths, ids, Rotary()(hidden, ids)
    )
    # per row: [column, position] of what is left
    rows = [[[c, ids[i, c].item()] for c in range(length) if masks[i][c]] for i in range(batch)]
    lost = [0] * batch
    for drops, positions in cuts:
        drop, dropped = torch.zeros(batch, sequence.length, dtype=torch.bool), []
        for i, row in enumerate(rows):
            gone = {c for c, _ in row if drops[i][c]}
            if gone == {c for c, _ in row}:  # some text is always left
                gone.discard(row[-1][0])
            for entry in range(sequence.length):
                alive = sequence.mask is None or sequence.mask[i, entry]
                drop[i, entry] = bool(alive) and sequence.columns[i, entry].item() in gone
            dropped.append(len(gone))
            if positions == "contiguous":
                rows[i] = [[c, p - sum(g < c for g in gone)] for c, p in row]
                lost[i] += len(gone)
            rows[i] = [entry for entry in rows[i] if entry[0] not in gone]
        hidden, sequence = sequence.shorten(hidden, drop, dropped, positions, Rotary())
        assert sequence.length == hidden.shape[1] == max(map(len, rows))
        for i, row in enumerate(rows):
            tail = slice(sequence.length - len(row), None)
            assert sequence.columns[i, tail].tolist() == [c for c, _ in row]
            assert sequence.positions[i, tail].tolist() == [p for _, p in row]
            assert hidden[i, tail, 0].tolist() == [i * length + c for c, _ in row]
            assert sequence.rotary[0][i, tail, 0].tolist() == [p + 0.25 for _, p in row]
            assert sequence.rotary[1][i, tail, 0].tolist() == [p + 0.5 for _, p in row]
            mask = [True] * sequence.length if sequence.mask is None else sequence.mask[i].tolist()
            assert mask == [False] * (sequence.length - len(row)) + [True] * len(row)
        assert sequence.lengths == [len(row) for row in rows]
        assert ([0] * batch if sequence.shift is None else sequence.shift.flatten().tolist()) == lost
    full = sequence.expand(hidden)
    assert full.shape == (batch, length, 1)
    for i, row in enumerate(rows):
        columns = [c for c, _ in row]
        for c in range(length):
            before = [k for k in columns if k <= c]
            assert full[i, c, 0] == i * length + (before[-1] if before else columns[0])
