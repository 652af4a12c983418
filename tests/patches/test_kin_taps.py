"""What methods see of the families beyond LLaVA is what the host's own eager attention says."""

from __future__ import annotations

from dataclasses import dataclass, field

import probes
import pytest
import torch
from kin import KIN
from kin.byhand import language_model
from kin.family import Kin, Prompt

import vlmprune
from vlmprune import Cut, Decoder, Method, Reduction
from vlmprune.parts import CrossShare, ReceivedAttention, TextAttention, VisionAttention
from vlmprune.patches import family_of

TOLERANCE = 1e-6  # eager attention takes its softmax in float32


@dataclass(frozen=True)
class See(Method):
    """Keeps all, and what it saw."""

    taps: tuple = ()
    layer: int = 0
    seen: dict = field(default_factory=dict, compare=False)

    def cuts(self, facts):
        return [Cut(Decoder(self.layer), self.taps, self.reduce, "original")]

    def reduce(self, seen, layout):
        self.seen.update(seen)
        return Reduction(layout.alive, layout.alive_counts)


@torch.no_grad()
def seen_by(kin: Kin, prompt: Prompt, taps: tuple, layer: int = 0) -> dict:
    look = See(taps, layer)
    with vlmprune.patch(kin.model(), look):
        kin.model()(**prompt.inputs)
    return look.seen


@torch.no_grad()
def eager(kin: Kin, prompt: Prompt) -> tuple[list, list]:
    """Attention weights of all tower layers, per tower, and of all decoder layers, of the unpruned model."""
    model, family = kin.model(), family_of(kin.model())
    inner = family.inner(model)
    towers, decoder, handles = [], {}, []

    def keep(where, index):
        return lambda module, args, output: where.__setitem__(index, output[1])

    for tower in family.towers(inner):
        towers.append({})
        for index, layer in enumerate(family.tower_layers(tower)):
            attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
            handles.append(attention.register_forward_hook(keep(towers[-1], index)))
    for index, layer in enumerate(language_model(model).layers):
        handles.append(layer.self_attn.register_forward_hook(keep(decoder, index)))
    model.set_attn_implementation("eager")
    try:
        model(**prompt.inputs)
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    return towers, decoder


def squares(values: torch.Tensor, rows: int, cols: int, unit: int) -> torch.Tensor:
    """`(patches,)` in a raster as means over the squares that make a token."""
    return values.view(rows // unit, unit, cols // unit, unit).mean((1, 3)).flatten()


def in_tower(kin: Kin, weights: torch.Tensor, prompt: Prompt, rows: str, unit: int) -> torch.Tensor:
    """Head-mean attention that every visual token receives, one after the other, from a tower layer's weights."""
    mean = weights.mean(1).double()
    if "image_sizes" in prompt.inputs:  # one sequence of all pictures
        parts, start = [], 0
        for height, width in (prompt.inputs["image_sizes"] // 6).tolist():
            here = slice(start, start := start + height * width)
            parts.append(squares(mean[0, here, here].mean(0), height, width, unit))
        return torch.cat(parts)
    cls = int(kin.has_cls)
    row = mean[:, 0, cls:] if rows == "cls" else mean[:, cls:, cls:].mean(1)
    side = round(row.shape[1] ** 0.5)
    return torch.cat([squares(view, side, side, unit) for view in row])


@pytest.mark.parametrize("kin", KIN.values(), ids=KIN)
def test_tower_taps(kin):
    prompt, family = kin.scene(), family_of(kin.model())
    unit = family.unit(family.inner(kin.model()))
    taps = tuple(VisionAttention(layer, rows) for layer in (0, 2) for rows in (["cls"] * kin.has_cls + ["patches"]))
    seen, (towers, _) = seen_by(kin, prompt, taps), eager(kin, prompt)
    for tap in taps:
        got = torch.cat([row[: len(item)] for row, item in zip(seen[tap], prompt.items, strict=True)])
        want = [in_tower(kin, tower[tap.layer], prompt, tap.rows, unit) for tower in towers if tower]
        if "pixel_values_videos" in prompt.inputs:  # frames begin with a [CLS] token, of which nothing is said
            images = len(want[0]) if len(want) > 1 else 0
            got = torch.cat((got[:images], got[images:].view(-1, 17)[:, 1:].flatten()))
        want = torch.cat(want)
        probes.same(got.double(), want, TOLERANCE)
        assert probes.gap(got.double(), want.flip(0)) > 10 * TOLERANCE


@pytest.mark.parametrize("kin", KIN.values(), ids=KIN)
def test_decoder_taps(kin):
    prompt = kin.scene()
    # Gemma 3's others see a window, and are refused
    layers = (1, 2) if kin.name == "gemma3" else (0, 1, 2, 3)
    kinds = [lambda n, rows=rows: TextAttention(n, rows) for rows in ("last", "all", "instruction")]
    taps = tuple(make(layer) for layer in layers for make in [*kinds, ReceivedAttention])
    seen, (_, decoder) = seen_by(kin, prompt, taps, 3), eager(kin, prompt)
    end, apart = max(column for item in prompt.items for column in item), []
    for tap in taps:
        mean = decoder[tap.layer][0].mean(0).double()
        text = mean[end + 1 :].mean(0)
        for got, item in zip(seen[tap], prompt.items, strict=True):
            got = got[: len(item)].double()
            if isinstance(tap, ReceivedAttention):
                want = torch.stack((of_patches(kin, mean, item, prompt)[item], text[item]), -1)
            else:
                want = {"last": mean[-1], "all": mean.mean(0), "instruction": text}[tap.rows][item]
            if isinstance(tap, ReceivedAttention) and is_film(prompt, item):
                want, got = want.view(2, 17, 2)[:, 1:], got.view(2, 17, 2)[:, 1:]
            probes.same(got, want, TOLERANCE)
            apart.append(probes.gap(got, want.flip(0)))
    assert max(apart) > 1e-3  # of single taps a window may hide all


@pytest.mark.parametrize("kin", KIN.values(), ids=KIN)
def test_how_much_text_and_picture_look_at_each_other(kin):
    """One picture: it looks at text where that stands between its rows, or where prompts see all of themselves."""
    prompt, layer = kin.prompt([4, ("image", 0), 7]), 1
    if len(prompt.items) > 1:
        pytest.skip("several images")
    tap = CrossShare(layer)
    seen, (_, decoder) = seen_by(kin, prompt, (tap,), 3)[tap][0].double(), eager(kin, prompt)
    mean, (item,) = decoder[layer][0].mean(0).double(), prompt.items
    text = [column for column in range(item[0], prompt.ids.shape[1]) if column not in item]
    want = torch.stack([mean[rows][:, keys].sum(1).mean() for rows, keys in ((text, item), (item, text))])
    probes.same(seen, want, TOLERANCE)
    assert (want[1] > 0.01) == (kin.prefix or kin.whole)


def is_film(prompt: Prompt, item: list) -> bool:
    return "pixel_values_videos" in prompt.inputs and len(item) == 34


def of_patches(kin: Kin, mean: torch.Tensor, item: list, prompt: Prompt) -> torch.Tensor:
    """The mean over the rows of a picture's patches; a frame's [CLS] is none."""
    return mean[[column for at, column in enumerate(item) if not (is_film(prompt, item) and at % 17 == 0)]].mean(0)
