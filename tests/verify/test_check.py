"""`vlmprune.check` passes where all is well, and says no more than it can tell."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import tiny
import torch
from checked import FAMILIES, passes, subject
from scenes import CROPS, STILL

import vlmprune
from vlmprune import UnsupportedError, registry
from vlmprune.verify import CHECKS, Line, Report, Subject, about, byhand, checks, evidence
from vlmprune.verify.runs import masks_allowed
from vlmprune.verify.verdict import Noise, judge, relative

METHODS = ["fopru", "transprune", "pool", "tome"]
PLAIN = {name: kind for name, kind in FAMILIES.items() if name != "mixed"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", PLAIN)
def test_every_family_passes(support, kind, name):
    model = subject(kind).model
    support("vlmprune check", model, name)
    passes(subject(kind).check(name, keep=0.4))


@pytest.mark.parametrize("name", sorted({*STILL} - {*METHODS, *CROPS}))
def test_every_method_passes(support, name):
    model = subject("llava").model
    support("vlmprune check", model, name)
    options = {"atp": {"thresholds": tiny.modules(model, biases=(-0.3, 1.5)) if name == "atp" else None}}
    # fewer pixels, and every token: nothing in the language model to have positions
    but = ("positions",) if name == "downsample" else ()
    given = options.get(name, {"keep": 0.4}) | vlmprune.registry.find(name).plain_with
    passes(subject("llava").check(name, **given), but)


def test_globalcom2_and_tokens_written_in_an_order_of_their_own(support):
    made = subject("next")
    support("vlmprune check", made.model, "globalcom2")
    passes(made.check("globalcom2", keep=0.4))
    passes(made.check("globalcom2", keep=0.4, parity="released"))


@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_full_and_sliding_layers_in_one_model(name):
    made = subject("mixed")
    layers = made.family.decoder_layers(made.family.inner(made.model))
    assert len({layer.self_attn.sliding_window for layer in layers}) == 2
    passes(made.check(name, keep=0.4))


def test_a_run_by_hand_that_is_not_the_models_own_is_said_to_be_that(monkeypatch):
    """One mask for all layers of a stretch, full and sliding: what the check itself once got wrong."""
    monkeypatch.setattr(byhand, "window_of", lambda layer: None)
    report = Subject(tiny.shared(**FAMILIES["mixed"])).check("fopru", keep=0.4)
    assert {"rows", "positions", "generate"} <= set(report.unknown)
    assert report.open == []
    assert "unpruned, the two ways that this line compares differ by" in report["rows"].told
    assert not report.passed


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_the_length_are_refused_by_name(kind):
    half = 32 // 4 // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [3.0] * half} if kind == "longrope" else {"factor": 2.0}
    original = {"original_max_position_embeddings": 40} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0} | factors | original
    model = tiny.model(max_position_embeddings=40, rope_parameters=rope)
    with pytest.raises(UnsupportedError, match=f"rope_type '{kind}', whose frequencies change behind position 40: "):
        vlmprune.check(model, "fopru", keep=0.4)
    assert not checks.left_behind(model)
    # nothing changes where the prompts do not reach that far
    original = {"original_max_position_embeddings": 512} if kind == "longrope" else {}
    passes(vlmprune.check(tiny.model(rope_parameters=rope | original), "fopru", keep=0.4))


def test_a_placeholder_without_an_embedding_is_an_error_with_a_way_out():
    model = tiny.model()
    model.config.image_token_id = 70000
    with pytest.raises(
        ValueError, match=r"an image is token 70000, and .* 0 to 63: .*resize_token_embeddings\(70001\)"
    ):
        vlmprune.check(model, "fopru", keep=0.4)


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
    assert {line.check for line in report.lines if line.outcome == "?"} <= (set() if wide else {*CHECKS} - {"restore"})
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


def test_every_module_gets_its_own_mode_back():
    model = tiny.model().train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    vlmprune.check(model, "random", keep=0.4)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 2, "do_sample": True, "temperature": 0.2},
        {"stop_strings": ["."], "eos_token_id": [*range(64)]},
        {"prompt_lookup_num_tokens": 3},
        {"output_attentions": True, "output_scores": True},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_how_the_user_generates_is_of_no_account(settings):
    model = tiny.model()
    mine = model.generation_config
    mine.update(**settings)
    said = mine.to_dict()
    passes(vlmprune.check(model, "fopru", keep=0.4))
    assert model.generation_config is mine
    assert mine.to_dict() == said


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_refused(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny.model()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(UnsupportedError, match=r"weights are offloaded or spread .*\(meta\).* on one device"):
        vlmprune.check(model, "fopru", keep=0.4)


def test_some_weights_offloaded_are_refused():
    model = tiny.model()
    model.model.language_model.layers[1].to("meta")
    with pytest.raises(UnsupportedError, match=r"\(cpu, meta\)"):
        vlmprune.check(model, "fopru", keep=0.4)


def test_every_prompt_runs_pruned_once(monkeypatch):
    made, ran, original = subject("llava"), [], evidence.run

    def run(family, model, inputs, forced, **more):
        ran.append(inputs)
        return original(family, model, inputs, forced, **more)

    passes(made.check("random", keep=0.4))
    monkeypatch.setattr(evidence, "run", run)
    passes(made.check("random", keep=0.4))
    for prompt in made.plain[False].prompts:
        assert sum(inputs is prompt for inputs in ran) == 1


# the parts


def judged(off, twin, dtype=torch.float32, mine=1e-7, most=None):
    return judge("rows", off, Noise(mine, mine if most is None else most), twin, dtype)


def test_a_mistake_that_rounding_hides_is_never_a_pass():
    assert judged(1e-7, 1.0).outcome == "pass"
    assert judged(1e-7, 5e-7).outcome == "?"
    assert judged(1e-7, None).outcome == "?"
    assert judged(1e-3, 1.0).outcome == "FAIL"
    assert judged(1e-3, 1.0, torch.bfloat16).outcome == "pass"
    assert judged(float("nan"), 1.0).outcome == "FAIL"
    assert judged(float("inf"), 1.0).outcome == "FAIL"
    assert "float32 may tell" in judged(1e-3, 1e-3, torch.bfloat16, mine=1e-3).told


def test_each_line_has_its_own_noise_and_another_lines_noise_excuses_but_proves_nothing():
    half = torch.bfloat16
    # the same bits unpruned: a mistake of 2 % shows, though other ways of computing differ by 5 %
    assert judged(0.0, 0.02, half, mine=0.0, most=0.05).outcome == "pass"
    assert judged(0.0, 0.02, half, mine=0.05).outcome == "?"
    # where the bits are others when pruned, rounding may explain it, and then such a mistake does not show
    assert judged(0.03, 0.02, half, mine=0.0, most=0.05).outcome == "?"
    assert judged(0.03, 0.50, half, mine=0.0, most=0.05).outcome == "pass"
    assert judged(0.30, 0.50, half, mine=0.0, most=0.05).outcome == "FAIL"
    assert judged(0.03, 0.50, half, mine=0.0, most=0.05).noise == 0.05
    assert judged(0.0, 0.02, half, mine=0.0, most=0.05).noise == 0.0


@pytest.mark.parametrize("mine", [0.3, float("inf"), float("nan")])
@pytest.mark.parametrize("off", [0.0, 0.5, float("inf")])
def test_a_model_that_is_not_reproduced_unpruned_is_said_to_be_that(mine, off):
    line = judged(off, 1.0, mine=mine)
    assert line.outcome == "!"
    assert line.told.startswith(f"unpruned, the two ways that this line compares differ by {mine:.2g}, which is no")


def test_what_a_report_calls_passed():
    def report(*outcomes):
        return Report("m", [], [Line(name, outcome) for name, outcome in zip(CHECKS, outcomes, strict=False)])

    assert report("pass", "-", "?").passed
    assert not report("pass", "?", "?").passed
    assert not report("pass", "FAIL").passed
    assert not report("pass", "!").passed
    assert report("!", "FAIL", "?").unknown == ["rows"]
    assert report("!", "FAIL", "?").failed == ["batch"]
    assert report("!", "FAIL", "?").open == ["cache"]


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


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ([2, 3], Line("syncs", "pass", "3 waits where the plain model has 2 and 1 more are promised")),
        ([2, 4], Line("syncs", "FAIL", "4 waits where the plain model has 2 and 1 more are promised")),
        ([2, RuntimeError("the engine broke")], Line("syncs", "FAIL", "raised RuntimeError: the engine broke")),
        ([RuntimeError("no mask"), 3], Line("syncs", "FAIL", "raised RuntimeError: no mask")),
        ([2, UnsupportedError("not this one")], Line("syncs", "-", "refused: not this one")),
        ([None, None], Line("syncs", "-", "no GPU")),
    ],
)
def test_a_count_of_waits_that_raises_is_a_line_of_the_report(monkeypatch, waits, expected):
    left = list(waits)

    def syncs(model, prompt):
        made = left.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(checks, "syncs", syncs)
    report = subject("llava").check("random", keep=0.4)
    assert left == []
    assert report["syncs"] == expected
    assert report.failed == (["syncs"] if expected.outcome == "FAIL" else [])


def test_memory_that_runs_out_is_told_as_such(monkeypatch):
    def syncs(model, prompt):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(checks, "syncs", syncs)
    with pytest.raises(torch.OutOfMemoryError):
        subject("llava").check("random", keep=0.4)


@pytest.mark.parametrize("broken", [False, True])
def test_counting_waits_leaves_the_mode_as_it_was(monkeypatch, broken):
    modes = [2]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Model:
        device = torch.device("cuda")

        def __call__(self, **inputs):
            assert modes == [2, "warn"]
            assert inputs.keys() == {"input_ids", "use_cache", "logits_to_keep"}
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            if broken:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") if broken else nullcontext():
        assert checks.syncs(Model(), {"input_ids": 1, "attention_mask": 2}) == 1
    assert modes == [2, "warn", 2]


def test_without_a_gpu_no_wait_is_counted():
    assert checks.syncs(tiny.shared(), {}) is None


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


@pytest.mark.parametrize("part", ["lm_head", "model.language_model.layers.2.mlp.down_proj", "model.vision_tower"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_that_computes_no_numbers_is_an_error_and_no_question(part, bad):
    model = tiny.model()
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).view(-1)[5] = bad
    with pytest.raises(
        ValueError, match=r"^the unpruned model computes NaN or infinite numbers: .*load it in bfloat16"
    ):
        vlmprune.check(model, "random", keep=0.4)
    assert not checks.left_behind(model)


@pytest.mark.parametrize("side", evidence.SIDES)
def test_numbers_that_padding_spoils_are_an_error_too(monkeypatch, side):
    original = evidence.run

    def run(family, model, inputs, forced):
        made = original(family, model, inputs, forced)
        mask = inputs["attention_mask"]
        if not mask.all() and (side == "right") == bool(mask[:, 0].all()):
            made.logits[2] = torch.nan
        return made

    monkeypatch.setattr(evidence, "run", run)
    with pytest.raises(ValueError, match=f"computes NaN or infinite numbers in a batch padded {side}"):
        vlmprune.check(tiny.model(), "random", keep=0.4)


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
