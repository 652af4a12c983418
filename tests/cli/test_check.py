"""`vlmprune check` end to end on tiny models and on the embedded one."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest
import tiny_folders
import torch
from checked import unseen
from leftovers import Forgetful
from transformers import AutoModelForImageTextToText

from vlmprune.cli.check import METHODS
from vlmprune.engine import install as engine
from vlmprune.verify import CHECKS, Subject, evidence
from vlmprune.verify.runs import masked
from vlmprune.verify.told import without_paths


def rows(out):
    """The table's cells by method."""
    lines = out.splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("method "))
    assert lines[top].split() == ["method", *CHECKS]
    return {line.split()[0]: line.split()[1:] for line in lines[top + 2 : lines.index("", top)]}


def outcomes(method, **other):
    none = ("syncs", *unseen(method))
    return [other.get(name, "-" if name in none else "pass") for name in CHECKS]


@pytest.fixture
def broken(monkeypatch):
    """Unpatching leaves hooks."""
    monkeypatch.setattr(engine, "Hook", Forgetful)


def test_the_embedded_model_passes_within_a_minute(cli, support):
    support("vlmprune check", "llava", "fopru")
    start = time.process_time()
    code, out, err = cli("check")
    assert code == 0, out + err
    assert time.process_time() - start < 60
    assert rows(out) == {name: outcomes(name) for name in METHODS.split(",")}
    assert out.startswith("scene-llava (llava, ")
    assert "not applicable: syncs: no GPU" in out
    assert "```" not in out


def test_what_a_model_cannot_run_is_skipped_unless_it_was_asked_for(cli, folders):
    code, out, _ = cli("check", "--model", folders["siglip"], "--keep", "0.5", "--average", "0.5")
    assert code == 2
    # the tiny decoder has too few layers for this budget
    code, out, _ = cli("check", "--model", folders["siglip"], "--average", "0.3", "--method", "fopru,vtc_cls")
    assert code == 2
    code, out, err = cli("check", "--model", folders["llava"], "--method", "globalcom2")
    assert code == 2
    assert "single view" in err
    assert out == ""


def test_the_default_methods_skip_with_their_refusals(cli, folders, monkeypatch):
    monkeypatch.setattr("vlmprune.cli.check.METHODS", "random,vtc_cls,random+fastv")
    code, out, _ = cli("check", "--model", folders["siglip"])
    assert code == 0
    assert rows(out) == {name: outcomes(name) for name in ("random", "random+fastv")}
    assert "\nskipped: vtc_cls: vtc_cls reads the attention of the tower's [CLS] token" in out
    monkeypatch.setattr("vlmprune.cli.check.METHODS", "vtc_cls")
    code, _, err = cli("check", "--model", folders["siglip"])
    assert code == 2
    assert "can run none of vtc_cls" in err


def test_options_reach_the_methods_that_have_them(cli, folders):
    code, out, _ = cli(
        "check", "--model", folders["next"], "--method", "fopru+fastv,random", "--keep", "6", "--option", "layer=3",
        "--option", "seed=4", "--json",
    )  # fmt: skip
    assert code == 0
    said = json.loads(out)
    stacked, control = said["reports"]
    assert [text.split("(")[0].lower() for text in stacked["options"]] == ["fopru", "fastv"]
    assert "keep=12" in stacked["options"][0]
    assert "keep=6" in stacked["options"][1]
    assert "layer=3" in stacked["options"][1]
    assert "seed=4" in control["options"][0]
    assert set(stacked["checks"]) == set(CHECKS)
    assert stacked["checks"]["rows"]["outcome"] == "pass"
    assert 0 <= stacked["checks"]["rows"]["off"] < stacked["checks"]["rows"]["deliberate_mistake"]
    assert stacked["checks"]["syncs"] == {
        "outcome": "not applicable", "told": "no GPU", "off": None, "noise": None, "deliberate_mistake": None,
    }  # fmt: skip
    assert said["about"]["model_type"] == "llava_next"
    assert said["model"] == "a local folder"


def test_a_failure_ends_with_a_block_to_paste(cli, folders, broken):
    code, out, err = cli("check", "--model", folders["llava"], "--method", "random,fopru", "--keep", "5")
    assert code == 1
    assert rows(out) == {name: outcomes(name, restore="FAIL") for name in ("random", "fopru")}
    assert "fail: random, restore: left on the model: model: AfterModel" in out
    assert err.endswith("vlmprune: failed: random, fopru (block for a bug report above)\n")
    block = out[out.index("```") :]
    for word in ("vlmprune: ", "torch: ", "transformers: ", "device: cpu", "dtype: float32", "attention: sdpa",
                 "model_type: llava", "layers 4", "keep=5", "restore   FAIL", "model: a local folder"):  # fmt: skip
        assert word in block
    assert folders["llava"] not in block
    assert "/tmp" not in block
    code, out, err = cli("check", "--model", folders["llava"], "--method", "random", "--keep", "5", "--json")
    assert code == 1
    assert json.loads(out)["reports"][0]["checks"]["restore"]["outcome"] == "fail"
    assert err.endswith("vlmprune: failed: random\n")


def test_a_model_that_computes_no_numbers(cli, folders, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    model.lm_head.weight.data[7] = torch.nan
    folder = shutil.copytree(folders["llava"], tmp_path / "broken")
    model.save_pretrained(folder)
    code, out, err = cli("check", "--model", str(folder), "--method", "random")
    assert (code, out) == (2, "")
    assert "the unpruned model computes NaN or infinite numbers" in err
    assert "load it in bfloat16 or float32" in err


def test_a_block_on_demand(cli, folders):
    code, out, _ = cli("check", "--model", folders["llava"], "--method", "random", "--report")
    assert code == 0
    assert out.count("```") == 2
    assert out.rstrip().endswith("```")


def test_half_precision_says_what_it_cannot_tell(cli, folders):
    code, out, _ = cli("check", "--model", folders["llava"], "--method", "fastv", "--dtype", "bfloat16")
    assert code == 0
    (cells,) = rows(out).values()
    assert "FAIL" not in cells
    assert ("?" in cells) == ("; float32 may tell" in out)


def test_a_row_is_there_as_soon_as_its_method_is_done(cli, folders, monkeypatch, capsys):
    """Redirected too: nothing waits in a buffer."""
    seen, original = [], Subject.check

    def check(self, methods, **options):
        seen.append(capsys.readouterr().out)
        return original(self, methods, **options)

    monkeypatch.setattr(Subject, "check", check)
    flushed = []
    monkeypatch.setattr(
        "builtins.print", lambda *a, _print=print, **k: (flushed.append(k.get("flush")), _print(*a, **k))
    )
    code, _, _ = cli("check", "--model", folders["llava"], "--method", "random,fopru,grid")
    assert code == 0
    assert seen[0] == ""
    assert seen[1].splitlines()[2].split() == ["method", *CHECKS]
    assert seen[1].splitlines()[-1].split() == ["random", *outcomes("random")]
    assert seen[2].split() == ["fopru", *outcomes("fopru")]
    assert flushed[:3] == [True] * 3


def test_more_than_one_open_line_is_no_success(cli, folders, monkeypatch):
    original = Subject.check

    def check(self, methods, **options):
        report = original(self, methods, **options)
        lines = [replace(line, outcome="?") if line.check == "batch" else line for line in report.lines]
        return replace(report, lines=lines)

    monkeypatch.setattr(Subject, "check", check)
    code, out, _ = cli("check", "--model", folders["llava"], "--method", "random")
    assert (code, "```" in out) == (0, False)
    code, out, err = cli("check", "--model", folders["llava"], "--method", "random,grid")
    assert code == 1
    assert "vlmprune: inconclusive: 2 lines, too many to call it a proof (block for a bug report above)\n" in err
    assert "```" in out


def test_a_model_that_by_hand_is_another_is_no_success(cli, folders, monkeypatch):
    monkeypatch.setattr(evidence, "masked", lambda *args, **more: 1 - masked(*args, **more))
    code, out, err = cli("check", "--model", folders["llava"], "--method", "random")
    assert code == 1
    assert rows(out)["random"][list(CHECKS).index("decode")] == "!"
    assert "unknown model: random, decode: unpruned, the two ways that this line compares differ by" in out
    assert "vlmprune: by hand, the unpruned model is not reproduced: random (block" in err


def test_a_placeholder_outside_the_vocabulary_is_no_traceback(cli, folders, tmp_path):
    folder = shutil.copytree(folders["llava"], tmp_path / "outside")
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = 70000
    config.pop("image_token_index", None)
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = cli("check", "--model", str(folder), "--method", "random")
    assert (code, out) == (2, "")
    assert "the placeholder of a image is token 70000" not in err
    assert "the placeholder of an image is token 70000, and the model has embeddings for 0 to 63" in err


def test_onevision(cli, tmp_path, support):
    folder = tiny_folders.save(tmp_path / "ov", "llava_onevision", tower="siglip")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    support("vlmprune check", model, "fopru")
    code, out, _ = cli("check", "--model", folder, "--method", "fopru")
    assert code == 0
    assert rows(out) == {"fopru": outcomes("fopru")}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--method", "fopro"], "Did you mean 'fopru'?"),
        (["--method", "fopru+"], "unknown method ''"),
        (["--method", ","], "--method is empty"),
        (["--keep", "many"], "neither a count"),
        (["--method", "fopru", "--option", "strateg=row"], "Did you mean 'strategy'?"),
        (["--option", "keep=3"], "the budget is given by --keep"),
        (["--model", "scene-lava"], "Did you mean 'scene-llava'?"),
        (["--device", "cuda:77"], "there is no device"),
    ],
)
def test_mistakes(cli, argv, told):
    code, out, err = cli("check", *argv)
    assert (code, out) == (2, "")
    assert told in err


def test_paths_are_left_out():
    told = (
        "raised OSError: [Errno 2] No such file: '/home/ada/secret/x.bin' and C:\\Users\\ada\\y.bin, ~/w/z; 3/4 of it"
    )
    assert without_paths(told) == "raised OSError: [Errno 2] No such file: '(path)' and (path), (path); 3/4 of it"
