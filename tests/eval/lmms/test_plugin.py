"""lmms-eval finds the model by itself, and its command works."""

import json
from importlib import metadata

import harness
import pytest
from lmms_eval.models import get_model

from vlmprune.eval import testbed
from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.eval.naming import methods_of, typed
from vlmprune.runtime.errors import UserError


def test_the_entry_point_leads_to_the_model():
    points = metadata.entry_points(group="lmms_eval.models", name="vlmprune")
    assert {point.value for point in points} == {"vlmprune.eval.lmms.plugin:manifests"}
    assert get_model("vlmprune") is VlmPrune


@pytest.mark.slow
def test_the_command_prunes_scores_and_measures(tmp_path):
    asked = "vlmprune_scene_llava_exist"
    args = "pretrained=scene-llava,method=fopru,keep=26,newlines=none"
    said = harness.process(
        *harness.command(model_args=args, asked=asked, out="out", extra=("--limit", "12", "--batch_size", "5")),
        cwd=tmp_path,
    )
    assert "visual_tokens_entering_llm" in said
    results, samples = harness.written(tmp_path / "out")
    assert results["config"]["model_args"] == args
    assert results["versions"] == {asked: int(testbed.VERSION)}
    records = [r for r in testbed.questions("sparse") if r.category == "exist"][:12]
    assert [s["target"] for s in samples[asked]] == [r.answer for r in records]
    right = [s["filtered_resps"] == r.answer for s, r in zip(samples[asked], records, strict=True)]
    assert results["results"][asked]["exact_match,none"] == sum(right) / 12
    assert sum(right) >= 9
    for sample in samples[asked]:
        (cost,) = sample["token_counts"]
        assert (cost["tokens_before"], cost["tokens_after"], cost["layer_average"]) == (256, 26, 26.0)
        assert cost["output_tokens"] == 2  # the word and the end
        assert cost["ttft_s"] > 0
        assert cost["decode_tokens_per_s"] > 0
    spent = results["throughput"]
    assert spent["avg_visual_tokens_before"] == 256
    assert spent["avg_visual_tokens_entering_llm"] == spent["avg_visual_tokens_layer_average"] == 26
    assert spent["total_gen_tokens"] == 24
    assert spent["avg_latency"] == pytest.approx(spent["total_elapsed_time"] / 12)
    assert 0 < spent["avg_ttft_s"] < spent["total_elapsed_time"]
    json.dumps(results)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("method=foprru,keep=4", "unknown method 'foprru'. Did you mean 'fopru'"),
        ("method=fopru,keap=4", "'fopru' has no option 'keap'. Did you mean 'keep'"),
        ("method=fopru", "fopru needs keep="),
        ("method=fopru,keep=4,average=4", "keep= or average=, not both"),
        ("method=fopru,keep=1.5", "out of range"),
        ("method=fopru,keep=many", "is not a number"),
        ("method=none,keep=4", "takes no options, and here is keep=4"),
        ("method=none+fopru,keep=4", "cannot be combined"),
        ("method=fopru+vtc_cls,keep=4", "write fopru.keep= or vtc_cls.keep="),
        ("method=fopru,vtc_cls.keep=4", "'vtc_cls' is not one of the methods"),
        ("method=fopru+fopru,keep=4", "twice"),
        ("method=globalcom2,keep=4", "globalcom2"),  # one view only
        ("dtype=bflot16", "Did you mean 'bfloat16'"),
        ("device=tpu", "unknown device 'tpu'"),
        ("template=nowhere.jinja", "there is no such file"),
    ],
)
def test_mistakes_in_model_args_are_explained(args, said):
    with pytest.raises(UserError) as caught:
        VlmPrune.create_from_arg_string(f"pretrained=scene-llava,{args}")
    assert said in str(caught.value)


@pytest.mark.parametrize("given", ["auto", "0", "2.5"])
def test_a_bad_batch_size_is_refused(given):
    with pytest.raises(UserError, match="whole number"):
        VlmPrune("scene-llava", batch_size=given)


def test_a_model_that_is_not_there():
    with pytest.raises(UserError, match=r"Did you mean 'scene-llava'"):
        VlmPrune("scene-lava")


def test_text_becomes_values():
    args = "method=transprune,prune_layers=[1,2,4],keep_ratios=[0.9,0.5,0.2],mode=paper"
    made = VlmPrune.create_from_arg_string(f"pretrained=scene-llava,{args}")
    assert made.options == {"prune_layers": (1, 2, 4), "keep_ratios": (0.9, 0.5, 0.2), "mode": "paper"}


def test_negative_numbers_are_whole_where_they_look_so():
    # lmms-eval reads -2 as -2.0
    assert [typed(value) for value in (-2.0, "-2", -0.5, 2.0, "None", "row")] == [-2, -2, -0.5, 2.0, None, "row"]
    assert isinstance(typed(-2.0), int)


def test_methods_are_joined_and_share_options():
    made = methods_of("globalcom2+transprune", {"globalcom2.keep": 0.5, "prune_layers": (2, 3, 4), "seed": None})
    assert [type(method).name for method in made] == ["globalcom2", "transprune"]
    assert (made[0].keep, made[1].prune_layers) == (0.5, (2, 3, 4))
    assert methods_of("none", {"keep": None}) == []
