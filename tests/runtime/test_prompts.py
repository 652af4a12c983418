"""Which prompts are asked about which pictures."""

from __future__ import annotations

import pytest
from tiny_folders import PICTURES

from vlmprune.runtime.errors import UserError
from vlmprune.runtime.prompts import find_pictures, read_pairs


def write(path, *lines):
    path.write_bytes("\n".join(lines).encode())
    return str(path)


def test_pictures_are_found(pictures):
    names = sorted(PICTURES)
    assert list(find_pictures(str(pictures))[1]) == names
    assert list(find_pictures(str(pictures / "*"))[1]) == names
    assert list(find_pictures(str(pictures / "*.png"))[1]) == ["a.png", "d.png"]
    assert list(find_pictures(str(pictures / "a.png"))[1]) == ["a.png"]
    assert list(find_pictures(str(pictures.parent / "**" / "*.png"))[1]) == ["pictures/a.png", "pictures/d.png"]
    with pytest.raises(UserError, match=r"no pictures there .*'.*/\*\*/\*\.jpg'"):
        find_pictures(str(pictures.parent))
    with pytest.raises(UserError, match="no pictures there"):
        find_pictures(str(pictures / "*.tiff"))
    with pytest.raises(UserError, match="there is no folder"):
        find_pictures(str(pictures / "none" / "*.png"))


def test_prompts_of_text(pictures, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffwhat is it ?\r\n\r\n  # how many ?  \r\nwhat is it ?\r\n".encode())
    found = read_pairs(str(pictures), str(file))
    assert [(p.picture, p.prompt, p.line) for p in found[:3]] == [
        ("a.png", "what is it ?", 1), ("a.png", "# how many ?", 3), ("b.jpg", "what is it ?", 1),
    ]  # fmt: skip
    assert len(found) == 8
    assert [p.picture for p in read_pairs(str(pictures), str(file), 1)] == ["a.png"] * 2


def test_prompts_of_json_lines(pictures, tmp_path):
    (pictures / "x[1].png").write_bytes((pictures / "a.png").read_bytes())
    file = write(
        tmp_path / "p.jsonl", '{"image": "b.jpg", "prompt": "one", "id": 3}', "", '{"image": "*.png", "prompt": "two"}',
        '{"prompt": "three"}', '{"image": "x[1].png", "prompt": "four"}',
    )  # fmt: skip
    found = {(p.picture, p.prompt, p.line) for p in read_pairs(str(pictures), file)}
    assert found == (
        {("b.jpg", "one", 1), ("x[1].png", "four", 5)}
        | {(name, "two", 3) for name in ("a.png", "d.png", "x[1].png")}
        | {(name, "three", 4) for name in (*PICTURES, "x[1].png")}
    )
    assert read_pairs(str(pictures), write(tmp_path / "bare", '{"prompt": "it"}'))[0].prompt == "it"
    assert read_pairs(str(pictures), write(tmp_path / "p.txt", "{not JSON}"))[0].prompt == "{not JSON}"
    outside = read_pairs(str(pictures / "*.png"), write(tmp_path / "q.jsonl", '{"image": "b.jpg", "prompt": "one"}'))
    assert [pair.picture for pair in outside] == ["b.jpg"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "a.pgn", "prompt": "x"}', ["line 2", "no picture 'a.pgn'", "Did you mean 'a.png'?"]),
        ('{"image": "*.pdf", "prompt": "x"}', ["line 2", "no picture '*.pdf'", "fits none of the names"]),
        ('{"image": "a*.pgn", "prompt": "x"}', ["line 2", "no picture 'a*.pgn'", "fits none", "such as 'a.png'"]),
        ('{"image": "a.png", "promt": "x"}', ["line 2", "no 'prompt', only 'image', 'promt'"]),
        ('{"image": 3, "prompt": "x"}', ["line 2", "the image must be", "3"]),
        ('{"prompt": " "}', ["line 2", "not empty"]),
        ('{"prompt": 5}', ["line 2", "must be a text"]),
        ('["x"]', ["line 2", "not a JSON object"]),
        ('{"prompt": "x"', ["line 2", "not JSON", '"image"']),
    ],
)
def test_bad_lines(pictures, tmp_path, line, words):
    file = write(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(UserError) as caught:
        read_pairs(str(pictures), file)
    assert caught.value.code == 2
    for word in words:
        assert word in str(caught.value)


def test_bad_files(pictures, tmp_path):
    with pytest.raises(UserError, match="has no prompt in it"):
        read_pairs(str(pictures), write(tmp_path / "empty.txt", "", "  "))
    (tmp_path / "latin.txt").write_bytes("fine\nné".encode("latin-1"))
    with pytest.raises(UserError, match="line 2: this is not UTF-8"):
        read_pairs(str(pictures), str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="cannot read the prompts file"):
        read_pairs(str(pictures), str(tmp_path))


def test_prompts_that_no_tokenizer_takes(pictures, tmp_path):
    file = write(tmp_path / "p.jsonl", '{"prompt": "fine"}', '{"prompt": "half \\ud800 a character"}')
    with pytest.raises(UserError, match=r"p.jsonl, line 2: the prompt is not valid UTF-8: half a char.* \(U\+D800\)"):
        read_pairs(str(pictures), file)
