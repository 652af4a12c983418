"""`vlmprune validate` and `vlmprune eval`: what they print, refuse and return."""

from __future__ import annotations

import sys

import pytest

from vlmprune import configs
from vlmprune.eval.lmms import store, taskindex

pytest.importorskip("lmms_eval")

CONFIG = """\
model: {model}
name: tiny
tasks: [vlmprune_scene_llava_shape]
methods:
  - fopru
  - {{name: fastv, label: second}}
average: [0.75, 0.1]
controls: [none]
limit: 2
output: {output}
"""


@pytest.fixture
def config(tmp_path, folders):
    path = tmp_path / "my.yaml"
    path.write_text(CONFIG.format(model=folders["llava"], output=tmp_path / "out"))
    return path


def test_init_writes_the_template_once(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("init", "my.yaml")[0] == 0
    assert (tmp_path / "my.yaml").read_text() == configs.TEMPLATE.read_text()
    code, _, err = cli("validate", "my.yaml", "--no-model")
    assert (code, err) == (0, "")
    (tmp_path / "my.yaml").write_text("mine")
    assert cli("init", "my.yaml")[::2] == (2, "vlmprune: my.yaml is there already: name another file.\n")
    assert (tmp_path / "my.yaml").read_text() == "mine"
    code, _, err = cli("init", "no/my.yaml")
    assert (code, "cannot write no/my.yaml" in err) == (2, True)


def test_a_shipped_file_is_named(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("validate", "template.yaml", "--no-model")
    assert (code, err) == (0, f"template.yaml: the file of that name that comes with vlmprune, {configs.TEMPLATE}\n")


def test_few_patches_are_noted_once(cli, config):
    code, _, err = cli("validate", config, "--set", "keep=[1, 1.0]", "--set", "average=[]")
    assert (code, err.count("keep=1 is a count")) == (0, 1), err
    assert err.startswith("note: keep=1 is a count: one patch per image; keep=1.0 is all of them.")


def test_validate(cli, config):
    code, out, err = cli("validate", config)
    assert (code, err) == (0, "")
    assert "tiny: 4 cells" in out
    assert "left out: tiny: second average 0.1: average=0.1 cannot be met" in out
    assert out.endswith("is fine: 4 cells.\n")


def test_validate_tells_all_mistakes_with_lines_and_reads_no_weights(cli, config, folders, monkeypatch):
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("read weights"))
    config.write_text(config.read_text().replace("fopru", "vtc_cls").replace(folders["llava"], folders["siglip"]))
    code, out, err = cli("validate", config, "--set", "tasks=[vlmprune_scene_llava_shap]")
    assert (code, out) == (2, "")
    assert "2 mistakes in the config" in err
    assert f"{config}:5: vtc_cls: vtc_cls reads the attention of the tower's [CLS] token" in err
    assert "--set tasks=[vlmprune_scene_llava_shap]: unknown task" in err
    assert "Did you mean 'vlmprune_scene_llava_shape'?" in err


def test_validate_without_the_model(cli, config):
    code, out, _ = cli("validate", config, "--no-model", "--set", "model=some/where")
    assert code == 0
    assert "(the model was not looked at)" in out


@pytest.mark.parametrize("verb", ["validate", "eval"])
def test_usage(cli, verb, tmp_path):
    assert cli(verb)[0] == 2
    code, out, err = cli(verb, tmp_path / "none.yaml")
    assert (code, out) == (2, "")
    assert "no such file" in err


def test_dry_run_shows_the_plan_and_writes_nothing(cli, config, tmp_path):
    code, out, _ = cli("eval", config, "--dry-run")
    assert code == 0
    assert "tiny--fopru--average-0.75--vlmprune_scene_llava_shape--limit-2  not measured yet" in out
    assert "4 to measure: not measured yet" in out
    assert "How long this takes is unknown" in out
    assert not (tmp_path / "out").exists()


def test_eval_measures_and_reports(cli, config, tmp_path):
    code, out, err = cli("eval", config)
    assert code == 0, err
    assert "[4/4] tiny: second average 0.75 on vlmprune_scene_llava_shape: exact_match" in err
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out
    assert (tmp_path / "out" / "report.md").exists()
    assert store.load_run(tmp_path / "out").info["skipped"][0]["label"] == "second"
    code, out, _ = cli("eval", config, "--dry-run", "--set", "limit=3")
    assert "4 to measure: not measured yet" in out
    assert "About " in out
    code, out, _ = cli("eval", config, "--dry-run")
    assert "Nothing is left to measure." in out


def test_a_run_is_read_once_for_its_report(cli, config, monkeypatch):
    from vlmprune.eval import report

    read = []
    real = report.gather
    monkeypatch.setattr(report, "gather", lambda run: read.append(run) or real(run))
    code, out, _ = cli("eval", config, "--set", "methods=[]")
    assert code == 0
    assert "full model" in out
    assert len(read) == 1


def test_an_lmms_eval_that_lacks_a_requirement(cli, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    code, _, err = cli("eval", config)
    assert code == 2
    assert "lmms-eval is installed and cannot be imported" in err


def test_a_folder_in_use(cli, config, tmp_path):
    with store.locked(tmp_path / "out"):
        code, _, err = cli("eval", config)
    assert code == 2
    assert "another `vlmprune eval` is writing into" in err


def test_a_model_that_cannot_be_loaded(cli, config, folders, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folders["llava"], copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    code, _, err = cli("eval", config, "--set", f"model={copy}")
    assert code == 2
    assert "cannot load" in err


def test_a_report_that_fails_does_not_hide_that_all_is_measured(cli, config, monkeypatch):
    from vlmprune.eval import report

    monkeypatch.setattr(report, "write", lambda folder, results: 1 / 0)
    code, _, err = cli("eval", config)
    assert code == 1
    assert "all is measured and stored" in err
    assert "ZeroDivisionError" in err


def test_without_lmms_eval(cli, config, monkeypatch):
    monkeypatch.setattr(taskindex, "have_lmms_eval", lambda: False)
    code, out, err = cli("eval", config)
    assert (code, out) == (2, "")
    assert "pip install vlmprune[eval]" in err
    code, out, _ = cli("validate", config)
    assert code == 0
    assert "Task names were not checked." in out
