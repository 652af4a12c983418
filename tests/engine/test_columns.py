"""What is left of a prompt is known by its columns, and what a host hands on for every column is cut by them."""

from __future__ import annotations

from dataclasses import replace

import probes
import pytest
import tiny
import torch
from torch import nn

import vlmprune
from vlmprune.engine.sequence import Sequence, by_columns
from vlmprune.engine.turn import Brings, Turn
from vlmprune.patches import Family
from vlmprune.patches.language_models import counted


@pytest.mark.parametrize(("shape", "axis"), [((2, 5), 1), ((2, 5, 3), 1), ((3, 2, 5), -1), ((1, 5, 2, 3), 1)])
def test_by_columns(shape, axis):
    """Rows stand on the axis in front of columns, or there is one for all rows."""
    handed, columns = torch.arange(torch.tensor(shape).prod()).view(shape), torch.tensor([[0, 2, 4], [1, 1, 3]])
    got = by_columns((handed, -handed), columns, axis)
    for row, mine in enumerate(columns.tolist()):
        rows = handed.select(axis - 1 if axis > 0 else -2, min(row, shape[axis - 1] - 1))
        expected = rows[mine] if axis == 1 else rows[:, mine]
        assert torch.equal(got[0].select(axis - 1 if axis > 0 else -2, row), expected)
    assert torch.equal(got[1], -got[0])


def sequence_of(length: int, positions: torch.Tensor | None, rotary: tuple) -> Sequence:
    columns = torch.arange(length).expand(2, -1)
    return Sequence(length, columns, None, [length] * 2, positions, rotary)


class Doubles(nn.Module):
    def forward(self, hidden, position_ids):
        return 2.0 * position_ids[..., None], 2.0 * position_ids[..., None] + 1


def test_another_kind_of_layer_has_another_rotary_embedding():
    """Its own is taken by columns where positions are the host's, and made anew where they are not."""
    length, hidden = 6, torch.zeros(2, 6, 1)
    ids = torch.arange(length).expand(2, -1)
    full, sliding = ((ids[:1, :, None] * k, ids[:1, :, None] * k + 1) for k in (10.0, 100.0))
    whole = sequence_of(length, ids, full).handed(full, hidden, Doubles())
    assert whole.handed(full, hidden, Doubles()) is whole
    assert torch.equal(whole.handed(sliding, hidden, Doubles()).rotary[0], sliding[0].expand(2, -1, -1))
    drop = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]]).bool()
    left, kept = whole.shorten(hidden, drop, [2, 2], "original", Doubles())
    assert kept.columns.tolist() == [[0, 2, 3, 5], [1, 2, 3, 4]]
    assert kept.handed(full, left, Doubles()) is kept
    assert kept.handed(sliding, left, Doubles()).rotary[0][..., 0].tolist() == (kept.columns * 100).tolist()
    left, closed = whole.shorten(hidden, drop, [2, 2], "contiguous", Doubles())
    assert closed.handed(full, left, Doubles()) is closed
    assert closed.handed(sliding, left, Doubles()).rotary[0][..., 0].tolist() == [[0.0, 2.0, 4.0, 6.0]] * 2


def test_positions_on_several_axes_are_known_by_columns():
    """Layers are not told such positions; what was made of them is taken by columns, and no gap can be closed."""
    rotary = tuple(torch.randn(2, 4, 3) for _ in range(2))
    whole, drop = sequence_of(4, None, rotary), torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    _, kept = whole.shorten(torch.zeros(2, 4, 1), drop, [1, 1], "original", Doubles())
    assert kept.positions is None
    assert kept.columns.tolist() == [[0, 2, 3], [0, 1, 3]]
    assert torch.equal(kept.rotary[1], by_columns(rotary[1], kept.columns))
    with pytest.raises(vlmprune.UnsupportedError, match="lie on several axes"):
        whole.shorten(torch.zeros(2, 4, 1), drop, [1, 1], "contiguous", Doubles())


def test_position_ids_that_count():
    ids = torch.arange(24).view(4, 2, 3)
    assert counted(None) is None
    assert counted(ids[0]) is not None
    assert torch.equal(counted(ids), ids[0])
    assert counted(ids[:3]) is None


class Handed:
    """Notes what decoder layers are handed, behind the patch."""

    def __init__(self, model: nn.Module):
        self.layers = [{} for _ in model.model.language_model.layers]
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, __, kwargs, i=i: self.layers[i].update(kwargs), with_kwargs=True)
            for i, layer in enumerate(model.model.language_model.layers)
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_decode_keeps_what_the_host_made(tiny_model, positions):
    """Where a cut left positions as they are, layers behind it decode with the host's own rotary embedding."""
    model = tiny_model()
    prompt = probes.step_inputs(tiny.prompt(model, [4, "image", 6], [(24, 24)], together=True))
    with vlmprune.patch(model, "fastv", keep=5, layer=2, positions=positions):
        out = model(**prompt, use_cache=True)
        handed = Handed(model)
        model(input_ids=torch.tensor([[7]]), **{tiny.CACHE: out[tiny.CACHE]})
        handed.remove()
    first, *others = [layer["position_embeddings"][0] for layer in handed.layers]
    same = [cos is first for cos in others]
    assert same == [True] * len(others) if positions == "original" else same == [True, False, False]


@torch.no_grad()
def test_layers_get_what_is_left_of_what_is_theirs(tiny_model, monkeypatch):
    """Rotary embeddings of two kinds of layers, and a further argument that has something for every column."""
    monkeypatch.setattr(Family, "layer_columns", {"marks": 1})
    model = tiny_model()
    prompt = probes.step_inputs(tiny.prompt(model, [4, "image", 6], [(24, 24)], together=True))
    layers, other, length = model.model.language_model.layers, {}, prompt["input_ids"].shape[1]

    def host(module, args, kwargs):
        if "cos" not in other:
            other["cos"], other["sin"] = (x * 0.5 for x in kwargs["position_embeddings"])
        kwargs["marks"] = torch.arange(length)[None] * 3
        odd = module.self_attn.layer_idx % 2
        return args, kwargs | ({"position_embeddings": (other["cos"], other["sin"])} if odd else {})

    hooks = [layer.register_forward_pre_hook(host, with_kwargs=True) for layer in layers]
    with vlmprune.patch(model, "fastv", keep=5, layer=2, positions="original") as handle:
        handed = Handed(model)
        model(**prompt)
        handed.remove()
        kept = handle.trace.kept()
    for hook in hooks:
        hook.remove()
    start = prompt["input_ids"][0].tolist().index(tiny.IMAGE)
    tokens = (prompt["input_ids"] == tiny.IMAGE).sum().item()
    columns = [*range(start), *(start + t for t in kept), *range(start + tokens, length)]
    assert handed.layers[1]["marks"][0].tolist() == [3 * c for c in range(length)]
    for index in (2, 3):
        assert handed.layers[index]["marks"][0].tolist() == [3 * c for c in columns]
        cos = handed.layers[index]["position_embeddings"][0][0]
        assert torch.equal(cos, other["cos"][0, columns] * (1 if index % 2 else 2))


@pytest.mark.parametrize(
    ("end", "brings"),
    [
        (None, Brings.NEW),  # nothing tells
        (30 + 8 + 12, Brings.NEW),
        (30 + 12, Brings.OVERLAP),  # eight of the twelve are old
        (12, Brings.WHOLE),
        (30, Brings.ELSEWHERE),
        (49, Brings.ELSEWHERE),
    ],
)
def test_what_a_call_brings_is_told_by_its_end(end, brings):
    turn = Turn(cached=30, pruned=8, brought=12, end=end, told="attention_mask ends")
    assert turn.brings is brings
    whole = replace(turn, cached=38, pruned=0)  # the same conversation, unpruned: no overlap
    assert whole.brings is {Brings.OVERLAP: Brings.ELSEWHERE}.get(brings, brings)
