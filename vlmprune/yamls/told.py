"""What pydantic found wrong, told in the words of a file and with its lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from vlmprune.errors import did_you_mean
from vlmprune.yamls.tree import Key, Tree

__all__ = ["ConfigSource", "about", "as_mistake", "mistakes", "must_be"]


#: What pydantic wants, in a file's words.
TYPES = {"tuple_type": "a list", **dict.fromkeys(("dataclass_type", "dict_type"), "a mapping (key: value)")}


def about(what: str) -> PydanticCustomError:
    """What a validator raises about its own value; the value's name is put before it."""
    return PydanticCustomError("about", "{what}", {"what": what})


def must_be(wanted: str, value: Any, known: Iterable[str] = ()) -> PydanticCustomError:
    """A value is none of its kind: `keep must be text, not 3.`, with a suggestion where only some words are known."""
    hint = did_you_mean(value, known).strip() if isinstance(value, str) else ""
    return about(f"must be {wanted}{hint and f' ({hint})'}, not {shown(value)}.")


def mistakes(*found: tuple[Key | str, str]) -> PydanticCustomError:
    """Whole sentences, each with its key below that of the validator, or with its file and line."""
    return PydanticCustomError("mistakes", "{found}", {"found": found})


@contextmanager
def as_mistake(start: str = "") -> Iterator[None]:
    """Around what reads a value as methods and options do: what that raises is a mistake in the file."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise mistakes(((), f"{start}{error}")) from None


@dataclass
class ConfigSource:
    """Where the values of one model were written: the context in which they are validated.

    Attributes:
        tree: the file.
        home: key of the mapping that each word of the model stands in: () for the top, or the run's.
        place: the run's key, () for a file without runs.
        unknown: says what is known where a word is not, by its location and key.
        missing: says what a word that must be there is, by its location.
        thorough: look methods and their options up, too.
    """

    tree: Tree
    home: Mapping[str | int, Key] = field(default_factory=dict)
    place: Key = ()
    unknown: Callable[[Key, Key], str] = lambda loc, key: f"unknown key {key[-1]!r}."
    missing: Callable[[Key], str] = lambda loc: f"{name_of(loc)} is missing."
    thorough: bool = False

    def key(self, loc: Key) -> Key:
        """The key that a location of pydantic's means; steps that are not in the file (a short form) are left out."""
        key = self.home.get(loc[0], self.place) if loc else self.place
        value = self.tree.value
        for step in key:
            value = value[step]
        for step in loc:
            if step == "parts" and isinstance(value, dict) and isinstance(value.get("name"), list):
                step = "name"
            if step in steps_of(value):
                key, value = (*key, step), value[step]
        return key

    def where(self, *loc: str | int) -> str:
        """File and line of a location."""
        return self.tree.where(self.key(loc))

    def read(self, adapter: TypeAdapter[Any], value: Any, found: list[tuple[str, str]]) -> Any:
        """What a value means, or None, and what is wrong with it goes to `found`."""
        try:
            return adapter.validate_python(value, context=self)
        except ValidationError as error:
            found += self.told(error)
            return None

    def told(self, error: ValidationError) -> Iterator[tuple[str, str]]:
        """All that is wrong, as (where, what)."""
        for line in error.errors(include_url=False):
            loc, about = line["loc"], line.get("ctx", {})
            if line["type"] == "mistakes":
                for at, what in about["found"]:
                    yield (at if isinstance(at, str) else self.where(*loc, *at)), what
            else:
                yield self.where(*loc), self.sentence(line)

    def sentence(self, line: ErrorDetails) -> str:
        """One of pydantic's own errors, or `about`."""
        loc, kind = line["loc"], line["type"]
        name = name_of(self.key(loc))
        if kind == "about":
            return f"{name} {line['ctx']['what']}"
        if kind == "missing":
            return self.missing(loc)
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            return self.unknown(loc, self.key(loc))
        if kind in TYPES:
            return f"{name} must be {TYPES[kind]}, not {shown(line['input'])}."
        return f"{name}: {line['msg']}."


def steps_of(value: Any) -> Iterable[str | int]:
    """The keys or places that a value has."""
    return value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def name_of(key: Key) -> str:
    """`keep`, `runs[0].tasks[2]`, as a message names a value."""
    made = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return made.removeprefix(".") or "the file"


def shown(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
