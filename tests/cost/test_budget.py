"""What methods cost, read off noise, is what a real prefill does; one budget in all its words."""

from __future__ import annotations

import pytest
import tiny
import torch

import vlmprune
from vlmprune import registry, spec
from vlmprune.cost.budget import Costs, solve
from vlmprune.eval.bench.counting import count, kv_bytes
from vlmprune.eval.bench.oracle import PlainRun
from vlmprune.eval.bench.workload import make_workload

TEXT = 7
METHODS = [
    ("random", {"keep": 0.3}),
    ("grid", {"keep": 5}),
    ("fopru", {"average": 0.5}),
    ("vtc_cls", {"keep": 0.5}),
    ("divprune", {"keep": 0.5}),
    ("visionzip", {"keep": 0.5}),
    ("fastv", {"keep": 0.25}),
    ("fastv", {"average": 0.75}),
    ("transprune", {}),
    ("todre", {"keep": 0.5, "tau": None}),
    ("tome", {"keep": 0.5}),
    ("pool", {"keep": 0.25}),
    ("downsample", {"keep": 0.25}),
    ("fopru+fastv", {"fopru.keep": 0.5, "fastv.keep": 0.25}),
]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda given: str(given))
def test_it_costs_what_a_prefill_does(tiny_model, family, method, options):
    model = tiny_model(family=family)
    work, costs = make_workload(model, 1, TEXT), Costs(model, TEXT)
    methods = spec.build(method, options)
    with torch.no_grad(), vlmprune.patch(model, methods) as handle:
        run = PlainRun(work)
        towers = count(work, run.prefill)["tower_tokens"]
        trace, cached = handle.trace, kv_bytes(run.cache)
    found = costs.of(methods)
    assert found.layer_average == trace.layer_average()
    assert found.kv == cached
    assert found.left == len(trace.kept())
    from vlmprune.cost.flops import formula_flops

    assert found.flops == formula_flops(model.config, trace.kv_lengths, towers, work.views)
    if method != "downsample":
        assert found.flops < costs.unpruned.flops


def test_every_method_costs_what_it_does_or_is_refused(tiny_model):
    """Whatever is registered, at half of the patches."""
    model = tiny_model()
    work, costs, compared = make_workload(model, 1, TEXT), Costs(model, TEXT), 0
    for name in registry.names():
        try:
            methods = spec.build(name, {"keep": 0.5})
            found = costs.of(methods)
        except (ValueError, vlmprune.UnsupportedError):  # no budget, another kind of model or input, by the picture
            continue
        with torch.no_grad(), vlmprune.patch(model, methods) as handle:
            model(**work.inputs, use_cache=True)
            assert found.layer_average == handle.trace.layer_average(), name
        compared += 1
    assert compared > 12


def test_the_random_numbers_of_others_stay(tiny_model):
    before = torch.get_rng_state()
    Costs(tiny_model())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tower_for_any_size_has_no_cost():
    with pytest.raises(vlmprune.UnsupportedError, match="of LLaVA's build alone"):
        Costs(tiny.model(family="qwen2_vl"))


def test_the_unpruned_model_by_hand(tiny_model):
    costs = Costs(tiny_model(), TEXT)
    assert (costs.unpruned.left, costs.unpruned.layer_average) == (16, 16)
    assert costs.unpruned.kv == 4 * 2 * 16 * 4 * (16 + TEXT)  # layers, k and v, width, bytes, tokens
    half = Costs(tiny.model(dtype=torch.bfloat16), TEXT)
    assert half.unpruned.kv * 2 == costs.unpruned.kv


@pytest.mark.parametrize(("method", "options"), [("globalcom2", {"keep": 0.5}), ("todre", {"keep": 0.5})])
def test_what_hangs_on_the_picture_is_refused(tiny_model, method, options):
    costs = Costs(tiny_model(family="llava_next"))
    with pytest.raises(vlmprune.UnsupportedError, match=f"how many tokens {method} keeps .* hangs on the picture"):
        costs.of(spec.build(method, options))


@pytest.mark.parametrize("word", ["flops", "kv"])
@pytest.mark.parametrize("method", ["fopru", "fastv", "tome"])
def test_patch_takes_the_most_that_meets_it(tiny_model, method, word):
    model = tiny_model()
    costs = Costs(model)
    share = lambda keep: costs.of(spec.build(method, {"keep": keep})).over(costs.unpruned)[  # noqa: E731
        word
    ]
    target = (share(0.5) + share(0.5625)) / 2  # between 8 and 9 of 16 patches
    with vlmprune.patch(model, method, **{word: target}) as handle:
        assert [made.keep for made in handle.methods] == [0.5]
    with vlmprune.patch(model, method, **{word: share(0.5625)}) as handle:
        assert [made.keep for made in handle.methods] == [0.5625]


def test_what_cannot_be_met_says_how_far_it_goes(tiny_model):
    model = tiny_model()
    least = Costs(model).of(spec.build("fastv", {"keep": 1 / 16})).over(Costs(model).unpruned)["kv"]
    with pytest.raises(
        ValueError, match=rf"kv=0.1 by fastv cannot be met: with keep=0.0625, the least, it is {least:.3f}"
    ):
        vlmprune.patch(model, "fastv", kv=0.1)
    with pytest.raises(ValueError, match=r"flops=0\.9 by downsample cannot be met"):
        vlmprune.patch(model, "downsample", flops=0.9)


@pytest.mark.parametrize(
    ("method", "given", "error", "words"),
    [
        ("fopru", {"flops": 0.5, "keep": 3}, ValueError, "there is another"),
        ("fopru", {"flops": 0.5, "average": 3}, ValueError, "there is another"),
        ("fopru", {"flops": 0.5, "kv": 0.5}, ValueError, "there is another"),
        ("fopru", {"flops": 1.5}, ValueError, "flops=1.5 is out of range"),
        ("fopru", {"kv": "half"}, TypeError, "kv='half' is not a number"),
        ("atp", {"flops": 0.5, "weights": "atp-scene-llava"}, ValueError, "refuses keep"),
        ("fopru+fastv", {"flops": 0.5}, ValueError, "keep= could mean any of"),
        ("fopro", {"flops": 0.5}, ValueError, "Did you mean 'fopru'"),
    ],
)
def test_mistakes(tiny_model, method, given, error, words):
    with pytest.raises(error, match=words):
        vlmprune.patch(tiny_model(), method, **given)


def test_solve_by_hand():
    def build(keep):
        if keep < 0.3:
            raise ValueError("too low")
        return [keep]

    share = lambda methods: methods[0] ** 2  # noqa: E731
    assert solve(10, build, share, 0.5, "x=0.5") == 0.7
    assert solve(10, build, share, 1, "x=1") == 1
    assert solve(10, build, share, 0.09, "x=0.09") == 0.3
    with pytest.raises(ValueError, match=r"x=0\.05 cannot be met: with keep=0\.3, the least, it is 0\.090"):
        solve(10, build, share, 0.05, "x=0.05")
