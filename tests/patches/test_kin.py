"""Every family beyond LLaVA with every method: what its trace says is what the host's own layers compute by hand.

The full product of family, method and feature runs in `make test-all`; every run takes a part of it that `chosen`
picks: each family with each feature, and each method on some families.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import probes
import pytest
import torch
from kin import IN_TOWER, KIN
from kin.byhand import answered, by_hand, features_of
from kin.family import FILMS, FORCED, Kin, Prompt, options
from scenes import changes_of, told
from tiny import CACHE

import vlmprune
from vlmprune import UnsupportedError, registry

NAMES = registry.names()
#: Methods that run again in each feature: before the language model, in it, with taps of the tower, and merging.
FEATURES = ["batch", "static", "beams", "turn", "generate"]


def runnable(kin: Kin) -> list[str]:
    return [name for name in NAMES if not kin.refusal(name)]


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


def same(kin: Kin, got: torch.Tensor, want: torch.Tensor) -> None:
    probes.same(got.to(want), want, kin.tolerance)


def seen(kin: Kin, name: str, prompt: Prompt) -> dict:
    """What of `by_hand` tells what the patched tower sees: smaller pictures, or features that it makes otherwise."""
    if name == "downsample":
        return {"prompt": Prompt(prompt.inputs | smaller(prompt.inputs), prompt.items)}
    return {
        "prompt": prompt,
        "features": features_of(kin.model(), prompt) if name in IN_TOWER and prompt.items else None,
    }


@product("exact")
def test_what_the_trace_says_is_what_was_computed(kin, name, support):
    """Several pictures in one row, and four decoded tokens; the model is bitwise its own again afterwards."""
    model, prompt, words = kin.model(), kin.scene(), kin.refusal(name)
    for feature in ("exact", "unpatching"):
        support(feature, kin.name, name, refused=told(words))
    if words:
        with pytest.raises(UnsupportedError, match=words), vlmprune.patch(model, name, **options(kin, name)):
            model(**prompt.inputs)
        return
    before, _ = answered(kin, prompt.inputs)
    if name == "downsample":
        return is_downsampled(kin, prompt, before)
    with vlmprune.patch(model, name, **options(kin, name)) as handle:
        (got,), _ = answered(kin, prompt.inputs)
        shown = seen(kin, name, prompt)
    trace = handle.trace
    assert [grid.tokens for grid in trace.grids] == [len(item) for item in prompt.items]
    same(kin, got, by_hand(kin, trace=trace, **shown))
    assert changes_of(trace)
    other = "original" if trace.cuts[0].positions == "contiguous" else "contiguous"
    for twin in ({"positions": other}, *([] if trace.cuts[-1].merge is not None else [{"wrong": True}])):
        probes.far(got, by_hand(kin, trace=trace, **twin, **shown), kin.tolerance)
    assert torch.equal(answered(kin, prompt.inputs)[0], before)


def shrunk(pixels: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """Pictures with a share of their pixels, enlarged again."""
    small = pixels.flatten(0, -4).float()
    for size in ([round(n * share**0.5) for n in pixels.shape[-2:]], pixels.shape[-2:]):
        small = torch.nn.functional.interpolate(small, size, mode="bilinear", antialias=True)
    return small.view(pixels.shape).to(pixels.dtype)


def smaller(inputs: dict) -> dict:
    """The pictures of a call, shrunk."""
    return {name: shrunk(value) for name, value in inputs.items() if name.startswith("pixel_values")}


def is_downsampled(kin: Kin, prompt: Prompt, before: torch.Tensor) -> None:
    """The control changes the picture alone, and all its tokens stay."""
    with vlmprune.patch(kin.model(), "downsample", keep=0.4):
        got, _ = answered(kin, prompt.inputs)
    want, _ = answered(kin, prompt.inputs | smaller(prompt.inputs))
    same(kin, got, want)
    probes.far(got, before, kin.tolerance)


@product("batch")
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(kin, side, name, support):
    """And a row alone is what its trace says, carried out by hand."""
    support("batches" if side == "left" else "right padding", kin.name, name)
    rows, alone = kin.rows(), []
    with vlmprune.patch(kin.model(), name, **options(kin, name)) as handle:
        together, _ = answered(kin, kin.batch(rows, side))
        for prompt in rows:
            got = answered(kin, prompt.inputs)[0][0]
            alone.append((got, handle.trace if prompt.items else None, seen(kin, name, prompt)))
    # a window counts columns: padding between prompt and answer takes its place in any layer it reaches
    steps = 1 if side == "right" and kin.windowed() else None
    for row, (got, trace, shown) in enumerate(alone):
        same(kin, together[row, :steps], got[:steps])
        same(kin, got, by_hand(kin, trace=trace, **shown))


def by_trace(kin: Kin, name: str, prompt: Prompt, **asked: object) -> None:
    """What `generate` computes for forced tokens is what the trace says."""
    with vlmprune.patch(kin.model(), name, **options(kin, name)) as handle:
        got = probes.generated_logits(kin.model(), prompt.inputs, torch.tensor([FORCED]), **asked)[0]
        shown = seen(kin, name, prompt)
    same(kin, got, by_hand(kin, trace=handle.trace, **shown))


@product("static")
def test_a_static_cache(kin, name, support):
    support("static cache", kin.name, name)
    by_trace(kin, name, kin.scene(), cache_implementation="static", disable_compile=True)


@product("generate")
def test_generate(kin, name, support):
    support("generate", kin.name, name)
    by_trace(kin, name, kin.scene(seed=1))


@product("beams")
def test_beams(kin, name, support):
    """Beams of a padded batch are those of each row alone."""
    support("beam search", kin.name, name)
    kind = "video" if kin.shows is FILMS else "image"
    model, rows = kin.model(), [kin.prompt([3, (kind, n), 4 + n], n) for n in range(2)]
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with torch.no_grad(), vlmprune.patch(model, name, **options(kin, name)):
        out = model.generate(**kin.batch(rows), **asked)
        for row, prompt in enumerate(rows):
            assert out[row, -5:].tolist() == model.generate(**prompt.inputs, **asked)[0, -5:].tolist()


@product("turn")
def test_a_later_turn_of_text(kin, name, support):
    """Directly, and through `generate` with the ids of the whole conversation; another conversation in between."""
    support("second turn, text", kin.name, name)
    model, prompt, said, text = kin.model(), kin.scene(), FORCED[:2], [11, 44, 23]
    other = kin.prompt([2, ("video" if kin.shows is FILMS else "image", 2), 6], 5)
    with torch.no_grad(), vlmprune.patch(model, name, **options(kin, name)) as handle:
        _, cache = answered(kin, prompt.inputs, said)
        trace, shown = handle.trace, seen(kin, name, prompt)
        answered(kin, other.inputs)
        again = copy.deepcopy(cache)
        ids = torch.cat((prompt.ids, torch.tensor([said + text])), 1)
        everything = {"attention_mask": torch.ones_like(ids)}
        out = model(input_ids=ids[:, -3:], **everything, **{CACHE: cache}, use_cache=True)
        asked = dict(everything)
        if "token_type_ids" in prompt.inputs:
            types = prompt.inputs["token_type_ids"]
            asked["token_type_ids"] = torch.cat((types, types.new_full((1, 5), int(kin.prefix))), 1)
        got = probes.generated_logits(model, {"input_ids": ids} | asked, torch.tensor([FORCED]), **{CACHE: again})[0]
    want = by_hand(kin, trace=trace, forced=said + text + FORCED, **shown)
    same(kin, out.logits[0], want[3:6])
    same(kin, got, want[5:])


def test_every_run_has_each_family_with_each_feature_and_each_method():
    for feature in FEATURES:
        for number, kin in enumerate(KIN.values()):
            assert sum(chosen(feature, number, kin, name) for name in runnable(kin)) == 1
    every = [(number, kin, name) for number, kin in enumerate(KIN.values()) for name in NAMES]
    assert {name for each in every if chosen("exact", *each) for name in each[2:]} == {*NAMES}
