"""The typed schema of `vlmprune eval CONFIG.yaml`: from a file to dataclasses, every mistake with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmprune import configs, registry, spec
from vlmprune.errors import did_you_mean
from vlmprune.eval.config import choices
from vlmprune.eval.config.tree import Key, Mistakes, Reader, read_start, read_tree

__all__ = ["Budget", "Config", "Entry", "Part", "Published", "Setting", "load_config", "unique"]

#: ("keep" or "average", amount)
Budget = tuple[str, int | float]
CONTROLS = ("none", "random", "grid", "pool")
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: What an entry of `methods` may say besides the method's own options.
ENTRY = ("name", "label", "keep", "average", "own_budget", "seeds")


@dataclass(frozen=True)
class Part:
    """One method with its options; what the config says about it was not checked against the method yet."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One entry of `methods` or `controls`.

    Attributes:
        parts: the method, or several that run one after the other.
        label: what tables call it; unique in its setting.
        budgets: its own budgets; None takes those of the setting.
        own_budget: run the method's own published schedule, once.
        seeds: one cell for each; None leaves it to the method.
        control: whether it stands under `controls`.
        where: file and line.
    """

    parts: tuple[Part, ...]
    label: str
    budgets: tuple[Budget, ...] | None = None
    own_budget: bool = False
    seeds: tuple[int, ...] | None = None
    control: bool = False
    where: str = ""


@dataclass(frozen=True)
class Published:
    """A number of a paper, for the ledger of the report: `method` is a label, "none" the unpruned model."""

    method: str
    task: str
    metric: str
    value: float
    source: str
    definition: str
    budget: Budget | None = None
    model: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Setting:
    """One model with everything that is run on it. Field by field what `vlmprune init FILE` writes and explains."""

    model: str
    name: str
    tasks: tuple[str, ...]
    methods: tuple[Entry, ...]
    controls: tuple[Entry, ...]
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]
    batch_size: int
    device: str
    dtype: str
    attn_implementation: str | None
    device_map: str | None
    template: str | None
    limit: int | None
    generation: dict[str, Any]
    include_path: tuple[str, ...]
    metrics: dict[str, str]
    published: tuple[Published, ...]
    where: dict[str, str]  # of every key, and of every task and metric ("tasks.pope", "metrics.pope")


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
    reader = Reader(tree)
    made = read_config(reader, path, text)
    if reader.found:
        raise Mistakes(list(dict.fromkeys([*reader.found, *mistaken_methods(made)])))
    return made


def mistaken_methods(config: Config) -> Iterable[tuple[str, str]]:
    """Where methods and their options are wrong, whatever else is; budgets are not looked at."""
    for entry in (entry for setting in config.settings for entry in (*setting.methods, *setting.controls)):
        for part in entry.parts:
            try:
                if part.name not in ("", spec.NONE):
                    options = {"keep": 0.5} if "keep" in spec.takes(part.name) else {}
                    spec.build(part.name, options | {k: v for k, v in part.options.items() if k not in spec.BUDGETS})
            except (TypeError, ValueError, FileNotFoundError) as error:
                yield entry.where, f"{entry.label}: {error}"


DEFAULTS: dict[str, Any] = {
    "model": None, "name": None, "tasks": None, "methods": [], "keep": None, "average": None, "controls": True,
    "seeds": [0, 1, 2], "batch_size": 1, "device": "auto", "dtype": "auto", "attn_implementation": None,
    "device_map": None, "template": None, "limit": None, "generation": {}, "include_path": [], "metrics": {},
    "published": [],
}  # fmt: skip


def read_budgets(reader: Reader, key: Key, given: dict[str, Any]) -> tuple[Budget, ...]:
    """`keep` and `average` of a mapping, in this order; each a number or a list."""
    made: list[Budget] = []
    for word in spec.BUDGETS:
        if given.get(word) is None:
            continue

        def one(at: Key, value: Any, word: str = word) -> Budget | None:
            try:
                return word, spec.read_budget(value, word)
            except (TypeError, ValueError) as error:
                reader.wrong(at, str(error))
                return None

        made += filter(None, reader.listed((*key, word), given[word], one, least=0))
    once = unique(made)
    for budget in once if len(once) < len(made) else ():
        if made.count(budget) > 1:
            reader.wrong((*key, budget[0]), f"{budget[0]} {budget[1]} is given twice.")
    return once


def read_seeds(reader: Reader, key: Key, value: Any) -> tuple[int, ...]:
    """Whole numbers, each once: a seed that counts twice would narrow the spread."""
    seeds = reader.listed(key, value, lambda k, v: reader.whole(k, v, 0))
    if len(set(seeds)) < len(seeds):
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        reader.wrong(key, f"seed {', '.join(map(str, twice))} is given twice.")
    return tuple(dict.fromkeys(seeds))


def unique(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """Each budget once; 1 (a token) and 1.0 (all of them) are two."""
    return tuple({repr(budget): budget for budget in budgets}.values())


def read_config(reader: Reader, path: Path, text: str) -> Config:
    """The whole file: keys at the top hold for all `runs`, a run's own keys win."""
    top = reader.mapping((), reader.tree.value)
    reader.unknown((), top, ["output", *DEFAULTS, "runs"])
    output = Path(reader.text(("output",), top["output"])) if "output" in top else Path("runs") / path.stem
    shared = {word: value for word, value in top.items() if word in DEFAULTS}
    if "runs" not in top:
        settings = [read_setting(reader, dict.fromkeys(shared, ()), shared, ())]
    else:
        settings = []
        runs = top["runs"]
        if runs == []:
            reader.wrong(("runs",), "runs is an empty list: it needs an entry per model, or leave it out.")
        elif reader.check(("runs",), runs, isinstance(runs, list), "a list with an entry per model"):
            for i, given in enumerate(runs):
                key: Key = ("runs", i)
                mine = reader.mapping(key, given)
                reader.unknown(key, mine, list(DEFAULTS))
                at: dict[str, Key] = dict.fromkeys(shared, ()) | dict.fromkeys(mine, key)
                settings.append(read_setting(reader, at, shared | mine, key))
    names = [setting.name for setting in settings]
    for i, name in enumerate(names):
        if name and name in names[:i]:
            reader.wrong(("runs", i), f"two runs are called {name!r}: give one of them another `name`.")
    return Config(path, output.expanduser(), tuple(settings), text, top)


def read_setting(reader: Reader, at: dict[str, Key], given: dict[str, Any], place: Key) -> Setting:
    """One model's keys; `at` says where each was written: () at the top, or the run."""
    values = DEFAULTS | {word: value for word, value in given.items() if value is not None}
    key = {word: (*at.get(word, place), word) for word in DEFAULTS}

    def optional(word: str, read: Callable[[Key, Any], Any]) -> Any:
        return None if values[word] is None else read(key[word], values[word])

    for word in ("model", "tasks"):
        if values[word] is None:
            hint = " (an embedded name, a folder or a hub id)" if word == "model" else " (`lmms-eval tasks list`)"
            reader.wrong(place, f"{word} is missing{hint}.")
    budgets = read_budgets(reader, at.get("keep", at.get("average", place)), values)
    model = optional("model", reader.text) or ""
    named = optional("tasks", lambda k, v: reader.listed(k, v, reader.text)) or ()
    tasks = {
        task: reader.tree.where((*key["tasks"], i))
        for i, name in enumerate(named)
        for task in (read_suite(reader, (*key["tasks"], i), name) if name.endswith(".yaml") else (name,))
    }
    methods = tuple(
        read_entry(reader, (*key["methods"], i), value)
        for i, value in enumerate(as_list(reader, key, values, "methods"))
    )
    controls = read_controls(reader, key["controls"], values["controls"], {entry.label for entry in methods})
    check_labels(reader, methods + controls)
    if not methods and not controls:
        reader.wrong(place, "there is nothing to run: `methods` is empty and `controls` are off.")
    limit = optional("limit", lambda k, v: reader.whole(k, v, 1))
    generation = reader.mapping(key["generation"], values["generation"])
    metrics = reader.mapping(key["metrics"], values["metrics"])
    for task in metrics:
        if task not in tasks:
            known = ", ".join(tasks)
            reader.wrong((*key["metrics"], task), f"no task {task!r} here.{did_you_mean(task, tasks)} Tasks: {known}.")
    return Setting(
        model=model,
        name=optional("name", reader.text) or model.rstrip("/").rpartition("/")[2],
        tasks=tuple(tasks),
        methods=methods,
        controls=controls,
        budgets=budgets,
        seeds=read_seeds(reader, key["seeds"], values["seeds"]),
        batch_size=reader.whole(key["batch_size"], values["batch_size"], 1),
        device=choices.device(reader, key["device"], values["device"]),
        dtype=reader.choice(key["dtype"], values["dtype"], DTYPES),
        attn_implementation=optional("attn_implementation", lambda k, v: choices.attention(reader, k, v)),
        device_map=optional("device_map", lambda k, v: choices.device_map(reader, k, v)),
        template=optional("template", reader.text),
        limit=limit,
        generation=choices.generation(reader, key["generation"], generation),
        include_path=reader.listed(key["include_path"], values["include_path"], reader.text, least=0),
        metrics={task: reader.text((*key["metrics"], task), value) for task, value in metrics.items()},
        published=tuple(
            read_published(reader, (*key["published"], i), value, [e.label for e in methods + controls])
            for i, value in enumerate(as_list(reader, key, values, "published"))
        ),
        where={word: reader.tree.where(k) for word, k in key.items()}
        | {f"tasks.{task}": place for task, place in tasks.items()}
        | {f"metrics.{task}": reader.tree.where((*key["metrics"], task)) for task in metrics},
    )


def read_suite(reader: Reader, key: Key, name: str) -> tuple[str, ...]:
    """The tasks of a suite, a YAML file with a list `tasks`: relative to the config's folder, or one that ships."""
    path = configs.find(name, Path(reader.tree.name).parent)
    try:
        value = read_tree(read_start(path), str(path)).value
    except (OSError, UnicodeDecodeError) as error:
        reader.wrong(key, f"the suite {path} cannot be read: {getattr(error, 'strerror', None) or error}.")
        return ()
    except Mistakes as error:
        reader.found += error.found
        return ()
    tasks = value.get("tasks") if isinstance(value, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        reader.wrong(key, f"the suite {path} has no list of task names called `tasks`.")
        return ()
    return tuple(tasks)


def as_list(reader: Reader, key: dict[str, Key], values: dict[str, Any], word: str) -> list[Any]:
    value = values[word]
    return value if reader.check(key[word], value, isinstance(value, list), "a list") else []


def read_entry(reader: Reader, key: Key, value: Any, control: bool = False) -> Entry:
    """`fopru`, `{name: todre, tau: null, label: todre-1}` or `[globalcom2, {name: transprune, keep: 64}]`."""
    given = value if isinstance(value, dict) else {"name": value}
    given = {str(word): inner for word, inner in given.items()}
    name = given.get("name")
    if isinstance(name, str) and "+" in name:
        if more := set(given) - {"name", "label"}:
            way = "write each with its own, name: [{name: fopru, keep: 64}, ...]"
            reader.wrong(key, f"{', '.join(sorted(more))} of several methods joined by +: {way}.")
        given = {word: given[word] for word in ("name", "label") if word in given}
        given["name"] = [part.strip() for part in name.split("+")]
    several = isinstance(given.get("name"), list)
    if "name" not in given:
        reader.wrong(key, "an entry needs a name (`vlmprune ls methods`).")
    if several:
        reader.unknown(key, given, ("name", "label"))
        parts = tuple(read_part(reader, (*key, i), part) for i, part in enumerate(given["name"]))
        if len(parts) < 2:
            reader.wrong(key, "a list stands for several methods that run one after the other: name at least two.")
    else:
        options = {word: inner for word, inner in given.items() if word not in ENTRY}
        parts = (Part(reader.text(key, given.get("name", "?")), read_options(reader, key, options)),)
    own = given.get("own_budget", False)
    reader.check((*key, "own_budget"), own, isinstance(own, bool), "true or false")
    for word in spec.BUDGETS:
        if not several and word in given and given[word] is None:
            way = "leave it out for the budgets of all methods, or write own_budget: true for its own schedule."
            reader.wrong((*key, word), f"{word} is null, which is no budget: {way}")
    mine = read_budgets(reader, key, given) if not several else ()
    if own and mine:
        reader.wrong(key, "own_budget runs the method's own schedule: leave out keep and average.")
    seeds = given.get("seeds")
    label = given.get("label")
    return Entry(
        parts=parts,
        label="+".join(part.name for part in parts) if label is None else reader.text((*key, "label"), label),
        budgets=mine or None,
        own_budget=own is True,
        seeds=None if seeds is None else read_seeds(reader, (*key, "seeds"), seeds),
        control=control,
        where=reader.tree.where(key),
    )


def read_part(reader: Reader, key: Key, value: Any) -> Part:
    """One method of several: a name, or a mapping with its name and options, its budget among them."""
    given = value if isinstance(value, dict) else {"name": value}
    options = {str(word): inner for word, inner in given.items() if word != "name"}
    return Part(reader.text(key, given.get("name")), read_options(reader, key, options))


def read_options(reader: Reader, key: Key, options: dict[str, Any]) -> dict[str, Any]:
    """A method's options; null is a value."""
    for word, inner in options.items():
        if inner == "None":
            reader.wrong((*key, word), f"{word} is the text 'None' in YAML: write null for no value.")
            options = options | {word: None}
    return {word: reader.plain((*key, word), inner) for word, inner in options.items()}


def read_controls(reader: Reader, key: Key, value: Any, taken: set[str]) -> tuple[Entry, ...]:
    """True for all, false for none, or a list of entries; what stands among the methods is not run twice."""
    if isinstance(value, bool):
        return tuple(
            Entry((Part(name),), name, control=True, where=reader.tree.where(key))
            for name in (CONTROLS if value else ())
            if name not in taken
        )
    if not reader.check(key, value, isinstance(value, list), "true, false or a list of methods"):
        return ()
    return tuple(read_entry(reader, (*key, i), inner, control=True) for i, inner in enumerate(value))


def check_labels(reader: Reader, entries: Sequence[Entry]) -> None:
    """Labels are unique, and none is the name of another method: fopru called `random` would pass for the control."""
    taken = {spec.NONE, *registry.names()}
    seen: dict[str, str] = {}
    for entry in entries:
        names = "+".join(part.name for part in entry.parts)
        if entry.label != names and entry.label.casefold() in taken - {names}:
            reader.found.append((entry.where, f"the label {entry.label!r} is another method's name: give another one."))
        if (folded := entry.label.casefold()) in seen:
            reader.found.append(
                (entry.where, f"{entry.label!r} is the label of {seen[folded]} too: give one of them another `label`.")
            )
        seen[folded] = entry.where


def read_published(reader: Reader, key: Key, value: Any, labels: list[str]) -> Published:
    """One number of a paper; source and definition are required, since a number without them cannot be compared."""
    given = reader.mapping(key, value)
    known = ["method", "keep", "average", "task", "metric", "value", "source", "definition", "model"]
    reader.unknown(key, given, known)
    needed = {word: given.get(word) for word in ("method", "task", "metric", "value", "source", "definition")}
    for word in [word for word, inner in needed.items() if inner is None]:
        reader.wrong(key, f"a published number needs {word}.")
        needed[word] = 0 if word == "value" else "?"
    budgets = read_budgets(reader, key, given)
    if len(budgets) > 1:
        reader.wrong(key, "a published number has one budget, keep or average.")
    labels = ["none", *labels]
    if needed["method"] not in ("?", *labels):
        hint = did_you_mean(str(needed["method"]), labels)
        reader.wrong((*key, "method"), f"no method is labelled {needed['method']!r} here.{hint}")
    texts = {word: reader.text((*key, word), inner) for word, inner in needed.items() if word != "value"}
    return Published(
        **texts,
        value=reader.number((*key, "value"), needed["value"]),
        budget=budgets[0] if budgets else None,
        model=None if given.get("model") is None else reader.text((*key, "model"), given["model"]),
        where=reader.tree.where(key),
    )
