"""How often a pruned call waits for the device."""

from __future__ import annotations

import probes
import pytest
import tiny
import torch
from reference import Rule
from scenes import STILL
from tiny import CACHE
from transformers import DynamicCache, StaticCache
from waits import reads

import vlmprune
from vlmprune.parts import coverage
from vlmprune.verify import checks


def test_the_counter_counts(monkeypatch):
    x = torch.tensor([1.0, 0.0])
    for run in (
        lambda: x.tolist(), lambda: x.numpy(), lambda: x.cpu(), lambda: x.sum().item(), lambda: x.nonzero(),
        lambda: bool(x[0] > 0), lambda: int(x[0]), lambda: x[x > 0], lambda: x.masked_select(x > 0),
        lambda: torch.unique(x), lambda: [0, 1][x[0].long()],
    ):  # fmt: skip
        assert reads(run, monkeypatch).total >= 1
    assert reads(lambda: x.cpu().tolist(), monkeypatch).total == 1
    assert reads(lambda: torch.tensor([1, 2]).tolist(), monkeypatch).total == 0
    assert reads(lambda: torch.where(x > 0, x, 0).sort().indices.cumsum(0), monkeypatch).total == 0


METHODS = {
    "fopru": ("fopru", {"keep": 0.3}, 0),
    "fopru-row": ("fopru", {"keep": 0.3, "strategy": "row"}, 0),
    "vtc_cls": ("vtc_cls", {"keep": 5}, 0),
    "fastv": ("fastv", {"keep": 0.3}, 0),
    "random": ("random", {"keep": 5}, 0),
    "grid": ("grid", {"keep": 5}, 0),
    "pool": ("pool", {"keep": 5}, 0),
    "two": ([vlmprune.registry.find("vtc_cls")(keep=10), vlmprune.registry.find("fastv")(keep=4)], {}, 0),
    "emergent": (probes.rules(Rule(0, 2), Rule(2, 5, 3)), {}, 2),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_prefill_reads_the_counts_once(tiny_model, monkeypatch, method, family, batched):
    name, options, emergent = method
    model = tiny_model(family=family)
    sizes = [(24, 24), (40, 24), (24, 60)]
    prompt = tiny.prompt(model, [4, "image", 6, "image"], sizes[:2])
    if batched:
        prompt = probes.step_inputs(tiny.batch([prompt, tiny.prompt(model, [3, "image", 2], sizes[2:])]))
    else:
        del prompt["attention_mask"]
    model(**prompt)
    plain = reads(lambda: model(**prompt), monkeypatch)
    with vlmprune.patch(model, name, **options):
        model(**prompt)  # an image size is traced once
        pruned = reads(lambda: model(**prompt), monkeypatch)
    assert pruned.total <= plain.total + 1 + emergent, (
        f"{dict(pruned.seen)} where the plain model has {dict(plain.seen)}"
    )


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("name", STILL)
def test_ls_says_how_many_reads_a_method_adds(tiny_model, monkeypatch, name, family):
    monkeypatch.setattr(coverage, "on_host", lambda x: False)  # what it does on a GPU
    model = tiny_model(family=family)
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    model(**prompt)
    plain = reads(lambda: model(**prompt), monkeypatch)
    method = vlmprune.registry.find(name)
    if method.training != "none":
        pytest.skip("needs trained weights")
    options = {"keep": 0.3} if "keep" in vlmprune.registry.options(method) else {}
    try:
        handle = vlmprune.patch(model, name, **options)
    except vlmprune.UnsupportedError as refused:
        pytest.skip(str(refused))
    with handle:
        model(**prompt)
        pruned = reads(lambda: model(**prompt), monkeypatch)
    assert pruned.total <= plain.total + 1 + method.syncs, (dict(pruned.seen), dict(plain.seen))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_prompts_of_the_original_package_are_read_twice(monkeypatch, method, family):
    original = pytest.importorskip("original")
    name, options, emergent = method
    model, twin = original.pair(family)
    prompts = [original.prompt(twin, *p)[0] for p in (([4, "image", 6, "image"], [(24, 24), (40, 24)]), ([6], []))]
    prompt = original.batch(prompts)
    model(**prompt)
    plain = reads(lambda: model(**prompt), monkeypatch)
    with vlmprune.patch(model, name, **options):
        model(**prompt)
        pruned = reads(lambda: model(**prompt), monkeypatch)
    # which images the host gives to which row, and the counts
    assert pruned.total <= plain.total + 2 + emergent, (dict(pruned.seen), dict(plain.seen))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rules", [[Rule(0)], [Rule(0, 2), Rule(2, 5, 3)]], ids=len)
def test_decode_steps_read_nothing(tiny_model, monkeypatch, rules, batched):
    model = tiny_model()
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    if batched:
        prompt = probes.step_inputs(tiny.batch([prompt, tiny.prompt(model, [3, "image", 2], [(24, 24)])]))
    rows, length = prompt["input_ids"].shape
    counts = []
    for patched in (False, True):
        if patched:
            vlmprune.patch(model, probes.rules(*rules))
        with torch.no_grad():
            cache = DynamicCache(config=model.config.text_config)
            model(**prompt, **{CACHE: cache})
        step = {"input_ids": torch.full((rows, 1), 9), "position_ids": torch.full((rows, 1), length)}
        step |= {"attention_mask": torch.cat((prompt["attention_mask"], torch.ones(rows, 1, dtype=torch.long)), 1)}
        counts.append(reads(lambda: model(**step, **{CACHE: cache}), monkeypatch))  # noqa: B023
    # a padded batch costs the plain model one look at the mask; every cut makes a mask of its own
    assert counts[1].total <= counts[0].total, [dict(c.seen) for c in counts]


@pytest.mark.parametrize("told", ["mask", "positions"])
@pytest.mark.parametrize("pictured", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["random", "fastv"])
@torch.no_grad()
def test_a_later_turn_reads_its_counts_its_end_and_the_length_of_its_cache(
    tiny_model, monkeypatch, name, kind, pictured, told
):
    """The counts if there are pictures, the end if positions alone tell it, and the length of a static cache.

    The host reads that length again for every mask that is made: that of the layers behind the cut.
    """
    model, text = tiny_model(), tiny_model().config.text_config
    first = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    second = tiny.prompt(model, [2, "image", 3] if pictured else [5], [(24, 24)] if pictured else [], seed=1)
    old, new = first["input_ids"].shape[1], second.pop("attention_mask").shape[1]
    if told == "mask":
        second["attention_mask"] = torch.ones(1, old + new, dtype=torch.long)
    else:
        second["position_ids"] = torch.arange(old, old + new)[None]

    def read():
        cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=100)
        model(**first, **{CACHE: cache})
        return reads(lambda: model(**second, **{CACHE: cache}), monkeypatch)

    plain = read()
    with vlmprune.patch(model, name, keep=5):
        pruned = read()
    masks = pictured or name == "fastv"  # what was cut before the language model needs none in a turn of text
    more = pictured + (told == "positions") + (kind == "static") * (1 + masks)
    assert pruned.total <= plain.total + more, (dict(pruned.seen), dict(plain.seen))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["fopru", "vtc_cls", "random", "pool"])
def test_synchronisations_on_a_gpu(method):
    """What CUDA itself says, uploads included."""
    model = tiny.model()
    prompt = {k: v for k, v in tiny.prompt(model, [4, "image", 6], [(24, 24)]).items() if k != "attention_mask"}
    model, prompt = model.cuda(), {k: v.cuda() for k, v in prompt.items()}

    def waits():
        with torch.no_grad():
            model(**prompt)
            return checks.syncs(model, prompt)

    plain = waits()
    with vlmprune.patch(model, method, keep=5):
        assert waits() <= plain + 1
