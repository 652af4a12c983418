"""From a config to a plan: what is run, what each result depends on, what cannot be run; no weights are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.eval.config.schema import Config, Published, Setting
from vlmprune.eval.lmms import fingerprints
from vlmprune.eval.lmms.cells import Cell, Draft, cells_of
from vlmprune.eval.lmms.taskindex import TaskIndex, no_metric
from vlmprune.runtime.errors import UserError
from vlmprune.runtime.loading import pick_device
from vlmprune.spec import NONE, budget_text
from vlmprune.yamls.tree import Mistakes

__all__ = ["EvalPlan", "ModelJob", "make_plan"]


@dataclass(frozen=True)
class ModelJob:
    """One model and its cells, in the order they run: method by method, so that a method's tasks stand together.

    `shared` is what all its results depend on; `depends` adds what one cell's depends on, and `key` hashes that.
    """

    setting: Setting
    cells: tuple[Cell, ...]
    shared: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]  # by label

    def depends(self, cell: Cell) -> dict[str, Any]:
        """Everything a result depends on; a cell is measured again when any of it changes."""
        about = {"options": cell.options, "budget": cell.budget, "seed": cell.seed}
        return {**self.shared, "task": self.tasks[cell.task], **self.methods[cell.label], **about}

    def key(self, cell: Cell) -> str:
        """Hash of `depends`."""
        return hashlib.sha256(json.dumps(self.depends(cell), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EvalPlan:
    """All cells of a config, what was left out and why, and what a user should know before it runs."""

    config: Config
    jobs: tuple[ModelJob, ...]
    skipped: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> list[tuple[ModelJob, Cell]]:
        return [(job, cell) for job in self.jobs for cell in job.cells]


def make_plan(config: Config, *, look_at_model: bool = True, device: str | None = None) -> EvalPlan:
    """Look up methods, models and tasks, and multiply them out.

    Args:
        config: of `load_config`.
        look_at_model: read every model's config.json; without it, what depends on the model stays unchecked, and the
            plan cannot be run.
        device: what the results will be measured on, as their keys name it; None finds out.

    Raises:
        Mistakes: everything that cannot be, with lines.
        UserError: lmms-eval is installed and cannot be imported.
    """
    drafts = [Draft(setting) for setting in config.settings]
    names = [setting.name for setting in config.settings]
    jobs = tuple(job_of(draft, names, look(draft) if look_at_model else {}, device) for draft in drafts)
    if mistakes := [*told_by(drafts, "mistakes"), *shared_files(jobs, config)]:
        raise Mistakes(mistakes)
    return EvalPlan(config, jobs, told_by(drafts, "skipped"), tuple(dict.fromkeys(told_by(drafts, "notes"))))


def told_by(drafts: Iterable[Draft], what: str) -> tuple[Any, ...]:
    """What all drafts have of a kind."""
    return tuple(told for draft in drafts for told in getattr(draft, what))


def job_of(draft: Draft, names: Sequence[str], model: dict[str, Any], device: str | None) -> ModelJob:
    """One model's cells, and what they depend on; `names` are those of all models."""
    setting = draft.setting
    index = TaskIndex(setting.include_path)
    tasks = leaves(draft, index)
    check_limit(draft, tasks)
    check_metrics(draft, index, tasks)
    notes_on(draft)
    cells = cells_of(draft, tasks)
    for i, one in enumerate(setting.published):
        if why := unmatched(one, setting.name, names, tasks, index, cells):
            draft.wrong(f"published.{i}", why)
    one_each = {cell.label: cell for cell in cells if not draft.mistakes}
    about = {label: fingerprints.method(cell.method, cell.arguments) for label, cell in one_each.items()}
    shared = shared_by_all(draft, model, fingerprints.device(setting.device) if device is None else device)
    named = {
        task: {"name": task, "metric": metric_of(setting, task, group), **index.fingerprint(task)}
        for task, group in tasks.items()
    }
    return ModelJob(setting, cells, shared, named, about)


def shared_by_all(draft: Draft, model: dict[str, Any], device: str) -> dict[str, Any]:
    """What all results of a model depend on."""
    words = ("dtype", "attn_implementation", "device_map", "batch_size", "limit", "generation")
    return {
        "versions": fingerprints.versions(),
        "library": fingerprints.library(),
        "model": model,
        "device": device,
        **{word: getattr(draft.setting, word) for word in words},
        "template": template_of(draft),
        # only where they are on: results from before there were these keys stand
        **({"plain_pictures": True} if draft.setting.plain_pictures else {}),
        **({"image_processor": draft.setting.image_processor} if draft.setting.image_processor else {}),
    }


def look(draft: Draft) -> dict[str, Any]:
    """A model's fingerprint, from its config.json and files; its facts are noted."""
    try:
        draft.facts, model = fingerprints.model(draft.setting.model)
    except (ValueError, OSError, UnsupportedError) as error:
        draft.wrong("model", str(error))
        return {}
    return model


def template_of(draft: Draft) -> str | None:
    """Fingerprint of the chat template that the config names."""
    named = draft.setting.template
    try:
        return None if named is None else fingerprints.code_of(str(Path(named).expanduser()))
    except OSError:
        draft.wrong("template", f"template: no file {named!r} that can be read.")
        return None


def leaves(draft: Draft, index: TaskIndex) -> dict[str, str | None]:
    """The tasks to run, each with the group it was named by: a group or tag stands for its tasks."""
    found: dict[str, str | None] = {}
    for name in draft.setting.tasks:
        try:
            for task in index.expand(name):
                found.setdefault(task, None if task == name else name)
        except ValueError as error:
            draft.wrong(f"tasks.{name}", str(error))
    if index.unchecked:
        draft.notes.append(index.unchecked)
    return found


def metric_of(setting: Setting, task: str, group: str | None) -> str | None:
    """The main metric that the config names for a task or its group."""
    return setting.metrics.get(task, setting.metrics.get(group or task))


def check_limit(draft: Draft, tasks: Iterable[str]) -> None:
    """MME's score counts pairs of neighbouring questions."""
    limit = draft.setting.limit
    if limit is not None and limit % 2 and "mme" in tasks:
        draft.wrong("limit", f"limit is {limit}: mme scores pairs of questions, so it must be even.")


def check_metrics(draft: Draft, index: TaskIndex, tasks: dict[str, str | None]) -> None:
    """A metric that the config names must be one of its task: it would be missed when all is answered."""
    metrics = draft.setting.metrics
    for task, group in tasks.items():
        named = task if task in metrics else group or task
        if named in metrics and (why := no_metric(index, task, metrics[named])):
            draft.wrong(f"metrics.{named}", why)


def notes_on(draft: Draft) -> None:
    """What is allowed, and may not be meant."""
    setting = draft.setting
    if not setting.methods:
        labels = ", ".join(entry.label for entry in setting.controls)
        draft.notes.append(f"{setting.name}: no methods are given, so only the controls are run: {labels}.")
    try:
        pick_device(setting.device)
    except UserError as error:
        draft.notes.append(f"{setting.name}: it cannot be run on this machine: {error}")


def shared_files(jobs: Iterable[ModelJob], config: Config) -> list[tuple[str, str]]:
    """Two cells must not share a file, on file systems that ignore case too."""
    seen: dict[str, Cell] = {}
    found = []
    for cell in (cell for job in jobs for cell in job.cells):
        other = seen.setdefault(cell.id.casefold(), cell)
        if other is not cell:
            who = f"{cell.label!r} and {other.label!r} on {cell.task}"
            found.append((str(config.path), f"{who} would share the file {cell.id}.json: change a label."))
    return found


def unmatched(
    entry: Published, name: str, names: Sequence[str], tasks: Collection[str], index: TaskIndex, cells: Sequence[Cell]
) -> str | None:
    """Why a published number is about no cell of the model called `name`: the ledger has nothing to put beside it.

    Numbers of the unpruned model may stand there without it, since `controls` can be switched off.
    """
    if entry.model is not None and entry.model not in names:
        hint, known = did_you_mean(entry.model, names), ", ".join(names)
        return f"the published model {entry.model!r} is the name of no run.{hint} Here is {known}."
    if entry.model not in (None, name):
        return None  # written at the top, for several runs
    if entry.task not in tasks:
        hint = did_you_mean(entry.task, tasks)
        return f"the published task {entry.task!r} is not run here.{hint}" if tasks else None
    mine = [cell for cell in cells if cell.task == entry.task and is_about(entry.method, cell)]
    return no_metric(index, entry.task, entry.metric) or at_no_budget(entry, mine)


def at_no_budget(entry: Published, cells: Sequence[Cell]) -> str | None:
    """Why a published number is about none of the cells of its method and task, if there are any."""
    budget = dict(entry.budgets) or None
    run = {str(cell.budget): cell.budget for cell in cells}
    if not run or str(budget) in run:
        return None
    wanted, *shown = [budget_text(one) or "no budget" for one in (budget, *run.values())]
    way = "To run it without the ledger: --set 'published=[]'."
    return f"{entry.method} is published at {wanted}, and run at {', '.join(shown)}. {way}"


def is_about(method: str, cell: Cell) -> bool:
    """Whether a published number's `method` means this cell: the unpruned model goes by its method, others by label."""
    return cell.method == NONE if method == NONE else cell.label == method
