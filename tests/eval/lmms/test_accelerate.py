"""Several processes share the documents of an evaluation and come to the result of one."""

import json
import socket
import sys
import textwrap

import harness
import pytest

from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.eval.lmms.parallel import place
from vlmprune.runtime.errors import UserError

ON_CPU = {"ACCELERATE_USE_CPU": "true"}
ASKED = ["vlmprune_scene_llava_digit", "vlmprune_scene_llava_unseen_exist"]
LIMIT = 7  # odd: one process has a document more, and the other one repeats one to keep in step
TIMELESS = ("task", "doc", "tokens_before", "tokens_after", "layer_average", "output_tokens")
SCRIPT = """
    import json, os, sys
    import harness
    from vlmprune.eval.lmms.model import VlmPrune
    lm = VlmPrune("scene-llava", method="fopru", keep=20, batch_size=2, device="cpu")
    found = []
    for method, options in (("fopru", {"keep": 20}), ("none", {})):
        lm.use(method, **options)
        answered = []
        lm.progress = lambda done, total: answered.append(total)
        result = harness.evaluate(lm, %r, limit=%d)
        found.append([result, lm.take_records(), lm.take_records(), answered[-1]])
    out = f"{sys.argv[1]}/rank{os.environ['RANK']}.json"
    json.dump([lm.rank, lm.world_size, found], open(out, "w"), default=float)
"""


def launch(processes=2):
    """`accelerate launch` for several processes on a CPU, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = [sys.executable, "-P", "-m", "accelerate.commands.launch"]
    return [*python, "--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]


def scores(result):
    """Metrics without their names' decorations and without the tables' aliases."""
    return {
        task: {k: v for k, v in values.items() if k != "alias" and v != "N/A"}
        for task, values in result["results"].items()
    }


@pytest.fixture(scope="module")
def alone():
    """The same evaluations in this process: (result, records) of fopru and of none."""
    lm = VlmPrune("scene-llava", batch_size=2, device="cpu")
    found = []
    for method, options in (("fopru", {"keep": 20}), ("none", {})):
        lm.use(method, **options)
        found.append((harness.evaluate(lm, ASKED, limit=LIMIT), lm.take_records()))
    return found


def test_two_processes_through_python(alone, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT % (ASKED, LIMIT)))
    helpers = harness.__file__.rpartition("/")[0]
    harness.process(*launch(), script, tmp_path, cwd=tmp_path, PYTHONPATH=helpers, **ON_CPU)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank[:2] for rank in ranks] == [[0, 2], [1, 2]]
    for here, first, second in zip(alone, ranks[0][2], ranks[1][2], strict=True):
        result, records = here
        assert second[0] is None  # results are the first process's business
        for task in ASKED:
            got, wanted = scores(first[0])[task], scores(result)[task]
            assert got["exact_match,none"] == wanted["exact_match,none"]
            assert got == pytest.approx(wanted, rel=1e-12)  # lmms-eval's error adds up in another order
            assert harness.answers(first[0], task) == harness.answers(result, task)
            assert sorted(s["doc_id"] for s in first[0]["samples"][task]) == list(range(LIMIT))
        # both know what all requests cost, each request once; a second call has nothing
        for found in (first, second):
            assert [[r[k] for k in TIMELESS] for r in found[1]] == [[r[k] for k in TIMELESS] for r in records]
            assert found[2] == []
        assert first[1] == second[1]
        # neither answered all: 4 of 7 documents of both tasks
        assert first[3] == second[3] == 8
        assert first[0]["throughput"]["total_gen_tokens"] == result["throughput"]["total_gen_tokens"]
        assert first[0]["throughput"]["avg_visual_tokens_entering_llm"] == records[0]["tokens_after"]
    assert alone[0][1][0]["tokens_after"] == 20


def test_two_processes_through_the_command(alone, tmp_path):
    asked = harness.command(
        *launch(), model_args="pretrained=scene-llava,method=fopru,keep=20", asked=",".join(ASKED), out="out",
        extra=("--limit", str(LIMIT), "--batch_size", "2"),
    )  # fmt: skip
    harness.process(*asked, cwd=tmp_path, **ON_CPU)
    results, samples = harness.written(tmp_path / "out")
    result, records = alone[0]
    for task in ASKED:
        assert [s["doc_id"] for s in samples[task]] == list(range(LIMIT))
        assert [s["filtered_resps"] for s in samples[task]] == harness.answers(result, task)
        wanted = result["results"][task]["exact_match,none"]
        assert results["results"][task]["exact_match,none"] == wanted
    assert results["throughput"]["total_gen_tokens"] == sum(r["output_tokens"] for r in records)


def test_processes_that_cannot_talk_are_refused(monkeypatch):
    """As when lmms-eval's command made its accelerator without being told of the CPU."""
    from accelerate import Accelerator

    Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"there are 2 processes, and accelerate ties 1 together.*ACCELERATE_USE_CPU"):
        place("cpu", None)
    with pytest.raises(UserError, match="device_map"):
        place("cpu", "auto")
    with pytest.raises(UserError, match="each takes its own GPU"):
        place("cuda:1", None)


def test_one_process_where_several_were_meant(monkeypatch, capsys):
    """`accelerate launch --cpu --num_processes 2` starts one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert place("cpu", None) == ("cpu", None)
    assert "started one process only" in capsys.readouterr().err
