"""torch.compile: a pruned prefill is one graph where the plain one is, and decoding on a static cache compiles."""

from __future__ import annotations

import contextlib
from collections import Counter

import probes
import pytest
import tiny
import torch
import torch._dynamo
from transformers import CompileConfig

import vlmprune

METHODS = {
    "random": {}, "pool": {}, "fopru": {}, "vtc_cls": {}, "todre": {"tau": None}, "fastv": {},
    "transprune": {}, "tome": {}, "pitome": {},
}  # fmt: skip


SMALL = {"tower_layers": 3, "num_hidden_layers": 3}  # tracing takes as long as there are layers


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


captured = torch._dynamo.config.patch(capture_scalar_outputs=True)


def prompt_of(model, rows=1):
    prompts = [tiny.prompt(model, [4 + 3 * i, "image", 6 - i], [(24, 24)], seed=i) for i in range(rows)]
    return probes.step_inputs(tiny.batch(prompts))


def explain(model, prompt):
    """What breaks the graph of a call, as (reason, line), and the number of graphs."""
    torch._dynamo.reset()
    with torch.no_grad():
        model(**prompt)  # what depends on the picture's size alone is worked out once, before
        found = torch._dynamo.explain(lambda: model(**prompt))()
    return [str(reason.user_stack[-1]) for reason in found.break_reasons], found.graph_count


# one of each kind of cut in every run; the others differ from these in how they score
ALIKE = ("pool", "fopru", "vtc_cls", "todre", "transprune", "pitome")


@captured
@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.exhaustive] * (m in ALIKE)) for m in METHODS])
def test_a_pruned_prefill_is_one_graph(tiny_model, method):
    """The plain model's only break is a value that it reads to check its placeholders; captured, there is none."""
    model = tiny_model(tower_layers=3)
    prompt = prompt_of(model)
    with torch.no_grad(), vlmprune.patch(model, method, keep=5, **METHODS[method]) as handle:
        eager = model(**prompt).logits
        counts = handle.trace.kv_lengths
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**prompt).logits
        assert torch.equal(compiled, eager)
        assert handle.trace.kv_lengths == counts


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("fopru", {}, marks=pytest.mark.exhaustive),
        ("fastv", {"family": "llava_next"}),
    ],
)
def test_no_more_graph_breaks_than_the_plain_model(tiny_model, method, options):
    model = tiny_model(**SMALL, **options)
    prompt = probes.step_inputs(tiny.prompt(model, [4, "image", 6], [(24, 24)], together=True))
    plain, graphs = explain(model, prompt)
    assert plain
    with vlmprune.patch(model, method, keep=5):
        pruned, more = explain(model, prompt)
    # the sizes of pictures are read once, in front of the host, which finds numbers then
    ours = [line for line in pruned if "patches/base.py" in line and line.endswith("in sizes>")]
    assert len(pruned) <= len(plain)
    assert len(ours) <= (model.config.model_type == "llava_next")
    assert not Counter(line for line in pruned if line not in ours) - Counter(plain)
    # where the plain forward breaks, the hook in front of it ends up in a graph of its own
    assert more <= graphs + 1


@captured
@pytest.mark.exhaustive  # half a minute, most of it torch's own
def test_counts_that_a_method_finds_out_break_the_graph_and_nothing_else(tiny_model):
    """Also where numbers are captured as symbols, which say nothing about shapes."""
    model = tiny_model(tower_layers=2, num_hidden_layers=2)
    prompt = prompt_of(model)
    with torch.no_grad(), vlmprune.patch(model, "todre", keep=5, tau=1.0) as handle:
        eager = model(**prompt).logits
        counts = handle.trace.kv_lengths
        compiled = torch.compile(model, backend="eager")(**prompt).logits
    assert torch.equal(compiled, eager)
    assert handle.trace.kv_lengths == counts
    assert counts[-1] < counts[0]  # stage 2 did fire


@captured
def test_a_compiled_padded_batch(tiny_model):
    """Inside a graph padding is not counted: the sequence stays longer than it must be, and the answers the same."""
    model = tiny_model(**SMALL)
    prompt = prompt_of(model, rows=3)
    assert not prompt["attention_mask"].all()
    for method in ("fopru", "fastv"):
        with torch.no_grad(), vlmprune.patch(model, method, keep=5):
            eager = model(**prompt).logits
            compiled = torch.compile(model, backend="eager", fullgraph=True)(**prompt).logits
        real = prompt["attention_mask"].bool()
        torch.testing.assert_close(compiled[real], eager[real], atol=1e-5, rtol=1e-5)


@captured
def test_a_wrong_prompt_fails_on_the_device(tiny_model):
    """One image each is taken for granted inside a graph, and checked there."""
    model = tiny_model(**SMALL)
    prompt = prompt_of(model, rows=2)
    ids = prompt["input_ids"]
    swapped = prompt | {"input_ids": ids.masked_fill(ids == tiny.IMAGE, 7)}
    swapped["input_ids"][0, :20] = tiny.IMAGE
    swapped["input_ids"][1, :12] = tiny.IMAGE
    with torch.no_grad(), vlmprune.patch(model, "random", keep=5):
        model(**prompt)
        compiled = torch.compile(model, backend="eager")
        compiled(**prompt)
        with pytest.raises(RuntimeError, match="one image each"):
            compiled(**swapped)


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("random", 2),
        ("fastv", 2),
        pytest.param(None, 1, marks=pytest.mark.exhaustive),
        pytest.param("todre", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_decoding_on_a_static_cache_compiles(tiny_model, method, rows):
    """`generate` compiles its decode steps itself where it can; here it is told to, without a single break."""
    model = tiny_model(**SMALL)
    prompt, forced = prompt_of(model, rows), probes.random_tokens(rows, 3)
    prompt.pop("position_ids")
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    with vlmprune.patch(model, method, keep=5) if method else contextlib.nullcontext():
        dynamic = probes.generated_logits(model, prompt, forced)
        static = probes.generated_logits(model, prompt, forced, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile
    probes.same(static, dynamic, 1e-5)
