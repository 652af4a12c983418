"""The schema: what a config means, and every mistake with its line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlmprune import configs
from vlmprune.eval.config.entries import Entry, Part
from vlmprune.eval.config.schema import load_config
from vlmprune.yamls.tree import Mistakes

GOOD = """\
model: scene-llava
tasks: [gqa]
methods: [fopru]
keep: 0.25
"""


@pytest.fixture
def config(tmp_path):
    """`config(text, *overrides)`: the text as a file `my.yaml`, loaded."""

    def load(text, *overrides):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture
def mistakes(config, tmp_path):
    """What is wrong: a list of (where, what), the folder left out."""

    def load(text, *overrides):
        with pytest.raises(Mistakes) as error:
            config(text, *overrides)
        return [(where.replace(f"{tmp_path}/", ""), what) for where, what in error.value.found]

    return load


def test_a_small_config_and_its_defaults(config):
    made = config(GOOD)
    (setting,) = made.settings
    assert (setting.model, setting.name, setting.tasks) == ("scene-llava", "scene-llava", ("gqa",))
    assert setting.budgets == (("keep", 0.25),)
    assert [entry.label for entry in setting.controls] == ["none", "random", "grid", "pool"]
    assert all(entry.control for entry in setting.controls)
    assert (setting.seeds, setting.batch_size, setting.limit) == ((0, 1, 2), 1, None)
    assert (setting.device, setting.dtype) == ("auto", "auto")
    assert str(made.output) == "runs/my"
    assert made.text == GOOD


def test_numbers_keep_their_kind(config):
    (setting,) = config(GOOD.replace("0.25", "[64, 0.5, 1, 1.0]") + "average: 128\n").settings
    assert setting.budgets == (("keep", 64), ("keep", 0.5), ("keep", 1), ("keep", 1.0), ("average", 128))
    assert [type(amount) for _, amount in setting.budgets] == [int, float, int, float, int]


def test_entries(config):
    text = GOOD.replace(
        "[fopru]",
        """
  - fopru
  - {name: todre, tau: null, label: one, keep: [64, 0.1]}
  - {name: transprune, own_budget: true, prune_layers: [7, 9, 12]}
  - {name: todre, pivot: random, seeds: [3, 4], label: two}
  - [globalcom2, {name: transprune, keep: 64}]
  - {name: [fopru, fastv], label: both}""",
    )
    (setting,) = config(text).settings
    plain, one, own, two, several, both = setting.methods
    assert plain == Entry((Part("fopru"),), "fopru", where=plain.where)
    assert (one.parts, one.budgets) == ((Part("todre", {"tau": None}),), (("keep", 64), ("keep", 0.1)))
    assert own.own_budget
    assert own.parts[0].options == {"prune_layers": [7, 9, 12]}
    assert two.seeds == (3, 4)
    assert several.label == "globalcom2+transprune"
    assert several.parts == (Part("globalcom2"), Part("transprune", {"keep": 64}))
    assert (both.label, [part.name for part in both.parts]) == ("both", ["fopru", "fastv"])
    assert [entry.where.rpartition(":")[2] for entry in setting.methods] == ["4", "5", "6", "7", "8", "9"]


def test_values_that_torch_and_transformers_know(config):
    text = """\
device: cuda:1
device_map: balanced_low_0
attn_implementation: {attention}
generation: {{until: ["a", "b"], max_gen_toks: 3, do_sample: true, temperature: 1, top_p: null, num_beams: 2}}
"""
    for attention in ("eager", "sdpa", "flash_attention_2", "someone/some-kernel"):
        (setting,) = config(GOOD + text.format(attention=attention)).settings
        assert (setting.device, setting.device_map) == ("cuda:1", "balanced_low_0")
        assert setting.attn_implementation == attention
        assert setting.generation == {
            "until": ["a", "b"], "max_gen_toks": 3, "do_sample": True, "temperature": 1, "top_p": None, "num_beams": 2,
        }  # fmt: skip
    assert config(GOOD + "limit: 10\nseeds: [0, 10]\nname: '010'\n").settings[0].limit == 10


def test_a_control_among_the_methods_is_not_run_twice(config):
    (setting,) = config(GOOD.replace("fopru", "fopru, random")).settings
    assert [entry.label for entry in setting.controls] == ["none", "grid", "pool"]
    (setting,) = config(GOOD + "controls: false\n").settings
    assert setting.controls == ()
    (setting,) = config(GOOD + "controls: [none, downsample]\n").settings
    assert [entry.label for entry in setting.controls] == ["none", "downsample"]


def test_several_models(config):
    text = """\
keep: [0.5]
limit: 4
runs:
  - {model: scene-llava, tasks: [gqa], methods: [fopru]}
  - model: scene-llava-next
    tasks: [pope]
    methods: [globalcom2]
    keep: 0.1
    limit: null
"""
    first, second = config(text).settings
    assert (first.budgets, first.limit) == ((("keep", 0.5),), 4)
    assert (second.budgets, second.limit) == ((("keep", 0.1),), None)
    assert first.where["limit"].endswith(":2")
    assert second.where["tasks.pope"].endswith(":6")


def test_suites(config, mistakes, tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "two.yaml").write_text("name: two\ntasks: [pope, gqa]\n")
    (setting,) = config(GOOD.replace("[gqa]", "[mme, suites/two.yaml]")).settings
    assert setting.tasks == ("mme", "pope", "gqa")
    assert setting.where["tasks.pope"].endswith("my.yaml:2")
    (tmp_path / "suites" / "two.yaml").write_text("name: two\ntasks: [pope\n")
    ((where, what),) = mistakes(GOOD.replace("[gqa]", "suites/two.yaml"))
    assert where == "suites/two.yaml:3"
    assert "not YAML" in what
    (tmp_path / "suites" / "two.yaml").write_text("name: two\n")
    ((where, what),) = mistakes(GOOD.replace("[gqa]", "suites/two.yaml"))
    assert (where, "no list of task names" in what) == ("my.yaml:2", True)
    ((_, what),) = mistakes(GOOD.replace("[gqa]", "suites/three.yaml"))
    assert "No such file" in what


@pytest.mark.parametrize("name", ["suites/common.yaml", "configs/suites/common.yaml"])
def test_suites_that_ship_are_found_from_anywhere(config, tmp_path, name):
    (setting,) = config(GOOD.replace("[gqa]", name)).settings
    assert {"gqa", "pope", "mme"} < set(setting.tasks)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("tasks: [mine]\n")
    assert config(GOOD.replace("[gqa]", name)).settings[0].tasks == ("mine",)  # the user's own comes first


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml", "template"])
def test_configs_that_ship_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = load_config(name)
    assert made.path == configs.HERE / (name.removeprefix("configs/").removesuffix(".yaml") + ".yaml")
    (tmp_path / "demo.yaml").write_text(GOOD)
    assert load_config("demo.yaml").path == Path("demo.yaml")
    with pytest.raises(Mistakes, match="Did you mean 'findings"):
        load_config("findngs.yaml")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (GOOD + "metod: 3\n", 5, ["unknown key 'metod'", "Did you mean 'methods'?"]),
        (GOOD.replace("keep: 0.25", "keep: 1.5"), 4, ["keep=1.5 is out of range"]),
        (GOOD.replace("keep: 0.25", "keep: [0.5, 0]"), 4, ["keep=0 keeps nothing"]),
        (GOOD.replace("keep: 0.25", "keep: half"), 4, ["keep='half' is neither a count (36) nor a fraction"]),
        (GOOD.replace("keep: 0.25", "keep: true"), 4, ["keep=True is not a number"]),
        (GOOD.replace("keep: 0.25", "average: -3"), 4, ["average=-3"]),
        (GOOD.replace("keep: 0.25", "keep: .nan"), 4, ["out of range"]),
        (GOOD.replace("keep: 0.25", "keep: [0.5, 0.5]"), 4, ["keep 0.5 is given twice"]),
        (GOOD.replace("[gqa]", "[3]"), 2, ["tasks[0] must be text, not 3"]),
        (GOOD.replace("[gqa]", "[]"), 2, ["tasks is an empty list"]),
        (GOOD.replace("[gqa]", "{a: b}"), 2, ["tasks must be text, not a mapping"]),
        (GOOD.replace("[fopru]", "fopru"), 3, ["methods must be a list, not 'fopru'"]),
        (GOOD.replace("[fopru]", "[{label: a}]"), 3, ["an entry needs a name"]),
        (GOOD.replace("[fopru]", "[fopru, fopru]"), 3, ["'fopru' is the label of", "another `label`"]),
        (GOOD.replace("[fopru]", "[fopru, {name: todre, label: FOPRU}]"), 3, ["is the label of"]),
        (GOOD.replace("[fopru]", "[{name: fopru, label: random}]"), 3, ["'random' is another method's name"]),
        (GOOD.replace("[fopru]", "[{name: fopru, label: none}]"), 3, ["'none' is another method's name"]),
        (GOOD.replace("[fopru]", "[{name: [fopru, fastv], label: Tome}]"), 3, ["'Tome' is another method's name"]),
        (GOOD.replace("[fopru]", "[[fopru]]"), 3, ["name at least two"]),
        (GOOD.replace("[fopru]", "[{name: [fopru, todre], keep: 3}]"), 3, ["unknown key 'keep'"]),
        (GOOD.replace("[fopru]", "[{name: fopru, own_budget: true, keep: 3}]"), 3, ["leave out keep and average"]),
        (GOOD.replace("[fopru]", "[{name: fopru, layer: {a: 1}}]"), 3, ["methods[0].layer must be a number"]),
        (GOOD.replace("[fopru]", "[]") + "controls: false\n", 1, ["nothing to run"]),
        (GOOD + "controls: maybe\n", 5, ["controls must be true, false or a list"]),
        (GOOD + "seeds: [-1]\n", 5, ["seeds[0] must be a whole number of at least 0"]),
        (GOOD + "batch_size: 0\n", 5, ["batch_size must be a whole number of at least 1, not 0"]),
        (GOOD + "batch_size: 2.0\n", 5, ["batch_size must be a whole number"]),
        (GOOD + "limit: 0.5\n", 5, ["limit must be a whole number of at least 1, not 0.5"]),
        (GOOD + "limit: true\n", 5, ["limit must be a whole number of at least 1, not true"]),
        (GOOD + "limit: 010\n", 5, ["'010' would be a number in octal"]),
        (GOOD + "limit: 1:30\n", 5, ["'1:30' would be a number in base 60"]),
        (GOOD + "seeds: [0, 1, 0]\n", 5, ["seed 0 is given twice"]),
        (GOOD.replace("[fopru]", "[{name: todre, seeds: [3, 3]}]"), 3, ["seed 3 is given twice"]),
        (GOOD + "device: tpu\n", 5, ["device must be auto, cpu, cuda or cuda:N, not 'tpu'"]),
        (GOOD + "device: cuda:x\n", 5, ["device must be auto, cpu, cuda or cuda:N"]),
        (GOOD + "device_map: x\n", 5, ["device_map must be auto, balanced", "not 'x'"]),
        (GOOD + "device_map: balance\n", 5, ["Did you mean 'balanced'?"]),
        (GOOD + "attn_implementation: flashy\n", 5, ["must be one of eager, ", "sdpa", "not 'flashy'"]),
        (GOOD + "attn_implementation: spda\n", 5, ["Did you mean 'sdpa'?"]),
        (GOOD + "generation:\n  max_new_token: 4\n", 6, ["unknown generation", "Did you mean 'max_new_tokens'?"]),
        (GOOD + "generation: {max_new_tokens: many}\n", 5, ["generation.max_new_tokens must be a whole number"]),
        (GOOD + "generation: {do_sample: 1}\n", 5, ["generation.do_sample must be true or false, not 1"]),
        (GOOD + "generation: {temperature: hot}\n", 5, ["generation.temperature must be a number, not 'hot'"]),
        (GOOD + "generation: {until: [3]}\n", 5, ["generation.until[0] must be text, not 3"]),
        (GOOD + "generation: {num_return_sequences: 2}\n", 5, ["must be 1: several answers"]),
        (GOOD + "generation: {pad_token_id: 2}\n", 5, ["pad_token_id is given by vlmprune itself"]),
        (GOOD + "dtype: float23\n", 5, ["dtype must be one of", "Did you mean 'float32'?"]),
        (GOOD + "metrics: {gpa: x}\n", 5, ["no task 'gpa' here", "Did you mean 'gqa'?"]),
        (GOOD + "generation: 3\n", 5, ["generation must be a mapping"]),
        (GOOD + "runs: []\n", 5, ["runs is an empty list: it needs an entry per model"]),
        (GOOD + "runs: 3\n", 5, ["runs must be a list with an entry per model, not 3"]),
        (GOOD + "published: [{method: fopru}]\n", 5, ["needs task", "needs metric", "needs source"]),
        (
            GOOD + "published:\n  - {method: fopro, task: gqa, metric: m, value: 1, source: s, definition: d}\n",
            6,
            ["no method is labelled 'fopro'", "Did you mean 'fopru'?"],
        ),
        (
            GOOD + "published:\n  - {method: fopru, task: gqa, metric: m, value: x, source: s, definition: d}\n",
            6,
            ["published[0].value must be a number, not 'x'"],
        ),
        ("methods: [fopru]\n", 1, ["model is missing", "tasks is missing"]),
        ("[1, 2]\n", 1, ["must be a mapping"]),
        (GOOD + "limit: 3\nlimit: 4\n", 6, ["'limit' is given twice (first in line 5)"]),
        (GOOD + "output: 2020-01-01\n", 5, ["'timestamp'", "quotes"]),
        (GOOD + "name: !!python/object/apply:os.system [date]\n", 5, ["no plain value"]),
        (GOOD + "1: 2\n", 5, ["a key must be text"]),
        (GOOD + "base: &b {a: 1}\n<<: *b\n", 6, ["merge keys"]),
        (GOOD + "name: &a [*a]\n", 5, ["inside the value that it names"]),
        (GOOD + "name: [\n", 6, ["not YAML"]),
        (GOOD + "name: *nobody\n", 5, ["not YAML", "nobody"]),
        ("a: 1\n---\nb: 2\n", 2, ["not YAML"]),
    ],
)
def test_mistakes(mistakes, text, line, words):
    found = mistakes(text)
    told = "\n".join(what for _, what in found)
    for word in words:
        assert word in told
    assert f"my.yaml:{line}" in [where for where, _ in found]


def test_all_mistakes_are_told_at_once(mistakes):
    found = mistakes("model: 3\ntasks: []\nmethods: [fopru]\nkeep: 7.5\nlimit: x\nwhat: 1\n")
    assert sorted(where for where, _ in found) == [f"my.yaml:{line}" for line in (1, 2, 4, 5, 6)]


def test_mistakes_stand_in_the_order_of_lines(mistakes):
    found = mistakes("runs: 3\nlimit: x\noutput: 3\n")
    assert [where for where, _ in found] == ["my.yaml:1", "my.yaml:3"]  # without models, nothing is said of them
    text = GOOD + "\n" * 6 + "limit: x\nseeds: -1\noutput: 3\nbatch_size: 0\nwhat: 1\n"
    found = mistakes(text.replace("keep: 0.25", "keep: 7.5"), "device=tpu", "dtype=3")
    lines = [f"my.yaml:{line}" for line in (4, 11, 12, 13, 14, 15)]
    assert [where for where, _ in found] == ["--set device=tpu", "--set dtype=3", *lines]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (  # a mistake in what others lean on is told alone
            GOOD.replace("[gqa]", "[3]") + "metrics: {gqa: exact_match}\n",
            ["2: tasks[0] must be text, not 3."],
        ),
        (
            GOOD.replace("[fopru]", "3") + "controls: false\npublished:\n  - {method: fopru, task: gqa, metric: m, "
            "value: 1, source: s, definition: d}\n",
            ["3: methods must be a list, not 3."],
        ),
        (GOOD.replace("scene-llava", "3") + "runs: [{}, {limit: 3}]\n", ["1: model must be text, not 3."]),
        (  # each in its own line, through all the short forms
            GOOD.replace(
                "[fopru]", "\n  - name: todre\n    tau: {a: 1}\n  - - fopru\n    - name: fastv\n      layer: None"
            ),
            [
                "5: methods[0].tau must be a number, text, true, false or null, or a list of them, not a mapping.",
                "8: methods[1][1].layer is the text 'None' in YAML: write null for no value.",
            ],
        ),
        (
            GOOD.replace("[fopru]", "\n  - name:\n    - fopru\n    - name: 3\n    seeds: [0]\n"),
            ["7: unknown key 'seeds' of several methods"],
        ),
        (
            GOOD.replace(
                "[fopru]", "\n  - name:\n    - fopru\n    - name: todre\n      tau: {a: 1}\n    label: both\n"
            ),
            ["7: methods[0].name[1].tau must be a number"],
        ),
        (  # what a model holds beside its keys is no key
            GOOD + "where: {}\npublished: [{where: a}]\nsuites: [a]\n",
            ["5: unknown key 'where'.", "7: unknown key 'suites'.", "6: unknown key 'where'."],
        ),
        (
            GOOD + "runs:\n  - {name: a, output: x}\n  - limt: 4\n",
            ["6: unknown key 'output'.", "7: unknown key 'limt'."],
        ),
        ("{}\n", ["1: model is missing", "1: tasks is missing"]),
        (GOOD + "generation: {do_sample: null, pad_token_id: null}\n", ["5: generation.pad_token_id is given by"]),
    ],
)
def test_where_and_nothing_else(mistakes, text, told):
    found = [f"{where.removeprefix('my.yaml:')}: {what}" for where, what in mistakes(text)]
    needs = [one for one in found if "a published number needs" in one]
    rest = [one for one in found if one not in needs]
    assert len(rest) == len(told), found
    assert all(any(one.startswith(words) for one in rest) for words in told), found


def test_values_stay_what_they_were_written_as(config):
    """Keys of results hash them: 1 and 1.0, true and 1 are different."""
    (setting,) = config(GOOD + "generation: {temperature: 1, top_p: 1.0, until: a, max_time: null}\n").settings
    assert repr(setting.generation) == "{'temperature': 1, 'top_p': 1.0, 'until': 'a', 'max_time': None}"
    (setting,) = config(GOOD.replace("[fopru]", "[{name: todre, a: true, b: 1, c: 1.0, d: [1, x]}]")).settings
    assert repr(setting.methods[0].parts[0].options) == "{'a': True, 'b': 1, 'c': 1.0, 'd': [1, 'x']}"


def test_the_command_imports_pydantic_with_the_first_config():
    code = "import sys, vlmprune.cli; assert 'pydantic' not in sys.modules; import vlmprune.eval.config.schema"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_aliases_work_and_cannot_explode(config, mistakes):
    (setting,) = config(GOOD.replace("0.25", "&budgets [0.5, 0.1]") + "average: *budgets\n").settings
    assert [amount for _, amount in setting.budgets] == [0.5, 0.1, 0.5, 0.1]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    ((_, what),) = mistakes(bomb)
    assert "once aliases" in what
    ((_, what),) = mistakes("[" * 5000)
    assert "nested too deeply" in what or "not YAML" in what
    ((_, what),) = mistakes("a: " + "[" * 40 + "]" * 40)
    assert "levels of nesting" in what
    ((_, what),) = mistakes("#" * 1_000_001)
    assert "more than" in what


def test_files_that_are_no_configs(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, words in (("dem.yaml", "Did you mean 'demo.yaml'?"), ("demo.yaml", "is empty"), ("bytes.yaml", "UTF-8")):
        with pytest.raises(Mistakes, match=words.replace("?", r"\?")):
            load_config(tmp_path / name)
    with pytest.raises(Mistakes, match="cannot be read"):
        load_config(tmp_path)


def test_overrides(config):
    made = config(
        GOOD, "limit=5", "keep=[0.5, 64]", "methods.0={name: todre, tau: null}", "methods.1=fopru", "output=x"
    )
    (setting,) = made.settings
    assert setting.limit == 5
    assert setting.budgets == (("keep", 0.5), ("keep", 64))
    assert [entry.label for entry in setting.methods] == ["todre", "fopru"]
    assert str(made.output) == "x"
    assert made.resolved["limit"] == 5
    assert made.text == GOOD
    (setting,) = config(GOOD + "generation: {until: '.'}\n", "generation.max_new_tokens=4").settings
    assert setting.generation == {"until": ".", "max_new_tokens": 4}
    first, second = config("runs:\n" + "  - {model: a/b, tasks: [gqa]}\n" * 2, "runs.1.name=other", "keep=1").settings
    assert (first.name, second.name) == ("b", "other")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("limit", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("limit=0", "limit must be a whole number"),
        ("limt=3", "Did you mean 'limit'?"),
        ("methods.7=fopru", "which has no place '7'"),
        ("methods.x=fopru", "which has no place 'x'"),
        ("keep.a=3", "keep is 0.25, which has no part 'a'"),
        ("runs.0.limit=3", "runs is not in the file, so it has no place 0. The file is about one model: write limit=3"),
        ("published.0.value=3", "published is not in the file, so it has no place 0."),
        ("keep=[", "not YAML"),
        ("keep=!!python/name:os.system", "no plain value"),
    ],
)
def test_overrides_that_are_mistakes(mistakes, override, words):
    ((where, what),) = mistakes(GOOD, override)
    assert words in what
    assert where == f"--set {override}"
