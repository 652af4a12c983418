"""YAML as plain values that remember where each was written: safe, bounded, without duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Key", "Mistakes", "Tree", "read_start", "read_text", "read_tree"]

LARGEST, NODES, DEPTH = 1_000_000, 20_000, 30  # characters, values after aliases are expanded, nested levels
TOO_DEEP = f"nested too deeply: more than {DEPTH} levels of nesting."
NO_PLAIN = "no plain value: write lists, mappings, text and numbers only."
NO_TEXT = re.compile("[\0\ud800-\udfff]")
PLAIN = ("str", "int", "float", "bool", "null")
#: Numbers of YAML 1.1 that hardly anybody means: 010 is 8, and 1:30 is 90.
UNUSUAL = re.compile(r"[-+]?0[0-7_]+|.*:.*")

Key = tuple[str | int, ...]


class Mistakes(ValueError):
    """Everything that is wrong with a file: `found` lists (where, what), each once, in the order of lines."""

    def __init__(self, found: list[tuple[str, str]]):
        self.found = sorted(dict.fromkeys(found), key=lambda told: in_order(told[0]))
        super().__init__("\n".join(f"{where}: {what}" for where, what in self.found))


def in_order(where: str) -> tuple[str, int]:
    """What `demo.yaml:12` and `--set a=b` are sorted by."""
    name, _, line = where.rpartition(":")
    return (name, int(line)) if name and line.isdecimal() else (where, 0)


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
        try:
            holder, key = self.room(steps)
        except ValueError as error:
            alone = steps[0] == "runs" and ("runs",) not in self.origin
            only = f" The file is about one model: write {'.'.join(steps[2:])}={text}." if alone else ""
            raise Mistakes([(where, f"{error}{only}")]) from None
        holder[key[-1]] = read_tree(text, where).value
        self.origin = {at: told for at, told in self.origin.items() if at[: len(key)] != key} | {key: where}

    def room(self, steps: list[str]) -> tuple[Any, Key]:
        """As `find`, with a place for the last step.

        Raises:
            ValueError: there is no such place.
        """
        self.value = {} if self.value is None else self.value
        holder, key = self.find(steps)
        if isinstance(holder, list) and key[-1] == len(holder):
            holder.append(None)
        return holder, key

    def find(self, steps: list[str]) -> tuple[Any, Key]:
        """The dict or list that the last step is in, with the whole key; those on the way are made.

        Raises:
            ValueError: there is no such place.
        """
        holder, key = self.value, ()
        for i in range(len(steps) - 1):
            part = place(holder, steps, i)
            key, holder = (*key, part), holder.setdefault(part, {}) if isinstance(holder, dict) else holder[part]
        return holder, (*key, place(holder, steps, len(steps) - 1))


def place(holder: Any, steps: list[str], i: int) -> str | int:
    """The key or index in `holder` that step `i` means; the last step may add one.

    Raises:
        ValueError: there is no such place.
    """
    step, last, around = steps[i], i == len(steps) - 1, ".".join(steps[:i]) or "the file"
    if isinstance(holder, list):
        if not re.fullmatch(r"\d+", step) or int(step) > len(holder) - (not last):
            raise ValueError(f"{around} is a list of {len(holder)}, which has no place {step!r}.")
        return int(step)
    if not isinstance(holder, dict):
        raise ValueError(f"{around} is {holder!r}, which has no part {step!r}.")
    if step not in holder and not last and steps[i + 1].isdigit():
        raise ValueError(f"{'.'.join(steps[: i + 1])} is not in the file, so it has no place {steps[i + 1]}.")
    return step


def read_start(path: Path) -> str:
    """The text of a file, of a large one no more than it takes to see that it is too large.

    Raises:
        UnicodeDecodeError: not UTF-8.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        return file.read(LARGEST + 1)


def read_text(path: Path, missing: Callable[[], str]) -> str:
    """As `read_start`; `missing` is what to say where there is no such file.

    Raises:
        Mistakes: there is none, or none that can be read.
    """
    try:
        return read_start(path)
    except FileNotFoundError:
        why = missing()
    except UnicodeDecodeError:
        why = "not a text file in UTF-8."
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}."
    raise Mistakes([(str(path), why)])


def read_tree(text: str, name: str) -> Tree:
    """Read YAML. Nothing but plain values is built, and aliases cannot grow beyond a bound.

    Raises:
        Mistakes: not YAML, a key given twice, an object of another kind, or too much.
    """
    if len(text) > LARGEST:
        raise Mistakes([(name, f"more than {LARGEST} characters: not a config.")])
    builder = Builder(name)
    try:
        root = yaml.compose(text, Loader=lambda stream: Bounded(stream, builder))
    except yaml.MarkedYAMLError as error:
        told = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        raise builder.stop(mark and mark.line, f"not YAML: {told}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise builder.stop(line, f"not YAML: the character #x{error.character:04x} is not allowed.") from None
    if root is not None:
        builder.tree.value = builder.build(root, (), ())
    return builder.tree


class Bounded(yaml.SafeLoader):
    """Gives a document up that is too large or too deep, while it is read."""

    def __init__(self, stream: str, builder: Builder):
        super().__init__(stream)
        self.builder, self.depth, self.seen = builder, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.seen = self.depth + 1, self.seen + 1
        if self.seen > 2 * NODES:  # keys count too
            raise self.builder.at(parent, f"more than {NODES} values: not a config.")
        if self.depth > DEPTH + 2:
            raise self.builder.at(parent, TOO_DEEP)
        made = super().compose_node(parent, index)
        self.depth -= 1
        return made


class Builder:
    """Makes plain values of nodes, and notes their lines in `tree`."""

    def __init__(self, name: str):
        self.tree, self.seen = Tree(name), 0

    def line(self, number: int | None) -> str:
        """`file:3`, or the name alone where it is no file (`--set a=b`)."""
        name = self.tree.name
        return name if number is None or name.startswith("--set ") else f"{name}:{number + 1}"

    def stop(self, number: int | None, what: str) -> Mistakes:
        return Mistakes([(self.line(number), what)])

    def at(self, node: yaml.Node | None, what: str) -> Mistakes:
        return self.stop(node and node.start_mark.line, what)

    def build(self, node: yaml.Node, key: Key, around: tuple[yaml.Node, ...]) -> Any:
        """The value of a node; an alias's are built again wherever it stands, and counted."""
        self.check_bounds(node, around)
        self.tree.origin[key] = self.line(node.start_mark.line)
        inside = (*around, node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.build(item, (*key, i), inside) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self.mapping(node, key, inside)
        raise self.at(node, f"{node.tag!r} is {NO_PLAIN}")

    def check_bounds(self, node: yaml.Node, around: tuple[yaml.Node, ...]) -> None:
        """Give up where aliases make too much of a file."""
        self.seen += 1
        if self.seen > NODES:
            raise self.at(node, f"more than {NODES} values once aliases (*name) are expanded.")
        if any(node is other for other in around):
            raise self.at(node, "an alias (*name) stands inside the value that it names.")
        if len(around) > DEPTH:  # through aliases
            raise self.at(node, TOO_DEEP)

    def mapping(self, node: yaml.MappingNode, key: Key, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        """The values of a mapping; each stands in the line of its key."""
        made: dict[str, Any] = {}
        for name, value in node.value:
            word = self.word(name)
            if word in made:
                first = self.tree.origin[(*key, word)].rpartition(":")[2]
                raise self.at(name, f"{word!r} is given twice (first in line {first}).")
            made[word] = self.build(value, (*key, word), inside)
            self.tree.origin[(*key, word)] = self.line(name.start_mark.line)
        return made

    def word(self, node: yaml.Node) -> str:
        """A key of a mapping."""
        if node.tag.endswith(":merge"):
            raise self.at(node, "merge keys (<<) are not supported: keys at the top hold for all `runs`.")
        word = self.scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(word, str):
            raise self.at(node, f"a key must be text, not {getattr(node, 'value', node)!r}.")
        return word

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """Text, a number, true, false or null."""
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if what := self.unclear(kind, node.value):
            raise self.at(node, what)
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except ValueError:
            raise self.at(node, f"{node.value[:40]!r} is no number that can be read.") from None

    @staticmethod
    def unclear(kind: str, text: str) -> str | None:
        """Why a scalar of such a kind is refused; None where it is plain."""
        if kind == "timestamp":
            return f"{text!r} is read as a date ({kind!r}): put it in quotes for text."
        if kind not in PLAIN:
            return f"{kind!r} is {NO_PLAIN}"
        if kind in ("int", "float") and UNUSUAL.fullmatch(text):
            meant = "base 60" if ":" in text else "octal"
            return f"{text!r} would be a number in {meant}: write it plainly, or in quotes for text."
        bad = NO_TEXT.search(text)
        return f"the character #x{ord(bad[0]):04x} is no text." if bad else None
