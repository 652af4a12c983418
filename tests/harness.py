"""Running the real lmms-eval in tests: tasks over local documents, and processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from clocks import PATIENCE

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (make install does)")

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vlmprune.eval import tasks

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@lru_cache
def packaged() -> TaskManager:
    """Our tasks only: the index of all of lmms-eval's takes seconds."""
    return TaskManager(include_path=[tasks.path()], include_defaults=False)


@lru_cache
def builtin() -> TaskManager:
    """All tasks by name, as the command knows them."""
    return TaskManager(include_path=[tasks.path()], model_name="vlmprune")


def save_docs(folder: Path, rows: list[dict], split: str = "test", pictures: tuple[str, ...] = ("image",)) -> str:
    """Documents on disk, as `load_from_disk` reads them; columns of `pictures` hold pictures (or lists of them)."""
    made = datasets.Dataset.from_list(rows)
    for name in pictures:
        if name in made.column_names:
            kind = datasets.Image()
            several = any(isinstance(row[name], list) for row in rows)
            made = made.cast_column(name, datasets.Sequence(kind) if several else kind)
    datasets.DatasetDict({split: made}).save_to_disk(folder)
    return str(folder)


def as_file(picture) -> dict:
    """A PIL picture as a cell of a column of pictures."""
    from io import BytesIO

    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def task(folder: str, name: str = "local", **config) -> ConfigurableMessagesTask:
    """A task over documents with `question`, `answer` and perhaps `image`, scored by equality."""
    made = {
        "task": name,
        "dataset_path": folder,
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": visuals,
        "doc_to_text": lambda doc, lmms_eval_specific_kwargs=None: doc["question"],
        "doc_to_target": "answer",
        "process_results": lambda doc, results: {"exact_match": float(results[0] == doc["answer"])},
        "generation_kwargs": {"max_new_tokens": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 0},
    }
    return ConfigurableMessagesTask(config=made | config, model_name="vlmprune")


def visuals(doc: dict) -> list:
    found = doc.get("image")
    return [] if found is None else found if isinstance(found, list) else [found]


def evaluate(lm, asked, manager: TaskManager | None = None, **options) -> dict:
    """`simple_evaluate`; `asked` has names or task objects."""
    manager = manager or packaged()
    options = {"bootstrap_iters": 0, "log_samples": True} | options
    return simple_evaluate(model=lm, tasks=asked, task_manager=manager, **options)


def answers(result: dict, name: str = "local") -> list[str]:
    """The model's answers by document."""
    return [s["filtered_resps"][0] for s in sorted(result["samples"][name], key=lambda s: s["doc_id"])]


def instances(lm, task: ConfigurableMessagesTask) -> list:
    """The requests that lmms-eval would make."""
    lm.task_dict[task.config.task] = task.dataset
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


def texts(results: list) -> list[str]:
    """The answers in what `generate_until` returns."""
    return [result.text for result in results]


def process(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a process; returns what it printed, with errors."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | OFFLINE | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def command(*before: str, model_args: str, asked: str, out: str, extra: tuple[str, ...] = ()) -> list[str]:
    """`lmms-eval eval` as a user types it, run by this Python (`before` goes in front of `-m lmms_eval`)."""
    first = list(before) or [sys.executable, "-P"]
    return [
        *first, "-m", "lmms_eval", "eval", "--model", "vlmprune", "--model_args", model_args,
        "--include_path", tasks.path(), "--tasks", asked, "--log_samples", "--output_path", out, *extra,
    ]  # fmt: skip


def written(out: Path) -> tuple[dict, dict[str, list[dict]]]:
    """What the command wrote: results, and samples by task in the order of documents."""
    (results,) = out.rglob("*_results.json")
    samples = {}
    for file in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[file.stem.partition("_samples_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), samples
