"""`vlmprune budget`: every word gives all others."""

from __future__ import annotations

import json

import pytest

from vlmprune.runtime import answering


@pytest.fixture
def told(cli, folders):
    """`told(flags...)`: the JSON of the command, without times."""

    def call(*given):
        code, out, err = cli("budget", "--model", folders["llava"], "--json", "--repeats", "0", *given)
        assert code == 0, err
        return json.loads(out)

    return call


def test_every_word_gives_the_others(told):
    by_keep = told("--method", "fastv", "--keep", "0.5")
    shares = {name: row["share"] for name, row in by_keep["costs"].items()}
    assert (shares["left"], shares["layer_average"]) == (0.5, 0.75)
    for flag, word in (("--average", "layer_average"), ("--flops", "flops"), ("--kv", "kv")):
        again = told("--method", "fastv", flag, str(shares[word]))
        assert again["costs"] == by_keep["costs"], flag
    other = told("--method", "fastv", "--flops", f"{100 * shares['flops'] - 1}%")
    assert other["costs"]["left"]["pruned"] < by_keep["costs"]["left"]["pruned"]


def test_time_is_measured_and_solved_for(cli, folders, monkeypatch):
    """A clock by which a pruned prefill takes half as long, and as much less as the method keeps."""
    kept = []

    def times(loaded, methods, inputs, repeats):
        kept.append(methods[0].keep)
        return {"plain_ms": 10.0, "pruned_ms": 5 + 5 * methods[0].keep, "ratio": 2 / (1 + methods[0].keep), "pairs": 5}

    monkeypatch.setattr(answering, "prefill_times", times)
    given = ["--model", folders["llava"], "--method", "fopru"]
    code, out, err = cli("budget", *given, "--first-token", "0.75", "--json")
    assert code == 0, err
    assert json.loads(out)["options"] == {"keep": 0.5}
    assert json.loads(out)["costs"]["first_token_ms"] == {"unpruned": 10, "pruned": 7.5, "share": 0.75}
    code, _, err = cli("budget", *given, "--first-token", "0.4")
    assert (code, "--first-token 0.4 cannot be met" in err) == (2, True)
    assert len(kept) > 3


def test_what_a_person_reads(cli, folders):
    code, out, _ = cli("budget", "--model", folders["llava"], "--method", "fopru", "--keep", "4", "--repeats", "2")
    assert code == 0
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "keep=0.25" in lines["visual tokens left"]
    assert "ms" in lines["first token"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--method", "fopru", "--keep", "4", "--flops", "0.5"], "--flops is not allowed with --keep"),
        (["--method", "fopru", "--flops", "2"], "flops=2 is out of range"),
        (["--method", "fopru", "--flops", "many"], "--flops 'many' is no share"),
        (["--method", "fopru"], "needs keep="),
        (["--method", "fopro", "--flops", "0.5"], "Did you mean 'fopru'"),
        (["--method", "todre", "--keep", "4"], "hangs on the picture"),
        (["--method", "fastv", "--kv", "0.1"], "--kv 0.1 cannot be met"),
    ],
)
def test_mistakes(cli, folders, given, words):
    code, out, err = cli("budget", "--model", folders["llava"], *given)
    assert (code, out, words in err) == (2, "", True), err
