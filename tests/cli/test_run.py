"""`vlmprune run` end to end on tiny models."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_folders import answer, noise_picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmprune import embedded
from vlmprune.embedded import looks_drawn
from vlmprune.eval import testbed
from vlmprune.runtime import loading, tables
from vlmprune.spec import read_budget, read_option

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
    warned = "note: keep=1 is a count: one patch per image; keep=1.0 is all of them. A fraction is a float in (0, 1].\n"
    assert err == f"{warned}loading {folders['llava']} ...\n"


def test_a_terminal_of_40_columns(cli, folders, picture, monkeypatch):
    """Every cell stands in its column, word by word, and no line is wider: the terminal would break it anywhere."""
    asked = ("run", "--image", picture, "--prompt", PROMPT, "--model", folders["llava"], "--method", "vtc_cls,fastv")
    asked += ("--keep", "4", "--max-new-tokens", 6, "--repeats", 0)
    cells = lambda out: [line for line in out.splitlines()[3:] if line and not line.startswith("Layer average")]  # noqa: E731
    wide = cells(cli(*asked)[1])
    monkeypatch.setattr(tables, "room", lambda: 40)
    narrow = cells(cli(*asked)[1])
    assert max(map(len, wide)) > 40 >= max(map(len, narrow))
    header, _, *rows = (re.split(" {2,}", line) for line in wide)
    rule = next(i for i, line in enumerate(narrow) if not line.strip("- "))
    spans = [slice(*found.span()) for found in re.finditer("-+", narrow[rule])]
    told = lambda lines: [" ".join(" ".join(line[span] for line in lines).split()) for span in spans]  # noqa: E731
    assert told(narrow[:rule]) == header
    assert told(narrow[rule + 1 :]) == [" ".join(column) for column in zip(*rows, strict=True)]


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
    assert "80 -> 20 8 -> 0" in " ".join(out.split())
    assert "88.0" in out  # the full model's layer average counts newlines
    assert "prefill" not in out


def test_default_method_and_model(cli, folders, picture, monkeypatch):
    monkeypatch.setattr(embedded, "path", lambda name: {"scene-llava": folders["llava"]}[name])
    code, out, err = cli("run", "--image", picture, "--prompt", "what colour is a cat ?", "--repeats", 1)
    assert code == 0
    assert "fopru 0.25 16 -> 4" in " ".join(out.split())
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
    assert read_budget(text) == value
    assert type(read_budget(text)) is type(value)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "nan", "inf", "many", "", "0.0", "200%", "%"])
def test_bad_keep(text):
    with pytest.raises(ValueError, match=r"^keep="):
        read_budget(text)
    with pytest.raises(ValueError, match=r"^average="):
        read_budget(text, "average")


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
    found = read_option(text)
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


# What a checkpoint, a picture or a prompt may be like


def broken_processor(folder, target, **fields):
    """The model of a folder with other fields in its processor's file."""
    shutil.copytree(folder, target)
    file = target / "processor_config.json"
    said = json.loads(file.read_text())
    for name, value in fields.items():
        said.pop(name, None) if value is None else said.update({name: value})
    file.write_text(json.dumps(said))
    return target


@pytest.mark.parametrize(
    ("family", "fields", "told"),
    [
        ("llava", {"patch_size": None}, "patch_size=6 (was None)"),
        ("llava", {"patch_size": 4}, "patch_size=6 (was 4)"),
        ("llava", {"num_additional_image_tokens": 0}, "num_additional_image_tokens=1 (was 0)"),
        ("llava", {"vision_feature_select_strategy": None}, "vision_feature_select_strategy='default' (was None)"),
        ("next", {"patch_size": None, "num_additional_image_tokens": None, "vision_feature_select_strategy": None},
         "patch_size=6 (was None)"),
        ("siglip", {"vision_feature_select_strategy": "default"}, "select_strategy='full' (was 'default')"),
        ("siglip", {"vision_feature_select_strategy": None}, None),  # counts right
    ],
)  # fmt: skip
def test_a_processor_that_lacks_the_models_facts(cli, folders, picture, tmp_path, family, fields, told):
    folder = broken_processor(folders[family], tmp_path / "model", **fields)
    shared = ("--image", picture, "--prompt", PROMPT, "--repeats", 0, "--max-new-tokens", 3, "--json")
    code, out, err = cli("run", "--model", folder, *shared)
    assert code == 0, err
    code, right, _ = cli("run", "--model", folders[family], *shared)
    assert json.loads(out)["pruned"] == json.loads(right)["pruned"]
    assert json.loads(out)["full"] == json.loads(right)["full"]
    assert ("does not fit the model" in err, told is None or told in err) == (told is not None, True)


def test_a_prompt_that_is_no_text(cli, folders, picture):
    code, _, err = cli("run", "--image", picture, "--prompt", "what \udcff is it ?", "--model", folders["llava"])
    assert (code, err) == (2, "vlmprune: --prompt is not valid UTF-8: byte 0xff at character 6.\n")


def test_an_embedded_model_and_a_photograph(cli, tmp_path):
    noise_picture(64, 64).save(tmp_path / "photo.png")
    shared = ("--prompt", "is there a circle ?", "--repeats", 0, "--max-new-tokens", 1)
    scene = Path(testbed.__file__).parent / "pictures" / "scene1.png"
    code, _, err = cli("run", "--image", tmp_path / "photo.png", *shared)
    assert code == 0
    assert "scene-llava knows drawn scenes only, and 1 picture looks like none" in err
    code, _, err = cli("run", "--image", scene, *shared)
    assert (code, "drawn scenes only" in err) == (0, False)


def test_scenes_are_told_from_photographs():
    records = [r for split in testbed.SPLITS for r in testbed.questions(split)[::10]]
    pictures = {r.picture_id: r.picture for r in records}
    assert len(pictures) > 50
    assert all(looks_drawn(Image.open(io.BytesIO(data))) for data in pictures.values())
    x, y = np.meshgrid(np.linspace(0, 1, 90), np.linspace(0, 1, 60))
    sky = np.stack([90 + 60 * y, 150 + 40 * y, 235 - 30 * x], -1).astype(np.uint8)
    assert not looks_drawn(Image.fromarray(sky))
    assert not looks_drawn(Image.new("RGB", (50, 50), "grey"))


def test_how_much_of_a_picture_is_seen(cli, folders, tmp_path):
    noise_picture(96, 24).save(tmp_path / "wide.png")
    shared = ("--image", tmp_path / "wide.png", "--prompt", PROMPT, "--repeats", 0, "--max-new-tokens", 1)
    code, out, _ = cli("run", "--model", folders["llava"], *shared)
    assert code == 0
    assert f"{tmp_path / 'wide.png'}: the model sees 25% of it" in out
    code, out, _ = cli("run", "--model", folders["llava"], *shared, "--json")
    assert json.loads(out)["images"][0]["seen"] == pytest.approx(0.25, abs=0.01)
    code, out, _ = cli("run", "--model", folders["next"], *shared)
    assert (code, "the model sees" in out) == (0, False)


# Adapters


def adapter(folder, base, **more):
    folder.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": str(base)} | more
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_an_adapter_says_what_it_is(cli, folders, picture, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    shared = ("run", "--image", picture, "--prompt", PROMPT, "--model")
    code, _, err = cli(*shared, adapter(tmp_path / "lora", folders["llava"]))
    assert code == 2
    assert f"{tmp_path / 'lora'} is the folder of a PEFT adapter for {folders['llava']}" in err
    assert "pip install peft" in err
    code, _, err = cli(*shared, adapter(tmp_path / "empty", ""))
    assert (code, "does not say of which model" in err) == (2, True)


def test_an_adapter_is_loaded_onto_its_base(cli, folders, picture, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(folders["llava"], dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora" in name:
                weight.mul_(20)
    wrapped.peft_config["default"].base_model_name_or_path = folders["llava"]
    wrapped.save_pretrained(tmp_path / "lora")
    shared = (
        "run",
        "--image",
        picture,
        "--prompt",
        PROMPT,
        "--repeats",
        0,
        "--max-new-tokens",
        6,
        "--keep",
        4,
        "--json",
    )
    code, out, err = cli(*shared, "--model", tmp_path / "lora")
    assert code == 0, err
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(folders["llava"]).save_pretrained(tmp_path / "merged")
    found, expected = json.loads(out), json.loads(cli(*shared, "--model", tmp_path / "merged")[1])
    plain = json.loads(cli(*shared, "--model", folders["llava"])[1])
    assert (found["full"], found["pruned"][0]["answer"]) == (expected["full"], expected["pruned"][0]["answer"])
    assert found["full"] != plain["full"]  # the adapter does something
