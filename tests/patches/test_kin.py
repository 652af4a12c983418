"""Every family beyond LLaVA with every method: what its trace says is what the host's own layers compute by hand.

The full product of family, method and feature runs in `make test-all`; every run takes a part of it that `chosen`
picks: each family with each feature, and each method on some families.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import probes
import pytest
import scenes
import torch
from kin import FORCED, IN_TOWER, KIN, Kin, Prompt, answered, by_hand, features_of
from scenes import FALLBACK, OPTIONS, changes_of
from tiny import CACHE

import vlmprune
from vlmprune import UnsupportedError, registry

NAMES = registry.names()
#: Methods that run again in each feature: before the language model, in it, with taps of the tower, and merging.
FEATURES = ["batch", "static", "beams", "turn", "generate"]


def runnable(kin: Kin) -> list[str]:
    return [name for name in NAMES if not kin.refusal(name) and name not in ("downsample", *IN_TOWER)]


def chosen(feature: str, number: int, kin: Kin, name: str) -> bool:
    """Whether every run has a cell of the product."""
    if feature == "exact":
        return (number + NAMES.index(name)) % 3 == 0 or kin.refusal(name)
    able = runnable(kin)
    return name == able[(3 * number + FEATURES.index(feature)) % len(able)]


def cells(feature: str) -> Iterator:
    for number, kin in enumerate(KIN.values()):
        for name in NAMES if feature == "exact" else runnable(kin):
            left = [] if chosen(feature, number, kin, name) else [pytest.mark.exhaustive]
            yield pytest.param(kin, name, marks=left, id=f"{kin.name}-{name}")


def product(feature: str):
    return pytest.mark.parametrize(("kin", "name"), list(cells(feature)))


def options(kin: Kin, name: str) -> dict:
    """Options of a method that make a difference, with its documented fallback where there is no [CLS] token."""
    given = OPTIONS[name](kin.model()) if name in OPTIONS else {"keep": 0.4}
    return given if kin.has_cls else given | FALLBACK.get(name, {})


def same(kin: Kin, got: torch.Tensor, want: torch.Tensor) -> None:
    probes.same(got.to(want), want, kin.tolerance)


@product("exact")
def test_what_the_trace_says_is_what_was_computed(kin, name):
    """Several pictures in one row, and four decoded tokens; the model is bitwise its own again afterwards."""
    model, prompt = kin.model(), kin.scene()
    if words := kin.refusal(name):
        with pytest.raises(UnsupportedError, match=words), vlmprune.patch(model, name, **options(kin, name)):
            model(**prompt.inputs)
        return
    before, _ = answered(kin, prompt.inputs)
    if name == "downsample":
        return is_downsampled(kin, prompt, before)
    with vlmprune.patch(model, name, **options(kin, name)) as handle:
        (got,), _ = answered(kin, prompt.inputs)
        features = features_of(model, prompt) if name in IN_TOWER else None
    trace = handle.trace
    assert [grid.tokens for grid in trace.grids] == [len(item) for item in prompt.items]
    same(kin, got, by_hand(kin, prompt, trace, features=features))
    assert changes_of(trace)
    other = "original" if trace.cuts[0].positions == "contiguous" else "contiguous"
    for twin in ({"positions": other}, *([] if trace.cuts[-1].merge is not None else [{"wrong": True}])):
        probes.far(got, by_hand(kin, prompt, trace, **twin, features=features), kin.tolerance)
    assert torch.equal(answered(kin, prompt.inputs)[0], before)


def shrunk(pixels: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """Pictures with a share of their pixels, enlarged again."""
    small = pixels.flatten(0, -4).float()
    for size in ([round(n * share**0.5) for n in pixels.shape[-2:]], pixels.shape[-2:]):
        small = torch.nn.functional.interpolate(small, size, mode="bilinear", antialias=True)
    return small.view(pixels.shape).to(pixels.dtype)


def is_downsampled(kin: Kin, prompt: Prompt, before: torch.Tensor) -> None:
    """The control changes the picture alone, and all its tokens stay."""
    with vlmprune.patch(kin.model(), "downsample", keep=0.4):
        got, _ = answered(kin, prompt.inputs)
    shown = {name: shrunk(value) for name, value in prompt.inputs.items() if name.startswith("pixel_values")}
    want, _ = answered(kin, prompt.inputs | shown)
    same(kin, got, want)
    probes.far(got, before, kin.tolerance)


@product("batch")
def test_a_row_of_a_left_padded_batch_is_the_row_alone(kin, name):
    """And a row alone is what its trace says, carried out by hand."""
    rows, alone = kin.rows(), []
    with vlmprune.patch(kin.model(), name, **options(kin, name)) as handle:
        together, _ = answered(kin, kin.batch(rows))
        for prompt in rows:
            alone.append((answered(kin, prompt.inputs)[0][0], handle.trace))
    for row, (prompt, (got, trace)) in enumerate(zip(rows, alone, strict=True)):
        same(kin, together[row], got)
        same(kin, got, by_hand(kin, prompt, trace if prompt.items else None))


@product("static")
def test_a_static_cache(kin, name):
    prompt = kin.scene()
    forced = torch.tensor([FORCED])
    with vlmprune.patch(kin.model(), name, **options(kin, name)) as handle:
        got = probes.generated_logits(
            kin.model(), prompt.inputs, forced, cache_implementation="static", disable_compile=True
        )[0]
    same(kin, got, by_hand(kin, prompt, handle.trace))


@product("generate")
def test_generate(kin, name):
    prompt = kin.scene(seed=1)
    with vlmprune.patch(kin.model(), name, **options(kin, name)) as handle:
        got = probes.generated_logits(kin.model(), prompt.inputs, torch.tensor([FORCED]))[0]
    same(kin, got, by_hand(kin, prompt, handle.trace))


@product("beams")
def test_beams(kin, name):
    """Beams of a padded batch are those of each row alone."""
    model, rows = kin.model(), [kin.prompt([3, ("image", n), 4 + n], n) for n in range(2)]
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with torch.no_grad(), vlmprune.patch(model, name, **options(kin, name)):
        out = model.generate(**kin.batch(rows), **asked)
        for row, prompt in enumerate(rows):
            assert out[row, -5:].tolist() == model.generate(**prompt.inputs, **asked)[0, -5:].tolist()


@product("turn")
def test_a_later_turn_of_text(kin, name):
    """Directly, and through `generate` with the ids of the whole conversation; another conversation in between."""
    model, prompt, said, text = kin.model(), kin.scene(), FORCED[:2], [11, 44, 23]
    with torch.no_grad(), vlmprune.patch(model, name, **options(kin, name)) as handle:
        _, cache = answered(kin, prompt.inputs, said)
        trace = handle.trace
        answered(kin, kin.prompt([2, ("image", 2), 6], 5).inputs)
        again = copy.deepcopy(cache)
        ids = torch.cat((prompt.ids, torch.tensor([said + text])), 1)
        everything = {"attention_mask": torch.ones_like(ids)}
        out = model(input_ids=ids[:, -3:], **everything, **{CACHE: cache}, use_cache=True)
        told = dict(everything)
        if "token_type_ids" in prompt.inputs:
            types = prompt.inputs["token_type_ids"]
            told["token_type_ids"] = torch.cat((types, types.new_full((1, 5), int(kin.prefix))), 1)
        got = probes.generated_logits(model, {"input_ids": ids} | told, torch.tensor([FORCED]), **{CACHE: again})[0]
    want = by_hand(kin, prompt, trace, said + text + FORCED)
    same(kin, out.logits[0], want[3:6])
    same(kin, got, want[5:])


def test_every_run_has_each_family_with_each_feature_and_each_method():
    for feature in FEATURES:
        for number, kin in enumerate(KIN.values()):
            assert sum(chosen(feature, number, kin, name) for name in runnable(kin)) == 1
    every = [(number, kin, name) for number, kin in enumerate(KIN.values()) for name in NAMES]
    assert {name for each in every if chosen("exact", *each) for name in each[2:]} == {*NAMES}
    assert scenes.FORCED  # the matrix of the LLaVA families stands beside this one
