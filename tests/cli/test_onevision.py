"""The command on LLaVA-OneVision: a processor without its part for videos, several pictures, and videos refused."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import tiny
import tiny_folders
from PIL import Image

pytestmark = pytest.mark.skipif(find_spec("torchvision") is not None, reason="these processors are whole here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folders.save(tmp_path_factory.mktemp("onevision"), "llava_onevision", tower="siglip"))


def ask(cli, folder, pictures, *more):
    flags = [flag for picture in pictures for flag in ("--image", picture)]
    return cli("run", *flags, "--prompt", "what is it", "--model", folder, "--max-new-tokens", 3, "--repeats", 0, *more)


def test_a_large_picture_and_its_drawing(cli, folder, tmp_path):
    picture, target = tmp_path / "large.png", tmp_path / "kept.png"
    tiny_folders.noise_picture(96, 90).save(picture)
    code, out, err = ask(cli, folder, [picture], "--method", "fopru", "--keep", 9, "--save", target, "--json")
    assert (code, "no torchvision: images only" in err) == (0, True)
    (counts,) = json.loads(out)["pruned"][0]["images"]
    assert counts == {"patches_before": 160, "patches_after": 9, "newlines_before": 12, "newlines_after": 12}
    assert min(Image.open(target).size) > 100


def test_several_pictures_have_no_crops(cli, folder, tmp_path):
    for name in "ab":
        tiny_folders.noise_picture(96, 90).save(tmp_path / f"{name}.png")
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    code, out, _ = ask(cli, folder, pictures, "--method", "random", "--keep", 5, "--save", tmp_path / "k.png", "--json")
    assert code == 0
    (a, b) = json.loads(out)["pruned"][0]["images"]
    assert a == b == {"patches_before": 16, "patches_after": 5, "newlines_before": 1, "newlines_after": 1}


def test_what_a_method_cannot_do_is_a_sentence(cli, folder, tmp_path):
    tiny_folders.noise_picture(96, 90).save(tmp_path / "large.png")
    code, _, err = ask(cli, folder, [tmp_path / "large.png"], "--method", "tome", "--keep", 0.5)
    assert code != 0
    assert "tome merges patches inside the tower" in err
    code, _, err = ask(cli, folder, [tmp_path / "large.png"], "--method", "vtc_cls")
    assert code == 2
    assert "vtc_cls reads the attention of the tower's [CLS] token" in err


def test_a_video_file_is_no_picture(cli, folder, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42 and so on")
    code, out, err = ask(cli, folder, [tmp_path / "film.mp4"], "--method", "random")
    assert (code, out) == (2, "")
    assert "film.mp4 is a video, not a picture: give it to `run` or `fidelity` by --video." in err


def test_a_processor_that_needs_torchvision_says_so(cli, tmp_path, picture):
    tiny.model("llava_next_video").save_pretrained(tmp_path / "model")
    code, out, err = ask(cli, tmp_path / "model", [picture], "--method", "random")
    assert (code, out) == (2, "")
    assert "the processor of llava_next_video models needs torchvision" in err
