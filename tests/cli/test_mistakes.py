"""A user's mistake gives exit code 2 and one message; nothing is printed to stdout and nobody sees a traceback."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import ImageFile
from tiny_folders import noise_picture
from transformers import LlavaForConditionalGeneration

import vlmprune
from vlmprune import embedded
from vlmprune.runtime import answering, loading


@pytest.fixture
def run(cli, folders, picture):
    """`run(flag=value, ...)` with a working command line around what is given."""

    def call(**given):
        flags = {"image": picture, "prompt": "what is it ?", "model": folders["llava"], "repeats": 0} | given
        argv = ["run"]
        for flag, value in flags.items():
            if value is not None:
                argv += [f"--{flag.replace('_', '-')}", value]
        return cli(*argv)

    return call


@pytest.fixture
def refused(run):
    """The message of a refused command."""

    def call(**given):
        code, out, err = run(**given)
        assert code == 2, err
        assert out == ""
        return err

    return call


def test_the_command_itself_works(run):
    code, out, _ = run()
    assert code == 0
    assert out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": "0"}, ["keep=0", "at least 1"]),
        ({"keep": "1.5"}, ["1.5", "out of range"]),
        ({"keep": "some"}, ["'some'", "neither a count"]),
        ({"keep": ","}, ["--keep is empty"]),
        ({"method": "fopro"}, ["unknown method 'fopro'", "Did you mean 'fopru'?"]),
        ({"method": ","}, ["--method is empty"]),
        ({"option": "stratagy=row"}, ["no option 'stratagy'", "Did you mean 'strategy'?"]),
        ({"option": "strategy=column"}, ["strategy='column'", "'rank', 'row'"]),
        ({"option": "strategy"}, ["not KEY=VALUE"]),
        ({"option": "keep=3"}, ["--keep"]),
        ({"option": "average=3"}, ["--average"]),
        ({"method": "todre", "option": "tau=none"}, ["tau='none'", "or None"]),
        ({"method": "transprune", "option": "prune_layers=[2,3"}, ["prune_layers: '[2,3' is no list"]),
        ({"method": "fopru+fastv"}, ["keep= could mean any of", "fopru.keep="]),
        ({"method": "tome+pitome", "option": "tome.keep=0.5"}, ["pitome", "needs keep="]),
        ({"method": "none"}, ["'none' is the whole model"]),
        ({"average": "0"}, ["average=0", "at least 1"]),
        ({"method": "fastv", "option": "layer=9"}, ["layer=9", "1..3"]),
        ({"device": "cuda:99"}, ["no device 'cuda:99'"]),
        ({"device": "tpu"}, ["unknown device 'tpu'"]),
        ({"max_new_tokens": "0"}, ["--max-new-tokens"]),
        ({"prompt": "  "}, ["--prompt is empty"]),
        ({"prompt": "<image> and <image>"}, ["2 <image>", "there is 1 picture."]),
        ({"model": "scene-lava"}, ["no model 'scene-lava'", "Did you mean 'scene-llava'?"]),
        ({"model": "./no/such/folder"}, ["no such folder"]),
    ],
)
def test_values(refused, given, words):
    err = refused(**given)
    assert err.splitlines()[-1].startswith("vlmprune: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize("argv", [["run"], ["run", "--image", "x.png"], ["fly"], ["ls"], ["ls", "dogs"], []])
def test_usage(cli, argv):
    code, out, err = cli(*argv)
    assert code == 2
    assert out == ""
    assert "usage: vlmprune" in err


def test_pictures(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval's import turns it on for the process
    broken, cut, text = tmp_path / "broken.png", tmp_path / "cut.png", tmp_path / "note.txt"
    noise_picture(64, 64).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    text.write_text("hello")
    assert "no such picture" in refused(image=tmp_path / "none.png")
    assert "is a folder" in refused(image=tmp_path)
    assert "not a picture" in refused(image=text)
    assert "cannot be read as a picture" in refused(image=cut)
    assert "broken.png" in refused(image=broken)


def test_pictures_are_read_before_the_model(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    refused(image=tmp_path / "none.png")
    refused(save=tmp_path / "no" / "kept.png")
    refused(method="fopro")


def test_save(refused, tmp_path):
    assert "no folder" in refused(save=tmp_path / "no" / "kept.png")
    assert "is a folder" in refused(save=tmp_path)
    assert "does not end like a picture" in refused(save=tmp_path / "kept.doc")


def test_save_without_permission(refused, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    assert "no permission to write" in refused(save=closed / "kept.png")


def test_folders_that_are_no_models(refused, tmp_path, folders, picture):
    empty, other, strange, bare, damaged = (tmp_path / name for name in ("empty", "bert", "strange", "bare", "damaged"))
    for folder in (empty, other, strange, bare, damaged):
        folder.mkdir()
    config = json.loads((Path(folders["llava"]) / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (strange / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    (bare / "config.json").write_text(json.dumps(config))
    for file in Path(folders["llava"]).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"nothing")
    assert "no config.json" in refused(model=empty)
    assert "is a file" in refused(model=picture)
    err = refused(model=other)
    assert "'bert', which is not supported" in err
    assert "llava_next" in err
    assert "no_such_type" in refused(model=strange)
    assert "cannot load" in refused(model=bare)
    assert "cannot load" in refused(model=damaged)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])  # the older ones of them say llava
def test_checkpoints_of_the_original_package(refused, tmp_path, model_type):
    config = {"model_type": model_type, "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    err = refused(model=tmp_path)
    assert "is a checkpoint of the original llava package" in err
    assert "load_pretrained_model" in err


def test_unsupported_tower(refused, folders, tmp_path, monkeypatch):
    from vlmprune.patches import base

    monkeypatch.setitem(base.TOWERS, "clip_vision_model", True)
    monkeypatch.delitem(base.TOWERS, "siglip_vision_model")
    assert "vision tower 'siglip_vision_model' is not supported" in refused(model=folders["siglip"])


def test_method_that_does_not_fit_the_model(refused, folders):
    err = refused(model=folders["siglip"], method="random,vtc_cls")
    assert "vtc_cls" in err
    assert "[CLS]" in err
    assert "fallback='received'" in err


def test_method_with_its_fallback_fits(run, folders):
    assert run(model=folders["siglip"], method="random,vtc_cls", option="fallback=received")[0] == 0


def test_hub_out_of_reach(refused, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    err = refused(model="no-such-owner-at-all/no-such-model")
    assert "loading no-such-owner-at-all/no-such-model from the Hugging Face hub ..." in err
    assert "no such folder here, and the hub could not help" in err


def test_embedded_model_missing(refused, monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"the weights of {name} are missing from this installation")

    monkeypatch.setattr(embedded, "path", missing)
    err = refused(model=None)
    assert "the weights of scene-llava are missing" in err
    assert "--model" in err


def test_interrupted(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "answer", interrupt)
    code, out, err = run()
    assert (code, out) == (130, "")
    assert "interrupted" in err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), vlmprune.CutNotRunError("no cut ran")])
def test_failures(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fail)
    code, out, err = run()
    assert (code, out) == (1, "")
    assert str(error) in err
