"""lmms-eval finds the model by itself, and its command works."""

import json
from importlib import metadata

import harness
import pytest
from lmms_eval.models import get_model

from vlmprune.eval import testbed
from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.methods import FoPru, ToDRE, TransPrune
from vlmprune.parts.facts import ModelFacts
from vlmprune.runtime.errors import UserError

FACTS = ModelFacts("llava", 24, 22, True, decoder_layers=32, views=False, view_patches=576)


def test_the_entry_point_leads_to_the_model():
    points = metadata.entry_points(group="lmms_eval.models", name="vlmprune")
    assert {point.value for point in points} == {"vlmprune.eval.lmms.plugin:manifests"}
    assert get_model("vlmprune") is VlmPrune


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
        ("method=fopru,keep=many", "neither a count (36) nor a fraction"),
        ("method=fopru,keep=None", "fopru needs keep="),
        ("method=random,keep=9,seed=None", "seed=None"),
        ("method=transprune,keep=9,prune_layers=[1,2", "prune_layers: '[1,2' is no list"),
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
    made = VlmPrune.create_from_arg_string("pretrained=scene-llava,method=fopru,keep=26,layer=-2")
    assert (made.options["layer"], type(made.options["layer"])) == (-2, int)


@pytest.mark.parametrize(("tau", "value", "cuts"), [("None", None, 1), ("null", None, 1), ("0.1", 0.1, 2)])
def test_none_is_a_value(tau, value, cuts):
    """It was thrown away once, and full ToDRE ran under the name of its first stage."""
    made = VlmPrune.create_from_arg_string(f"pretrained=scene-llava,method=todre,keep=64,tau={tau}")
    assert made.options == {"keep": 64, "tau": value}
    assert made.handle.methods == [ToDRE(keep=64, tau=value, system=2)]  # the processor tells the prefix
    assert len(made.handle.methods[0].cuts(FACTS)) == cuts
    made.use("todre", keep=64, tau=0.1)
    made.use("todre", keep=64, tau=None)
    assert made.handle.methods == [ToDRE(keep=64, tau=None, system=2)]
    assert "tau=None" in repr(made)  # the key of lmms-eval's response cache


def test_methods_are_joined_and_share_options():
    args = "method=fopru+transprune,fopru.keep=50%,transprune.keep=26,prune_layers=[1,2,4]"
    made = VlmPrune.create_from_arg_string(f"pretrained=scene-llava,{args}")
    assert made.handle.methods == [FoPru(keep=0.5), TransPrune(keep=26, prune_layers=(1, 2, 4))]
