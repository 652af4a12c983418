"""`downsample` on scene-qwen: the commands show a smaller picture beside methods, with as many tokens, and say so."""

from __future__ import annotations

import json
from pathlib import Path

from vlmprune.eval import testbed

PICTURES = Path(testbed.__file__).parent / "pictures"
QUESTION = "how many red objects are there ?"


def test_run_shows_it_beside_a_method(cli, tmp_path):
    asked = ("run", "--image", PICTURES / "scene1.png", "--prompt", QUESTION, "--model", "scene-qwen")
    asked += ("--method", "downsample,random", "--keep", "0.25", "--max-new-tokens", 3)
    code, out, err = cli(*asked, "--repeats", 1, "--save", tmp_path / "kept.png")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert rows["full"][3] == "64"
    assert rows["downsample"][1:8] == ["(fewer", "pixels)", "0.25", "64", "->", "16", "16.0"]
    assert rows["random"][1:6] == ["0.25", "64", "->", "16", "16.0"]
    assert "Fewer pixels: the picture itself is smaller" in out
    code, out, _ = cli(*asked, "--repeats", 0, "--json")
    fewer, pruned = json.loads(out)["pruned"]
    assert (fewer["fewer_pixels"], pruned["fewer_pixels"]) == (True, False)
    assert [one["images"][0]["patches_before"] for one in (fewer, pruned)] == [64, 64]
    assert [one["images"][0]["patches_after"] for one in (fewer, pruned)] == [16, 16]


def test_on_a_family_of_equal_views_it_is_what_it_was(cli, tmp_path):
    asked = ("run", "--image", PICTURES / "scene1.png", "--prompt", QUESTION, "--model", "scene-llava", "--repeats", 0)
    code, out, err = cli(*asked, "--method", "downsample", "--keep", "0.25", "--save", tmp_path / "kept.png")
    assert code == 0, err
    assert "fewer pixels" not in out.lower()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["downsample"][1:3] == ["0.25", rows["full"][3]]  # all tokens


def test_fidelity_measures_it(cli, tmp_path):
    """Pictures of several shapes in one batch; the unpruned model sees the whole ones."""
    (tmp_path / "prompts.txt").write_text(QUESTION)
    code, out, err = cli(
        "fidelity", "--images", PICTURES / "*e[12].png", "--prompts", tmp_path / "prompts.txt", "--model", "scene-qwen",
        "--method", "fopru", "--controls", "downsample,random", "--seeds", 1, "--keep", "0.25", "--repeats", 1,
        "--worst", 1, "--max-new-tokens", 3, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("downsample")]
    assert lines[0].startswith("downsample (fewer pixels)")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    tokens = {(row["picture"], row["label"].split(",")[0]): (row["tokens_before"], row["tokens_after"]) for row in rows}
    names = {name for name, _ in tokens}
    assert len(names) == 4
    for name in names:
        before, after = tokens[name, "fopru"]
        assert tokens[name, "random"] == (before, after) == (before, before // 4)
        fewer = tokens[name, "downsample"]
        assert fewer[0] == before
        assert 0.6 * after <= fewer[1] <= after
    costs = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert len(costs) == 3


def test_a_method_is_drawn_where_it_suffers(cli, tmp_path):
    """`downsample` as a method, with its worst pictures."""
    (tmp_path / "prompts.txt").write_text(QUESTION)
    code, _, err = cli(
        "fidelity", "--images", PICTURES / "scene1.png", "--prompts", tmp_path / "prompts.txt", "--model", "scene-qwen",
        "--method", "downsample", "--controls", "none", "--keep", "0.25", "--repeats", 0, "--worst", 1,
        "--max-new-tokens", 3, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("worst-*.png"))) <= 1
