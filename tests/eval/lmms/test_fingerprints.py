"""What a result depends on, seen by its content: code, weights, files at the same path."""

from __future__ import annotations

import importlib
import sys

import pytest
import tiny
import torch

from vlmprune.eval.lmms import fingerprints
from vlmprune.methods import base
from vlmprune.methods.atp.modules import save

METHOD = """\
from dataclasses import dataclass
{imports}

@dataclass(frozen=True)
class Mine(Base):
    summary = "mine"
"""


@pytest.fixture
def edited(monkeypatch):
    """`edited("selection.py")`: the source files whose path ends so have another content."""
    real = fingerprints.code_of

    def edit(end):
        hits = []
        monkeypatch.setattr(
            fingerprints, "code_of", lambda path: hits.append(1) or "new" if path.endswith(end) else real(path)
        )
        return hits

    return edit


@pytest.mark.parametrize(
    "file",
    ["/parts/selection.py", "/parts/taps.py", "/kernels/ops.py", "/kernels/triton_ops.py",
     "/kernels/csrc/select_gather.cu", "/engine/hooks.py", "/parts/budget.py", "/registry.py", "/patches/llava.py",
     "/patches/base.py", "/eval/lmms/model.py", "/eval/lmms/outcome.py", "/eval/lmms/measure.py",
     "/runtime/loading.py", "/runtime/answering.py"],
)  # fmt: skip
def test_an_edit_of_what_every_result_depends_on(edited, file):
    before = fingerprints.library()
    assert before == fingerprints.library()
    assert edited(file) == []
    assert fingerprints.library() != before


@pytest.mark.parametrize(
    "file",
    ["/methods/fopru.py", "/cli/ls.py", "/eval/report/tables.py", "/eval/lmms/plan.py", "/eval/lmms/words.py",
     "/eval/lmms/progress.py", "/verify/checks.py"],
)  # fmt: skip
def test_an_edit_of_what_no_result_or_one_method_depends_on(edited, file):
    before = fingerprints.library()
    hits = edited(file)
    assert fingerprints.library() == before
    assert not hits


@pytest.mark.parametrize(
    ("name", "files"),
    [("fopru", ("fopru", "base")), ("todre", ("todre", "base")), ("fastv", ("fastv", "base")),
     ("grid", ("controls", "base")), ("globalcom2_fixed", ("globalcom2", "base"))],
)  # fmt: skip
def test_a_methods_code_is_its_own_its_bases_and_what_it_takes_from_other_methods(edited, name, files):
    keep = {"keep": 4}
    before = fingerprints.method(name, keep)
    for file in ("atp", "base", "controls", "fastv", "fopru", "globalcom2", "todre", "tome", "transprune", "vtc_cls"):
        edited(f"/methods/{file}.py")
        assert (fingerprints.method(name, keep) != before) == (file in files), file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Another package with a method: its base class in one file, what that imports in others."""
    folder = tmp_path / "otherpackage"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text("from vlmprune.methods import Method as Base\nfrom . import helper\n")
    (folder / "helper.py").write_text("def late():\n    import otherpackage.inner.deep\n")
    (folder / "inner").mkdir()
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "deep.py").write_text("import json\nfrom ..far import thing\n")
    (folder / "far.py").write_text("thing = 1\n")
    (folder / "apart.py").write_text("thing = 1\n")
    (folder / "mine.py").write_text(METHOD.format(imports="from otherpackage.base import Base"))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(base, "REGISTERED", dict(base.REGISTERED))
    base.register("mine")(importlib.import_module("otherpackage.mine").Mine)
    importlib.import_module("otherpackage.far")
    importlib.import_module("otherpackage.inner.deep")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "otherpackage"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "changes"),
    [("mine.py", True), ("base.py", True), ("helper.py", True), ("inner/deep.py", True), ("far.py", True),
     ("apart.py", False)],
)  # fmt: skip
def test_the_code_of_another_package(package, file, changes):
    before = fingerprints.method("mine", {})
    with (package / file).open("a") as code:
        code.write("# edited\n")
    assert (fingerprints.method("mine", {}) != before) == changes


def test_weights_are_told_apart_by_their_content(tmp_path, tiny_model):
    """Retrained modules in the same folder; the same in another folder are the same."""
    model = tiny_model()

    def weights(folder, **options):
        save(tiny.modules(model, **options), tmp_path / folder)
        return fingerprints.method("atp", {"weights": str(tmp_path / folder)})["weights"]

    first = weights("one")
    assert weights("other") == first
    assert weights("one", seed=1) != first
    assert weights("one", biases=(-1.2, 1.0 + 2e-7)) != first  # a single threshold, by its last bits
    assert weights("one", pool=4) != first
    assert weights("one") == first


def test_whatever_a_method_has_learnt_is_hashed():
    class Part:
        pass

    def hashed(**fields):
        part = Part()
        vars(part).update(fields)
        return fingerprints.weights_of(part)

    assert hashed(keep=4) is None
    a, b = torch.arange(4.0), torch.arange(4.0) + 1
    assert hashed(one=a) == hashed(one=a.clone(), keep=4)
    different = [hashed(one=a), hashed(one=b), hashed(two=a), hashed(one=a, two=b), hashed(one=a.bfloat16()),
                 hashed(one=a.view(2, 2)), hashed(one=torch.nn.Linear(1, 1))]  # fmt: skip
    assert len({*different}) == len(different)


def test_folders_are_told_apart_by_names_and_contents(tmp_path):
    def files(**contents):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return fingerprints.files(folder)

    same = files(a="1", b="2")
    assert files(b="2", a="1") == same
    assert same not in (
        files(a="2", b="1"),
        files(a="1", c="2"),
        files(a="1"),
        files(a="1", b="2", c=""),
        files(a="12"),
    )
    assert files(a="1", b="2", **{"__pycache__/c": "x", ".git/c": "y"}) == same
    assert files(a="1", **{"b/c": "2"}) != files(a="1", c="2")
