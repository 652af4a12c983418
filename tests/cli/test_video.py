"""Videos on the command line: `run --video` and `fidelity --video`, and what is refused in one line."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import films
import kin
import pytest
import tiny
import tiny_folders
import torch
from kin.family import lively
from PIL import Image
from transformers import AutoModelForImageTextToText

import vlmprune
from vlmprune import embedded
from vlmprune.cli import flags
from vlmprune.runtime import loading, videos

pytest.importorskip("av")
SETTINGS = {"size": tiny_folders.CROP, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
QUESTION = "what colour is the circle ?"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("films") / "film.mp4", films.moving(20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-OneVision with the settings of its video processor."""
    made = tiny_folders.save(tmp_path_factory.mktemp("model"), "llava_onevision", tower="siglip")
    (made / "video_preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return made


def ask(cli, *more, model="scene-qwen", prompt=QUESTION):
    return cli("run", "--prompt", prompt, "--model", model, "--max-new-tokens", 4, "--repeats", 0, *more)


@torch.no_grad()
def by_hand(clip, method=None, **options):
    """What scene-qwen says of a clip, its inputs made without the command's code."""
    place = embedded.path("scene-qwen")
    model = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()
    loaded = loading.load(loading.find_model("scene-qwen"))
    rows = loaded.processor.video_processor([list(clip.frames)])
    (frames, high, wide), vocabulary = rows["video_grid_thw"][0].tolist(), loaded.processor.tokenizer
    text = f"<s>user: <vision> {'<video>' * (frames * high * wide // 4)} </vision> {QUESTION} assistant:"
    ids = vocabulary(text, return_tensors="pt", add_special_tokens=False)
    inputs = {
        **ids,
        "pixel_values_videos": rows["pixel_values_videos"],
        "video_grid_thw": rows["video_grid_thw"],
        # two frames of tokens every so many seconds: 20 frames of a tenth of a second, 4 pairs of them read
        "second_per_grid_ts": torch.tensor([2 * 2.0 / len(clip.frames)]),
        "mm_token_type_ids": 2 * (ids["input_ids"] == model.config.video_token_id).long(),
    }
    if method:
        vlmprune.patch(model, method, **options)
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return vocabulary.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="the video processor is the real one here")
def test_a_video_and_its_strip(cli, film, tmp_path):
    target = tmp_path / "kept.png"
    more = ("--method", "divprune,random", "--keep", "0.25", "--save", target)
    code, out, err = ask(cli, "--video", film, *more, "--json")
    assert code == 0, err
    assert "Pillow scales the frames" in err
    said = json.loads(out)
    (about,) = said["videos"]
    assert about == {
        "file": str(film), "width": 128, "height": 96, "seen": 1.0, "of": 20, "frames": [0, 2, 5, 7, 10, 12, 15, 17],
        "seconds": [0.0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7],
    }  # fmt: skip
    assert said["images"] == []
    whole = 4 * 6 * 8  # pairs of frames, and tokens of 16 x 16 pixels
    counts = {"patches_before": whole, "patches_after": whole // 4, "newlines_before": 0, "newlines_after": 0}
    assert [(pruned["images"], pruned["videos"]) for pruned in said["pruned"]] == 2 * [([], [counts])]
    clip = videos.read_video(film)
    assert said["full"]["answer"] == by_hand(clip) == "red"
    assert said["pruned"][0]["answer"] == by_hand(clip, "divprune", keep=0.25)
    with Image.open(target) as drawn:
        assert drawn.width > 8 * 192  # the frames
        assert drawn.height > 3 * 144  # a row for the full model and one for each method


def test_frames_in_text(cli, film):
    code, out, _ = ask(cli, "--video", film, "--frames", 4, "--keep", "0.5")
    assert code == 0
    assert f"{film} (128 x 96, 4 of 20 frames): {QUESTION}" in out
    assert "fopru 0.5 96 -> 48" in " ".join(out.split())


def test_pictures_and_videos_of_one_prompt(cli, film, folder, tmp_path):
    picture = tmp_path / "a.png"
    tiny_folders.noise_picture(24, 24).save(picture)
    more = ("--image", picture, "--video", film, "--frames", 3, "--method", "random", "--keep", 3, "--json")
    code, out, err = ask(cli, *more, "--save", tmp_path / "kept.png", model=folder, prompt="what is it ?")
    assert code == 0, err
    said = json.loads(out)
    assert ([one["file"] for one in said["images"]], [one["file"] for one in said["videos"]]) == (
        [str(picture)], [str(film)],
    )  # fmt: skip
    (pruned,) = said["pruned"]
    assert [one["patches_before"] for one in pruned["images"]] == [2 * 16]
    # a frame is pooled to half its side, and one newline ends the video
    assert pruned["videos"] == [{"patches_before": 12, "patches_after": 3, "newlines_before": 1, "newlines_after": 1}]
    assert pruned["images"][0]["patches_after"] == 3


@pytest.mark.skipif(find_spec("torchvision") is None, reason="their processors need torchvision")
@pytest.mark.parametrize("family", ["llava_next_video", "video_llava"])
def test_families_whose_processors_need_torchvision(cli, film, tmp_path, family):
    from transformers import (
        CLIPImageProcessorPil,
        LlavaNextImageProcessorPil,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
        VideoLlavaProcessor,
        VideoLlavaVideoProcessor,
    )

    made = lively(kin.video_llava()) if family == "video_llava" else tiny.model(family)
    made.config.video_token_id = tiny_folders.VIDEO
    made.save_pretrained(tmp_path)
    shared = {"tokenizer": tiny_folders.tokenizer(), "patch_size": tiny.PATCH, "num_additional_image_tokens": 1}
    shared |= {"vision_feature_select_strategy": "default", "chat_template": tiny_folders.TEMPLATE}
    size = {"size": tiny_folders.SIZE, "crop_size": tiny_folders.CROP}
    if family == "llava_next_video":
        pictures = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=tiny.PINPOINTS)
        reads = LlavaNextVideoProcessor(LlavaNextVideoVideoProcessor(**size), pictures, **shared)
    else:
        reads = VideoLlavaProcessor(CLIPImageProcessorPil(**size), VideoLlavaVideoProcessor(**size), **shared)
    reads.save_pretrained(tmp_path)
    more = ("--frames", 8, "--method", "random", "--keep", "0.5", "--save", tmp_path / "kept.png", "--json")
    code, out, err = ask(cli, "--video", film, *more, model=tmp_path, prompt="what is it ?")
    assert code == 0, err
    frame = 4 if family == "llava_next_video" else 16  # pooled, or not
    ((counts,),) = (pruned["videos"] for pruned in json.loads(out)["pruned"])
    assert (counts["patches_before"], counts["patches_after"]) == (8 * frame, 4 * frame)
    assert counts["newlines_before"] == (8 if family == "video_llava" else 0)  # [CLS] of every frame


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "name a picture (--image) or a video (--video)"),
        ({"image": "PICTURE", "frames": 3}, "--frames is of videos"),
        ({"video": "FILM", "frames": 0}, "--frames must be at least 1, not 0"),
        ({"video": "FILM", "frames": 21}, "film.mp4 has 20 frames, and --frames 21 are asked for"),
        ({"video": "none.mp4"}, "no such video: none.mp4"),
        ({"video": "PICTURE.txt"}, "cannot be read as a video"),
        ({"image": "FILM"}, "film.mp4 is a video, not a picture: give it to `run` or `fidelity` by --video."),
        ({"video": "FILM", "model": "scene-llava"}, "models of type 'llava' read no videos here, as scene-llava is"),
        ({"video": "FILM", "prompt": "what <video> is <video> it ?"}, "the prompt has 2 <video>, and there is 1 video"),
    ],
)  # fmt: skip
def test_mistakes(cli, film, picture, given, words):
    broken = picture.with_suffix(".txt")
    broken.write_text("no video")
    named = {"FILM": film, "PICTURE": picture, "PICTURE.txt": broken}
    given = {"model": "scene-qwen", "prompt": QUESTION} | given
    argv = [part for name, value in given.items() for part in (flags.flag(name), named.get(value, value))]
    code, out, err = cli("run", *argv)
    assert (code, out) == (2, "")
    assert words in err
    assert len([line for line in err.splitlines() if not line.startswith(("loading", "no torchvision"))]) == 1


def test_without_pyav_nothing_is_loaded(cli, film, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    for argv in (("run", "--prompt", "x"), ("fidelity", "--prompts", film, "--out", tmp_path / "out")):
        code, _, err = cli(*argv, "--video", film, "--model", "scene-qwen")
        assert (code, err.count("\n")) == (2, 1)
        assert "reading videos needs PyAV: pip install 'vlmprune[video]'" in err


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="the video processor is the real one here")
def test_a_model_without_settings_for_videos(cli, film, tmp_path):
    made = tiny_folders.save(tmp_path, "llava_onevision", tower="siglip")
    code, _, err = ask(cli, "--video", film, model=made, prompt="what is it ?")
    assert code == 2
    assert "has no video processor that can be used here" in err


# fidelity


def test_fidelity_on_a_folder_of_videos(cli, tmp_path):
    """Two videos of different sizes in one batch, one that cannot be read; the page has strips."""
    where = tmp_path / "films"
    where.mkdir()
    films.write(where / "red.mp4", films.moving(12))
    films.write(where / "green.mp4", films.moving(12, (30, 160, 60), (96, 128)))
    films.write(where / "short.mp4", films.moving(2))
    (where / "notes.txt").write_text("no video")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "{QUESTION}"}}\n{{"video": "red*", "prompt": "is there a red circle ?"}}\n')
    more = ("--keep", "0.5", "--method", "divprune", "--controls", "none", "--repeats", 1, "--batch", 4)
    argv = ("fidelity", "--video", where, "--frames", 4, "--prompts", prompts, "--model", "scene-qwen")
    code, _, err = cli(*argv, *more, "--max-new-tokens", 3, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert "short.mp4 has 2 frames, and --frames 4 are asked for" in err
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["picture"], row["prompt"]): row for row in said["rows"]}
    assert sorted(rows) == [("green.mp4", QUESTION), ("red.mp4", "is there a red circle ?"), ("red.mp4", QUESTION)]
    assert rows["red.mp4", QUESTION]["unpruned"] == "red"
    assert {row["tokens_before"] for row in rows.values()} == {2 * 6 * 8}
    assert {row["tokens_after"] for row in rows.values()} == {6 * 8}
    sheets = list((tmp_path / "out").glob("worst-*.png"))
    assert len(sheets) == 1
    assert Image.open(sheets[0]).width > 4 * 128
    # how many frames are read is part of the setting
    argv = [*argv[:4], 2, *argv[5:]]
    code, _, err = cli(*argv, *more, "--max-new-tokens", 3, "--out", tmp_path / "out", "--resume")
    assert (code, "frames 4, now 2" in err) == (2, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--images", "FOLDER", "--video", "FOLDER"), "--video is not allowed with --images"),
        (("--images", "FOLDER", "--frames", 3), "--frames is of videos"),
        (("--video", "FOLDER"), "no videos there (mp4, avi"),
        (("--video", "nowhere"), "--video nowhere: no such file or folder"),
    ],
)
def test_mistakes_of_fidelity(cli, tmp_path, given, words):
    (tmp_path / "prompts.txt").write_text(QUESTION)
    argv = [tmp_path if part == "FOLDER" else part for part in given]
    code, out, err = cli("fidelity", *argv, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert words in err
