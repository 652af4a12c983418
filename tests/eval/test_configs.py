"""Every file in configs/ is a config that would run, on models of the size that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlavaConfig, LlavaNextConfig

pytest.importorskip("lmms_eval")

from vlmprune.eval import testbed
from vlmprune.eval.config.schema import KEYS, load_config
from vlmprune.eval.lmms import fingerprints
from vlmprune.eval.lmms.plan import make_plan
from vlmprune.methods.atp import modules as atp_modules

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """config.json of the models that the files name: LLaVA-1.5-7B and LLaVA-NeXT-7B are transformers' defaults."""
    root = tmp_path_factory.mktemp("models")
    made = {"llava-hf/llava-1.5-7b-hf": LlavaConfig(), "llava-hf/llava-v1.6-vicuna-7b-hf": LlavaNextConfig()}
    folders = {}
    for name, config in made.items():
        folders[name] = root / name.partition("/")[2]
        config.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def atp_weights(tmp_path_factory, stand_ins):
    """Untrained modules in the place of those that a user trains, by what they are called in the files."""
    root = tmp_path_factory.mktemp("weights")
    facts, _ = fingerprints.model(str(stand_ins["llava-hf/llava-1.5-7b-hf"]))
    small, _ = fingerprints.model("scene-llava")
    sizes = {"atp-144": (facts, 144), "atp-88": (facts, 88), "atp-scene-llava": (small, 0.25)}
    return {
        name: atp_modules.save(atp_modules.Thresholds(atp_modules.AtpConfig.of(*size)), root / name)
        for name, size in sizes.items()
    }


def test_there_are_configs():
    assert {"demo.yaml", "template.yaml"} < {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_valid(path, stand_ins, atp_weights):
    overrides = []
    for i, setting in enumerate(load_config(path).settings):
        place = "" if len(load_config(path).settings) == 1 else f"runs.{i}."
        if setting.model in stand_ins:
            overrides.append(f"{place}model={stand_ins[setting.model]}")
        for j, entry in enumerate(setting.methods):
            weights = entry.parts[0].options.get("weights")
            if weights in atp_weights and not (Path(testbed.__file__).parent / weights).is_dir():
                overrides.append(f"{place}methods.{j}.weights={atp_weights[weights]}")
    plan = make_plan(load_config(path, overrides))
    labels = {cell.label for _, cell in plan.cells}
    assert labels >= {"none", "random", "grid", "pool"}
    assert not plan.skipped
    # a published number stands beside a cell of the plan
    for job in plan.jobs:
        there = {(c.method if c.method == "none" else c.label, str(c.budget), c.task) for c in job.cells}
        for entry in job.setting.published:
            assert (entry.method, str(dict([entry.budget]) if entry.budget else None), entry.task) in there


@pytest.mark.parametrize("path", sorted((CONFIGS / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_can_be_named_as_tasks(path, tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(f"model: scene-llava\ntasks: {path}\n")
    assert make_plan(load_config(config), look_at_model=False).cells


def test_every_pope_is_scored_alike():
    for path in FILES:
        for setting in load_config(path).settings:
            if "pope" in setting.tasks and setting.published:
                assert setting.metrics.get("pope") == "pope_f1_score", path.name


def test_the_demo_has_the_six_methods_and_three_budgets():
    settings = load_config(CONFIGS / "demo.yaml").settings
    assert {setting.model for setting in settings} == set(testbed.NAMES)
    names = {entry.parts[0].name for setting in settings for entry in setting.methods}
    assert names >= {"fopru", "vtc_cls", "globalcom2", "todre", "transprune", "atp"}
    assert all(setting.budgets == (("keep", 0.5), ("keep", 0.25), ("keep", 0.1)) for setting in settings)


def test_the_template_names_every_key():
    text = (CONFIGS / "template.yaml").read_text()
    assert [word for word in (*KEYS, "output", "runs") if f"\n{word}:" not in text and f"\n# {word}:" not in text] == []
