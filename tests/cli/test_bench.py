"""`vlmprune bench` as a user types it."""

from __future__ import annotations

import json

import pytest

FAST = ("--pairs", 2, "--plain-runs", 1, "--stage-runs", 1, "--new-tokens", 4, "--prompt-tokens", 8)


@pytest.fixture
def bench(cli, folders):
    def run(*argv, model="llava"):
        return cli("bench", "--model", folders[model], *FAST, *argv)

    return run


def test_a_whole_run(bench, tmp_path):
    files = [tmp_path / name for name in ("r.json", "r.csv", "r.png")]
    code, out, err = bench(
        "--method", "fopru,fastv", "--keep", "4,50%", "--batch", "1,2", "--json", files[0], "--csv", files[1], "--plot",
        files[2],
    )  # fmt: skip
    assert code == 0, err
    assert all(file.stat().st_size > 0 for file in files)
    for word in ("overhead", "oracle", "Amdahl", "tower", "selection", "KV MB", "by formula", "fastv", "unpruned"):
        assert word in out
    found = json.loads(files[0].read_text())
    assert len(found["cells"]) == 8
    assert len(found["unpruned"]) == 2
    assert "WARNING" not in out
    assert "building" not in err


def test_views(bench):
    code, out, err = bench("--method", "globalcom2,pool", "--keep", "0.25", "--sizes", 5, model="next")
    assert code == 0, err
    assert "globalcom2" in out
    assert "A new picture size costs" in out
    assert "5 random sizes have" in out


def test_going_on(bench, tmp_path):
    file = tmp_path / "r.json"
    assert bench("--keep", "4", "--method", "random", "--json", file)[0] == 0
    before = json.loads(file.read_text())
    code, _, err = bench("--keep", "4,8", "--method", "random", "--json", file, "--resume")
    after = json.loads(file.read_text())
    assert code == 0
    assert after["cells"][0] == before["cells"][0]
    assert [cell["budget"] for cell in after["cells"]] == ["4", "8"]
    assert "keep 8" in err
    assert "keep 4" not in err


def test_going_on_with_another_run_is_refused(bench, tmp_path):
    file = tmp_path / "r.json"
    assert bench("--keep", "4", "--method", "random", "--json", file)[0] == 0
    code, _, err = bench("--keep", "4", "--method", "random", "--json", file, "--resume", "--pairs", 3)
    assert code == 2
    assert "pairs 2 there and 3 here" in err


def test_comparing(bench, cli, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert bench("--keep", "4", "--method", "random", "--json", old)[0] == 0
    # everything but the files comes from the old run
    code, out, err = cli("bench", "--compare", old, "--json", new)
    assert code == 0, err
    assert f"Changes since {old}" in out
    assert "not measured alike" not in out
    assert json.loads(new.read_text())["asked"] == json.loads(old.read_text())["asked"]
    code, out, _ = cli("bench", "--from", new, "--compare", old)
    assert code == 0
    assert "KV bytes" in out


def test_results_from_a_file_are_not_measured(bench, cli, tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    out = bench("--keep", "4", "--method", "random", "--json", file)[1]
    monkeypatch.setattr("vlmprune.eval.bench.run.measured", lambda *_: pytest.fail("something was measured"))
    assert cli("bench", "--from", file)[1] == out


def test_one_new_token(bench):
    code, out, err = bench("--keep", "4", "--new-tokens", 1)
    assert code == 0, err
    assert "token overhead" not in out


def test_a_shape(cli):
    code, out, err = cli("bench", "--shape", "scene-llava", "--keep", "26", "--method", "grid", *FAST)
    assert code == 0, err
    assert "random weights" in err
    assert "256 visual tokens" in out


def test_an_oracle_that_computed_something_else_is_reported(bench, cli, tmp_path):
    file = tmp_path / "r.json"
    assert "WARNING" not in bench("--keep", "4", "--method", "random", "--json", file)[1]
    found = json.loads(file.read_text())
    found["cells"][0]["same_as_oracle"] = 0.5
    file.write_text(json.dumps(found))
    assert "WARNING: random 4: the oracle's logits differ" in cli("bench", "--from", file)[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--shape", "smal"), "'small'"),
        (("--model", "x/y", "--shape", "small"), "not allowed with"),
        (("--shape", "scene-llava", "--method", "foprru"), "fopru"),
        (("--shape", "scene-llava", "--method", "globalcom2"), "single view"),
        (("--keep", "0"), "keep=0"),
        (("--keep", ","), "--keep is empty"),
        (("--batch", "two"), "--batch 'two'"),
        (("--pairs", "0"), "--pairs must be at least 1"),
        (("--sizes", "0"), "--sizes must be at least 1"),
        (("--selection", "--sizes", "3"), "--sizes would have no effect"),
        (("--shape", "scene-llava", "--sizes", "3"), "have one layout"),
        (("--prompt-tokens", "1"), "--prompt-tokens must be at least 2"),
        (("--shape", "scene-llava", "--prompt-tokens", "5000"), "positions"),
        (("--device", "tpu"), "unknown device"),
        (("--resume",), "--resume needs the --json"),
        (("--from", "missing.json"), "no such file"),
        (("--compare", "missing.json"), "no such file"),
        (("--json", "no/such/r.json"), "no folder"),
        (("--plot", "r.xyz"), "name it .png"),
        (("--selection", "--csv", "r.csv"), "--csv would have no effect"),
    ],
)
def test_mistakes(cli, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("bench", *argv)
    assert code == 2
    assert said in err
    assert not out


def test_selection_alone(cli, tmp_path, monkeypatch):
    from vlmprune.eval.bench import selection

    real = selection.compare_selection
    small = lambda tokens, keep, device, pairs: real(80, 10, dim=8, device=device, pairs=pairs)  # noqa: E731
    monkeypatch.setattr(selection, "compare_selection", small)
    file = tmp_path / "s.json"
    code, out, _ = cli("bench", "--selection", "--pairs", 2, "--device", "cpu", "--json", file)
    assert code == 0
    assert "80 -> 10" in out
    assert [one["objective"] for one in json.loads(file.read_text())["selection"]] == 2 * [
        "max_min",
        "log_det",
        "coverage",
    ]
