"""`vlmprune.check` passes where all is well, and names what is broken where something is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import tiny
import torch
from transformers import StaticCache

import vlmprune
from vlmprune import Cut, Decoder, Method, Reduction, UnsupportedError, decode, engine, registry
from vlmprune.prefill import Prefill
from vlmprune.selftest import CHECKS, Line, Subject, about, checks
from vlmprune.selftest.runs import masks_allowed
from vlmprune.selftest.verdict import judge, relative
from vlmprune.sequence import Sequence
from vlmprune.trace import CutTrace

FAMILIES = {
    "llava": {},
    "llava-siglip-qwen2": {"tower": "siglip", "text": "qwen2"},
    "next": {"family": "llava_next"},
    "next-mistral": {"family": "llava_next", "text": "mistral", "sliding_window": 24},
    "vip": {"family": "vipllava"},
    "onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
    "next-video": {"family": "llava_next_video"},
}
METHODS = ["fopru", "transprune", "pool", "tome", "downsample"]
ALWAYS = {"rows", "batch", "cache", "decode", "positions", "restore", "generate"}


@cache
def subject(kind, dtype=torch.float32):
    return Subject(tiny.shared(dtype=dtype, **FAMILIES[kind]))


def passes(report, but=()):
    """Everything that a CPU can check passed, but for `but`."""
    expected = {name: "-" if name in ("syncs", *but) else "pass" for name in CHECKS}
    assert {line.check: line.outcome for line in report.lines} == expected, str(report)
    assert report.passed
    assert report.failed == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_passes(support, kind, name):
    model = subject(kind).model
    support("vlmprune check", model, name)
    passes(subject(kind).check(name, keep=0.4), but=("positions",) if name == "downsample" else ())


@pytest.mark.parametrize("name", sorted({*registry.names()} - {*METHODS, "globalcom2"}))
def test_every_method_passes(support, name):
    model = subject("llava").model
    support("vlmprune check", model, name)
    options = {"atp": {"thresholds": tiny.modules(model, biases=(-0.3, 1.5)) if name == "atp" else None}}
    passes(subject("llava").check(name, **options.get(name, {"keep": 0.4})))


def test_globalcom2_and_tokens_written_in_an_order_of_their_own(support):
    made = subject("next")
    support("vlmprune check", made.model, "globalcom2")
    passes(made.check("globalcom2", keep=0.4))
    passes(made.check("globalcom2", keep=0.4, parity="released"))


def test_stacked_methods_pass():
    methods = [registry.find("fopru")(keep=0.6), registry.find("fastv")(keep=0.3)]
    report = subject("next").check(methods)
    passes(report)
    assert report.method == "fopru+fastv"
    assert report["cache"].told.startswith("77, 37 entries")


def test_videos_are_among_the_prompts_where_a_method_reads_them():
    made = subject("onevision")
    made.check("random", keep=0.4)
    made.check("tome", keep=0.6)
    assert "pixel_values_videos" in made.plain[True].prompts[0]
    assert "pixel_values_videos" not in made.plain[False].prompts[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    report = subject("llava", dtype).check("fastv", keep=0.4)
    assert report.failed == []
    wide = dtype == torch.float64
    assert {line.check for line in report.lines if line.outcome == "?"} <= (set() if wide else ALWAYS - {"restore"})
    # entries and positions are plain to see in any dtype
    assert {report[name].outcome for name in ("cache", "positions", "restore")} == {"pass"}


def test_a_budget_that_prunes_nothing_is_not_called_a_pass():
    report = subject("llava").check("random", keep=1.0)
    assert [report[name].outcome for name in ("rows", "decode", "positions", "generate")] == ["-"] * 4
    assert report["restore"].outcome == "?"


def test_the_model_is_left_as_it_was():
    model = tiny.model()
    model.train()
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    before = model(**prompt).logits
    assert vlmprune.check(model, "fopru", keep=0.4).passed
    assert model.training
    assert torch.equal(model(**prompt).logits, before)
    assert not any(p.grad is not None for p in model.parameters())


# what is broken, and which lines must say so: no other may


def failing(name="fastv", kind="llava", **options):
    report = subject(kind).check(name, **(options or {"keep": 0.4}))
    return set(report.failed), report


def around(monkeypatch, owner, name, after):
    """Let `owner.name` return what `after(result, *args)` makes of its result."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: after(original(*args, **kwargs), *args, **kwargs))


def on_cache(monkeypatch, change, static=None):
    """Change every layer 2 that a prefill has filled; with `static`, only in such caches or only in others."""
    original = Prefill.finish

    def finish(self, output):
        original(self, output)
        cached = output.past_key_values
        if cached is not None and static in (None, isinstance(cached, StaticCache)):
            change(cached.layers[2])

    monkeypatch.setattr(Prefill, "finish", finish)


def test_a_layer_that_caches_everything_twice(monkeypatch):
    def twice(layer):
        layer.keys, layer.values = (torch.cat((x, x), 2) for x in (layer.keys, layer.values))

    on_cache(monkeypatch, twice, static=False)
    failed, report = failing("fopru")
    assert "cache" in failed
    assert not failed & {"rows", "restore"}
    kept = report["cache"].told.split()
    assert report["cache"].told.startswith("layer 2 caches ")
    assert int(kept[3]) == 2 * int(kept[7])


def test_one_entry_twice_too_long(monkeypatch):
    def one_more(layer):
        layer.keys, layer.values = (torch.cat((x, x[:, :, 3:4]), 2) for x in (layer.keys, layer.values))

    on_cache(monkeypatch, one_more, static=False)
    failed, report = failing("fopru")
    assert "cache" in failed
    assert report["positions"].outcome == "?"
    assert not failed & {"rows", "restore"}


def test_one_entry_in_its_neighbours_place(monkeypatch):
    def double(layer):
        layer.values[:, :, -15] = layer.values[:, :, -16]

    on_cache(monkeypatch, double, static=False)
    failed, report = failing("fopru")
    # decoded tokens read it, and so the layers above have other keys for them
    assert failed == {"cache", "decode", "positions", "generate"}
    assert report["cache"].told.startswith("layer 2, entry ")


def test_a_trace_that_promises_other_lengths(monkeypatch):
    original = Prefill.finish

    def finish(self, output):
        original(self, output)
        self.plan.trace = replace(self.plan.trace, kv_lengths=[n - 1 for n in self.plan.trace.kv_lengths])

    monkeypatch.setattr(Prefill, "finish", finish)
    assert failing()[0] == {"cache"}


def test_a_wrong_kept_index(monkeypatch):
    original = Sequence.shorten

    def shorten(self, hidden, drop, *rest):
        drop = drop.clone()
        for row in drop:
            gone = row.nonzero().flatten()
            if len(gone):
                stays = (~row[int(gone[0]) : int(gone[-1])]).nonzero().flatten() + gone[0]
                row[gone[-1]], row[stays[-1]] = False, True
        return original(self, hidden, drop, *rest)

    monkeypatch.setattr(Sequence, "shorten", shorten)
    failed, report = failing()
    assert failed == {"rows", "cache", "decode", "positions", "generate"}
    assert report["rows"].off > 0.1


def moved(sequence, rotary_emb, hidden, by):
    ids = sequence.positions + by
    return replace(sequence, positions=ids, rotary=rotary_emb(hidden, position_ids=ids), shift=sequence.shift - by)


def test_positions_off_by_one_everywhere(monkeypatch):
    """All at once, which no logit shows: rotary attention knows differences only."""

    def after(result, sequence, hidden, drop, dropped, positions, rotary_emb):
        hidden, made = result
        return hidden, moved(made, rotary_emb, hidden, 1)

    around(monkeypatch, Sequence, "shorten", after)
    failed, report = failing("fopru")
    assert failed == {"positions"}
    assert report["positions"].told.startswith("contiguous")


def test_positions_off_by_one_in_the_answer(monkeypatch):
    around(monkeypatch, Sequence, "segment", lambda made, *_: replace(made, shift=made.shift + 1))
    # in a batch the row without a picture is wrong too, which alone was not pruned
    assert failing("fopru")[0] == {"decode", "positions", "generate", "batch"}


def test_the_other_position_policy(monkeypatch):
    original = Sequence.shorten

    def shorten(self, hidden, drop, dropped, positions, rotary_emb):
        return original(self, hidden, drop, dropped, "contiguous", rotary_emb)

    monkeypatch.setattr(Sequence, "shorten", shorten)
    assert {"positions"} <= failing("fastv", keep=0.4)[0]
    assert failing("fopru")[0] == set()


def test_a_merge_with_other_weights(monkeypatch):
    """The trace says so, and the engine did not."""

    def lying(layer, name, positions, keep, merge, scores):
        return CutTrace(layer, name, positions, keep, replace(merge, weight=merge.weight * 0.9), scores)

    monkeypatch.setattr("vlmprune.prefill.CutTrace", lying)
    assert failing("pool")[0] == {"rows", "cache", "decode", "positions", "generate"}


@dataclass(frozen=True)
class Sociable(Method):
    """Keeps other tokens in company than alone: `moves` of them."""

    moves: int = 1
    name = "sociable"

    def cuts(self, facts):
        return [Cut(Decoder(1), (), self.reduce, "contiguous")]

    def reduce(self, seen, layout):
        number = torch.arange(layout.width)
        alone = number < 10
        company = (number >= self.moves) & (number < 10 + self.moves)
        return Reduction(layout.alive & (company if len(layout.grids) > 2 else alone))


def test_other_tokens_in_a_batch():
    few, many = (subject("llava").check(Sociable(moves)) for moves in (1, 3))
    assert few["batch"].outcome == "?"
    assert few["batch"].told == (
        "row 0, padded left: 2 of 20 kept tokens are others than alone; scores may be too close to call"
    )
    assert few.passed
    assert many.failed == ["batch"]
    assert "6 of 20" in many["batch"].told
    passes(subject("llava").check(Sociable(0)))


def test_a_hook_left_behind(monkeypatch):
    model = tiny.model()
    made = Subject(model)
    monkeypatch.setattr(engine, "HOOKS", tuple(h for h in engine.HOOKS if h is not engine.AfterModel))
    report = made.check("fopru", keep=0.4)
    assert report.failed == ["restore"]
    assert "model: AfterModel" in report["restore"].told


def test_an_attribute_left_behind(monkeypatch):
    model = tiny.model("llava_next")

    class Other:
        pass

    monkeypatch.setattr(engine, "Bound", Other)
    report = Subject(model).check("fopru", keep=0.4)
    assert report.failed == ["restore"]
    assert "get_image_features" in report["restore"].told


def test_weights_that_are_not_put_back(monkeypatch):
    model = tiny.model()
    made = Subject(model)
    made.check("fopru", keep=0.4)

    def spoil(_, patched):
        patched.lm_head.weight.data[7] *= 1.001

    around(monkeypatch, engine, "remove", spoil)
    assert "restore" in made.check("fopru", keep=0.4).failed


def test_a_row_that_sees_the_mask_of_another(monkeypatch):
    def after(result, *_):
        hidden, made = result
        return hidden, made if made.mask is None else replace(made, mask=made.mask.roll(1, 0))

    around(monkeypatch, Sequence, "shorten", after)
    failed, report = failing()
    assert failed == {"batch"}
    assert "padded" in report["batch"].told


def test_a_decode_mask_that_forgets_padding(monkeypatch):
    around(monkeypatch, decode, "decode_mask", lambda mask, *_: mask if mask is None else torch.ones_like(mask))
    assert failing()[0] == {"batch"}


def test_a_static_cache_that_is_another(monkeypatch):
    def spoil(layer):
        layer.values[:, :, 3] *= 2

    on_cache(monkeypatch, spoil, static=True)
    failed, report = failing("fopru")
    assert failed == {"generate"}
    assert report["generate"].told == "a static cache gives another answer"


def test_a_generation_that_raises(monkeypatch):
    def broken(*_):
        raise RuntimeError("no decode state")

    monkeypatch.setattr("vlmprune.engine.resume", broken)
    failed, report = failing("fopru")
    assert {"decode", "generate", "batch"} <= failed
    assert report["decode"].told == "raised RuntimeError: no decode state"
    assert report["restore"].outcome == "pass"


def test_a_refusal_is_no_failure(monkeypatch):
    def refuse(*_):
        raise UnsupportedError("not this one")

    monkeypatch.setattr("vlmprune.engine.resume", refuse)
    failed, report = failing("fopru")
    assert failed == set()
    assert report["decode"] == Line("decode", "-", "refused: not this one")


# the parts


def test_a_mistake_that_rounding_hides_is_never_a_pass():
    assert judge("rows", 1e-7, 1e-7, 1.0, torch.float32).outcome == "pass"
    assert judge("rows", 1e-7, 1e-7, 5e-7, torch.float32).outcome == "?"
    assert judge("rows", 1e-7, 1e-7, None, torch.float32).outcome == "?"
    assert judge("rows", 1e-3, 1e-7, 1.0, torch.float32).outcome == "FAIL"
    assert judge("rows", 1e-3, 1e-7, 1.0, torch.bfloat16).outcome == "pass"
    assert judge("rows", float("nan"), 1e-7, 1.0, torch.float32).outcome == "FAIL"
    assert judge("rows", float("inf"), 1e-7, 1.0, torch.float32).outcome == "FAIL"
    assert "float32 may tell" in judge("rows", 1e-3, 1e-3, 1e-3, torch.bfloat16).told


def test_relative_sees_nan():
    x = torch.eye(3)
    y = x.clone()
    y[1, 1] = torch.nan
    assert relative(x, x).tolist() == [0, 0, 0]
    assert relative(y, x).tolist() == [0, torch.inf, 0]
    assert relative(2 * x, x).tolist() == [1, 1, 1]


def test_masks_go_to_an_attention_that_takes_them():
    language_model = tiny.model().model.language_model
    for given, used in (("eager", "eager"), ("sdpa", "sdpa"), ("flash_attention_2", "sdpa")):
        language_model.config._attn_implementation = given
        with masks_allowed(language_model):
            assert language_model.config._attn_implementation == used
        assert language_model.config._attn_implementation == given


def test_eager_attention_passes():
    passes(vlmprune.check(tiny.shared(attn="eager"), "fastv", keep=0.4))


def test_waits_beyond_the_promise_fail():
    assert checks.syncs_line(3, 4, 1).outcome == "pass"
    assert checks.syncs_line(3, 5, 1).outcome == "FAIL"
    assert "5 waits" in checks.syncs_line(3, 5, 1).told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["fopru", "fastv", "todre"])
def test_on_a_gpu(name):
    report = vlmprune.check(tiny.model().cuda(), name, keep=0.4)
    assert report["syncs"].outcome == "pass", str(report)
    assert report.failed == [], str(report)


def test_a_patched_model_is_refused():
    model = tiny.model()
    with vlmprune.patch(model, "fopru", keep=4), pytest.raises(ValueError, match=r"is patched .*unpatch it first"):
        vlmprune.check(model, "fopru", keep=4)


def test_mistakes_are_told_as_patch_tells_them():
    with pytest.raises(ValueError, match="Did you mean 'fopru'"):
        subject("llava").check("fopro", keep=4)
    with pytest.raises(UnsupportedError, match="single view"):
        subject("llava").check("globalcom2", keep=4)
    with pytest.raises(UnsupportedError, match=r"\[CLS\]"):
        subject("llava-siglip-qwen2").check("vtc_cls", keep=4)


def test_models_of_the_original_package_are_refused(support):
    original = pytest.importorskip("original")
    model, _ = original.pair("llava")
    support("vlmprune check", model, "fopru", refused="models of the original package: check the HF conversion")
    with pytest.raises(UnsupportedError, match="Hugging Face conversion"):
        vlmprune.check(model, "fopru", keep=4)


def test_what_a_bug_report_needs_to_know():
    said = about(subject("next").model)
    assert said["model_type"] == "llava_next"
    assert said["dtype"] == "float32"
    assert said["attention"] == "sdpa"
    assert said["language_model"] == {
        "type": "llama", "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "sliding_window": None,
    }  # fmt: skip
