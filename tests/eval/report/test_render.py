"""The templates of both reports: text comes out as it is, whatever signs are in it, and no block is forgotten."""

from __future__ import annotations

import base64
import io
import re
from html import unescape
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from vlmprune.eval.report import render
from vlmprune.eval.report.document import Block, Bullets, Captioned, Cards, Code, Heading, Picture, Plot, Table, Text

FOLDER = Path("/runs/one")
NASTY = '<b>&amp; | `a` *b* _c_ ~~d~~ $e$ [f](http://g) "h" \\ </td>'
texts = st.text("ab1 .)([]!#+-=>*_`~$|<&;:\\\"'/\n", min_size=1, max_size=12).map(lambda t: " ".join(t.split()))
quick = settings(max_examples=200, deadline=None)


def picture(suffix="PNG"):
    made = io.BytesIO()
    Image.new("RGB", (2, 2)).save(made, suffix)
    return made.getvalue()


def blocks(folder):
    """One of every kind."""
    (folder / "a.png").write_bytes(picture())
    card = Captioned(NASTY, picture("JPEG"), f"of {NASTY}", {"prompt": NASTY, "answer": "yes"}, f"note {NASTY}")
    return [
        Heading(NASTY, 1),
        Text(NASTY),
        Text(NASTY, warning=True),
        Bullets([NASTY, "two"]),
        Code(f"a\n  {NASTY}"),
        Table(["name", "number"], [[NASTY, "1"], ["x", "2"]], [0], ["full", "control start"]),
        Picture(folder / "a.png", f"One {NASTY}. Two."),
        Plot({"name": NASTY}, NASTY, [Picture(folder / "a.png", f"Still {NASTY}.")]),
        Cards([card, card], folder / "b.png", NASTY),
    ]


def parsed(text):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def text_of(html):
    return unescape(re.sub(r"<[^>]*>", "", html)).strip()


def test_both_pages_show_every_kind_of_block(tmp_path):
    made = blocks(tmp_path)
    assert {type(block) for block in made} == set(get_args(Block))
    for block in made:
        page = render.html([block], "t").partition("<body>")[2]
        assert NASTY in text_of(page) or NASTY in unescape(page)
        assert "<b>&" not in page
        shown = parsed(render.markdown([block], tmp_path))
        assert NASTY in text_of(shown) or NASTY in unescape(shown), block
    with pytest.raises(TypeError, match="no block of the type str"):
        render.html(["a text"], "t")
    with pytest.raises(TypeError, match="no block of the type str"):
        render.markdown(["a text"], tmp_path)


def test_rows_and_cells_have_their_classes(tmp_path):
    page = render.html(blocks(tmp_path), "t")
    assert '<thead><tr><th class="left">name</th><th>number</th></tr></thead>' in page
    assert '<tr class="full"><td class="left long">' in page
    assert '<tr class="control start"><td class="left">x</td><td>2</td></tr>' in page
    assert f"{'| --- | ---: |'}\n" in render.markdown(blocks(tmp_path), tmp_path)


def test_pictures_are_inlined_as_what_they_are(tmp_path):
    page = render.html(blocks(tmp_path), "t").partition("<script>")[0]
    found = re.findall(r'src="data:image/(\w+);base64,([^"]*)"', page)
    assert [kind for kind, _ in found] == ["png", "png", "jpeg", "jpeg"]
    assert [base64.b64decode(data) for _, data in found] == [*[picture()] * 2, *[picture("JPEG")] * 2]


def test_cards_in_markdown_are_a_sheet_and_a_table(tmp_path):
    text = render.markdown(blocks(tmp_path)[-1:], tmp_path)
    assert "](b.png)\n" in text
    shown = parsed(text)
    assert re.findall(r"<th>(.*)</th>", shown) == ["", "picture", "prompt", "answer"]
    cells = [unescape(cell) for cell in re.findall(r"<td>(.*)</td>", shown)]
    assert cells == ["1", NASTY, NASTY, "yes", "2", NASTY, NASTY, "yes"]


@quick
@given(texts.filter(bool))
@example("1. no list")
@example("12) no list")
@example("[a]: http://no.definition")
@example("no closing #")
@example("a ] b [c](d)")
@example("&amp; &#42; a_b __c__ <http://d>")
def test_markdown_shows_text_as_it_is(text):
    for block, tag in (
        (Heading(text), "h2"),
        (Text(text), "p"),
        (Text(text, warning=True), "p"),
        (Bullets([text]), "li"),
    ):
        shown = parsed(render.markdown([block], FOLDER))
        (found,) = re.findall(rf"<{tag}>(.*)</{tag}>", shown)
        expected = f"Note: {text}" if block == Text(text, warning=True) else text
        assert text_of(found) == expected, shown
        assert not re.search(r"<(a|em|code|img|s|ul|ol)\b", found)
    table = parsed(render.markdown([Table(["a", "b"], [[text, "end"]], [0, 1])], FOLDER))
    assert [unescape(cell) for cell in re.findall(r"<td>(.*)</td>", table)] == [text, "end"]


@quick
@given(texts.filter(bool))
@example("a ] b [c](d). e")
@example("\\] a")
def test_markdown_names_pictures_as_they_are(text):
    shown = parsed(render.markdown([Picture(FOLDER / "plots" / "a.png", text)], FOLDER))
    (found,) = re.findall(r'<img src="plots/a.png" alt="(.*)" />', shown)
    assert unescape(found) == text.partition(". ")[0].strip()


@quick
@given(texts)
def test_html_shows_text_as_it_is(text):
    page = render.html([Text(text)], text).partition("</style>")
    assert f"<title>{text}</title>" in unescape(page[0])
    (found,) = re.findall(r"<p>(.*)</p>", page[2])
    assert unescape(found) == text
    assert "<" not in found


def test_bytes_that_are_no_text(tmp_path):
    files = render.pages([Text("caf\udce9.png"), Table(["a"], [["\udce9"]], [0])], "caf\udce9", tmp_path)
    assert set(files) == {"report.html", "report.md"}
    assert all(b"caf\\udce9" in content for content in files.values())
