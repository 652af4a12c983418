"""What methods see of towers that turn or norm what they project: what vLLM shows of them, and what comes of it.

Layers of transformers are shown as vLLM's are; what serving keeps is what a pruned prompt has on transformers.
"""

from __future__ import annotations

import copy

import kin
import pytest
import tiny
import tiny_qwen
import torch
from torch import nn

import vlmprune
from vlmprune import registry
from vlmprune.patches import family_of
from vlmprune.patches.towers import tower_layer
from vlmprune.serving.choice import Choice, ServedPicture
from vlmprune.serving.watch import AttentionWatcher
from vlmprune.spec import build

F64 = torch.float64
SIZES = [(24, 40), (16, 16), (48, 24), (24, 40)]  # pixels; not all multiples of a window


class Attention(nn.Module):
    """What compares queries and keys."""

    def __init__(self, head_size, scale):
        super().__init__()
        self.head_size, self.scale = head_size, scale

    def forward(self, query, key, value):
        return value


class Layer(nn.Module):
    """A layer of transformers that shows queries and keys as vLLM's does."""

    def __init__(self, layer, packed):
        super().__init__()
        self.layer, self.packed, holder = layer, packed, nn.Module()
        attention = layer.attn if packed else layer.attention
        head_size = attention.head_dim if hasattr(attention, "head_dim") else attention.dim // attention.num_heads
        holder.attn = Attention(head_size, tower_layer(layer).scale)
        self.attn = self.attention = holder
        self.norm1 = self.layernorm_before = nn.Identity()

    def forward(self, hidden, rest, kwargs):
        if self.packed:
            shown = tower_layer(self.layer, tuple(turn[None] for turn in kwargs["position_embeddings"]))
            heads = hidden[:, 0][None]
        else:
            shown, heads = tower_layer(self.layer), hidden
        self.norm1(hidden)
        rows = shown.normed(heads)
        query, key = (x.transpose(1, 2) for x in (shown.queries(rows), shown.keys(rows)))
        if self.packed:
            self.attn.attn(query=query, key=key, value=key)
        else:
            self.attn.attn(*(x.flatten(2) for x in (query, key, key)))
        inputs = hidden[:, 0] if self.packed else hidden
        return self.layer(inputs, *rest, **kwargs)


class Shown(nn.Module):
    """Stands in the host's list of layers, and calls its layer as vLLM does."""

    def __init__(self, layer, packed):
        super().__init__()
        self.shown, self.packed = Layer(layer, packed), packed

    def forward(self, hidden_states, *rest, **kwargs):
        return self.shown(hidden_states[:, None] if self.packed else hidden_states, rest, kwargs)


def case(name):
    """A model, prompts with two pictures and one, and the sizes of these."""
    if name in tiny_qwen.CLASSES:
        model = tiny.shared(dtype=F64, family=name)
        made = [(SIZES[:2], 0), (SIZES[2:3], 1)]
        return model, [
            (
                tiny.prompt(model, [3, *["image", 4] * len(sizes)], sizes, seed=seed),
                [tiny_qwen.grid(size) for size in sizes],
            )
            for sizes, seed in made
        ]
    model = kin.KIN[name].model()
    shown = [([3, ("image", 1), 4, ("image", 2), 2], [1, 2]), ([3, ("image", 0), 4], [0])]
    return model, [(kin.KIN[name].prompt(parts).inputs, [kin.TILES[n] for n in mine]) for parts, mine in shown]


@torch.no_grad()
def served_rows(model, name, options, prompts):
    """What serving keeps of all pictures, seen in one pass of the tower."""
    family = family_of(model)
    wrapped = copy.deepcopy(model)
    inner = family.inner(wrapped)
    tower, facts = family.towers(inner)[0], family.facts(inner)
    choice = Choice(build(name, options), family, facts)
    choice.check()
    layers = family.tower_layers(tower)
    taps = [tap for tap in choice.plan.measured if tap.layer >= 0]
    shown = nn.ModuleList([Shown(layer, facts.packed) for layer in layers])
    watcher = AttentionWatcher(tower, [one.shown for one in shown], taps, family, facts, mean=None)
    if facts.packed:
        tower.blocks = shown
    else:
        tower.encoder.layer = shown
    sizes = [size for _, mine in prompts for size in mine]
    watcher.sizes = sizes
    pictures = [ServedPicture(family.packing(inner, "image", size).trace()) for size in sizes]
    given = {"pixel_values": torch.cat([inputs["pixel_values"] for inputs, _ in prompts])}
    if facts.packed:
        given["image_grid_thw"] = torch.tensor(sizes)
    features = torch.cat(list(inner.get_image_features(**given).pooler_output)).flatten(0, -2)
    rows = features.split([picture.grid.tokens for picture in pictures])
    kept = choice.rows(pictures, watcher.take(), rows)
    assert [len(mine) for mine, _ in kept] == [choice.count(picture.grid) for picture in pictures]
    return kept


@torch.no_grad()
def host_rows(model, name, options, inputs):
    """`(length, dim)` rows that the first decoder layer reads of a pruned prompt, and which tokens of every picture."""
    found, inner = [], family_of(model).inner(model)
    norm = inner.language_model.layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        with vlmprune.patch(model, name, **options) as handle:
            model(**inputs)
            kept = [handle.trace.kept(i) for i in range(len(handle.trace.grids))]
    finally:
        hook.remove()
    return found[0][0], kept


METHODS = ["divprune", "fopru", "hiprune", "pool", "vscan", "zero_tprune"]
CASES = [(model, name) for model in ("qwen2_5_vl", "qwen3_vl", "internvl", "internvl-qwen3") for name in METHODS]
CASES += [("internvl", "vtc_cls"), ("internvl-qwen3", "vtc_cls"), ("internvl", "vispruner")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_what_is_served_keeps_the_rows_of_transformers(name, method):
    options = {"keep": 0.4, **registry.find(method).served_with}
    model, prompts = case(name)
    served = served_rows(model, method, options, prompts)
    for inputs, sizes in prompts:
        rows, kept = host_rows(model, method, options, inputs)
        at = 3
        for mine in kept:
            found, places = served.pop(0)
            assert places.tolist() == mine
            torch.testing.assert_close(found, rows[at : at + len(mine)], rtol=1e-6, atol=1e-7)
            at += len(mine) + 4
        assert len(kept) == len(sizes)
