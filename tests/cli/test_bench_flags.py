"""Which cells the flags of `vlmprune bench` make, which flags contradict each other, and what the tables say."""

from __future__ import annotations

import json

import pytest

FAST = ("--pairs", 2, "--plain-runs", 1, "--stage-runs", 1, "--new-tokens", 4, "--prompt-tokens", 8)
ATP = ("--option", "weights=atp-scene-llava")


@pytest.fixture
def bench(cli, folders):
    return lambda *argv: cli("bench", "--model", folders["llava"], *FAST, *argv)


def test_methods_without_a_budget(cli, tmp_path):
    """One job of theirs, beside one per budget of the others; an option goes to the method that has it."""
    file = tmp_path / "r.json"
    code, out, err = cli("bench", "--model", "scene-llava", "--method", "fopru,atp", *ATP, "--keep", "16,32", *FAST,
                         "--json", file)  # fmt: skip
    assert code == 0, err
    made = [(c["method"], c["budget"], c["options"]) for c in json.loads(file.read_text())["cells"]]
    assert made == [
        ("fopru", "16", {"keep": 16}),
        ("atp", "-", {"weights": "atp-scene-llava"}),
        ("fopru", "32", {"keep": 32}),
    ]
    assert "WARNING" not in out


def test_the_default_budget_is_nothing_to_a_method_without(cli):
    code, _, err = cli("bench", "--model", "scene-llava", "--method", "atp", *ATP, *FAST)
    assert code == 0, err
    assert "\natp, batch 1:" in err


@pytest.mark.parametrize("word", ["keep", "average"])
def test_a_budget_for_methods_without_one_alone(cli, word):
    code, _, err = cli("bench", "--model", "scene-llava", "--method", "atp", *ATP, f"--{word}", 64)
    assert code == 2
    assert f"'atp' has no budget {word}" in err
    assert "follows from the average" in err


def test_a_published_schedule(bench, tmp_path):
    file = tmp_path / "r.json"
    code, _, err = bench("--method", "fastv", "--keep", "none,4", "--json", file)
    assert code == 0, err
    assert [c["options"] for c in json.loads(file.read_text())["cells"]] == [{}, {"keep": 4}]
    code, _, err = bench("--method", "fopru", "--keep", "none")
    assert code == 2
    assert "fopru needs keep=" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--selection", "--method", "fopru"), "--selection times greedy selection alone: --method would have no"),
        (("--selection", "--model", "x", "--keep", 4), "--keep, --model would have no effect"),
        (("--selection", "--pairs", 0), "--pairs must be at least 1"),
        (("--from", "r.json", "--keep", 4, "--quick"), "--from measures nothing: --keep, --quick would have no"),
        (("--from", "r.json", "--json", "s.json"), "--from measures nothing: --json would"),
        (("--from", "r.json", "--selection"), "would have no effect"),
        (("--from", "r.json", "--kernels", "torch"), "--kernels would have no effect"),
        (("--kernels", "cutlass"), "'cutlass' is not one of"),
    ],
)
def test_contradictions(cli, argv, said):
    code, out, err = cli("bench", *argv)
    assert code == 2
    assert said in err
    assert not out


@pytest.mark.parametrize(("pairs", "said"), [(3, "3 interleaved pairs with their range"), (6, "its 95 % interval")])
def test_few_pairs_have_a_range(pairs, said):
    from vlmprune.eval.bench.report import selection_text
    from vlmprune.eval.bench.selection import compare_selection

    assert said in selection_text(compare_selection(tokens=40, keep=5, dim=8, pairs=pairs))


def test_times_carry_their_spread_and_ratios_their_pairs(bench):
    out = bench("--method", "random", "--keep", 4)[1]
    first, decode = (
        next(x for x in part.splitlines() if x.startswith("random"))
        for part in out.split("Token: ")[0].split("First token: ")
    )
    assert first.count("±") == 1  # two pruned runs and one unpruned
    assert decode.count("±") == 3
    assert "of one interleaved pair alone" in out
    assert "2 interleaved pairs with their range" in out
    assert ", of which there are fewer" in out


def test_quick_takes_a_pair_for_every_unpruned_run(cli, tmp_path):
    from vlmprune.eval.bench.asked import QUICK

    assert QUICK["plain_runs"] == QUICK["pairs"]
    file = tmp_path / "r.json"
    assert cli("bench", "--shape", "scene-llava", "--method", "grid", "--quick", "--json", file)[0] == 0
    cell = json.loads(file.read_text())["cells"][0]
    assert cell["speedup"]["pairs"] == cell["first_token_ms"]["pruned"]["runs"] == 5


def test_the_oracles_token_and_answer_stand_beside(cli, folders, tmp_path):
    file = tmp_path / "r.json"
    cli("bench", "--model", folders["llava"], *FAST, "--method", "random", "--keep", 4, "--json", file)
    found = json.loads(file.read_text())
    cell = found["cells"][0]
    for who, first, step in (("unpruned", 100, 10), ("pruned", 40, 20), ("oracle", 10, 10)):
        cell["first_token_ms"][who]["median"], cell["decode_ms"][who] = (
            first,
            dict.fromkeys(("median", "low", "high", "runs"), step),
        )
    file.write_text(json.dumps(found))
    row = cli("bench", "--from", file)[1].split("token overhead")[1].splitlines()[2].split()
    assert row[6:8] == ["20.0", "±0%"]
    assert row[8:10] == ["10.0", "±0%"]
    assert row[-2:] == ["1.30x", "3.25x"]  # 130 / 100, 130 / 40


def test_kernels_are_recorded_and_what_replaced_them_is_said_once(bench, cli, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = tmp_path / "r.json"
    code, out, err = bench("--method", "random,grid", "--keep", 4, "--kernels", "triton", "--json", file)
    assert code == 0, err
    found = json.loads(file.read_text())["settings"]
    assert found["kernels"] == "triton"
    why = next(text for text in found["replaced"] if text.startswith("select_gather: not on triton, since"))
    assert err.count(why) == 1
    assert why in out
    other = tmp_path / "other.json"
    code, out, _ = cli("bench", "--compare", file, "--kernels", "torch", "--json", other)
    assert code == 0
    assert "kernels: triton -> torch" in out
    assert json.loads(other.read_text())["settings"]["replaced"] == []


def test_kernels_are_forced_while_a_run_lasts(bench, monkeypatch):
    from vlmprune.eval.bench import measure
    from vlmprune.kernels import choice

    seen, real = [], measure.measure_method
    monkeypatch.setattr(measure, "measure_method", lambda *a: seen.append(choice.wanted("merge")) or real(*a))
    assert bench("--method", "random", "--keep", 4, "--kernels", "torch")[0] == 0
    assert seen == ["torch"]
    assert choice.wanted("merge") == "auto"
    monkeypatch.setenv("VLMPRUNE_KERNELS", "tritn")
    code, _, err = bench("--method", "random", "--keep", 4)
    assert code == 2
    assert "'triton'" in err


def test_no_memory_for_the_prompts(bench):  # more than any address space has
    code, _, err = bench("--method", "random", "--keep", 4, "--batch", 10**14)
    assert code == 1
    assert "out of memory" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("keep", ["16", "1000", "100%"])
def test_a_budget_of_everything_is_said(bench, keep):
    code, _, err = bench("--method", "random", "--keep", f"{keep},4")
    assert code == 0, err
    assert err.count("keeps all 16 patches: nothing is pruned") == 1


@pytest.mark.parametrize(("new", "said"), [(1, False), (2, True)])
def test_too_few_tokens_to_decode(cli, folders, new, said):
    code, out, err = cli("bench", "--model", folders["llava"], *FAST, "--new-tokens", new, "--method", "random")
    assert code == 0
    assert "decode step" not in out
    assert "Answer" not in out
    assert ("only warms up and is not measured" in err) == said
