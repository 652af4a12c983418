"""The tasks that lmms-eval knows, ours among them, by name; no data set is opened."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from vlmprune.errors import did_you_mean
from vlmprune.eval.lmms import fingerprints
from vlmprune.runtime.errors import UserError, brief

__all__ = ["INSTALL", "TaskIndex", "have_lmms_eval", "imported"]

INSTALL = "lmms-eval is not installed: pip install vlmprune[eval]"
OURS = Path(__file__).resolve().parents[1] / "tasks"


@cache
def have_lmms_eval() -> bool:
    """Whether lmms-eval is installed; importing it takes seconds, so the metadata is asked."""
    return fingerprints.versions()["lmms-eval"] is not None


@contextmanager
def imported() -> Iterator[None]:
    """Around imports of lmms-eval, whose own requirements may be missing: the recipe for CPUs leaves many out.

    Raises:
        UserError: it, or something that it imports, cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        lost = (error.name or "").partition(".")[0]
        way = f"pip install {lost} (if the package is called as its module), or all" if lost else "all"
        raise UserError(
            f"lmms-eval is installed and cannot be imported: {brief(error)}. Install what is missing: {way} that it "
            "needs: pip install vlmprune[eval]"
        ) from error


class TaskIndex:
    """Tasks by name: ours, those of the user's folders, and, once one of them is asked for, lmms-eval's own.

    Attributes:
        unchecked: a sentence for the user where lmms-eval is missing and names are taken as they are.
    """

    def __init__(self, include_path: Sequence[str] = ()):
        self.paths = [str(OURS), *(str(Path(folder).expanduser()) for folder in include_path)]
        self.unchecked = ""
        self._near: Any = None
        self._hashes: dict[Path, str] = {}

    def manager(self, name: str | None = None) -> Any:
        """lmms-eval's `TaskManager`, with its own 1,700 tasks only if `name` (or any name) is not one of the others."""
        if self._near is None:
            self._near = task_manager(tuple(self.paths), False)
        if name is None or name in self._near.all_tasks:
            return self._near
        return task_manager(tuple(self.paths), True)

    def expand(self, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or those of a group or tag, in order.

        Raises:
            ValueError: no such task (the message suggests one), or a group that cannot be taken apart.
            UserError: lmms-eval is installed and cannot be imported.
        """
        if lost := [path for path in self.paths if not Path(path).is_dir()]:
            raise ValueError(f"include_path: there is no folder {lost[0]!r}.")
        if not have_lmms_eval():
            self.unchecked = f"{INSTALL}. Task names were not checked."
            return [name]
        manager = self.manager(name)
        if name not in manager.all_tasks:
            raise ValueError(unknown_task(name, manager.all_tasks))
        about = manager.task_index[name]
        if about["type"] in ("task", "python_task"):
            return [name]
        return list(dict.fromkeys(task for member in members(name, about) for task in self.expand(member)))

    def metrics(self, name: str) -> list[str]:
        """The metrics that a task's YAML lists; none where it leaves them to lmms-eval, or is written in Python."""
        if not have_lmms_eval():
            return []
        about = self.manager(name).task_index[name]
        listed = config_of(about["yaml_path"]).get("metric_list") if about["type"] == "task" else None
        return [str(entry["metric"]) for entry in listed or () if isinstance(entry, dict) and "metric" in entry]

    def fingerprint(self, name: str) -> dict[str, Any]:
        """What a task depends on beyond lmms-eval's version, where its YAML is not lmms-eval's own: the files beside
        that (`files`), all it says with what it includes (`yaml`), and local data elsewhere (`data`)."""
        if not have_lmms_eval():
            return {}
        about = self.manager(name).task_index[name]
        yaml_path = Path(about["yaml_path"]).resolve()
        if not any(yaml_path.is_relative_to(Path(path).resolve()) for path in self.paths):
            return {}
        folder = yaml_path.parent
        if folder not in self._hashes:  # once for all tasks of a folder
            self._hashes[folder] = fingerprints.files(folder)
        made = {"files": self._hashes[folder]}
        if about["type"] != "task":
            return made
        return made | said_in(yaml_path)


def said_in(path: Path) -> dict[str, str]:
    """Fingerprints of all that a task's YAML says, and of local data elsewhere."""
    config = config_of(path)
    said = json.dumps(config, sort_keys=True, default=str)
    made = {"yaml": hashlib.sha256(said.encode()).hexdigest()}
    if elsewhere := [one for one in local_data(config) if not one.is_relative_to(path.parent)]:
        made["data"] = fingerprints.of_files(path.parent, elsewhere)
    return made


def members(name: str, about: Mapping[str, Any]) -> list[str]:
    """The names that a group or tag stands for.

    Raises:
        ValueError: it does not only name them.
    """
    found = about["task"] if about["task"] != -1 else config_of(about["yaml_path"])["task"]
    if not all(isinstance(member, str) for member in found):
        raise ValueError(f"the group {name!r} changes its tasks' settings: name the tasks that you want instead.")
    return found


def config_of(path: str | Path) -> dict[str, Any]:
    """What the YAML file of a task or group says, with what it includes."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(path), mode="simple")


def unknown_task(name: str, known: Collection[str]) -> str:
    """What to say of a name that is no task's; a pattern gets what it would fit."""
    hint = did_you_mean(name, known)
    if glob.has_magic(name):
        fits = fnmatch.filter(known, name)
        few = ", ".join(fits[:5]) + (", ..." if len(fits) > 5 else "")
        hint = f" Patterns are not taken: name the tasks or a group{f' ({few})' if fits else ''}."
    return f"unknown task {name!r}.{hint} `lmms-eval tasks list` lists lmms-eval's own."


def no_metric(index: TaskIndex, task: str, metric: str) -> str | None:
    """Why a task has no such metric; None where it has, or does not say which it has."""
    known = index.metrics(task)
    if not known or metric.partition(" (")[0] in known:  # "exact_match (strict)" is that behind a second filter
        return None
    return f"{task} has no metric {metric!r}.{did_you_mean(metric, known)} It has {', '.join(known)}."


def local_data(config: Mapping[str, Any]) -> list[Path]:
    """The files of a data set on this disk: `data_files`, and those of the folder that is its `dataset_path`."""
    found = data_files(config)
    place = Path(str(config.get("dataset_path") or ""))
    if place.is_dir() and place != Path():
        found += place.rglob("*")
    return [path.resolve() for path in found if path.is_file()]


def data_files(config: Mapping[str, Any]) -> list[Path]:
    """What the patterns of `data_files` fit."""
    named = [text for text in texts((config.get("dataset_kwargs") or {}).get("data_files")) if "://" not in text]
    return [Path(path) for one in named for path in glob.glob(str(Path(one)), recursive=True)]


def texts(value: Any) -> Iterator[str]:
    """All texts of nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


@cache
def task_manager(paths: tuple[str, ...], defaults: bool) -> Any:
    """lmms-eval's index of tasks; reading its own takes seconds."""
    with imported():
        from loguru import logger

        logger.disable("lmms_eval")  # hundreds of lines about files that are no tasks
        from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths), include_defaults=defaults, model_name="vlmprune")
