"""`vlmprune demo` on tiny models in the place of the embedded ones."""

from pathlib import Path

import pytest
from PIL import Image
from tiny_folders import noise_picture

from vlmprune import embedded
from vlmprune.cli import demo
from vlmprune.eval import testbed
from vlmprune.runtime import loading


@pytest.fixture
def shipped(monkeypatch, tmp_path, folders):
    """Two pictures for one model and one for the other."""
    places = {"scene-llava": Path(folders["llava"]), "scene-llava-next": Path(folders["next"])}
    rows, small, wide = [], (24, 24), (48, 24)
    for i, (model, size) in enumerate([("scene-llava", small), ("scene-llava-next", wide), ("scene-llava", small)]):
        file = tmp_path / f"p{i}.png"
        noise_picture(*size, seed=i).save(file)
        rows.append({"file": file, "model": model, "question": "what is it ?", "answer": f"word{i}"})
    for module in (embedded, testbed):
        monkeypatch.setattr(module, "path", places.__getitem__)
    monkeypatch.setattr(testbed, "NAMES", tuple(places))
    monkeypatch.setattr(testbed, "pictures", lambda: rows)
    return rows


def test_demo(cli, shipped, tmp_path, monkeypatch):
    loads, real = [], loading.load
    monkeypatch.setattr(loading, "load", lambda source: loads.append(source.name) or real(source))
    code, out, _ = cli("demo", "--out", tmp_path / "out")
    assert code == 0
    assert loads == ["scene-llava", "scene-llava-next"]  # once each
    lines = out.partition("\n\nIn brackets")[0].splitlines()
    assert lines[0].split("  ")[0] == "picture"
    for method in demo.METHODS:
        assert sum(f" {method} " in line for line in lines) == 4  # three pictures and the sum
    assert "(4)" in out  # a quarter of 16
    assert "(1)" in out
    assert "(52)" in out  # all of the other model's: 48 patches, 4 newlines
    drawn = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in drawn] == ["1-p0.png", "2-p2.png", "3-p1.png"]
    for path in drawn:
        assert str(path) in out
        with Image.open(path) as sheet:
            assert sheet.width > 7 * 190


def test_right_answers_are_counted(cli, shipped, tmp_path, monkeypatch):
    from vlmprune.runtime import answering

    real = answering.answer
    monkeypatch.setattr(answering, "answer", lambda *given: (real(*given), "Word1.")[1])
    out = cli("demo", "--out", tmp_path / "out")[1]
    (total,) = [line for line in out.splitlines() if line.startswith("right answers")]
    assert total.split() == ["right", "answers", "of", "3", "1", "fopru", "1", "1"]


def test_a_method_that_does_not_fit_a_model_is_left_out_there(cli, shipped, tmp_path, monkeypatch):
    from vlmprune.runtime import answering
    from vlmprune.runtime.errors import UserError

    real = answering.check

    def check(loaded, todo):
        if loaded.source.name == "scene-llava-next" and todo[0].method == "vtc_cls":
            raise UserError("no [CLS] here")
        return real(loaded, todo)

    monkeypatch.setattr(answering, "check", check)
    code, out, _ = cli("demo", "--out", tmp_path / "out")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if " vtc_cls " in line]
    assert [row[-2:] == ["-", "-"] for row in rows] == [False, False, True, False]
    assert rows[-1][-6:] == ["0", "of", "2"] * 2
    assert out.count("no [CLS] here") == 1


def test_without_weights(cli, shipped, tmp_path, monkeypatch):
    def missing(name):
        if name == "scene-llava-next":
            raise FileNotFoundError(f"the weights of {name} are missing")
        return real(name)

    real = testbed.path
    monkeypatch.setattr(testbed, "path", missing)
    code, out, err = cli("demo", "--out", tmp_path / "out")
    assert code == 0
    assert "left out: the weights of scene-llava-next are missing" in err
    assert "p1.png" not in out


def test_nothing_to_show(cli, monkeypatch, tmp_path):
    def missing(*_):
        raise FileNotFoundError("gone")

    monkeypatch.setattr(testbed, "path", missing)
    monkeypatch.setattr(testbed, "pictures", missing)
    code, out, err = cli("demo", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "missing" in err
    file = tmp_path / "file"
    file.touch()
    assert cli("demo", "--out", file)[0] == 2
