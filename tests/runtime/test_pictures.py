"""Any picture file becomes an upright RGB picture."""

import numpy as np
import pytest
from PIL import Image

from vlmprune.runtime import tables
from vlmprune.runtime.pictures import read_picture, to_rgb
from vlmprune.runtime.tables import change, counted, short, table


def pixel(image, at=(0, 0)):
    return image.getpixel(at)


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    read = read_picture(tmp_path / "turned.png")
    assert read.size == (10, 20)
    assert (pixel(read, (5, 2)), pixel(read, (5, 18))) == ((255, 0, 0), (0, 0, 255))


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert pixel(to_rgb(clear)) == (255, 255, 255)
    assert pixel(to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 255)))) == (10, 20, 30)
    assert pixel(to_rgb(Image.new("LA", (2, 2), (10, 0)))) == (255, 255, 255)


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.putpixel((1, 0), 1)
    assert [pixel(to_rgb(image), (x, 0)) for x in (0, 1)] == [(250, 0, 0), (0, 0, 250)]
    image.save(tmp_path / "clear.gif", transparency=1)
    read = read_picture(tmp_path / "clear.gif")
    assert [pixel(read, (x, 0)) for x in (0, 1)] == [(250, 0, 0), (255, 255, 255)]


def test_cmyk():
    red, green, blue = pixel(to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))))
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 256 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    read = read_picture(tmp_path / "deep.png")
    assert read.mode == "RGB"
    shades = [pixel(read, (x, 0))[0] for x in range(3)]
    assert shades == pytest.approx([0, 100, 255], abs=1)


@pytest.mark.parametrize(("top", "dtype"), [(1.0, np.float32), (255.0, np.float32), (40000, np.int32), (255, np.int32)])
def test_numbers_of_other_kinds(top, dtype):
    values = np.array([[0, top / 2, top]]).astype(dtype)
    shades = [pixel(to_rgb(Image.fromarray(values)), (x, 0))[0] for x in range(3)]
    expected = 255 if top != 40000 else 40000 / 257
    assert shades == pytest.approx([0, expected / 2, expected], abs=1.5)


def test_black_and_white_and_grey():
    assert pixel(to_rgb(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert pixel(to_rgb(Image.new("L", (2, 2), 77))) == (77, 77, 77)


def test_table():
    text = table(["a", "n", "b"], [["x", "1", "long"], [], ["字", "100", ""]], right=["n"])
    assert text.splitlines() == ["a     n  b", "--  ---  ----", "x     1  long", "", "字  100"]
    assert change(3, 3) == "3"
    assert change(3, 1) == "3 -> 1"
    assert short("a\n b", 10) == "a b"
    assert short("abcdefgh", 6) == "abc..."


def test_a_table_in_40_columns_breaks_no_word():
    """Though some columns have room to spare and others none."""
    header = ["method", "keep", "patches left", "layer average", "answer"]
    rows = [["full model", "-", "16", "16.0", "a red one it is"], ["vtc_cls", "4", "16 -> 4", "4.0", "red"]]
    assert table(header, rows, header[1:-1], 40).splitlines() == [
        "method   keep  patches    layer  answer",
        "                  left  average",
        "-------  ----  -------  -------  -------",
        "full        -       16     16.0  a red",
        "model                            one it",
        "                                 is",
        "vtc_cls     4  16 -> 4      4.0  red",
    ]
    # and one that is wider than all of it loses nothing
    long = table(["n", "answer"], [["1", "x" * 50]], (), 40)
    assert (max(map(len, long.splitlines())), long.count("x")) == (40, 50)


def test_a_table_fits_the_terminal(monkeypatch):
    header, rows = ["method", "n", "answer"], [["fopru", "12", "a rather long answer"], [], ["grid", "3", ""]]
    whole = table(header, rows, ["n"])
    assert max(map(len, whole.splitlines())) == 32
    narrow = table(header, rows, ["n"], 24)
    assert narrow.splitlines() == [
        "method   n  answer", "------  --  ------------", "fopru   12  a rather", "            long answer", "",
        "grid     3",
    ]  # fmt: skip
    # no word is broken while there is another way
    assert table(header, rows, ["n"], 17).splitlines() == [
        "method:   fopru", "  n:      12", "  answer: a rather", "          long", "          answer", "",
        "method: grid", "  n:    3",
    ]  # fmt: skip
    assert table(["n"], [["[bold]x[/bold] :smile:"]]).splitlines()[2] == "[bold]x[/bold] :smile:"
    assert table(header, rows, ["n"], 32) == whole
    # the limit is that of the terminal, and a file has none
    monkeypatch.setenv("COLUMNS", "24")
    assert table(header, rows, ["n"]) == whole
    monkeypatch.setattr(tables.sys.stdout, "isatty", lambda: True)
    assert table(header, rows, ["n"]) == narrow
    monkeypatch.setenv("COLUMNS", "80")
    assert table(header, rows, ["n"]) == whole


def test_counted():
    assert [counted(n, "picture") for n in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
