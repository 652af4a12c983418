"""Picture files of every kind, whole and broken: the right colours, or one line and exit code 2, and no waiting."""

from __future__ import annotations

import os
import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny_folders import noise_picture

from vlmprune.runtime import loading, pictures
from vlmprune.runtime.errors import UserError
from vlmprune.runtime.pictures import read_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval's import turns it on for the process


@pytest.fixture
def refused(cli, llava, monkeypatch):
    """The one line that `vlmprune run` says to a picture, before any model is loaded."""
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))

    def call(path):
        code, out, err = cli("run", "--image", path, "--prompt", "what is it ?", "--model", llava)
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert line.startswith("vlmprune: ")
        assert len(line) < 800
        return line

    return call


def png(width, height, depth=8, colour=2):
    """The head of a PNG that claims a size, and hardly any data: what a decompression bomb looks like."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def two(mode="RGB"):
    """The left half red, the right half blue."""
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    return image.convert(mode)


# Right results


def colours(image):
    return image.getpixel((2, 4)), image.getpixel((13, 4))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGBA", {}), ("a.png", "P", {}), ("a.gif", "P", {}), ("a.webp", "RGB", {"lossless": True}),
        ("a.tif", "CMYK", {}), ("a.tif", "RGB", {"compression": "tiff_lzw"}), ("a.bmp", "RGB", {}),
        ("a.ppm", "RGB", {}), ("a.tga", "RGB", {}), ("a.jpg", "CMYK", {"quality": 100}), ("a.jp2", "RGB", {}),
    ],
)  # fmt: skip
def test_formats(tmp_path, name, mode, options):
    two(mode).save(tmp_path / name, **options)
    left, right = colours(read_picture(tmp_path / name))
    assert np.abs(np.subtract(left, RED)).max() <= 3
    assert np.abs(np.subtract(right, BLUE)).max() <= 3


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    options = {"lossless": True} if name == "a.webp" else {}
    two().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (16, 8), "green")] * 3, **options)
    assert colours(read_picture(tmp_path / name)) == (RED, BLUE)


def test_transparency_in_files(tmp_path):
    clear = Image.new("RGBA", (16, 8), (9, 9, 9, 0))
    clear.paste((0, 0, 255, 255), (8, 0, 16, 8))
    for name in ("a.png", "a.webp", "a.tif"):
        clear.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        assert colours(read_picture(tmp_path / name)) == (WHITE, BLUE)
    grey = Image.new("LA", (16, 8), (40, 0))
    grey.save(tmp_path / "grey.png")
    assert colours(read_picture(tmp_path / "grey.png"))[0] == WHITE
    palette = Image.new("P", (16, 8), 0)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.paste(1, (8, 0, 16, 8))
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    assert colours(read_picture(tmp_path / "p.png")) == (WHITE, BLUE)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_keep_their_shades(tmp_path, name):
    """Neither clipped to white nor shifted to black."""
    values = np.linspace(0, 65535, 16).astype(np.uint16)
    Image.fromarray(np.tile(values, (4, 1))).save(tmp_path / name)
    row = np.asarray(read_picture(tmp_path / name))[0, :, 0]
    assert np.abs(row - values / 257.0).max() <= 1


def test_floats_and_single_bits(tmp_path):
    Image.fromarray(np.tile(np.linspace(0, 1, 16, dtype=np.float32), (4, 1))).save(tmp_path / "float.tif")
    assert np.abs(np.asarray(read_picture(tmp_path / "float.tif"))[0, :, 0] - np.linspace(0, 255, 16)).max() <= 1
    two("1").save(tmp_path / "one.tif")
    half = Image.new("1", (16, 8))
    half.paste(1, (8, 0, 16, 8))
    half.save(tmp_path / "half.tif")
    assert colours(read_picture(tmp_path / "half.tif")) == ((0, 0, 0), WHITE)


@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_photographs(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    two().save(tmp_path / "a.jpg", exif=exif, quality=100)
    read = read_picture(tmp_path / "a.jpg")
    assert read.size == ((16, 8) if turn <= 4 else (8, 16))
    corner = read.getpixel((0, 0))
    assert (corner[0] > 200) == (turn in (1, 4, 5, 6))  # which corner was stored first, by the standard's table


# Refused


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "not a picture"), ("text.jpg", b"hello", "not a picture"),
        ("zeros.png", bytes(4096), "not a picture"), ("page.png", b"<html></html>", "not a picture"),
        ("bomb.png", png(60_000, 60_000), "pixels and is not read"), ("wide.png", png(2**31 - 1, 1), "is not read"),
        ("none.png", png(0, 0), "picture"), ("short.png", png(400, 400), "cannot be read"),
        ("video.mp4", b"\0\0\0\x18ftypmp42", "is a video"),
    ],
)  # fmt: skip
def test_no_pictures(refused, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    line = refused(tmp_path / name)
    assert words in line
    assert name in line


@pytest.mark.filterwarnings("error")
def test_a_picture_that_is_too_large_is_refused_with_a_way_out(refused, tmp_path):
    (tmp_path / "large.png").write_bytes(png(20_000, 20_000))
    told = refused(tmp_path / "large.png")
    assert "has more than 178,956,970 pixels" in told
    assert "shrink it first" in told


def test_large_pictures_are_no_bombs(tmp_path, monkeypatch):
    """Up to twice Pillow's limit it only warns: such photographs exist, and the warning is not shown."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    two().save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").size == (16, 8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp", "a.ppm"])
def test_damaged_files(tmp_path, name):
    """Cut anywhere and with bytes turned over: a picture, or a line that says why not."""
    buffer = BytesIO()
    noise_picture(20, 14).save(buffer, Image.registered_extensions()["." + name[2:]])
    whole, chance, told = buffer.getvalue(), random.Random(0), []
    for number in range(60):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: chance.randrange(len(data))]
        for _ in range(chance.randrange(1, 6) if number % 3 else 0):
            data[chance.randrange(min(len(data), 200) if number % 2 else len(data))] = chance.randrange(256)
        (tmp_path / name).write_bytes(data)
        try:
            assert read_picture(tmp_path / name).mode == "RGB"
        except UserError as error:
            told.append(str(error))
    assert told
    assert all(name in line and "\n" not in line for line in told)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_no_numbers(refused, tmp_path, value):
    pixels = np.ones((4, 4), np.float32)
    pixels[2, 1] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert "NaN or infinite" in refused(tmp_path / "a.tif")


# What is no regular file


def test_pipes_and_devices_are_not_waited_for(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", "/dev/null"):
        assert "is a pipe or a device" in refused(path)


def test_links_in_a_circle(refused, tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert "no such picture" in refused(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path)
    assert "is a folder" in refused(tmp_path / "c.png")


def test_no_permission(refused, picture, monkeypatch):
    """Simulated: the tests may run as root, who may read anything."""

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pictures.Image, "open", closed)
    assert f"no permission to read {picture}" in refused(picture)


NAMES = [
    "two\nlines.png",
    "tab\t.png",
    "bild-ü-图.png",
    "-dash.png",
    "a b'c\"d.png",
    "\x1b[31mred.png",
    b"\xff\xfe.png",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names(refused, cli, llava, tmp_path, name):
    """Any name works, and is told on one line without control characters."""
    path = tmp_path / (os.fsdecode(name) if isinstance(name, bytes) else name)
    path.write_bytes(b"nothing")
    assert refused(path).isprintable()
    assert "no such picture" in refused(f"{path}.png")


def test_a_picture_with_an_odd_name_is_answered(cli, llava, tmp_path):
    path = tmp_path / os.fsdecode(b"two\nlines \xff.png")
    noise_picture(24, 24).save(path)
    argv = ["--prompt", "what is it ?", "--model", llava, "--repeats", 0, "--max-new-tokens", 1]
    code, out, _ = cli("run", "--image", path, *argv)
    assert code == 0
    assert r"two\nlines \udcff.png (24 x 24)" in out


def test_a_name_that_is_too_long(refused, cli, llava, picture):
    assert "no such picture" in refused("x" * 5000)
    argv = ["--image", picture, "--prompt", "what ?", "--model", llava]
    code, _, err = cli("run", *argv, "--save", "x" * 5000 + ".png")
    assert (code, len(err.splitlines())) == (2, 1)


# `vlmprune fidelity --images`


def test_a_folder_of_everything(cli, llava, tmp_path):
    """What can be read is measured; what cannot is left out and named, and what is no file is not looked at."""
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    noise_picture(24, 24).save(folder / "good.png")
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / os.fsdecode(b"odd\n\xff.png")).write_bytes((folder / "good.png").read_bytes())
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "folder.png").mkdir()
    (tmp_path / "prompts.txt").write_text("what is it ?\n")
    argv = ["--prompts", tmp_path / "prompts.txt", "--model", llava, "--keep", 4, "--controls", "none"]
    code, _, err = cli("fidelity", "--images", folder, *argv, "--max-new-tokens", 2, "--out", out)
    assert code == 0, err
    assert "2 pictures could not be read, and left out: bomb.png, empty.jpg" in err
    assert r"odd\n\udcff.png" in (out / "results.json").read_text()


@pytest.mark.parametrize("where", ["x" * 5000, "/dev/zero"], ids=["long", "device"])
def test_places_without_pictures(cli, llava, tmp_path, where):
    (tmp_path / "prompts.txt").write_text("what is it ?\n")
    argv = ["--prompts", tmp_path / "prompts.txt", "--model", llava, "--out", tmp_path / "out"]
    code, _, err = cli("fidelity", "--images", where, *argv)
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_picture_that_would_explode_while_it_is_prepared(cli, llava, tmp_path, monkeypatch):
    """CLIP scales the shorter side to the tower's: one pixel times a million becomes far more than fits."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    Image.new("L", (1, 400_000)).save(tmp_path / "a.png")
    code, out, err = cli("run", "--image", tmp_path / "a.png", "--prompt", "what is it ?", "--model", llava)
    assert (code, out) == (2, "")
    assert "1 x 400000" in err.splitlines()[-1]
