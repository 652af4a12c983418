"""Runs a plan through lmms-eval: each model is loaded once, each cell is on disk as soon as it is measured."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmprune import spec
from vlmprune.eval.config.schema import Setting
from vlmprune.eval.lmms import fingerprints, outcome, store
from vlmprune.eval.lmms import plan as plans
from vlmprune.eval.lmms.cells import Cell
from vlmprune.eval.lmms.plan import EvalPlan, ModelJob
from vlmprune.eval.lmms.survey import Survey, survey
from vlmprune.eval.lmms.taskindex import imported
from vlmprune.runtime import interruption
from vlmprune.runtime.errors import CommandError, UserError, brief

__all__ = ["Done", "rank", "run_plan"]

LOG = "lmms-eval.log"
#: What a setting says of how its model is loaded.
LOADING = ("batch_size", "device", "dtype", "attn_implementation", "device_map", "template", "plain_pictures")
LOADING += ("image_processor",)


@dataclass(frozen=True)
class Done:
    """What a run did: ids of the cells it measured, and of those that failed, with their errors."""

    measured: tuple[str, ...]
    failed: dict[str, str]


class Watcher:
    """What is told while a plan runs; the command line shows it, and nothing needs to."""

    def start(self, found: Survey) -> None: ...

    def loading(self, job: ModelJob) -> None: ...

    def cell(self, job: ModelJob, cell: Cell) -> None: ...

    def samples(self, answered: int, of: int) -> None: ...

    def finished(self, cell: Cell, content: dict[str, Any]) -> None: ...


def rank() -> int:
    """Number of this process among those of `accelerate launch`; 0 writes and speaks."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def run_plan(plan: EvalPlan, watcher: Watcher | None = None, command: list[str] | None = None) -> Done:
    """Measure what is not measured yet.

    Every cell is written as soon as it exists, so a run that was stopped, by whatever, goes on where it was. A cell
    that fails is written with its error and the others go on; the next run tries it again, last. With several
    processes, whose ways part when one of them fails, the run ends there.

    Raises:
        StoreError: the folder is in use, or cannot be written.
        CommandError: a model that cannot be loaded; with several processes, a cell that failed.
        UserError: lmms-eval, or what it needs, cannot be imported.
    """
    watcher = watcher or Watcher()
    folder = plan.config.output
    with contextlib.ExitStack() as stack:
        if processes() > 1:
            from vlmprune.eval.lmms.parallel import place

            place(plan.jobs[0].setting.device, plan.jobs[0].setting.device_map)
        if rank() == 0:
            stack.enter_context(store.locked(folder))
        found = from_first(lambda: survey(plan, folder))
        info = about_run(plan, command)
        if rank() == 0:
            store.write_run(folder, info)
            watcher.start(found)
        done = run_jobs(plan, found, watcher)
        if rank() == 0:
            store.write_run(folder, info | {"finished": now()})
    return done


def run_jobs(plan: EvalPlan, found: Survey, watcher: Watcher) -> Done:
    """Run what is to do of every model, in the order in which it was found."""
    done = Done((), {})
    for job in plan.jobs:
        mine = [cell for name in found.todo for cell in job.cells if cell.id == name]
        if mine:
            part = run_job(job, mine, plan.config.output, watcher)
            done = Done(done.measured + part.measured, done.failed | part.failed)
    return done


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process finds out, in all of them: they must agree, and may not share a disk."""
    if processes() < 2:
        return make()
    import torch

    box = [make() if rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def run_job(job: ModelJob, cells: list[Cell], folder: Path, watcher: Watcher) -> Done:
    """Load a model and run its cells."""
    with quietly(folder) as log:
        watcher.loading(job)
        with imported():
            from vlmprune.eval.lmms.model import VlmPrune

            share_locks()
        lm = VlmPrune(job.setting.model, **{word: getattr(job.setting, word) for word in LOADING})
        lm.progress = watcher.samples
        tasks: dict[str, Any] = {}
        measured, failed = [], {}
        for cell in cells:
            watcher.cell(job, cell)
            content = run_cell(lm, job, cell, tasks, folder, log)
            if content is None:  # not the first process
                continue
            if rank() == 0:
                store.write_cell(folder, content)
                watcher.finished(cell, content)
            if content["error"] is not None:
                failed[cell.id] = content["error"]
                if processes() > 1:
                    raise CommandError(f"{cell.id}: {content['error']}. The next run goes on behind it.")
            else:
                measured.append(cell.id)
    return Done(tuple(measured), failed)


def run_cell(
    lm: Any, job: ModelJob, cell: Cell, tasks: dict[str, Any], folder: Path, log: Callable[[str, BaseException], None]
) -> dict[str, Any] | None:
    """A cell's file, measured or with its error; None in processes other than the first."""
    start = time.perf_counter()
    about = {"format": store.FORMAT, "cell": asdict(cell), "key": job.key(cell), "depends": job.depends(cell)}
    try:
        return measure(lm, job, cell, tasks, about, folder, start)
    except (KeyboardInterrupt, MemoryError, GeneratorExit):
        raise
    except BaseException as error:  # whatever a task's code, a data set or a model raises; sys.exit too
        interruption.check(error)  # or Ctrl-C would be kept as a failed cell
        log(f"{cell.id} failed", error)
        if isinstance(error, outcome.NoMetric):
            tasks[cell.task] = error  # as a data set that cannot be opened: its other cells fail at once
        return outcome.failed_cell(about, told(error), time.perf_counter() - start)


def measure(
    lm: Any, job: ModelJob, cell: Cell, tasks: dict[str, Any], about: dict[str, Any], folder: Path, start: float
) -> Any:
    """One cell through lmms-eval; None in processes other than the first."""
    from lmms_eval.evaluator import simple_evaluate

    task = open_task(job, cell.task, tasks)
    lm.use(cell.method, **cell.arguments)
    lm.take_records()
    results = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=job_index(job).manager(cell.task),
        batch_size=job.setting.batch_size,
        limit=job.setting.limit,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="WARNING",
        # as lmms-eval's own command: scoring sees documents without pictures, and files to submit are put here
        cli_args=argparse.Namespace(output_path=str(folder / "files" / cell.id), process_with_media=False),
    )
    records = [record for record in lm.take_records() if record["task"] == cell.task]
    if rank() != 0:
        return None
    metric = plans.metric_of(job.setting, cell.task, cell.group)
    return outcome.cell_of_results(about, results, records, task, metric, time.perf_counter() - start)


def job_index(job: ModelJob) -> Any:
    from vlmprune.eval.lmms.taskindex import TaskIndex

    return TaskIndex(job.setting.include_path)


def open_task(job: ModelJob, name: str, tasks: dict[str, Any]) -> Any:
    """A task with its data set, opened once a run; what went wrong the first time goes wrong again at once."""
    if name not in tasks:
        try:
            tasks[name] = load_task(job, name)
        except Exception as error:
            tasks[name] = error
    if isinstance(tasks[name], Exception):
        raise tasks[name]
    return tasks[name]


def share_locks() -> None:
    """Let data sets open data sets, which would wait for themselves; `simple_evaluate` does so for tasks it opens.

    Raises:
        UserError: lmms-eval reaches into filelock for that, and this release of filelock looks otherwise inside.
    """
    from lmms_eval import evaluator

    try:
        getattr(evaluator, "_enable_reentrant_filelocks", lambda: None)()
    except (ImportError, AttributeError) as error:
        found = {name: version(name) for name in ("lmms-eval", "filelock")}
        raise UserError(
            f"lmms-eval {found['lmms-eval']} cannot work with filelock {found['filelock']}: {brief(error)}. "
            "Take an older one: pip install 'filelock<4.3'"
        ) from error


def load_task(job: ModelJob, name: str) -> Any:
    """Open a task's data set; the first process does it alone, so that the others find it in the cache."""
    from lmms_eval.tasks import get_task_dict

    manager = job_index(job).manager(name)
    if processes() > 1:
        import torch

        if rank() != 0:
            torch.distributed.barrier()
        try:
            task = get_task_dict([name], manager, "chat")[name]
        finally:
            if rank() == 0:
                torch.distributed.barrier()
    else:
        task = get_task_dict([name], manager, "chat")[name]
    if job.setting.generation:
        task.set_config(key="generation_kwargs", value=dict(job.setting.generation), update=True)
    return task


def told(error: BaseException) -> str:
    """An exception in a sentence; lmms-eval wraps some in others that say nothing."""
    last = getattr(error, "last_attempt", None)
    inner = last.exception() if last is not None else None
    error = inner or error
    if isinstance(error, CommandError | outcome.Incomplete):
        return brief(error)
    return f"{type(error).__name__}: {brief(error)}"


class WithoutBars:
    """A log file that leaves out progress bars."""

    def __init__(self, file: Any):
        self.file, self.after_bar = file, False

    def write(self, text: str) -> int:
        bar = text.startswith("\r") or (self.after_bar and text == "\n")
        self.after_bar = text.startswith("\r") or (self.after_bar and not text)
        return len(text) if bar else self.file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextlib.contextmanager
def quietly(folder: Path) -> Iterator[Callable[[str, BaseException], None]]:
    """Send what lmms-eval, its tasks and transformers print into a file of the run; yields a way to write there."""
    import traceback

    from loguru import logger

    from vlmprune.runtime.status import quiet

    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    place = folder / LOG if rank() == 0 else Path(os.devnull)
    with open(place, "a", encoding="utf-8") as opened:
        file: Any = WithoutBars(opened)

        def log(what: str, error: BaseException) -> None:
            file.write(f"{now()} {what}\n{''.join(traceback.format_exception(error))}\n")
            file.flush()

        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), quiet():
            with imported():
                import lmms_eval.evaluator  # noqa: F401 - it sets up loguru when imported, so before we do

            logger.remove()
            sink = logger.add(file, level="WARNING")
            try:
                yield log
            finally:
                logger.remove(sink)


def ledger(setting: Setting) -> list[dict[str, Any]]:
    """The ledger as `run.json` holds it: an entry names its budget as the config does."""
    made = []
    for entry in setting.published:
        about = {word: value for word, value in asdict(entry).items() if word not in spec.BUDGETS}
        made.append(about | {"model": entry.model or setting.name} | dict(entry.budgets))
    return made


def about_run(plan: EvalPlan, command: list[str] | None) -> dict[str, Any]:
    """What `run.json` says."""
    config, published = plan.config, []
    for entry in (entry for job in plan.jobs for entry in ledger(job.setting)):
        if entry not in published:  # written at the top, it is in every run
            published.append(entry)
    return {
        "format": store.FORMAT,
        "config": config.resolved,
        "config_text": config.text,
        "config_path": str(config.path),
        "command": list(command if command is not None else sys.argv),
        "versions": fingerprints.versions() | {"python": sys.version.split()[0]},
        "commit": fingerprints.commit(),
        "device": ", ".join(dict.fromkeys(job.shared["device"] for job in plan.jobs)),
        "processes": processes(),
        "started": now(),
        "finished": None,
        "cells": [cell.id for _, cell in plan.cells],
        "keys": {cell.id: job.key(cell) for job, cell in plan.cells},
        "skipped": list(plan.skipped),
        "notes": list(plan.notes),
        "published": published,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
