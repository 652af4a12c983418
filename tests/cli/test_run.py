"""`vlmprune run` end to end on tiny models."""

import json

import pytest
from PIL import Image
from tiny_folders import answer, noise_picture

from vlmprune.cli.run import parse_budget, parse_option
from vlmprune.eval import testbed
from vlmprune.runtime import loading
from vlmprune.runtime.errors import UserError

PROMPT = "what colour is it ?"


def test_answers_are_those_of_the_library(cli, folders, picture):
    code, out, _ = cli(
        "run", "--image", picture, "--prompt", PROMPT, "--model", folders["llava"], "--method", "fopru,random",
        "--keep", "2", "--option", "seed=3", "--max-new-tokens", 6, "--repeats", 2, "--json",
    )  # fmt: skip
    assert code == 0
    said = json.loads(out)
    asked = folders["llava"], picture, PROMPT, 6
    full, (fopru, control) = said["full"]["answer"], said["pruned"]
    assert full == answer(*asked)
    assert fopru["answer"] == answer(*asked, "fopru", keep=2)
    assert control["answer"] == answer(*asked, "random", keep=2, seed=3)
    assert len({full, fopru["answer"], control["answer"]}) > 1  # otherwise nothing was shown
    assert (fopru["options"], control["options"]) == ({"keep": 2}, {"keep": 2, "seed": 3})
    assert fopru["images"] == [{"patches_before": 16, "patches_after": 2, "newlines_before": 0, "newlines_after": 0}]
    assert fopru["prefill"]["pairs"] == 2
    assert fopru["prefill"]["ratio"] > 0
    assert said["times_bound_by_overhead"] is False


def test_text_output(cli, folders, picture):
    code, out, err = cli(
        "run", "--image", picture, "--prompt", PROMPT, "--model", folders["llava"], "--method", "vtc_cls,fastv",
        "--keep", "25%,1", "--max-new-tokens", 2, "--repeats", 1,
    )  # fmt: skip
    assert code == 0
    assert out.startswith(f"{folders['llava']} (llava, ")
    lines = [line.split() for line in out.splitlines()]
    rows = {tuple(line[:2]): line for line in lines if len(line) > 1}
    assert rows["full", "model"][2:5] == ["-", "16", "16.0"]
    assert rows["vtc_cls", "0.25"][2:6] == ["16", "->", "4", "4.0"]
    assert rows["fastv", "0.25"][2:6] == ["16", "->", "4", "10.0"]  # two of four layers see all
    assert rows["vtc_cls", "1"][2:6] == ["16", "->", "1", "1.0"]
    assert "x" in rows["fastv", "1"][-2] + rows["fastv", "1"][-3]
    assert "medians of 1 interleaved pairs" in out
    assert "newlines " not in out.splitlines()[3]  # a column that would hold nothing but zeros
    assert err == f"loading {folders['llava']} ...\n"


def test_newlines_and_several_pictures(cli, folders, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    noise_picture(48, 24).save(files[0])
    noise_picture(24, 24).save(files[1])
    shared = ("--prompt", PROMPT, "--model", folders["next"], "--keep", "10", "--repeats", 0, "--max-new-tokens", 2)
    code, out, _ = cli("run", "--image", files[0], "--image", files[1], *shared, "--json")
    assert code == 0
    pruned = json.loads(out)["pruned"][0]
    assert pruned["images"] == [
        {"patches_before": 48, "patches_after": 10, "newlines_before": 4, "newlines_after": 4},
        {"patches_before": 32, "patches_after": 10, "newlines_before": 4, "newlines_after": 4},
    ]
    assert pruned["prefill"] is None
    code, out, _ = cli("run", "--image", *files, *shared, "--option", "newlines=none")
    assert code == 0
    assert "80 -> 20    8 -> 0" in out
    assert "88.0" in out  # the full model's layer average counts newlines
    assert "prefill" not in out


def test_default_method_and_model(cli, folders, picture, monkeypatch):
    monkeypatch.setattr(testbed, "path", lambda name: {"scene-llava": folders["llava"]}[name])
    code, out, err = cli("run", "--image", picture, "--prompt", "what colour is a cat ?", "--repeats", 1)
    assert code == 0
    assert "fopru       0.25  16 -> 4" in out
    assert "bound by overhead" in out
    assert "scene-llava does not know these words: a, cat" in err


def test_saves_a_picture(cli, folders, picture, tmp_path):
    target = tmp_path / "kept.png"
    code, out, _ = cli(
        "run", "--image", picture, picture, "--prompt", PROMPT, "--model", folders["llava"], "--method", "grid,pool",
        "--keep", 4, "--repeats", 0, "--max-new-tokens", 2, "--save", target,
    )  # fmt: skip
    assert code == 0
    assert out.endswith(f"kept tokens: {target}\n")
    with Image.open(target) as drawn:
        assert drawn.width > 3 * 384  # the picture and two panels
        assert drawn.height > 2 * 384  # two pictures


@pytest.mark.parametrize(
    ("text", "value"), [("36", 36), ("0.1", 0.1), ("10%", 0.1), ("1", 1), ("1.0", 1.0), ("100%", 1.0), (" 5 ", 5)]
)
def test_keep(text, value):
    assert parse_budget(text) == value
    assert type(parse_budget(text)) is type(value)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "nan", "inf", "many", "", "0.0", "200%", "%"])
def test_bad_keep(text):
    with pytest.raises(UserError, match="--keep"):
        parse_budget(text)
    with pytest.raises(UserError, match="--average"):
        parse_budget(text, "average")


def test_average(cli, folders, picture):
    shared = ("run", "--image", picture, "--prompt", PROMPT, "--model", folders["llava"], "--repeats", 0)
    code, out, _ = cli(*shared, "--method", "fastv,fopru", "--average", "10,75%")
    assert code == 0
    rows = {tuple(line.split()[:2]): line.split()[2:6] for line in out.splitlines() if line.startswith(("fa", "fo"))}
    assert rows["fastv", "10"] == ["16", "->", "4", "10.0"]  # two layers of 16 and two of 4
    assert rows["fopru", "10"] == ["16", "->", "10", "10.0"]
    assert rows["fastv", "0.75"] == ["16", "->", "8", "12.0"]
    assert "average" in out.splitlines()[3].split()[1]
    code, out, err = cli(*shared, "--method", "fastv", "--average", "3")  # two layers of 16 are more than that alone
    assert (code, out) == (2, "")
    assert "average=3 cannot be met" in err


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("layer=3", "layer", 3), ("layer=-2", "layer", -2), ("t=0.5", "t", 0.5), ("newlines=row", "newlines", "row"),
        ("a-b=true", "a_b", True), ("a=False", "a", False), ("newlines=none", "newlines", "none"),
        ("x=a=b", "x", "a=b"),
    ],
)  # fmt: skip
def test_option(text, key, value):
    found = parse_option(text)
    assert found == (key, value)
    assert type(found[1]) is type(value)


@pytest.fixture
def loaded(folders):
    return loading.load(loading.find_model(folders["llava"]))


def ids(loaded, text):
    return loaded.processor.tokenizer(text.replace("<image>", "<image> " * 16), add_special_tokens=False)["input_ids"]


def test_chat_template_is_applied(loaded):
    inputs = loading.model_inputs(loaded, [noise_picture(24, 24)], PROMPT)
    assert inputs["input_ids"][0].tolist() == ids(loaded, f"<s> user: <image> {PROMPT} assistant:")


def test_prompt_with_placeholder_is_taken_as_it_is(loaded):
    inputs = loading.model_inputs(loaded, [noise_picture(24, 24)], "what <image> is")
    assert inputs["input_ids"][0].tolist() == ids(loaded, "what <image> is")


def test_no_chat_template(loaded):
    loaded.processor.chat_template = None
    inputs = loading.model_inputs(loaded, [noise_picture(24, 24)] * 2, PROMPT)
    assert inputs["input_ids"][0].tolist() == ids(loaded, f"<image> <image> {PROMPT}")


def test_a_first_token_is_not_doubled(loaded, monkeypatch):
    tokenizer = loaded.processor.tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("is")["input_ids"] == [1, tokenizer.convert_tokens_to_ids("is")]
    with_template = loading.model_inputs(loaded, [noise_picture(24, 24)], PROMPT)["input_ids"][0].tolist()
    as_written = loading.model_inputs(loaded, [noise_picture(24, 24)], "<image> is")["input_ids"][0].tolist()
    assert with_template.count(1) == as_written.count(1) == 1


def test_dtype(folders, picture, cli):
    shared = ("run", "--image", picture, "--prompt", PROMPT, "--model", folders["llava"], "--repeats", 0, "--json")
    code, out, _ = cli(*shared, "--dtype", "bfloat16")
    assert code == 0
    assert json.loads(out)["dtype"] == "bfloat16"
    code, out, _ = cli(*shared)
    assert json.loads(out)["dtype"] == "float32"
