"""`vlmprune fidelity` end to end on tiny models: what it measures, writes and refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from leftovers import ours
from PIL import Image
from tiny_folders import PICTURES, answer

import vlmprune
from vlmprune.eval import testbed
from vlmprune.eval.fidelity import costs
from vlmprune.eval.fidelity import measure as fidelity
from vlmprune.eval.fidelity import run as fidelity_run
from vlmprune.eval.lmms import store
from vlmprune.runtime import loading

PROMPTS = ["what colour is it ?", "is word20 word21 word22 ?"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def run(cli, folders, pictures, prompts, tmp_path):
    """`run(flag=value, ...)`: exit code, stdout, stderr and results.json (None if not written)."""

    def call(**given):
        flags = {
            "images": pictures, "prompts": prompts, "model": folders["next"], "method": "fopru", "keep": "4",
            "max_new_tokens": 4, "out": tmp_path / "out", "repeats": 0,
        } | given  # fmt: skip
        argv = ["fidelity"]
        for flag, value in flags.items():
            if value is not None:
                argv += [f"--{flag.replace('_', '-')}", *([value] if value is not True else [])]
        code, out, err = cli(*argv)
        file = Path(flags["out"]) / "results.json"
        return code, out, err, json.loads(file.read_text()) if file.is_file() else None

    return call


@pytest.fixture
def refused(run):
    """The message of a refused command that wrote nothing."""

    def call(**given):
        code, out, err, results = run(**given)
        assert (code, out, results) == (2, "", None), err
        return err.splitlines()[-1]

    return call


def test_end_to_end(run, folders, pictures, tmp_path):
    code, out, err, results = run(method="fopru,fastv", keep="4,25%", worst=2)
    assert code == 0
    assert (results["pictures"], results["prompts"], results["planned"], results["skipped"]) == (4, 8, 8, [])
    # two methods, three seeds of random, grid and pool, at two budgets, on eight prompts
    assert len(results["rows"]) == (2 + 3 + 1 + 1) * 2 * 8
    labels = [f"{m}, keep {k}" for k in (4, 0.25) for m in ("fopru", "fastv")]
    labels += [f"{m}, keep {k}" for k in (4, 0.25) for m in ("random", "grid", "pool")]
    assert [line["label"] for line in results["summary"]] == labels
    assert [line["control"] for line in results["summary"]] == [False] * 4 + [True] * 6
    assert all((line["over_random"] is None) == (line["method"] == "random") for line in results["summary"])
    for row in results["rows"]:
        if row["picture"] == "b.jpg" and row["label"] in ("fopru, keep 4", "random, keep 4"):
            seed = {} if row["seed"] is None else {"seed": row["seed"]}
            asked = folders["next"], pictures / row["picture"], row["prompt"], 4
            assert row["unpruned"] == answer(*asked)
            assert row["pruned"] == answer(*asked, row["label"].split(",")[0], keep=4, **seed)
            assert row["tokens_before"] == 48 + 4
            assert row["tokens_after"] == 4 + 4
    # the table says what the file says
    fopru = next(line for line in results["summary"] if line["label"] == "fopru, keep 4")
    share = 100 * sum(r["answer_agrees"] for r in results["rows"] if r["label"] == "fopru, keep 4") / 8
    assert fopru["measures"]["answer_agrees"]["value"] == pytest.approx(share / 100)
    assert re.search(rf"^fopru +keep 4 .* {share:.1f} \[", out, re.M)
    assert "random (3 seeds)" in out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out
    assert err == f"loading {folders['next']} ...\n"
    names = [".lock", "agreement.svg", "report.html", "report.md", "results.json", "rows.jsonl"]
    names += [f"worst-{m}.png" for m in ("fastv-keep-0.25", "fastv-keep-4", "fopru-keep-0.25", "fopru-keep-4")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names  # no temporary file either


class Tags(HTMLParser):
    """Checks that tags close, and collects links and text."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page(run, prompts, tmp_path):
    prompts.write_text("is <b> a | b & _c_ ?\n")
    code, _, _, results = run(worst=3)
    assert code == 0
    page = Tags()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    still, *pictures = [link for link in page.links if not link.startswith("#")]
    assert still.startswith("data:image/svg+xml;base64,")  # of the plot, where no script runs
    assert len(pictures) == 3
    for link in pictures:  # nothing is fetched from anywhere
        head, data = link.split(",", 1)
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 256
    assert page.text.count("is <b> a | b & _c_ ?") == 3
    worst = [row for row in results["rows"] if row["label"] == "fopru, keep 4"]
    worst.sort(key=lambda row: (row["answer_agrees"], -row["kl_answer"]))
    order = [row["picture"] for row in worst][:3]
    assert re.findall(r"\d\. (\S+\.(?:png|jpg|WEBP))", page.text) == order
    markdown = (tmp_path / "out" / "report.md").read_text()
    cells = [re.split(r" (?<!\\)\| ", line) for line in markdown.splitlines() if re.match(r"\| \d \|", line)]
    assert [cell[1] for cell in cells] == order
    assert all(len(cell) == 6 and cell[2] == r"is \<b> a \| b & \_c\_ ?" for cell in cells)
    assert "](worst-fopru-keep-4.png)" in markdown
    with Image.open(tmp_path / "out" / "worst-fopru-keep-4.png") as sheet:
        assert sheet.width > 4 * 256  # two pictures in a row, each with what was kept
        assert sheet.height > 2 * 128


def test_all_tokens_kept(run, tmp_path):
    code, out, _, results = run(method="fopru,fastv", keep="100%", controls="none")
    assert code == 0
    assert {row["answer_agrees"] and row["first_agrees"] for row in results["rows"]} == {True}
    assert {row["kl_first"] + row["kl_answer"] for row in results["rows"]} == {0.0}
    assert "100.0 [39.8, 100.0]" in out
    assert "random" not in out
    assert "Every picture got the same answer" in (tmp_path / "out" / "report.md").read_text()
    assert not list((tmp_path / "out").glob("worst-*"))


def test_order_and_batches_mean_nothing(run, pictures, prompts, tmp_path):
    def rows(**given):
        code, _, _, results = run(controls="random", seeds=2, **given)
        assert code == 0
        return results

    first = rows(batch=1, out=tmp_path / "one")
    pairs = [{"image": name, "prompt": prompt} for prompt in PROMPTS[::-1] for name in sorted(PICTURES, reverse=True)]
    other = tmp_path / "pairs.jsonl"
    other.write_text("\n".join(json.dumps(pair) for pair in pairs))
    second = rows(batch=3, prompts=other, out=tmp_path / "three")

    def key(row):
        return (row["label"], row["picture"], row["prompt"], row["seed"] or 0)

    for a, b in zip(sorted(first["rows"], key=key), sorted(second["rows"], key=key), strict=True):
        about = [{k: v for k, v in row.items() if "kl" not in k and k != "along"} for row in (a, b)]
        assert about[0] == about[1]
        assert [n for *n, _ in a["along"]] == [n for *n, _ in b["along"]]
        assert (a["kl_first"], a["kl_answer"]) == pytest.approx((b["kl_first"], b["kl_answer"]), rel=1e-3, abs=1e-6)
    for a, b in zip(first["summary"], second["summary"], strict=True):
        assert a["measures"]["answer_agrees"] == b["measures"]["answer_agrees"]
        assert list(a["measures"]["kl_answer"].values()) == pytest.approx(
            list(b["measures"]["kl_answer"].values()), rel=1e-3
        )


def test_pictures_that_cannot_be_read(run, pictures, tmp_path):
    (pictures / "b.jpg").write_bytes(b"no picture")
    Image.new("RGB", (24, 24)).save(pictures / "e.png")
    (pictures / "e.png").write_bytes((pictures / "e.png").read_bytes()[:40])
    code, _, err, results = run(controls="none")
    assert code == 0
    assert (results["pictures"], results["prompts"], results["planned"]) == (3, 6, 10)
    assert [one["picture"] for one in results["skipped"]] == ["b.jpg", "e.png"]
    assert "2 pictures could not be read, and left out: b.jpg, e.png" in err
    assert f"left out: {pictures / 'b.jpg'} is not a picture" in err
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Left out: 2 pictures" in report
    assert "Interrupted" not in report


def test_no_picture_can_be_read(refused, pictures):
    for name in PICTURES:
        (pictures / name).write_bytes(b"no picture")
    assert "none of the 4 pictures could be read, the first of them a.png: " in refused()


def test_json(run):
    code, out, err, results = run(json=True, controls="none")
    assert code == 0
    assert json.loads(out) == results
    assert "report: " in err


def test_limit_and_seeds(run, tmp_path):
    code, _, _, results = run(limit=2, method="random", seeds=4, option="positions=original")
    assert code == 0
    assert {row["picture"] for row in results["rows"]} == {"a.png", "b.jpg"}
    random, grid, pool = results["summary"]  # what is asked for is no control
    assert (random["method"], random["seeds"], random["control"]) == ("random", [0, 1, 2, 3], False)
    assert random["options"] == {"keep": 4, "positions": "original"}
    assert (grid["options"], pool["control"]) == ({"keep": 4}, True)
    code, _, _, results = run(limit=1, method="random", option="seed=7", controls="none", out=tmp_path / "seven")
    assert results["summary"][0]["seeds"] == [None]
    assert results["summary"][0]["options"] == {"keep": 4, "seed": 7}
    assert results["summary"][0]["measures"]["kl_first"]["low"] is None  # one picture


def test_interrupted(run, monkeypatch, tmp_path):
    whole, calls = fidelity.reference, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(fidelity, "reference", interrupt)
    code, out, err, results = run(batch=2, controls="none")
    assert code == 130
    assert "reporting on what is finished" in err
    assert (results["prompts"], results["planned"], len(results["rows"])) == (4, 8, 4)
    assert "4 prompts about 2 pictures" in out
    assert "Interrupted: 4 of 8 prompts" in (tmp_path / "out" / "report.md").read_text()
    code, out, _, results = run(out=tmp_path / "nothing")
    assert (code, out, results) == (130, "", None)


def same(results, others):
    """Whether two reports say the same, but for the command that made them."""
    return {k: v for k, v in results.items() if k != "about"} == {k: v for k, v in others.items() if k != "about"}


@pytest.mark.parametrize("steps", [2, 4, 9])
def test_a_stopped_run_is_gone_on_with(run, monkeypatch, tmp_path, steps):
    """Stopped after so many steps, in the middle of a batch: nothing is measured twice, and the report is the same."""
    whole, calls = fidelity.compare, []

    def compare(*args):
        if len(calls) == steps:
            raise KeyboardInterrupt
        calls.append(len(args[1]["input_ids"]))
        return whole(*args)

    # three steps for each of two batches
    setting = {"method": "fopru,fastv", "controls": "random", "seeds": 1, "batch": 3, "limit": 2, "worst": 1}
    _, _, _, unbroken = run(out=tmp_path / "unbroken", **setting)
    monkeypatch.setattr(fidelity, "compare", compare)
    code, _, _, _ = run(**setting)
    if steps < 6:
        assert code == 130
        assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 1 + sum(calls)
        code, out, err, _ = run(**setting)
        assert (code, out) == (2, "")  # a second run is refused by name, and loses nothing
        assert f"{tmp_path / 'out'} holds another run" in err
        assert "--resume" in err
    before, steps = sum(calls), 99
    code, out, err, resumed = run(resume=True, **setting)
    assert code == 0
    assert same(resumed, unbroken)
    assert sum(calls) == 4 * 3  # rows
    assert ("measured before" in err) == (before >= 9)


def test_what_a_resumed_run_asks_for_may_differ(run, pictures, monkeypatch, tmp_path):
    whole, calls = fidelity.compare, []
    monkeypatch.setattr(fidelity, "compare", lambda *args: (calls.append(len(args[1]["input_ids"])), whole(*args))[1])
    out = tmp_path / "out"
    assert run(controls="none")[0] == 0
    assert (sum(calls), [p.name for p in out.glob("*.png")]) == (8, ["worst-fopru-keep-4.png"])
    # another method, less pictures: nothing new for the first one, whose picture goes if it is not in the report
    code, _, err, results = run(resume=True, controls="none", method="fastv", limit=2)
    assert (code, sum(calls), {row["label"] for row in results["rows"]}) == (0, 8 + 4, {"fastv, keep 4"})
    assert [p.name for p in out.glob("*.png")] == ["worst-fastv-keep-4.png"]
    code, _, err, results = run(resume=True, controls="none", method="fopru,fastv", limit=2)
    assert (code, sum(calls), len(results["rows"])) == (0, 12, 8)
    assert "4 prompts of 4 measured before" in err
    # other options of the same name and budget, and a picture that was changed
    assert run(resume=True, controls="none", option="positions=original", limit=2)[0] == 0
    assert sum(calls) == 12 + 4
    Image.new("RGB", (24, 24), "red").save(pictures / "a.png")
    assert run(resume=True, controls="none", limit=2)[0] == 0
    assert sum(calls) == 16 + 2
    # another setting cannot be mixed in
    code, _, err, _ = run(resume=True, controls="none", max_new_tokens=3)
    assert code == 2
    assert "max_new_tokens 4, now 3" in err
    assert sum(calls) == 18


def test_what_a_killed_run_leaves(run, tmp_path):
    """Half a line at the end, or one that was damaged since."""
    _, _, _, whole = run(controls="none", batch=1, worst=0)
    rows = tmp_path / "out" / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:3], "{]\n", *lines[4:-1], lines[-1][:40]]))
    code, _, err, again = run(controls="none", batch=1, worst=0, resume=True)
    assert code == 0
    assert f"{rows}, line 4: damaged, and measured again" in err
    assert f"{rows}, line 9: damaged" in err
    assert err.count("damaged") == 2
    assert "6 prompts of 8 measured before" in err
    assert same(again, whole)
    assert sorted(rows.read_text().splitlines(keepends=True)) == sorted(lines)
    rows.write_text("".join(lines)[:-1])  # all of the last line but its end
    assert run(controls="none", batch=1, worst=0, keep="5", resume=True)[0] == 0
    assert len([json.loads(line) for line in rows.read_text().splitlines()]) == 1 + 8 + 8
    rows.write_text("x\ny\n")
    code, _, err, _ = run(resume=True)
    assert (code, f"{rows}, line 1" in err) == (2, True)


def test_two_at_once_in_one_folder(refused, tmp_path):
    with store.locked(tmp_path / "out", "fidelity", "--out FOLDER"):
        assert f"another `vlmprune fidelity` is writing into {tmp_path / 'out'}" in refused()


def test_short_of_memory(run, monkeypatch, tmp_path):
    whole, sizes = fidelity.reference, []

    def short(model, inputs, longest):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("no room")
        return whole(model, inputs, longest)

    monkeypatch.setattr(fidelity, "reference", short)
    limit = 2
    code, _, err, results = run(batch=8, controls="none")
    assert code == 0
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert "going on with 2 prompts at a time" in err
    assert results["prompts"] == 8
    limit = 0
    code, out, err, _ = run(batch=2, controls="none", out=tmp_path / "none")
    assert (code, out) == (1, "")
    assert "out of memory: no room" in err


def test_no_hook_is_left(run, monkeypatch, folders):
    loaded = loading.load(loading.find_model(folders["next"]))
    monkeypatch.setattr(loading, "load", lambda *_: loaded)
    assert run(controls="none", worst=1)[0] == 0
    assert not ours(loaded.model)
    with vlmprune.patch(loaded.model, "fopru", keep=4):  # the same look finds them where they are
        assert ours(loaded.model)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "fopro"}, ["unknown method 'fopro'", "Did you mean 'fopru'?"]),
        ({"controls": "gird"}, ["unknown method 'gird'", "Did you mean 'grid'?"]),
        ({"keep": "0"}, ["keep=0"]),
        ({"option": "stratagy=row"}, ["Did you mean 'strategy'?"]),
        ({"batch": "0"}, ["--batch must be at least 1"]),
        ({"max_new_tokens": "0"}, ["--max-new-tokens must be at least 1"]),
        ({"seeds": "0"}, ["--seeds must be at least 1"]),
        ({"limit": "0"}, ["--limit must be at least 1"]),
        ({"worst": "-1"}, ["--worst must be at least 0"]),
        ({"images": "./no/such"}, ["./no/such: no such folder"]),
        ({"prompts": "./none.txt"}, ["no such prompts file: ./none.txt"]),
        ({"model": "scene-lava"}, ["Did you mean 'scene-llava'?"]),
        ({"device": "tpu"}, ["unknown device 'tpu'"]),
        ({"keep": None, "average": "3", "method": "fastv"}, ["average=3 cannot be met"]),
    ],
)
def test_mistakes(refused, given, words):
    err = refused(**given)
    for word in words:
        assert word in err


def test_mistakes_in_files(refused, prompts, tmp_path):
    prompts.write_text("what is it ?\n\nis <image> like <image> ?\n")
    assert f"{prompts}, line 3: the prompt has <image> more than once" in refused()
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert "cannot make the folder" in refused(out=blocked / "out")


def test_a_method_that_does_not_fit_is_told_before_work_is_done(refused, folders, monkeypatch):
    monkeypatch.setattr(fidelity_run, "measure", lambda *_: pytest.fail("measured"))
    assert "[CLS]" in refused(model=folders["siglip"], method="vtc_cls")


def test_from_nothing(cli, tmp_path):
    """The example of the help, on fewer pictures: they come with their questions and answers."""
    code, _, err = cli("fidelity", "--limit", 2, "--keep", "100%", "--controls", "none", "--out", tmp_path / "out")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["pictures"], results["metric"]) == (2, "exact")
    score = results["summary"][0]["score"]
    assert score["unpruned"] == score["pruned"]
    assert score["unpruned"]["value"] > 0.5  # the model was trained for these


def test_embedded_model_and_pictures(cli, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("how many objects are there ?\nwhat colour is a zebra ?\n")
    pattern = Path(testbed.__file__).parent / "pictures" / "scene*.png"
    code, out, err = cli(
        "fidelity", "--images", pattern, "--prompts", prompts, "--keep", "100%", "--limit", 2, "--controls", "none",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert "scene-llava: 4 prompts about 2 pictures" in out
    assert "does not know these words: zebra" in err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert all(row["unpruned"] == row["pruned"] != "" for row in rows)


def test_labels(run, folders, pictures, tmp_path):
    """Right is what the unpruned model says of two pictures; of the two others nobody is right."""
    data = tmp_path / "data.jsonl"
    said = {name: answer(folders["next"], pictures / name, PROMPTS[0], 4) for name in sorted(PICTURES)}
    right = {name: text if i < 2 else "never said" for i, (name, text) in enumerate(said.items())}
    lines = [{"image": name, "prompt": PROMPTS[0], "answer": text} for name, text in right.items()]
    data.write_text("\n".join(map(json.dumps, lines)))
    given = {"prompts": None, "data": data, "controls": "random", "seeds": 2, "worst": 1}
    code, out, _, results = run(**given)
    assert code == 0
    pruned = {name: answer(folders["next"], pictures / name, PROMPTS[0], 4, "fopru", keep=4) for name in right}
    score = results["summary"][0]["score"]
    assert score["unpruned"]["value"] == 0.5
    assert score["pruned"]["value"] == sum(pruned[name] == right[name] for name in right) / 4
    assert score["change"]["value"] == score["pruned"]["value"] - 0.5 < 0
    assert "score - unpruned" in out
    assert f"The score is {100 * score['pruned']['value']:.1f} [" in out
    lost = -score["change"]["value"]
    again = given | {"resume": True}
    assert run(**again, max_loss=f"{lost:.4f}")[0] == 0  # of controls nothing is asked
    code, _, err, _ = run(**again, max_loss=f"{100 * lost - 1}%")
    assert (code, f"fopru, keep 4: the score loses {lost:.3f}" in err) == (1, True)
    code, _, _, results = run(**again, metric="contains")
    assert (code, results["metric"]) == (0, "contains")


def test_labels_that_are_not_there(refused, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "what ?", "answer": "a"}\n{"prompt": "who ?"}\n')
    assert f"{data}, line 2: give an answer to every prompt, or to none" in refused(prompts=None, data=data)
    data.write_text('{"prompt": "what ?"}\n')
    assert f'{data} has no answers: scores need --data with an "answer"' in refused(prompts=None, data=data)
    assert "has no answers" in refused(max_loss="1%")
    assert "must be at least 0 and under 1" in refused(max_loss="1")
    assert "--data is not allowed with --prompts" in refused(data=data)
    assert "name --images and --prompts (one a line)" in refused(prompts=None)
    assert "name --images and --prompts (one a line)" in refused(images=None)


def costing(times):
    """Costs as a clock would tell them: `times` as fast by label."""

    def measured(self, entry):
        one = {"median": times[entry.label], "low": 1.0, "high": 9.0, "pairs": 3}
        return costs.EntryCosts((10, 5), (20, 10), one, one, (100, 60), (100, 40), 4, 1)

    return measured


def test_time_and_memory_stand_beside_agreement(run, monkeypatch):
    monkeypatch.setattr(costs.CostBook, "of", costing({"fopru, keep 4": 2.5, "grid, keep 4": 3.0}))
    code, out, _, results = run(repeats=3, controls="grid")
    assert code == 0
    assert re.search(r"^fopru .* 2\.50x \[1\.00, 9\.00\] +2\.50x .* 60 % +40 %$", out, re.M)
    assert [line["costs"]["kv"] for line in results["summary"]] == [[100, 40]] * 2


def test_costs_are_measured_once(run, monkeypatch):
    code, _, _, results = run(repeats=1, controls="none", batch=2)
    found = results["summary"][0]["costs"]
    assert (code, found["batch"], found["first"]["pairs"]) == (0, 2, 1)
    assert found["kv"][1] < found["kv"][0]
    assert found["peak"][1] < found["peak"][0]
    monkeypatch.setattr(costs, "measure_costs", lambda *args: pytest.fail("measured again"))
    assert run(repeats=1, controls="none", batch=2, resume=True)[3]["summary"][0]["costs"] == found


def test_exit_codes_for_ci(run, monkeypatch, tmp_path):
    monkeypatch.setattr(costs.CostBook, "of", costing({"fopru, keep 40": 2.5, "random, keep 40": 0.5}))
    code, _, _, results = run(repeats=3, controls="random", keep="40")
    same = results["summary"][0]["measures"]["answer_agrees"]["value"]
    assert code == 0
    assert 0 < same < 0.98
    again = {"repeats": 3, "keep": "40", "controls": "random", "resume": True}
    assert run(**again, min_agreement=f"{same:.4f}", min_speedup=2)[0] == 0  # of controls nothing is asked
    code, _, err, _ = run(**again, min_agreement=f"{100 * same + 1:.4f}%")
    assert (code, "of the answers stay the same, under" in err) == (1, True)
    code, _, err, _ = run(**again, min_speedup=2.6)
    assert (code, "fopru, keep 40: the first token comes 2.50 times as fast, under 2.6" in err) == (1, True)


def test_what_ci_cannot_mean_is_refused(refused):
    assert "must be above 0 and at most 1" in refused(min_agreement="98")
    assert "is no share" in refused(min_agreement="most")
    assert "--min-speedup needs times" in refused(min_speedup=2, repeats=0)
