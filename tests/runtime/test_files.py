"""Files that are there whole or not at all, and found writable before the work."""

from __future__ import annotations

import pytest

from vlmprune.runtime.errors import UserError, extra
from vlmprune.runtime.files import check_writable, write_all


def test_all_files_are_written_and_named(tmp_path):
    made = write_all(tmp_path, {"b.html": b"1", "a.json": b"2"})
    assert made == [tmp_path / "b.html", tmp_path / "a.json"]
    assert [file.read_bytes() for file in made] == [b"1", b"2"]
    assert sorted(tmp_path.iterdir()) == sorted(made)


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    file = tmp_path / "r.json"
    assert check_writable(str(file), "--json") == file
    assert not file.exists()
    file.write_text("here")
    check_writable(str(file), "--json")
    assert file.read_text() == "here"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "words"),
    [("", "is a folder: name a file"), ("no/r.json", "there is no folder")],
)
def test_what_cannot_is_refused(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        check_writable(str(tmp_path / name), "--json")


def test_a_package_that_lacks_is_told():
    assert extra("json", "never") is __import__("json")
    with pytest.raises(UserError, match="pip install it"):
        extra("no_such_package_at_all", "pip install it")
