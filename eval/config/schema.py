"""The schema of `vlmprune eval CONFIG.yaml`: pydantic models of its keys, and every mistake with its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass

from vlmprune import configs, spec
from vlmprune.errors import did_you_mean
from vlmprune.eval.config import kinds
from vlmprune.eval.config.kinds import Average, Keep, Plain, Positive, Seeds, Switch, Text
from vlmprune.eval.config.told import Source, about, mistakes, must_be
from vlmprune.eval.config.tree import Key, Mistakes, Tree, read_start, read_tree

__all__ = ["KEYS", "Budget", "Config", "Entry", "Part", "Published", "Setting", "load_config", "unique"]

#: ("keep" or "average", amount)
Budget = tuple[str, int | float]
CONTROLS = ("none", "random", "grid", "pool")
#: What an entry of `methods` may say besides the method's own options.
ENTRY = ("name", "label", "keep", "average", "own_budget", "seeds")
STRICT = ConfigDict(extra="forbid", validate_default=True)


class Budgeted:
    """Has budgets: `keep` and `average`, in this order."""

    keep: tuple[int | float, ...]
    average: tuple[int | float, ...]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return (*(("keep", amount) for amount in self.keep), *(("average", amount) for amount in self.average))


# Methods


@dataclass(frozen=True, config=STRICT)
class Part:
    """One method with its options; what the config says about it was not checked against the method yet."""

    name: Text
    options: dict[str, Plain] = field(default_factory=dict)


def looked_up(part: Part, info: ValidationInfo) -> Part:
    """Where anything else is wrong, a method and its options are looked up too; budgets are the plan's."""
    if info.context and info.context.thorough and part.name != spec.NONE:
        try:
            options = {"keep": 0.5} if "keep" in spec.takes(part.name) else {}
            spec.build(part.name, options | {k: v for k, v in part.options.items() if k not in spec.BUDGETS})
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise mistakes(((), f"{part.name}: {error}")) from None
    return part


def no_other_budget(own: bool, info: ValidationInfo) -> bool:
    if own and (info.data.get("keep") or info.data.get("average")):
        raise mistakes(((), "own_budget runs the method's own schedule: leave out keep and average."))
    return own


@dataclass(frozen=True, config=STRICT)
class Entry(Budgeted):
    """One entry of `methods` or `controls`.

    Attributes:
        parts: the method, or several that run one after the other.
        label: what tables call it; unique in its setting.
        keep, average: its own budgets; without any, those of the setting.
        own_budget: run the method's own published schedule, once.
        seeds: one cell for each; None leaves it to the method.
        control: whether it stands under `controls`.
        where: file and line.
    """

    parts: tuple[Annotated[Part, AfterValidator(looked_up)], ...]
    label: Text
    keep: Keep = ()
    average: Average = ()
    own_budget: Annotated[Switch, AfterValidator(no_other_budget)] = False
    seeds: Seeds | None = None
    control: bool = False
    where: str = ""

    @property
    def alone(self) -> bool:
        return len(self.parts) == 1


def in_full(value: Any) -> dict[str, Any] | Entry:
    """`fopru`, `{name: todre, tau: null, label: todre-1}` or `[globalcom2, {name: transprune, keep: 64}]`."""
    given = value if isinstance(value, dict) else {"name": value}
    if "name" not in given:
        raise mistakes(((), "an entry needs a name (`vlmprune ls methods`)."))
    name = given["name"]
    joined = isinstance(name, str) and "+" in name
    if not joined and not isinstance(name, list):
        options = {word: inner for word, inner in given.items() if word not in ENTRY}
        parts = [{"name": name, "options": options}]
        own = {word: given[word] for word in ENTRY[2:] if word in given}
    else:
        way = "of several methods, known: name, label. Write options with each: name: [{name: fopru, keep: 64}, ...]"
        if more := [((word,), f"unknown key {word!r} {way}.") for word in given if word not in ("name", "label")]:
            raise mistakes(*more)
        parts = [in_part(part) for part in (name.split("+") if joined else name)]
        own = {}
        if len(parts) < 2:
            way = "a list stands for several methods that run one after the other: name at least two."
            raise mistakes(((), way))
    label = given.get("label")
    return {"parts": parts, "label": "+".join(str(p["name"]) for p in parts) if label is None else label, **own}


def in_part(value: Any) -> dict[str, Any]:
    """One method of several: a name, or a mapping with its name and options, its budget among them."""
    given = value if isinstance(value, dict) else {"name": value.strip() if isinstance(value, str) else value}
    return {"name": given.get("name"), "options": {word: inner for word, inner in given.items() if word != "name"}}


def listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise must_be("a list", value)
    return tuple(value)


def or_controls(value: Any, info: ValidationInfo) -> tuple[Any, ...]:
    """True for all, false for none, or a list of entries; what stands among the methods is not run twice."""
    if isinstance(value, bool):
        taken = {entry.label for entry in info.data.get("methods", ())}
        return tuple(name for name in CONTROLS if value and name not in taken)
    if not isinstance(value, list):
        raise must_be("true, false or a list of methods", value)
    return tuple(value)


def placed(entries: tuple[Entry, ...], info: ValidationInfo) -> tuple[Entry, ...]:
    """The entries with their lines; labels differ, among methods and controls."""
    word = info.field_name or ""
    made = tuple(
        replace(entry, where=info.context.where(word, i), control=word == "controls") for i, entry in enumerate(entries)
    )
    seen: dict[str, str] = {}
    for entry in (*(info.data.get("methods", ()) if word == "controls" else ()), *made):
        if other := seen.get(entry.label.casefold()):
            raise mistakes(
                (entry.where, f"{entry.label!r} is the label of {other} too: give one of them another `label`.")
            )
        seen[entry.label.casefold()] = entry.where
    if word == "controls" and not seen and "methods" in info.data:
        raise mistakes((info.context.where(), "there is nothing to run: `methods` is empty and `controls` are off."))
    return made


Entries = Annotated[tuple[Annotated[Entry, BeforeValidator(in_full)], ...], AfterValidator(placed)]


# Published numbers


def said(value: Any) -> Any:
    """A mapping without its nulls, which stand for the defaults."""
    return {word: inner for word, inner in value.items() if inner is not None} if isinstance(value, dict) else value


def one_budget(average: tuple[int | float, ...], info: ValidationInfo) -> tuple[int | float, ...]:
    if len(average) + len(info.data.get("keep", ())) > 1:
        raise mistakes(((), "a published number has one budget, keep or average."))
    return average


@dataclass(frozen=True, config=STRICT)
class Published(Budgeted):
    """A number of a paper, for the ledger of the report: `method` is a label, "none" the unpruned model.

    Source and definition are required, since a number without them cannot be compared.
    """

    method: Text
    task: Text
    metric: Text
    value: kinds.Number
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
    tasks = value.get("tasks") if isinstance(value, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise mistakes(((), f"the suite {path} has no list of task names called `tasks`."))
    return tuple(tasks)


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
class Setting(Budgeted):
    """One model with everything that is run on it. Field by field what `vlmprune init FILE` writes and explains.

    `suites` has the tasks of each entry of `tasks`; `where` the line of every key, and of every task, metric and
    published number ("tasks.pope", "metrics.pope", "published.0").
    """

    model: Text
    name: Annotated[Text | None, AfterValidator(name_or_model)] = None
    suites: kinds.Some[Annotated[Text, AfterValidator(suite)]] = Field(alias="tasks")
    methods: Annotated[Entries, BeforeValidator(listed)] = field(default_factory=list)
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
    limit: Positive | None = None
    generation: kinds.Generation = field(default_factory=dict)
    include_path: kinds.Many[Text] = ()
    metrics: Annotated[dict[str, Text], AfterValidator(of_tasks)] = field(default_factory=dict)
    published: Annotated[
        tuple[Annotated[Published, BeforeValidator(said)], ...], BeforeValidator(listed), AfterValidator(about_entries)
    ] = field(default_factory=list)
    where: Annotated[dict[str, str], AfterValidator(lines)] = field(default_factory=dict, init=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for some in self.suites for task in some))


#: What may be said of a model, and at the top of a file.
KEYS = tuple("tasks" if one.name == "suites" else one.name for one in fields(Setting) if one.name != "where")
TOP = ("output", *KEYS, "runs")
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
    runs: Annotated[
        tuple[Annotated[dict[str, Any], kinds.kind("a mapping (key: value)")], ...], BeforeValidator(per_model)
    ] = ()


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
    try:
        text = read_start(path)
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near += configs.names()
        raise Mistakes([(str(path), f"no such file.{did_you_mean(path.name, near)}")]) from None
    except UnicodeDecodeError:
        raise Mistakes([(str(path), "not a text file in UTF-8.")]) from None
    except OSError as error:
        raise Mistakes([(str(path), f"cannot be read: {error.strerror or error}.")]) from None
    tree = read_tree(text, str(path))
    for assignment in overrides:
        tree.override(assignment)
    if tree.value is None:
        raise Mistakes([(str(path), "the file is empty; `vlmprune init FILE` writes one that explains every key.")])
    found: list[tuple[str, str]] = []
    head = validated(HEAD, tree.value, Source(tree), found)
    settings = [validated(SETTING, given, source, found) for given, source in models(tree)]
    names = [setting.name if setting else "" for setting in settings]
    for i, name in enumerate(names):
        if name and name in names[:i]:
            where = tree.where(("runs", i))
            found.append((where, f"two runs are called {name!r}: give one of them another `name`."))
    if found:
        for given, source in models(tree):
            validated(SETTING, given, replace(source, thorough=True), found)
        raise Mistakes(found)
    output = Path(head.output or Path("runs") / path.stem).expanduser()
    return Config(path, output, tuple(settings), text, tree.value)


def models(tree: Tree) -> Iterator[tuple[dict[str, Any], Source]]:
    """What is said of each model, where each word was written: keys at the top hold for all, a run's own win."""
    top = tree.value
    if not isinstance(top, dict):
        return
    shared = {word: value for word, value in top.items() if word not in ("output", "runs")}
    if "runs" not in top:
        yield shared, Source(tree, dict.fromkeys(shared, ()), unknown=unknown)
    for i, mine in enumerate(top["runs"] if isinstance(top.get("runs"), list) else ()):
        if isinstance(mine, dict):
            place: Key = ("runs", i)
            yield shared | mine, Source(tree, dict.fromkeys(shared, ()) | dict.fromkeys(mine, place), place, unknown)


def validated(adapter: TypeAdapter[Any], given: Any, source: Source, found: list[tuple[str, str]]) -> Any:
    """The model that is meant, or None and what is wrong."""
    try:
        return adapter.validate_python(given, context=source)
    except ValidationError as error:
        found += source.told(error)
        return None


def unique(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """Each budget once; 1 (a token) and 1.0 (all of them) are two."""
    return tuple({repr(budget): budget for budget in budgets}.values())
