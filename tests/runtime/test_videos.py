"""Frames of video files: the right ones, upright, and what a file that is none is told."""

from __future__ import annotations

import sys
from fractions import Fraction
from importlib.util import find_spec
from types import SimpleNamespace

import films
import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from vlmprune.runtime import videos
from vlmprune.runtime.errors import UserError
from vlmprune.runtime.frames import FramesAsPictures

av = pytest.importorskip("av")


@pytest.fixture
def film(tmp_path):
    """20 frames in shades of grey, 10 a second."""
    return films.write(tmp_path / "film.mp4", films.greys(20))


def shades(clip):
    return [round((np.asarray(frame).mean() - 10) / 10) for frame in clip.frames]


@pytest.mark.parametrize(
    ("frames", "numbers"), [(4, [0, 5, 10, 15]), (8, [0, 2, 5, 7, 10, 12, 15, 17]), (1, [0]), (20, list(range(20)))]
)
def test_frames_are_spread_over_the_video(film, frames, numbers):
    clip = videos.read_video(film, frames)
    assert shades(clip) == list(clip.numbers) == numbers
    assert clip.seconds == pytest.approx([number / 10 for number in numbers])
    assert (clip.total, clip.rate, clip.size) == (20, 10.0, (48, 32))
    assert clip.about == {"total_num_frames": 20, "fps": 10.0, "frames_indices": numbers}
    assert all(frame.mode == "RGB" for frame in clip.frames)


def test_a_file_that_holds_fewer_frames_than_it_says(film, monkeypatch):
    told_by = videos.told_by
    monkeypatch.setattr(videos, "told_by", lambda *args: (told_by(*args)[0] + 20, 10.0))
    clip = videos.read_video(film, 4)
    assert (clip.total, shades(clip)) == (20, [0, 5, 10, 15])


def test_as_many_frames_as_there_are(film):
    with pytest.raises(UserError, match=r"film\.mp4 has 20 frames, and --frames 21 are asked for"):
        videos.read_video(film, 21)


def test_what_was_held_sideways_is_turned():
    shot = np.zeros((2, 4, 3), np.uint8)
    shot[0, 0] = 255  # the upper left corner
    made = {
        turn: np.asarray(videos.upright(SimpleNamespace(rotation=turn, to_ndarray=lambda format: shot)))
        for turn in (0, 90, -90, 180)
    }
    assert [made[turn].shape[:2] for turn in made] == [(2, 4), (4, 2), (4, 2), (2, 4)]
    corners = {turn: [tuple(map(int, at)) for at in np.argwhere(x[..., 0] == 255)] for turn, x in made.items()}
    assert corners == {0: [(0, 0)], 90: [(3, 0)], -90: [(0, 1)], 180: [(1, 3)]}  # counterclockwise


def test_what_is_no_video(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 and so on")
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 8000, 0, Fraction(1, 8000)
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    (tmp_path / "empty.mp4").write_bytes(b"")
    said = {
        "none.mp4": "no such video",
        "": "is a folder: name a video file",
        "broken.mp4": "broken.mp4 cannot be read as a video",
        "empty.mp4": "empty.mp4 cannot be read as a video",
        "sound.wav": "sound.wav has no video in it, only audio",
    }
    for name, words in said.items():
        with pytest.raises(UserError) as caught:
            videos.read_video(tmp_path / name)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_pyav(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'vlmprune\[video\]'"):
        videos.read_video(film)


# Frames as pictures

QWEN = {"size": {"shortest_edge": 1024, "longest_edge": 65536}, "patch_size": 8, "merge_size": 2}
MEANS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]}
PLAIN = {"size": {"height": 24, "width": 24}, "do_center_crop": None, **MEANS}


def packed(**more):
    return FramesAsPictures(QWEN | MEANS | {"temporal_patch_size": 2} | more, None, more.get("model", "qwen2_5_vl"))


def test_packed_frames_are_pairs_of_pictures():
    """Of a video that stands still they are the picture's patches; of another each half of a patch is one frame's."""
    first, other, last = films.moving(3)
    image = Qwen2VLImageProcessorPil(**QWEN, **MEANS, temporal_patch_size=2)
    alone = [image([shot], return_tensors="pt") for shot in (first, other, last)]
    rows, cols = alone[0]["image_grid_thw"][0, 1:].tolist()
    made = packed()([[first, first], [first, other, last]])
    assert made["video_grid_thw"].tolist() == [[1, rows, cols], [2, rows, cols]]
    still, moved, end = made["pixel_values_videos"].split(rows * cols)
    torch.testing.assert_close(still, alone[0]["pixel_values"], rtol=0, atol=1e-6)
    torch.testing.assert_close(end, alone[2]["pixel_values"], rtol=0, atol=1e-6)  # the last frame is repeated
    halves = [x["pixel_values"].view(-1, 3, 2, 64) for x in alone]
    both = torch.stack((halves[0][:, :, 0], halves[1][:, :, 1]), 2).flatten(1)
    torch.testing.assert_close(moved, both, rtol=0, atol=1e-6)
    assert not torch.equal(moved, still)


def test_bounds_of_all_frames_together():
    """Qwen3-VL shares its pixels among the frames."""
    shots = films.moving(8)
    each = packed()([shots])["video_grid_thw"]
    shared = packed(model="qwen3_vl")([shots])["video_grid_thw"]
    assert each.tolist() == [[4, 12, 16]]
    frames, rows, cols = shared[0].tolist()
    assert frames == 4
    assert 8 * rows * cols * 64 <= 65536 < 8 * (rows + 2) * (cols + 2) * 64


def test_plain_frames_are_scaled_pictures():
    shots = films.moving(3)
    made = FramesAsPictures(PLAIN, None, "llava_onevision")([shots])["pixel_values_videos"]
    assert made.shape == (1, 3, 3, 24, 24)
    plain = CLIPImageProcessorPil(size=PLAIN["size"], do_center_crop=False, **MEANS)
    torch.testing.assert_close(made[0], plain(shots, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    ("fields", "words"), [({}, "how large"), (PLAIN | {"cap_pixels_per_frame": True}, "cap_pixels_per_frame")]
)
def test_settings_that_cannot_be_followed(fields, words):
    with pytest.raises(UserError, match=words):
        FramesAsPictures(fields, None, "llava_onevision")


@pytest.mark.skipif(find_spec("torchvision") is None, reason="the real video processors need torchvision")
@pytest.mark.parametrize("frames", [4, 6])
@pytest.mark.parametrize(
    ("kind", "model", "fields"),
    [
        ("LlavaOnevisionVideoProcessor", "llava_onevision", PLAIN),
        ("Qwen2VLVideoProcessor", "qwen2_5_vl", QWEN | MEANS | {"temporal_patch_size": 2}),
        ("Qwen3VLVideoProcessor", "qwen3_vl", QWEN | MEANS | {"temporal_patch_size": 2}),
        ("Glm4vVideoProcessor", "glm4v", QWEN | MEANS | {"temporal_patch_size": 2}),
    ],
)
def test_as_the_models_own_video_processor_prepares_them(kind, model, fields, frames):
    import transformers

    shots = films.moving(frames, size=(160, 96))
    own = getattr(transformers, kind)(**fields)(videos=[shots], do_sample_frames=False, return_tensors="pt")
    made = FramesAsPictures(fields, None, model)([shots])
    if "video_grid_thw" in own:
        assert own["video_grid_thw"].tolist() == made["video_grid_thw"].tolist()
    assert own["pixel_values_videos"].shape == made["pixel_values_videos"].shape
    off = (own["pixel_values_videos"] - made["pixel_values_videos"]).abs()
    assert off.max() < 0.1  # four steps of 255, over a standard deviation of 0.2
    assert off.mean() < 0.01
