"""Positions on three axes: what stays of a picture keeps the positions that it has on transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_qwen
import torch
from tiny import IMAGE

from vlmprune.patches import FAMILIES

pytestmark = pytest.mark.vllm

#: Of patches: a picture that is taller than wide, one wider than tall, a strip, and one token.
SIZES = [(1, 12, 6), (1, 4, 14), (1, 2, 700), (1, 2, 2)]


def model(family):
    """The mixin of a model, with as much of one as positions need."""
    from vlmprune.serving.models import EncodingOnAxes

    config = tiny_qwen.model(family).config
    made = EncodingOnAxes.__new__(EncodingOnAxes)
    made.config, made.served = config, SimpleNamespace(family=FAMILIES[family])
    return made


def prompt(sizes, seed):
    """Ids of text and whole pictures, and which columns stay: all text, and some tokens of every picture."""
    generator = torch.Generator().manual_seed(seed)
    ids, stays = [7, 8], [True, True]
    for _, rows, cols in sizes:
        kept = torch.rand(rows * cols // 4, generator=generator) < 0.4
        kept[int(torch.randint(len(kept), (), generator=generator))] = True
        ids += [IMAGE] * len(kept) + [9, 10, 11]
        stays += kept.tolist() + [True] * 3
    return torch.tensor(ids), torch.tensor(stays)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cached", "chunk"), [(0, 10_000), (0, 7), (3, 16), (20, 5), (10_000, 1)])
def test_positions_are_those_of_transformers(family, dtype, cached, chunk):
    served, host = model(family), tiny_qwen.model(family)
    for seed, sizes in enumerate(([SIZES[0]], [SIZES[1], SIZES[0]], [SIZES[2], SIZES[3], SIZES[1]], [])):
        ids, stays = prompt(sizes, seed)
        told = {"image_grid_thw": torch.tensor(sizes)} if sizes else {}
        whole, _ = host.model.get_rope_index(
            ids[None], mm_token_type_ids=(ids == IMAGE)[None].long(), attention_mask=torch.ones_like(ids[None]), **told
        )
        wanted, ids_left = whole[:, 0][:, stays], ids[stays]
        features, rows = [], []
        for size, (start, end) in zip(sizes, runs(ids), strict=True):
            places = stays[start:end].nonzero().flatten()
            spec = SimpleNamespace(offset=int(stays[:start].sum()), length=len(places))
            features.append(
                SimpleNamespace(mm_position=spec, data={"image_grid_thw": SimpleNamespace(data=torch.tensor(size))})
            )
            rows.append(served.placed(torch.full((len(places), 3), 5.0, dtype=dtype), places, size))
        positions, off = served.get_mrope_input_positions(ids_left.tolist(), features[::-1])
        behind = int(wanted.max()) + 1 - len(ids_left)
        assert off == behind
        done = min(cached, len(ids_left) - 1)
        first = done
        while done < len(ids_left):  # chunk by chunk, as vLLM prefills
            end, window = min(done + chunk, len(ids_left)), []
            for one, made in zip(features, rows, strict=True):
                at = one.mm_position.offset
                part = made[max(done - at, 0) : max(end - at, 0)]
                window += [part] if len(part) else []
            for _ in range(2):  # the same chunk again: a request that was preempted
                left, positions, off = served.recompute_mrope_positions(ids_left.tolist(), window, positions, done)
                assert off == behind
            assert all((part == 5).all() and part.shape[1] == 3 for part in left)
            done = end
        torch.testing.assert_close(positions[:, first:], wanted[:, first:], rtol=0, atol=0)


def runs(ids):
    """Start and end of every picture."""
    change = torch.nn.functional.pad((ids == IMAGE).long(), (1, 1)).diff()
    return list(
        zip((change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist(), strict=True)
    )


def test_rows_without_placeholders_are_an_error():
    served = model("qwen2_5_vl")
    rows = served.placed(torch.zeros(3, 4), torch.arange(3), (1, 4, 4))
    with pytest.raises(RuntimeError, match="3 rows of pictures came for 2 placeholders"):
        served.recompute_mrope_positions([7, IMAGE, IMAGE, 9], [rows], torch.zeros(3, 4, dtype=torch.long), 0)
