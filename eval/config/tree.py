"""YAML as plain values that remember where each was written: safe, bounded, without duplicate keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlmprune.errors import did_you_mean

__all__ = ["Key", "Mistakes", "Reader", "Tree", "read_start", "read_tree"]

LARGEST, NODES, DEPTH = 1_000_000, 20_000, 30  # characters, values after aliases are expanded, nested levels
TOO_DEEP = f"nested too deeply: more than {DEPTH} levels of nesting."
PLAIN = ("str", "int", "float", "bool", "null")
#: Numbers of YAML 1.1 that hardly anybody means: 010 is 8, and 1:30 is 90.
UNUSUAL = re.compile(r"[-+]?0[0-7_]+|.*:.*")

Key = tuple[str | int, ...]


class Mistakes(ValueError):
    """Everything that is wrong with a file: `found` lists (where, what)."""

    def __init__(self, found: list[tuple[str, str]]):
        self.found = found
        super().__init__("\n".join(f"{where}: {what}" for where, what in found))


@dataclass
class Tree:
    """The values of a YAML file.

    Attributes:
        name: the file, as messages name it.
        value: plain dicts, lists, strings, numbers, booleans and None.
        origin: where the value at a key was written, `demo.yaml:3` or `--set limit=3`.
    """

    name: str
    value: Any = None
    origin: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """Where a value was written, or the nearest value around it that was."""
        while key and key not in self.origin:
            key = key[:-1]
        return self.origin.get(key, self.name)

    def override(self, assignment: str) -> None:
        """Apply `a.b.0=value`: the value is read as YAML; a missing key is made.

        Raises:
            Mistakes: no such assignment.
        """
        where = f"--set {assignment}"
        path, equals, text = assignment.partition("=")
        steps = [part.strip() for part in path.split(".")]
        if not equals or not all(steps):
            raise Mistakes([(where, "write KEY=VALUE, such as limit=20 or runs.0.batch_size=8.")])
        key: Key = ()
        holder = self.value = {} if self.value is None else self.value
        for i, step in enumerate(steps):
            last, shown = i == len(steps) - 1, ".".join(steps[:i]) or "the file"
            if isinstance(holder, list):
                if not re.fullmatch(r"\d+", step) or int(step) > len(holder) - (not last):
                    raise Mistakes([(where, f"{shown} is a list of {len(holder)}, which has no place {step!r}.")])
                part: str | int = int(step)
                if part == len(holder):
                    holder.append(None)
            elif isinstance(holder, dict):
                part = step
                if part not in holder and not last and steps[i + 1].isdigit():
                    rest = ".".join(steps[2:])
                    only = f" The file is about one model: write {rest}={text}." if key == () and part == "runs" else ""
                    path = ".".join(steps[: i + 1])
                    raise Mistakes([(where, f"{path} is not in the file, so it has no place {steps[i + 1]}.{only}")])
                holder.setdefault(part, {})
            else:
                raise Mistakes([(where, f"{shown} is {holder!r}, which has no part {step!r}.")])
            key += (part,)
            if last:
                for old in [k for k in self.origin if k[: len(key)] == key]:
                    del self.origin[old]
                holder[part] = read_tree(text, where).value
                self.origin[key] = where
            holder = holder[part]


def read_start(path: Path) -> str:
    """The text of a file, of a large one no more than it takes to see that it is too large.

    Raises:
        UnicodeDecodeError: not UTF-8.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        return file.read(LARGEST + 1)


def read_tree(text: str, name: str) -> Tree:
    """Read YAML. Nothing but plain values is built, and aliases cannot grow beyond a bound.

    Raises:
        Mistakes: not YAML, a key given twice, an object of another kind, or too much.
    """
    tree = Tree(name)

    def stop(node: yaml.Node | None, what: str) -> Mistakes:
        return Mistakes([(line_of(name, node.start_mark) if node else name, what)])

    if len(text) > LARGEST:
        raise stop(None, f"more than {LARGEST} characters: not a config.")
    try:
        root = compose(text, stop)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise Mistakes([(line_of(name, mark) if mark else name, f"not YAML: {told}.")]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = name if name.startswith("--set ") else f"{name}:{line}"
        raise Mistakes([(where, f"not YAML: the character #x{error.character:04x} is not allowed.")]) from None
    seen = 0

    def build(node: yaml.Node, key: Key, around: tuple[yaml.Node, ...]) -> Any:
        nonlocal seen
        seen += 1
        if seen > NODES:
            raise stop(node, f"more than {NODES} values once aliases (*name) are expanded.")
        if any(node is other for other in around):
            raise stop(node, "an alias (*name) stands inside the value that it names.")
        if len(around) > DEPTH:  # through aliases
            raise stop(node, TOO_DEEP)
        tree.origin[key] = line_of(name, node.start_mark)
        inside = (*around, node)
        if isinstance(node, yaml.ScalarNode):
            return scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [build(item, (*key, i), inside) for i, item in enumerate(node.value)]
        if not (isinstance(node, yaml.MappingNode) and node.tag.endswith(":map")):
            raise stop(node, f"{node.tag!r} is no plain value: write lists, mappings, text and numbers only.")
        made: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if name_node.tag.endswith(":merge"):
                raise stop(name_node, "merge keys (<<) are not supported: keys at the top hold for all `runs`.")
            word = scalar(name_node) if isinstance(name_node, yaml.ScalarNode) else None
            if not isinstance(word, str):
                raise stop(name_node, f"a key must be text, not {getattr(name_node, 'value', name_node)!r}.")
            if word in made:
                first = tree.origin[(*key, word)].rpartition(":")[2]
                raise stop(name_node, f"{word!r} is given twice (first in line {first}).")
            made[word] = build(value_node, (*key, word), inside)
            tree.origin[(*key, word)] = line_of(name, name_node.start_mark)
        return made

    def scalar(node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "timestamp":
            raise stop(node, f"{node.value!r} is read as a date ({kind!r}): put it in quotes for text.")
        if kind not in PLAIN:
            raise stop(node, f"{kind!r} is no plain value: write lists, mappings, text and numbers only.")
        if kind in ("int", "float") and (odd := UNUSUAL.fullmatch(node.value)):
            meant = "base 60" if ":" in odd[0] else "octal"
            raise stop(node, f"{node.value!r} would be a number in {meant}: write it plainly, or in quotes for text.")
        if bad := next((c for c in node.value if c == "\0" or "\ud800" <= c <= "\udfff"), None):
            raise stop(node, f"the character #x{ord(bad):04x} is no text.")
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except ValueError:
            raise stop(node, f"{node.value[:40]!r} is no number that can be read.") from None

    tree.value = build(root, (), ()) if root is not None else None
    return tree


def compose(text: str, stop: Callable[[yaml.Node | None, str], Mistakes]) -> yaml.Node | None:
    """The nodes of a YAML document; one that is too large or too deep is given up while it is read.

    Raises:
        Mistakes: too many values, too many levels.
        yaml.YAMLError: not YAML.
    """
    depth = seen = 0

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            nonlocal depth, seen
            depth, seen = depth + 1, seen + 1
            if seen > 2 * NODES:  # keys count too
                raise stop(parent, f"more than {NODES} values: not a config.")
            if depth > DEPTH + 2:
                raise stop(parent, TOO_DEEP)
            made = super().compose_node(parent, index)
            depth -= 1
            return made

    return yaml.compose(text, Loader=Loader)


def line_of(name: str, mark: yaml.Mark) -> str:
    """`file:3`, or the name alone where it is no file (`--set a=b`)."""
    return name if name.startswith("--set ") else f"{name}:{mark.line + 1}"


class Reader:
    """Reads values of a tree by type and collects what is wrong, so that a user sees all of it at once."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.found: list[tuple[str, str]] = []

    def wrong(self, key: Key, what: str) -> None:
        self.found.append((self.tree.where(key), what))

    def check(self, key: Key, value: Any, good: bool, wanted: str) -> bool:
        if not good:
            self.wrong(key, f"{name_of(key)} must be {wanted}, not {shown(value)}.")
        return good

    def unknown(self, key: Key, given: Iterable[str], known: Sequence[str]) -> None:
        for word in given:
            if word not in known:
                hint = did_you_mean(word, known)
                self.wrong((*key, word), f"unknown key {word!r}.{hint} Known: {', '.join(known)}.")

    def text(self, key: Key, value: Any) -> str:
        good = isinstance(value, str) and bool(value.strip())
        return value if self.check(key, value, good, "text") else ""

    def whole(self, key: Key, value: Any, least: int) -> int:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return value if self.check(key, value, good, f"a whole number of at least {least}") else least

    def number(self, key: Key, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return float(value) if self.check(key, value, good, "a number") else 0.0

    def choice(self, key: Key, value: Any, known: Sequence[str]) -> str:
        good = isinstance(value, str) and value in known
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        return (
            value
            if self.check(key, value, good, f"one of {', '.join(known)}{hint and ' (' + hint.strip() + ')'}")
            else ""
        )

    def listed(self, key: Key, value: Any, read: Callable[[Key, Any], Any], least: int = 1) -> tuple[Any, ...]:
        """A list, or one value alone."""
        if not isinstance(value, list):
            return (read(key, value),)
        if len(value) < least:
            self.wrong(key, f"{name_of(key)} is an empty list.")
        return tuple(read((*key, i), item) for i, item in enumerate(value))

    def mapping(self, key: Key, value: Any) -> dict[str, Any]:
        return value if self.check(key, value, isinstance(value, dict), "a mapping (key: value)") else {}

    def plain(self, key: Key, value: Any) -> Any:
        """An option of a method or of generation: a scalar, or a list of scalars."""
        inner = value if isinstance(value, list) else [value]
        good = all(x is None or isinstance(x, str | int | float | bool) for x in inner)
        return value if self.check(key, value, good, "a number, text, true, false or null, or a list of them") else None


def name_of(key: Key) -> str:
    """`keep`, `runs[0].tasks[2]`, as a message names a value."""
    made = ""
    for part in key:
        made += f"[{part}]" if isinstance(part, int) else f".{part}" if made else str(part)
    return made or "the file"


def shown(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
