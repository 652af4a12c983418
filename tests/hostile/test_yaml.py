"""Hostile configs, through `vlmprune validate` and `eval`: told with their line, soon, and in little memory."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc

import pytest

GOOD = "model: scene-llava\ntasks: [gqa]\nmethods: [fopru]\nkeep: 0.25\n"
SECONDS = 10  # of the processor, for each; the slowest takes two
MEMORY = 60 << 20

#: text, the line that is named (None: the file as a whole), what is said
CASES = {
    "billion laughs": (
        GOOD
        + "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        None, "once aliases",
    ),
    "quadratic": (GOOD + "a: &a [" + "x, " * 9000 + "]\nb: [*a, *a, *a, *a]\n", None, "once aliases"),
    "a cycle": (GOOD + "name: &a\n  b: *a\n", 5, "inside the value that it names"),
    "a cycle of keys": (GOOD + "? &a [*a]\n: 1\n", 5, "a key must be text"),
    "python object": (GOOD + "name: !!python/object/apply:os.system ['touch owned']\n", 5, "no plain value"),
    "python name": (GOOD + "name: !!python/name:os.system\n", 5, "no plain value"),
    "python in a key": (GOOD + "!!python/object:os.PathLike {}: 1\n", 5, "a key must be text"),
    "a tag of one's own": (GOOD + "name: !mine {a: 1}\n", 5, "no plain value"),
    "binary": (GOOD + "name: !!binary aGVsbG8=\n", 5, "no plain value"),
    "a set": (GOOD + "name: !!set {a, b}\n", 5, "no plain value"),
    "duplicate keys deep down": (GOOD + "generation:\n  until: a\n  until: b\n", 7, "given twice"),
    "merge keys": (GOOD + "a: &a {limit: 3}\nb:\n  <<: *a\n", 7, "merge keys"),
    "deep flow": (GOOD + "name: " + "[" * 100_000, 5, "nested too deeply"),
    "deep mappings": (GOOD + "name: " + "{a: " * 50_000, 5, "nested too deeply"),
    "deep blocks": (GOOD + "".join(f"{' ' * i}a:\n" for i in range(400)), None, "nested too deeply"),
    "deep through aliases": (
        GOOD + "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(60)), None, "nested too deeply",
    ),
    "NUL": (GOOD + "name: a\0b\n", 5, "#x0000 is not allowed"),
    "NUL, escaped": (GOOD + 'output: "a\\0b"\n', 5, "#x0000 is no text"),
    "half a character": (GOOD + 'name: "\\ud800"\n', 5, "#xd800 is no text"),
    "a control character": (GOOD + "name: \x07\n", 5, "#x0007 is not allowed"),
    "ten megabytes": (GOOD + "#" * 10_000_000, None, "not a config"),
    "a megabyte of values": (GOOD + "name: [" + "x," * 490_000 + "]", None, "not a config"),
    "a long number": (GOOD + "limit: " + "9" * 5000 + "\n", 5, "no number that can be read"),
    "a number beyond floats": (
        f"{GOOD}published: [{{method: fopru, task: gqa, metric: m, source: s, definition: d, value: {'9' * 400}}}]\n",
        5, "must be a number",
    ),
    "a tab": (GOOD + "generation:\n\tuntil: a\n", 6, "not YAML"),
    "an unclosed quote": (GOOD + "name: 'a\n", None, "not YAML"),
    "two documents": (GOOD + "---\nb: 2\n", 5, "not YAML"),
    "a directive": ("%YAML 9.9\n---\n" + GOOD, 1, "not YAML"),
    "only a number": ("3\n", 1, "must be a mapping"),
    "not UTF-8": (GOOD.encode() + b"name: \xff\xfe\n", None, "UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), None, "UTF-8"),
    "empty": (b"", None, "is empty"),
}  # fmt: skip


@pytest.fixture
def refused(cli, tmp_path, monkeypatch):
    """The lines that a verb says to a config that is wrong."""
    monkeypatch.chdir(tmp_path)

    def call(verb, path):
        start = time.process_time()
        code, out, err = cli(verb, path)
        assert (code, out) == (2, ""), err
        assert time.process_time() - start < SECONDS
        return err

    return call


@pytest.mark.parametrize("name", CASES)
def test_mistakes(refused, tmp_path, name):
    text, line, words = CASES[name]
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    err = refused("validate", path)
    assert words in err
    assert len(err) < 2000
    if "\n1 mistake" not in err and "mistakes in" not in err:
        assert len(err.splitlines()) == 1
    if line is not None:
        assert f"my.yaml:{line}: " in err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["billion laughs", "ten megabytes"])
def test_memory(refused, tmp_path, name):
    (tmp_path / "my.yaml").write_text(CASES[name][0])
    tracemalloc.start()
    try:
        refused("validate", tmp_path / "my.yaml")
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["billion laughs", "python object", "NUL", "deep flow", "not UTF-8"])
def test_eval_refuses_them_too(refused, tmp_path, name):
    text, _, words = CASES[name]
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in refused("eval", path)
    assert os.listdir(tmp_path) == ["my.yaml"]


@pytest.mark.parametrize("text", ["!!python/name:os.system", "[" * 999, "&a [*a]", '"\\0"', "a\0b"], ids=repr)
def test_overrides(cli, tmp_path, text):
    (tmp_path / "my.yaml").write_text(GOOD)
    code, out, err = cli("validate", tmp_path / "my.yaml", "--set", f"name={text}")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("vlmprune: --set name=")


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    from vlmprune.eval.config.schema import load_config

    (tmp_path / "my.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(tmp_path / "my.yaml").settings[0].model == "scene-llava"


def test_a_suite_that_is_hostile(refused, tmp_path):
    (tmp_path / "suite.yaml").write_text("a: &a [x, x]\n" + "[" * 5000)
    (tmp_path / "my.yaml").write_text(GOOD.replace("[gqa]", "suite.yaml"))
    assert f"{tmp_path}/suite.yaml:2: not YAML" in refused("validate", tmp_path / "my.yaml")
    (tmp_path / "suite.yaml").write_text("tasks: " + "[" * 5000)
    assert "nested too deeply" in refused("validate", tmp_path / "my.yaml")
    (tmp_path / "suite.yaml").unlink()
    (tmp_path / "suite.yaml").symlink_to(tmp_path / "suite.yaml")
    assert "cannot be read" in refused("validate", tmp_path / "my.yaml")


@pytest.mark.parametrize("name", ["x" * 5000 + ".yaml", "two\nlines.yaml", "/dev/zero", ""], ids=lambda name: name[:9])
def test_names_that_are_no_configs(refused, name):
    refused("validate", name)


def test_a_pipe_is_read_no_further_than_it_may_go(refused, tmp_path):
    """`vlmprune validate <(endless)`: it ends all the same."""
    os.mkfifo(tmp_path / "pipe.yaml")

    def write():
        with open(tmp_path / "pipe.yaml", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"#" * 65536)
            except BrokenPipeError:
                pass

    threading.Thread(target=write, daemon=True).start()
    assert "not a config" in refused("validate", tmp_path / "pipe.yaml")
