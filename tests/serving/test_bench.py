"""`vlmprune bench --engine vllm` on the embedded models: who takes part, and what is said of them."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("model", "keep", "rival"), [("scene-llava", "64,0.1", 0), ("scene-llava-next", "128", 1)])
def test_everybody_takes_part_and_is_answered(engines, cli, tmp_path, model, keep, rival):
    engines.stop()
    file = tmp_path / "found.json"
    given = ["--model", model, "--keep", keep, "--concurrency", "1,3", "--pairs", "1", "--new-tokens", "4"]
    code, out, err = cli("bench", "--engine", "vllm", "--method", "vtc_cls", *given, "--json", str(file))
    assert code == 0, err
    found = json.loads(file.read_text())
    budgets = keep.count(",") + 1
    each = ["unpruned", *["pruned", "ceiling", *["fewer pixels"] * rival] * budgets]
    assert [row["runner"] for row in found["rows"]] == each * 2
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(4 * row["requests_per_second"])
        assert (row["prompt"] < found["rows"][0]["prompt"]) == (row["runner"] != "unpruned")
    by_name = {row["runner"]: row["prompt"] for row in found["rows"][: len(each)]}
    assert by_name["ceiling"] == by_name["pruned"]  # as many rows
    assert len(found["embed_multimodal"]) == budgets
    assert "speed-up" in out
