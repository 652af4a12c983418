"""`vlmprune.check` names what is broken: the engine is broken on purpose, and exactly the lines it shows in fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import tiny
import torch
from checked import passes, subject
from leftovers import Forgetful
from tiny import CACHE
from transformers import StaticCache

from vlmprune import Cut, Decoder, Method, Reduction, UnsupportedError
from vlmprune.engine import decode
from vlmprune.engine import install as engine
from vlmprune.engine.prefill import Prefill
from vlmprune.engine.sequence import Sequence
from vlmprune.trace import CutTrace
from vlmprune.verify import Line, Subject, checks, evidence


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
        cached = output.get(CACHE)
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

    monkeypatch.setattr("vlmprune.engine.prefill.CutTrace", lying)
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
    passes(subject("llava").check(Sociable(0)), ("taps",))


@dataclass(frozen=True)
class Torn(Method):
    """Keeps the ten best of a score; in company, the scores are off by `error`, and two are `gap` apart."""

    gap: float
    error: float = 0.0
    name = "torn"

    def cuts(self, facts):
        return [Cut(Decoder(1), (), self.reduce, "contiguous")]

    def reduce(self, seen, layout):
        scores = torch.arange(layout.width, 0, -1).float().expand(len(layout.grids), -1).clone()
        scores[:, 10] = scores[:, 9] - self.gap
        if len(layout.grids) > 2:
            scores[:, 9] -= self.error
        best = scores.where(layout.alive, -torch.inf).topk(10).indices
        keep = torch.zeros_like(layout.alive).scatter(1, best, True)
        return Reduction(keep & layout.alive, scores=scores)


def test_a_tie_that_rounding_decides_in_a_batch_is_judged_by_its_gap():
    near = subject("llava").check(Torn(1e-6, 2e-6))
    passes(near, ("taps",))
    told = "kept tokens are others than alone; their scores tie but for rounding (9.5e-07 apart)"
    assert told in near["batch"].told
    # scores that are off by more than rounding are no tie, however few tokens they exchange
    for gap, error in ((0.5, 1.0), (1e-6, 1.0)):
        line = subject("llava").check(Torn(gap, error))["batch"]
        assert line.outcome == "?"
        assert "2 of 20 kept tokens are others than alone; scores may be too close" in line.told


def test_what_follows_a_tie_is_still_compared(monkeypatch):
    """The right tokens for that choice, and then a row reads the mask of another."""

    def after(result, *_):
        hidden, made = result
        return hidden, made if made.mask is None else replace(made, mask=made.mask.roll(1, 0))

    around(monkeypatch, Sequence, "shorten", after)
    assert subject("llava").check(Torn(1e-6, 2e-6)).failed == ["batch"]


def test_a_hook_left_behind(monkeypatch):
    model = tiny.model()
    made = Subject(model)
    monkeypatch.setattr(engine, "Hook", Forgetful)
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

    monkeypatch.setattr("vlmprune.engine.hooks.resume", broken)
    failed, report = failing("fopru")
    assert {"decode", "generate", "batch"} <= failed
    assert report["decode"].told == "raised RuntimeError: no decode state"
    assert report["restore"].outcome == "pass"


def test_one_prompt_that_raises_fails_batches_alone(monkeypatch):
    original = evidence.run

    def run(family, model, inputs, forced, **more):
        if checks.left_behind(model) and "pixel_values" not in inputs:
            raise RuntimeError("no text alone")
        return original(family, model, inputs, forced, **more)

    monkeypatch.setattr(evidence, "run", run)
    failed, report = failing("fopru")
    assert failed == {"batch"}
    assert report["batch"].told == "raised RuntimeError: no text alone"


def test_a_refusal_is_no_failure(monkeypatch):
    def refuse(*_):
        raise UnsupportedError("not this one")

    monkeypatch.setattr("vlmprune.engine.hooks.resume", refuse)
    failed, report = failing("fopru")
    assert failed == set()
    assert report["decode"] == Line("decode", "-", "refused: not this one")
