"""The schema of `vlmprune eval CONFIG.yaml`: pydantic models of its keys, and every mistake with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass

from vlmprune import configs, spec
from vlmprune.errors import did_you_mean
from vlmprune.eval.config import kinds
from vlmprune.eval.config.entries import STRICT, Budget, Entries, WithBudgets, or_controls
from vlmprune.eval.config.kinds import Average, Keep, Seeds
from vlmprune.yamls.kinds import Many, Number, Positive, Some, Switch, Text
from vlmprune.yamls.told import ConfigSource, about, mistakes, must_be
from vlmprune.yamls.tree import Key, Mistakes, Tree, read_start, read_text, read_tree

__all__ = ["KEYS", "Config", "Published", "Setting", "load_config"]


# Published numbers


def said(value: Any) -> Any:
    """A mapping without its nulls, which stand for the defaults."""
    return {word: inner for word, inner in value.items() if inner is not None} if isinstance(value, dict) else value


def one_budget(average: tuple[int | float, ...], info: ValidationInfo) -> tuple[int | float, ...]:
    if len(average) + len(info.data.get("keep", ())) > 1:
        raise mistakes(((), "a published number has one budget, keep or average."))
    return average


@dataclass(frozen=True, config=STRICT)
class Published(WithBudgets):
    """A number of a paper, for the ledger of the report: `method` is a label, "none" the unpruned model.

    Source and definition are required, since a number without them cannot be compared.
    """

    method: Text
    task: Text
    metric: Text
    value: Number
    source: Text
    definition: Text
    keep: Keep = ()
    average: Annotated[Average, AfterValidator(one_budget)] = ()
    model: Text | None = None

    @property
    def budget(self) -> Budget | None:
        return next(iter(self.budgets), None)


def about_entries(published: tuple[Published, ...], info: ValidationInfo) -> tuple[Published, ...]:
    """A published number is of an entry that is run, or of the unpruned model."""
    labels = [spec.NONE, *(e.label for word in ("methods", "controls") for e in info.data.get(word, ()))]
    found = [
        ((i, "method"), f"no method is labelled {one.method!r} here.{did_you_mean(one.method, labels)}")
        for i, one in enumerate(published)
        if one.method not in labels and {"methods", "controls"} <= set(info.data)
    ]
    if found:
        raise mistakes(*found)
    return published


# One model


@dataclass(frozen=True)
class Suite:
    """What is read of a suite; pydantic ignores the rest."""

    tasks: Annotated[tuple[Annotated[str, Strict()], ...], Field(min_length=1)]


SUITE = TypeAdapter(Suite)


def suite(name: str, info: ValidationInfo) -> tuple[str, ...]:
    """A task, or the tasks of a suite: a YAML file with a list `tasks`, by the config's folder, or one that ships."""
    if not name.endswith(".yaml"):
        return (name,)
    path = configs.find(name, Path(info.context.tree.name).parent)
    try:
        value = read_tree(read_start(path), str(path)).value
    except (OSError, UnicodeDecodeError) as error:
        why = f"the suite {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        raise mistakes(((), why)) from None
    except Mistakes as error:
        raise mistakes(*error.found) from None
    try:
        return SUITE.validate_python(value).tasks
    except ValidationError:
        raise mistakes(((), f"the suite {path} has no list of task names called `tasks`.")) from None


def name_or_model(name: str | None, info: ValidationInfo) -> str:
    return name or str(info.data.get("model", "")).rstrip("/").rpartition("/")[2]


def of_tasks(metrics: dict[str, str], info: ValidationInfo) -> dict[str, str]:
    """A metric is of a task that is run."""
    tasks = [task for tasks in info.data.get("suites", ()) for task in tasks]
    if found := [
        ((task,), f"no task {task!r} here.{did_you_mean(task, tasks)} Tasks: {', '.join(tasks)}.")
        for task in metrics
        if task not in tasks and "suites" in info.data
    ]:
        raise mistakes(*found)
    return metrics


def lines(_: Any, info: ValidationInfo) -> dict[str, str]:
    """Where every key, task, metric and published number was written."""
    where = info.context.where
    tasks = {f"tasks.{task}": where("tasks", i) for i, some in enumerate(info.data.get("suites", ())) for task in some}
    metrics = {f"metrics.{task}": where("metrics", task) for task in info.data.get("metrics", ())}
    published = {f"published.{i}": where("published", i) for i in range(len(info.data.get("published", ())))}
    return {word: where(word) for word in KEYS} | tasks | metrics | published


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Setting(WithBudgets):
    """One model with everything that is run on it. Field by field what `vlmprune init FILE` writes and explains.

    `suites` has the tasks of each entry of `tasks`; `where` the line of every key, and of every task, metric and
    published number ("tasks.pope", "metrics.pope", "published.0").
    """

    model: Text
    name: Annotated[Text | None, AfterValidator(name_or_model)] = None
    suites: Some[Annotated[Text, AfterValidator(suite)]] = Field(alias="tasks")
    methods: Entries = field(default_factory=list)
    keep: Keep = ()
    average: Average = ()
    controls: Annotated[Entries, BeforeValidator(or_controls)] = True
    seeds: Seeds = (0, 1, 2)
    batch_size: Positive = 1
    device: kinds.Device = "auto"
    dtype: kinds.DType = "auto"
    attn_implementation: kinds.Attention | None = None
    device_map: kinds.DeviceMap | None = None
    template: Text | None = None
    plain_pictures: Switch = False
    image_processor: dict[str, Any] = field(default_factory=dict)
    limit: Positive | None = None
    generation: kinds.Generation = field(default_factory=dict)
    include_path: Many[Text] = ()
    metrics: Annotated[dict[str, Text], AfterValidator(of_tasks)] = field(default_factory=dict)
    published: Annotated[tuple[Annotated[Published, BeforeValidator(said)], ...], AfterValidator(about_entries)] = (
        field(default_factory=list)
    )
    where: Annotated[dict[str, str], AfterValidator(lines)] = field(default_factory=dict, init=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for some in self.suites for task in some))


#: What may be said of a model, and at the top of a file.
KEYS = tuple("tasks" if one.name == "suites" else one.name for one in fields(Setting) if one.name != "where")
TOP = ("output", *KEYS, "runs")
HINTS = {"model": " (an embedded name, a folder or a hub id)", "tasks": " (`lmms-eval tasks list`)"}
SETTING = TypeAdapter(Annotated[Setting, BeforeValidator(said)])


def unknown(loc: Key, key: Key) -> str:
    """What is known where a word is not."""
    word = str(key[-1])
    if loc[0] == "generation":
        return kinds.unknown_argument(word)
    known = TOP if len(key) == 1 else KEYS
    if loc[0] == "published":
        known = tuple(one.name for one in fields(Published))
    return f"unknown key {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}."


def missing(loc: Key) -> str:
    """What a word that must be there is."""
    return f"a published number needs {loc[-1]}." if len(loc) > 1 else f"{loc[0]} is missing{HINTS[str(loc[0])]}."


# The file


def per_model(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise must_be("a list with an entry per model", value)
    if not value:
        raise about("is an empty list: it needs an entry per model, or leave it out.")
    return tuple(value)


@dataclass(frozen=True)
class Head:
    """What stands at the top of a file alone; pydantic ignores the rest."""

    output: Text = ""
    runs: Annotated[tuple[dict[str, Any], ...], BeforeValidator(per_model)] = ()


HEAD = TypeAdapter(Head)


@dataclass(frozen=True)
class Config:
    """A whole file: where results go, and one setting per model."""

    path: Path
    output: Path
    settings: tuple[Setting, ...]
    text: str
    resolved: dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config; methods, models and tasks are looked up later (`plan.make_plan`).

    Args:
        path: the YAML file, or the name of one that ships with the package (`demo`).
        overrides: `key=value`, as of `--set`.

    Raises:
        Mistakes: everything that is wrong, with lines; of a file with mistakes, methods and their options are looked up
            too, so that one mistake does not hide another.
    """
    path = configs.find(path)
    text = read_text(path, lambda: f"no such file.{near(path)}")
    tree = read_tree(text, str(path))
    for assignment in overrides:
        tree.override(assignment)
    if tree.value is None:
        raise Mistakes([(str(path), "the file is empty; `vlmprune init FILE` writes one that explains every key.")])
    found: list[tuple[str, str]] = []
    head = ConfigSource(tree).read(HEAD, tree.value, found)
    settings = [source.read(SETTING, given, found) for given, source in models(tree)]
    found += named_twice(tree, [setting and setting.name for setting in settings])
    if found:
        for given, source in models(tree):
            replace(source, thorough=True).read(SETTING, given, found)
        raise Mistakes(found)
    output = Path(head.output or Path("runs") / path.stem).expanduser()
    return Config(path, output, tuple(settings), text, tree.value)


def named_twice(tree: Tree, names: Sequence[str | None]) -> list[tuple[str, str]]:
    """Runs with the name of an earlier one."""
    return [
        (tree.where(("runs", i)), f"two runs are called {name!r}: give one of them another `name`.")
        for i, name in enumerate(names)
        if name and name in names[:i]
    ]


def near(path: Path) -> str:
    """The file that may be meant by one that is not there."""
    beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return did_you_mean(path.name, beside + configs.names())


def models(tree: Tree) -> Iterator[tuple[dict[str, Any], ConfigSource]]:
    """What is said of each model, where each word was written: keys at the top hold for all, a run's own win."""
    top = tree.value
    if not isinstance(top, dict):
        return
    shared = {word: value for word, value in top.items() if word not in ("output", "runs")}
    if "runs" not in top:
        yield shared, ConfigSource(tree, dict.fromkeys(shared, ()), unknown=unknown, missing=missing)
    for i, mine in enumerate(top["runs"] if isinstance(top.get("runs"), list) else ()):
        if isinstance(mine, dict):
            place: Key = ("runs", i)
            home = dict.fromkeys(shared, ()) | dict.fromkeys(mine, place)
            yield shared | mine, ConfigSource(tree, home, place, unknown, missing)
