"""What the families beyond LLaVA tell of a model, and what they refuse."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import probes
import pytest
import torch
from kin import KIN
from kin.byhand import answered, by_hand
from tiny import CACHE
from torch import nn

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.patches import FAMILIES, REFUSED, family_of

KINDS = sorted({type(family_of(kin.model())).model_type for kin in KIN.values()})


@pytest.mark.parametrize("kin", KIN.values(), ids=KIN)
def test_facts(kin):
    model = kin.model()
    family = family_of(model)
    inner = family.inner(model)
    assert inner is model.model
    assert family.inner(inner) is inner
    facts = family.facts(inner)
    assert (facts.family, facts.tower_layers, facts.decoder_layers) == (model.config.model_type, 4, 4)
    assert (facts.has_cls, facts.views) == (kin.has_cls, False)
    assert facts.feature_layer == (2 if "video" in kin.name else 3)
    if not facts.packed:
        assert (facts.view_patches, facts.unit) == {1: (16, 1), 2: (9, 2), 4: (9, 4)}[facts.unit]
        assert (facts.unit == 4) == (kin.name in ("smolvlm", "idefics3"))
    said = {"processor_fields": family.processor_fields(inner)}
    assert all(isinstance(value, int | str) for value in said["processor_fields"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_small_enough_to_copy(kind):
    most = 100 if kind == "llava" else 60  # which has two kinds of towers
    assert len(inspect.getsource(import_module(f"vlmprune.patches.{kind}")).splitlines()) < most


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_why(kind):
    assert kind not in FAMILIES
    model = nn.Module()
    model.config = SimpleNamespace(model_type=kind)
    with pytest.raises(UnsupportedError, match=f"'{kind}' are not supported: .{{20}}"):
        family_of(model)


def test_which_pictures_a_budget_is_of(cli):
    code, out, _ = cli("ls", "models")
    assert code == 0
    for words in ("a picture with all its tiles", "a tile of a picture", "a picture, or a video with all its frames"):
        assert f"an image of a budget is {words}" in out
    assert "fast_vlm: its tower is a timm model" in out


def refuses(kin, inputs, words, name="random", error=UnsupportedError, **options):
    with (
        torch.no_grad(),
        vlmprune.patch(kin.model(), name, **{"keep": 0.5} | options),
        pytest.raises(error, match=words),
    ):
        kin.model()(**inputs)


def test_a_run_that_is_no_whole_number_of_tiles():
    kin = KIN["internvl"]
    inputs = kin.scene().inputs
    ids = inputs["input_ids"].clone()
    first = (ids[0] == 5).nonzero().flatten()[0]
    ids[0, first] = 9
    refuses(
        kin, inputs | {"input_ids": ids}, "26 image placeholders is no whole number of tiles of 9", error=ValueError
    )


def test_more_tiles_than_placeholders():
    kin = KIN["internvl"]
    inputs = kin.scene().inputs
    more = torch.cat((inputs["pixel_values"], inputs["pixel_values"][:1]))
    words = "36 image placeholders, and 45 features.*The processor writes the placeholders"
    refuses(kin, inputs | {"pixel_values": more}, words, error=ValueError)


def test_beams_of_pictures_that_are_runs_look_at_their_own():
    """A row with three tiles and one with one, twice each: taps of the tower are told by views, not by pictures."""
    kin, asked = KIN["internvl"], {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    rows = [kin.prompt([2, ("image", n), 3, ("image", 2), 4 - n], n) for n in (1, 0)]
    with torch.no_grad(), vlmprune.patch(kin.model(), "vtc_cls", keep=5):
        out = kin.model().generate(**kin.batch(rows), **asked)
        for row, prompt in enumerate(rows):
            assert out[row, -4:].tolist() == kin.model().generate(**prompt.inputs, **asked)[0, -4:].tolist()


@pytest.mark.parametrize("name", ["mistral3", "llava-pixtral"])
def test_pictures_of_any_size_need_their_sizes(name):
    kin = KIN[name]
    inputs = {key: value for key, value in kin.scene().inputs.items() if key != "image_sizes"}
    refuses(kin, inputs, "image_sizes", error=(ValueError, TypeError))


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_a_picture_that_fills_a_part_of_its_tile(name):
    """Its padding is no patch: who looks at the tower is refused, who does not is exact."""
    kin = KIN[name]
    prompt = kin.prompt([3, ("image", 0), 5])
    mask = torch.ones(1, 1, 36, 36, dtype=torch.long)
    mask[..., 24:] = 0
    padded = replace(prompt, inputs=prompt.inputs | {"pixel_attention_mask": mask})
    refuses(kin, padded.inputs, "fills a part of its view alone", "fopru", error=ValueError)
    with vlmprune.patch(kin.model(), "random", keep=0.4) as handle:
        (got,), _ = answered(kin, padded.inputs)
    probes.same(got, by_hand(kin, padded, handle.trace))
    probes.far(got, by_hand(kin, prompt, handle.trace))


@pytest.mark.parametrize("newlines", ["all", "row", "none"])
def test_cls_of_a_frame_is_a_token_of_its_own_kind(newlines):
    """It is no part of the budget; by "row" it stays where a patch of its frame does."""
    kin = KIN["video_llava"]
    prompt = kin.prompt([3, ("video", 0), 4])
    with vlmprune.patch(kin.model(), "random", keep=3, seed=4, newlines=newlines) as handle:
        (got,), _ = answered(kin, prompt.inputs)
    (cut,) = handle.trace.cuts
    frames = cut.keep[0].view(2, 17)
    assert frames[:, 1:].sum() == 3
    want = {"all": [True, True], "none": [False, False], "row": frames[:, 1:].any(1).tolist()}[newlines]
    assert frames[:, 0].tolist() == want
    probes.same(got, by_hand(kin, prompt, handle.trace))
    grid = handle.trace.grids[0]
    assert (grid.frames, grid.patches, grid.newlines, grid.view.tolist()) == (2, 32, 2, [0] * 17 + [1] * 17)


def test_a_frame_of_which_nothing_stays_loses_its_cls():
    kin = KIN["video_llava"]
    prompt = kin.prompt([3, ("video", 0), 4])
    with vlmprune.patch(kin.model(), "random", keep=1, newlines="row") as handle:
        answered(kin, prompt.inputs)
    assert sorted(handle.trace.cuts[0].keep[0].view(2, 17).sum(1).tolist()) == [0, 2]


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_pictures_that_see_themselves(name, method):
    """Behind a cut as before it; without `token_type_ids` hosts let them see less, and say nothing: refused."""
    kin = KIN[name]
    prompt, causal = kin.scene(), replace(kin, blocks=False, prefix=False)
    with vlmprune.patch(kin.model(), method, keep=0.4) as handle:
        (got,), _ = answered(kin, prompt.inputs)
        trace = handle.trace
        untold = {key: value for key, value in prompt.inputs.items() if key != "token_type_ids"}
        with pytest.raises(ValueError, match=f"{name} models need the token_type_ids"):
            answered(kin, untold)
    probes.same(got, by_hand(kin, prompt, trace), kin.tolerance)
    probes.far(got, by_hand(causal, prompt, trace), kin.tolerance)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("method", ["random", None])
def test_pictures_in_a_later_turn(name, method):
    """Refused, whether the cache is pruned or not."""
    kin = KIN[name]
    first, later = (kin.prompt(parts).inputs for parts in ([3, ("image", 0), 4], [2, ("image", 1), 3]))
    with torch.no_grad(), vlmprune.patch(kin.model(), "random", keep=0.4) as handle:
        if method:
            _, cache = answered(kin, first)
        else:
            with handle.disabled():
                _, cache = answered(kin, first)
        length = first["input_ids"].shape[1] + 4 + later["input_ids"].shape[1]
        again = later | {"attention_mask": torch.ones(1, length, dtype=torch.long)}
        with pytest.raises(UnsupportedError, match="pictures in a later turn are not supported"):
            kin.model()(**again, **{CACHE: cache}, use_cache=True)


def test_a_window_that_is_shorter_than_the_prompt():
    """FastV reads layer 1; here it is told one that sees the last 24 tokens of 30."""
    kin = KIN["gemma3"]
    words = r"layer 0, which sees the last 24 tokens alone, and this prompt has 30.*see all: 1, 2\."
    refuses(kin, kin.scene().inputs, words, "fastv", layer=1)
    short = kin.prompt([3, ("image", 0), 4])
    with torch.no_grad(), vlmprune.patch(kin.model(), "fastv", keep=0.5, layer=1) as handle:
        (got,), _ = answered(kin, short.inputs)
    probes.same(got, by_hand(kin, short, handle.trace))


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_a_tower_that_failed_leaves_nothing(name):
    """Towers that hand on no keywords note the frame by thread; what a failed call left is no later call's."""
    kin = KIN[name]
    prompt, model = kin.scene(), kin.model()
    family = family_of(model)
    (tower,) = family.towers(model.model)
    with vlmprune.patch(model, "fopru", keep=0.4) as handle:
        (want,), _ = answered(kin, prompt.inputs)
        broken = family.tower_layers(tower)[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answered(kin, prompt.inputs)
        broken.remove()
        with handle.disabled():
            answered(kin, prompt.inputs)
        assert torch.equal(answered(kin, prompt.inputs)[0][0], want)


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_positions_that_count_from_one(method):
    """Nobody says positions or masks, in decoding and in a later turn: PaliGemma's own begin at 1."""
    kin = KIN["paligemma"]
    prompt, model, said = kin.scene(), kin.model(), [9, 33, 21, 50]
    bare = {key: value for key, value in prompt.inputs.items() if key != "attention_mask"}
    with torch.no_grad(), vlmprune.patch(model, method, keep=0.4, positions="original") as handle:
        out = model(**bare, use_cache=True)
        logits = [out.logits[:, -1]]
        for token in said:
            out = model(input_ids=torch.tensor([[token]]), **{CACHE: out[CACHE]}, use_cache=True)
            logits.append(out.logits[:, -1])
        length = prompt.ids.shape[1] + len(said)
        later = {"input_ids": torch.tensor([[11, 44, 23]]), "position_ids": torch.arange(1, 4)[None] + length}
        out = model(**later, **{CACHE: out[CACHE]}, use_cache=True)
    want = by_hand(kin, prompt, handle.trace, [*said, 11, 44, 23])
    probes.same(torch.cat(logits), want[:5], kin.tolerance)
    probes.same(out.logits[0, -1], want[-1], kin.tolerance)
