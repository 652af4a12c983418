"""The results behind docs/table.md as two small files, which are in version control.

    vlmprune eval table.yaml                                  # answers, cell by cell, into runs/table
    python scripts/table_results.py answers runs/table        # -> benchmarks/table.json
    python scripts/table_results.py costs                     # -> benchmarks/table-costs.json; goes on where it stopped
    python scripts/table_page.py                              # -> docs/table.md

`answers` takes several folders, the later ones for what the earlier lack or have otherwise: a method that came later
needs `vlmprune eval table.yaml --set 'runs.0.methods=[NAME]' --set output=runs/later` alone. `costs` times one prefill
of every row in turns with the unpruned model's, on this machine, whatever else that does (`taskset -c 1` keeps it to a
core).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmprune import registry, spec
from vlmprune.api import Handle
from vlmprune.eval import tasks, testbed
from vlmprune.eval.bench.counting import CPU_ATTENTION, attention_flops
from vlmprune.eval.bench.stats import ratio
from vlmprune.eval.config.entries import Entry, Part
from vlmprune.eval.config.schema import Config, Setting, load_config
from vlmprune.eval.lmms import cells, fingerprints, store
from vlmprune.eval.lmms.plan import make_plan
from vlmprune.runtime import answering, loading
from vlmprune.runtime.files import write_whole
from vlmprune.spec import Job

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "table.yaml"
ANSWERS, COSTS = ROOT / "benchmarks" / "table.json", ROOT / "benchmarks" / "table-costs.json"
FORMAT = 1
NATIVE = "native"
TOKENS = ("tokens_before", "tokens_after", "layer_average", "output_tokens")
#: Options with which a method that a model does not run was tried, where it has some for such models.
TRIED = {("scene-qwen", name): {"fallback": "received"} for name in ("tcc", "vtc_cls")}
#: What a model runs and is not asked, and why.
ELSEWHERE = {
    ("scene-qwen", "downsample"): "is a smaller picture here, and so the native rival, which has runs of its own"
}
SPLIT_OF = {f"{group}_mixed": split for split, group in tasks.GROUPS.items()}
#: Tasks about things that are not there, by which a yes is told to be false.
FALSE_YES = {f"{group}_absent": split for split, group in tasks.GROUPS.items()}


def native(setting: Setting) -> tuple[str, dict[str, float]] | None:
    """Of a run with other settings of the image processor: whose rival it is, and at which budget, as its name says."""
    if not setting.image_processor:
        return None
    return setting.model, {"keep": float(setting.name.rpartition("-")[2])}


# Answers


def packed(scores: list[float]) -> str | list[float]:
    """Scores of samples: those that are 0 or 1 as the hexadecimal digits of their bits, others as they are."""
    if set(scores) <= {0.0, 1.0}:
        return np.packbits(np.array(scores, bool)).tobytes().hex()
    return [round(score, 4) for score in scores]


def unpacked(held: str | list[float], count: int) -> np.ndarray:
    """(count,) scores of what `packed` made."""
    if isinstance(held, str):
        return np.unpackbits(np.frombuffer(bytes.fromhex(held), np.uint8))[:count].astype(float)
    return np.array(held, float)


def asked(task: str, count: int) -> list[testbed.Question]:
    """The first questions of a task; none of one that asks for captions."""
    if task in FALSE_YES:
        return tasks.absent(FALSE_YES[task])[:count]
    return tasks.mixed(SPLIT_OF[task])[:count] if task in SPLIT_OF else []


def row_of(cell: dict[str, Any], natives: dict[str, tuple[str, dict[str, float]]]) -> dict[str, Any]:
    """One cell as the page needs it.

    Raises:
        SystemExit: it was asked other questions than its task has now.
    """
    about, samples = cell["cell"], sorted(cell["samples"], key=lambda sample: sample["doc"])
    wanted = [question.answer for question in asked(about["task"], len(samples))]
    if wanted and [sample["target"] for sample in samples] != wanted:
        raise SystemExit(f"{about['id']} answers other questions than its task has now: evaluate it again.")
    model, label, budget = about["model"], about["label"], about["budget"]
    if model in natives:
        (model, budget), label = natives[model], NATIVE
    made = {"model": model, "label": label, "method": about["method"], "options": about["options"], "budget": budget}
    made |= {"seed": about["seed"], "control": about["control"] or label == NATIVE, "task": about["task"]}
    made |= {"count": len(samples), "scores": packed([sample["score"] for sample in samples])}
    made |= {word: round(float(np.mean([sample[word] for sample in samples])), 2) for word in TOKENS}
    if about["task"] in FALSE_YES:
        made["said_yes"] = packed([float(sample["answer"] == "yes") for sample in samples])
    if not wanted:
        made["made_up"] = cell["metrics"]["made_up"]["value"]
    return made


def absent(config: Config) -> list[dict[str, Any]]:
    """Methods that a model was not asked with, and budgets that one was not asked at, with the reason.

    Raises:
        SystemExit: the config leaves out what would run.
    """
    found = []
    for setting in (one for one in config.settings if native(one) is None and one.tasks[0] in SPLIT_OF):
        facts, _ = fingerprints.model(setting.model)
        there = {entry.parts[0].name: entry for entry in (*setting.methods, *setting.controls)}
        for name in registry.names():
            part = Part(name=name, options=TRIED.get((setting.name, name), {}))
            takes, entry = "keep" in spec.takes(name), there.get(name) or Entry(parts=(part,), label=name)
            if name not in there:
                lacking = setting.budgets[:1]
            else:
                lacking = [at for at in setting.budgets if entry.budgets and at not in entry.budgets]
            for budget in lacking:
                cell = cells.cell_of(setting, entry, budget if takes else None, None, "-", None)
                why = cells.impossible(cell, facts) or registry.find(name).refuses_inputs.get("image")
                why = why or ELSEWHERE.get((setting.name, name))
                if why is None:
                    raise SystemExit(
                        f"{name} runs on {setting.name} at {budget}, and configs/table.yaml leaves it out."
                    )
                found.append({"model": setting.name, "method": name, "why": why})
                found[-1]["budget"] = dict([budget]) if name in there else None
    return found


def answers(folders: list[Path], out: Path) -> None:
    """Gather the cells of runs into one file."""
    config = load_config(CONFIG)
    natives = {setting.name: found for setting in config.settings if (found := native(setting))}
    found: dict[str, dict[str, Any]] = {}
    planned = {cell.id for _, cell in make_plan(config).cells}
    runs: list[dict[str, Any]] = []
    for folder in folders:
        run = store.load_run(folder)
        found |= {cell["cell"]["id"]: cell for cell in run.cells if cell["error"] is None}
        about = {word: run.info[word] for word in ("commit", "device", "versions")} | {"day": run.info["started"][:10]}
        runs += [about] if about not in runs else []
    rows = [row_of(cell, natives) for cell in found.values()]
    for model, task in {(row["model"], row["task"]) for row in rows}:
        if len(counts := {row["count"] for row in rows if (row["model"], row["task"]) == (model, task)}) > 1:
            raise SystemExit(f"{task} of {model} was asked with limits {sorted(counts)}: evaluate with one.")
    order = [setting.name for setting in config.settings]
    rows.sort(key=lambda row: order.index(row["model"]))
    about = {"format": FORMAT, "missing": len(planned - found.keys()), "runs": runs, "absent": absent(config)}
    save(out, about, rows)
    print(f"{out}: {len(rows)} rows")


def save(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One line a row, so that a difference shows which."""
    head = json.dumps(about, indent=1)[:-2]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    write_whole(out, f'{head},\n "rows": [\n{lines}\n]}}\n'.encode())


# Costs


def entries(setting: Setting) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Label, job and budget of every row of a model that prunes, one seed of each."""
    for entry in (*setting.methods, *setting.controls):
        part = entry.parts[0]
        if part.name == spec.NONE:
            continue
        takes = "keep" in spec.takes(part.name)
        for budget in (entry.budgets or setting.budgets) if takes else (None,):
            at = dict([budget]) if budget else None
            yield entry.label, {"method": part.name, "options": part.options | (at or {})}, at


def inputs_of(loaded: loading.Loaded, question: testbed.Question) -> dict[str, Any]:
    """One prompt, as the evaluation asks it."""
    return loading.model_inputs(loaded, [question.image], question.question)


def prefill(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Runs a prefill through its first token."""
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()


def flops(call: Callable[[], Any]) -> int:
    """Of matrix products, convolutions, attention and our own operations, the method's own work included."""
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flops}) as counter:
        call()
    return counter.get_total_flops()


def in_turns(whole: Callable[[], Any], pruned: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Seconds of two calls, run one after the other, the order alternating, after one of each that is not counted."""
    times: list[tuple[float, float]] = []
    for number in range(pairs + 1):
        took = {}
        for call in (whole, pruned) if number % 2 else (pruned, whole):
            start = time.perf_counter()
            call()
            took[call] = time.perf_counter() - start
        if number:
            times.append((took[whole], took[pruned]))
    above, below = zip(*times, strict=True)
    return {"speedup": {word: round(value, 4) for word, value in ratio(above, below).items()}} | {
        "ms": [round(1e3 * float(np.median(some)), 2) for some in (above, below)]
    }


def without(handle: Handle, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call on the model as it is without its patch."""

    def plain() -> None:
        with handle.disabled():
            call()

    return plain


@torch.no_grad()
def costs(out: Path, pairs: int) -> None:
    """Measure what is not in the file yet."""
    torch.set_num_threads(1)
    found = json.loads(out.read_text())["rows"] if out.is_file() else []
    done = {json.dumps([row["model"], row["label"], row["budget"]]) for row in found}
    config = load_config(CONFIG)
    about = {"format": FORMAT, "pairs": pairs, "machine": machine(), "versions": fingerprints.versions()}
    for setting in config.settings:
        split = SPLIT_OF.get(setting.tasks[0])
        if split is None:
            continue
        base = loading.load(loading.find_model(setting.model))
        question = tasks.mixed(split)[0]
        inputs = inputs_of(base, question)
        if (rival := native(setting)) is not None:
            other = loading.load(loading.find_model(setting.model), image_processor=setting.image_processor)
            todo = [(NATIVE, None, rival[1])]
            call = prefill(other.model, inputs_of(other, question))
        else:
            todo = list(entries(setting))
        whole = prefill(base.model, inputs)
        for label, job, budget in todo:
            if json.dumps([setting.model, label, budget]) in done:
                continue
            handle = None if job is None else answering.patch(base, Job(**job))
            unpruned = whole if handle is None else without(handle, whole)
            one = {"model": setting.model, "label": label, "budget": budget, "split": split}
            pruned = call if handle is None else whole
            one |= in_turns(unpruned, pruned, pairs) | {"flops": [flops(unpruned), flops(pruned)]}
            found.append(one | {"load": round(os.getloadavg()[0], 1)})
            if handle is not None:
                handle.unpatch()
            save(out, about | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}, found)
            print(setting.name, label, budget, one["speedup"]["median"], flush=True)


def machine() -> dict[str, Any]:
    """What the times are of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    kept = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": name, "cores": os.cpu_count(), "kept": kept, "threads": 1}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("answers", help="gather what was answered")
    one.add_argument("folders", type=Path, nargs="+", help="of `vlmprune eval table.yaml`")
    one.add_argument("--out", type=Path, default=ANSWERS)
    other = verbs.add_parser("costs", help="measure times and FLOPs")
    other.add_argument("--pairs", type=int, default=9)
    other.add_argument("--out", type=Path, default=COSTS)
    args = parser.parse_args()
    if args.verb == "answers":
        answers(args.folders, args.out)
    else:
        costs(args.out, args.pairs)


if __name__ == "__main__":
    main()
