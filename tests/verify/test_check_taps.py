"""`vlmprune.check`'s line on taps: it passes on what eager attention computes, and a tap broken on purpose fails."""

from __future__ import annotations

import pytest
import tiny
import torch
from checked import BLIND, FAMILIES, subject
from scenes import CROPS, REPEATS
from torch import nn

import vlmprune
from vlmprune import Cut, Decoder, Reduction, registry
from vlmprune.engine.tower import TowerFrame
from vlmprune.parts.cuts import ProjectorCut
from vlmprune.parts.taps import (
    BlockKeys,
    ClsLogits,
    CrossShare,
    Distinctness,
    Hidden,
    ReceivedAttention,
    TextAttention,
    VisionAttention,
)
from vlmprune.patches.language_models import RotaryLayer
from vlmprune.patches.towers import ClipLayer
from vlmprune.verify.taps import eager, taps_line

EVERY = (
    VisionAttention(0), VisionAttention(3), VisionAttention(2, "patches"), VisionAttention(1, "all"), ClsLogits(5),
    TextAttention(0), TextAttention(1, "instruction"), TextAttention(2, "all"),
    ReceivedAttention(1), ReceivedAttention(2, logits=True),
    CrossShare(2), CrossShare(1, 3),
)  # fmt: skip


def keep_all(seen, layout):
    return Reduction(layout.alive.clone(), list(layout.alive_counts))


def line(model, *cuts):
    with torch.no_grad():
        return taps_line(
            subject("llava").family if model is None else vlmprune.patches.family_of(model), model, cuts, 0.0
        )


def of(tap, kind="llava", dtype=torch.float32):
    """The line on one tap alone."""
    model = tiny.shared(dtype=dtype, **FAMILIES[kind])
    if isinstance(tap, BlockKeys):
        return line(model, ProjectorCut((tap,), keep_all))
    return line(model, Cut(Decoder(2), (tap,), keep_all))


@pytest.mark.parametrize("kind", ["llava", "next-mistral", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_tap_is_what_eager_attention_computes(kind, dtype):
    for tap in (*EVERY, Hidden(), BlockKeys(4)):
        made = of(tap, kind, dtype)
        assert made.outcome == "pass", (tap, made)
        assert made.twin > 1e-3


@pytest.mark.parametrize("kind", ["llava-siglip-qwen2", "onevision", "vip", "next-video"])
def test_every_family(kind):
    first = FAMILIES[kind].get("tower") != "siglip"
    for tap in (VisionAttention(3, "cls" if first else "patches"), TextAttention(2, "all"), ReceivedAttention(1)):
        assert of(tap, kind).outcome == "pass", tap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_failure(dtype):
    assert {of(tap, "next", dtype).outcome for tap in (*EVERY, Hidden())} <= {"pass", "?"}
    assert of(VisionAttention(3), "next", dtype).outcome == "pass"


def test_what_eager_attention_has_nothing_of_is_said_to_be_unseen():
    made = line(tiny.shared(), Cut(Decoder(1), (Distinctness(3),), keep_all))
    assert (made.outcome, made.told.split("; ")[1]) == ("-", "not looked at: Distinctness")
    assert of(VisionAttention(3)).told == "VisionAttention"
    assert line(tiny.shared(), Cut(Decoder(1), (Distinctness(3), TextAttention(0)), keep_all)).told == (
        "TextAttention; not looked at: Distinctness"
    )
    assert line(tiny.shared()).outcome == "-"


def test_who_is_blind():
    seen = {name for name in registry.names() if name not in {"atp", *BLIND, *CROPS, *REPEATS}}
    model = tiny.shared()
    for name in sorted((seen | BLIND) - {*REPEATS}):
        cls = registry.find(name)
        cuts = cls(keep=4, **cls.plain_with).cuts(subject("llava").family.facts(model.model))
        assert any(type(tap) in {*map(type, EVERY), BlockKeys} or (tap == Hidden() and isinstance(cut.at, Decoder))
                   for cut in cuts for tap in cut.see) == (name in seen), f"{name}: BLIND, checked.py"  # fmt: skip


# broken on purpose


def rotated_less(self, x, cos, sin):
    return x  # no position at all


def from_norm(self, hidden):
    return hidden


def shifted(original):
    return lambda self, *given: original(self, *given).roll(1, 2)


BROKEN = {
    "tower scale": (ClipLayer, "scale", property(lambda self: self.attention.scale * 1.3), VisionAttention(3)),
    "tower norm": (ClipLayer, "normed", from_norm, VisionAttention(2, "patches")),
    "tower keys": (ClipLayer, "keys", shifted(ClipLayer.keys), ClsLogits(5)),
    "projection": (ClipLayer, "key_projection", property(lambda self: self.attention.q_proj), BlockKeys(4)),
    "scale": (RotaryLayer, "scale", property(lambda self: self.attention.scaling * 1.3), TextAttention(1)),
    "norm": (RotaryLayer, "normed", from_norm, ReceivedAttention(1)),
    "rotary": (RotaryLayer, "rotated", rotated_less, TextAttention(1, "all")),
    "queries": (RotaryLayer, "queries", shifted(RotaryLayer.queries), TextAttention(1, "instruction")),
    "keys": (RotaryLayer, "keys", shifted(RotaryLayer.keys), CrossShare(1, 3)),
    "logits": (RotaryLayer, "scale", property(lambda self: 1.0), ReceivedAttention(1, logits=True)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_is_wrong_fails(monkeypatch, name):
    owner, attribute, broken, tap = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    made = of(tap)
    assert made.outcome == "FAIL", made
    assert made.told.startswith(f"{type(tap).__name__}(layer=")
    assert made.told.endswith("is not what eager attention computes")


def test_a_window_that_is_forgotten_fails(monkeypatch):
    monkeypatch.setattr(RotaryLayer, "window", None)
    assert of(TextAttention(2, "all"), "next-mistral").outcome == "FAIL"


def test_a_tap_of_the_wrong_tower_layer_fails(monkeypatch):
    original = TowerFrame.enter

    def enter(self, index, layer, hidden, rest, kwargs):
        return original(self, index, self.before if index == 3 else layer, hidden, rest, kwargs)

    monkeypatch.setattr(
        TowerFrame, "before", subject("llava").model.model.vision_tower.encoder.layers[2], raising=False
    )
    monkeypatch.setattr(TowerFrame, "enter", enter)
    assert of(VisionAttention(3)).outcome == "FAIL"
    assert of(VisionAttention(2)).outcome == "pass"


@pytest.mark.parametrize(("tap", "other"), [
    (TextAttention(1, "last"), "all"), (TextAttention(1, "instruction"), "last"), (VisionAttention(3), "patches"),
])  # fmt: skip
def test_a_tap_of_the_wrong_rows_fails(monkeypatch, tap, other):
    original = type(tap).measure
    monkeypatch.setattr(type(tap), "measure", lambda self, *given: original(type(tap)(self.layer, other), *given))
    assert of(tap).outcome == "FAIL"


def test_the_report_has_the_line(monkeypatch):
    assert subject("llava").check("fastv", keep=0.4)["taps"].told == "TextAttention"
    monkeypatch.setattr(RotaryLayer, "rotated", rotated_less)
    report = subject("llava").check("fastv", keep=0.4)
    assert report.failed == ["taps"]


# eager attention


def settings(model):
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def test_each_part_gets_its_own_attention_back():
    model = tiny.model()
    model.model.language_model.config._attn_implementation = "eager"
    before = settings(model)
    assert {*before} == {"sdpa", "eager"}
    with eager(model):
        assert {*settings(model)} == {"eager"}
    assert settings(model) == before
    with pytest.raises(RuntimeError, match="halfway"), eager(model):
        raise RuntimeError("halfway")
    assert settings(model) == before


def test_a_class_that_refuses_eager_attention_is_named(monkeypatch):
    model = tiny.model()

    def refuse(attention):
        raise ValueError("no eager here")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    cut = Cut(Decoder(2), (TextAttention(1),), keep_all)
    told = "refused: LlavaForConditionalGeneration cannot run eager attention (no eager here)"
    assert line(model, cut) == vlmprune.verify.Line("taps", "-", told)
    monkeypatch.setattr(model, "set_attn_implementation", lambda attention: None)  # as transformers: a warning
    assert line(model, cut).told == "refused: LlamaAttention cannot run eager attention and stays with 'sdpa'"


def test_eager_attention_of_another_build_is_named(monkeypatch):
    model = tiny.model()
    attention = model.model.language_model.layers[1].self_attn
    original = attention.forward
    monkeypatch.setattr(attention, "forward", lambda **given: (original(**given)[0], None))
    made = line(model, Cut(Decoder(2), (TextAttention(1),), keep_all))
    assert made.told == "refused: LlamaAttention hands back no weights of eager attention"


class Doubling(nn.Module):
    """Stands for an adapter on a projection."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def test_replaced_projections_are_those_of_both_sides():
    model = tiny.model()
    attention = model.model.language_model.layers[1].self_attn
    attention.q_proj = Doubling(attention.q_proj)
    assert line(model, Cut(Decoder(2), (TextAttention(1),), keep_all)).outcome == "pass"
