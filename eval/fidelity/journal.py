"""The rows of `vlmprune fidelity` on disk as they are measured, so that a run that was stopped can be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.eval.fidelity.measure import Compared, StudyEntry, StudyRow
from vlmprune.eval.lmms import fingerprints
from vlmprune.runtime.files import write_whole
from vlmprune.runtime.status import note

if TYPE_CHECKING:
    from vlmprune.runtime.loading import Loaded

__all__ = ["FILE", "Journal", "JournalError", "refuse_second", "setting_of"]

FILE = "rows.jsonl"
FORMAT = 2  # of the first line


def setting_of(loaded: Loaded, longest: int, versions: str, frames: int | None = None) -> dict[str, Any]:
    """What every result hangs on, beside picture, prompt and method.

    Args:
        longest: tokens of an answer.
        versions: of what it runs on.
        frames: of every video, where there are some.
    """
    source, model = loaded.source, loaded.model
    return {
        "model": source.name,
        "weights": fingerprints.files(Path(source.place)) if source.local else model.config._commit_hash,
        "adapter": fingerprints.files(Path(source.adapter)) if source.adapter else None,
        "device": model.device.type,
        "dtype": loaded.about["dtype"],
        "max_new_tokens": longest,
        "versions": versions,
        **({} if frames is None else {"frames": frames}),
    }


class JournalError(Exception):
    """A folder that cannot be written to or gone on with; the message says why and what to do."""


def refuse_second(folder: Path, resume: bool, verb: str = "fidelity") -> None:
    """Refuse to begin in a folder where another run's rows are.

    Raises:
        JournalError: there are some, and nobody said `resume`.
    """
    lines = len((folder / FILE).read_bytes().splitlines()) - 1 if (folder / FILE).is_file() else 0
    if lines > 0 and not resume:
        raise JournalError(
            f"{folder} holds another run of `vlmprune {verb}` ({folder / FILE}, {lines} results): --resume goes on "
            "with it (what is there is not measured again), --out names another folder."
        )


class Journal:
    """Rows by what they depend on: picture (its content), prompt, method, its options and code, and the setting.

    Args:
        folder: where the file is, or will be.
        setting: what all rows depend on (the model, its precision, the longest answer, ...; JSON types).

    Raises:
        JournalError: the folder holds rows of another setting; it is named what differs.
        OSError: the file cannot be read.
    """

    def __init__(self, folder: Path, setting: dict[str, Any]):
        self.path, self.setting = folder / FILE, setting
        self.rows: dict[str, StudyRow] = {}
        self.damaged: list[int] = []  # numbers of lines that nothing could be made of
        self.contents: dict[Path, str] = {}
        self.codes: dict[str, Any] = {}
        # written with the first new row, without what a killed process left half-written
        self.before: list[str] | None = self.read() if self.path.is_file() else []

    def read(self) -> list[str]:
        """Take the rows that are there, and return their lines."""
        text = self.path.read_bytes().decode(errors="surrogateescape")
        head, *lines = text.split("\n")
        if lines and lines[-1] == "":
            lines.pop()
        if not lines:
            return []  # a run that measured nothing
        self.refuse_other(head)
        return [line for number, line in enumerate(lines, 2) if self.take(line, number)]

    def tell_damaged(self) -> None:
        """Say which lines are measured again."""
        for line in self.damaged:
            note(f"{self.path}, line {line}: damaged, and measured again")

    def refuse_other(self, head: str) -> None:
        """Refuse the rows below a first line that says another setting, or nothing."""
        try:
            said = json.loads(head)
            known = said["format"] == FORMAT and dict(said["setting"])
        except (ValueError, KeyError, TypeError):
            known = None
        if not known:
            raise JournalError(
                f"{self.path}, line 1, is damaged or of another version: name another folder with --out."
            )
        pairs = {name: (known.get(name), self.setting.get(name)) for name in known | self.setting}
        if told := [f"{name} {then!r}, now {now!r}" for name, (then, now) in pairs.items() if then != now]:
            raise JournalError(
                f"{self.path.parent} holds results of another setting, which cannot be mixed ({'; '.join(told)}): name "
                "another folder with --out."
            )

    def take(self, line: str, number: int) -> bool:
        """Take the row of a line; whether there was one."""
        try:
            said = json.loads(line)
            key = said.pop("key")
            self.rows[key] = row_of(said)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged.append(number)
            return False
        return True

    def key(self, picture: str, path: Path, prompt: str, entry: StudyEntry, seed: int | None) -> str:
        """What a row is found by again."""
        if path not in self.contents:
            try:
                self.contents[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError:  # whoever reads the picture says so
                self.contents[path] = ""
        options = entry.seeded(seed)
        name = json.dumps([entry.method, entry.options], sort_keys=True, default=str)
        if name not in self.codes:
            self.codes[name] = fingerprints.method(entry.method, entry.options)
        about = [picture, self.contents[path], prompt, entry.label, options, self.codes[name]]
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def add(self, rows: dict[str, StudyRow]) -> None:
        """Append rows; whole lines, so that a process that is killed loses the last of them at most.

        Raises:
            OSError: no room, or no permission.
        """
        said = [json.dumps({"key": key} | row.as_json(), ensure_ascii=False) for key, row in rows.items()]
        if self.before is not None:
            head = json.dumps({"format": FORMAT, "setting": self.setting}, ensure_ascii=False)
            write_whole(self.path, encoded([head, *self.before, *said]))
            self.before = None
        else:
            with self.path.open("ab") as file:
                file.write(encoded(said))
        self.rows |= rows

    def having(self, keys: Iterable[Sequence[str]]) -> list[StudyRow]:
        """The rows of every prompt (its keys) that has all of them: entries are compared on the same prompts."""
        return [self.rows[key] for mine in keys if all(key in self.rows for key in mine) for key in mine]


def encoded(lines: Iterable[str]) -> bytes:
    """Lines as a file has them; file names may hold bytes that are no text."""
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")


def row_of(said: dict[str, Any]) -> StudyRow:
    """The reverse of `StudyRow.as_json`; the tokens of the answer are not kept."""
    measured = {field.name: said.pop(field.name) for field in fields(Compared) if field.name != "tokens"}
    along = tuple((tokens, agreeing, kl) for tokens, agreeing, kl in measured.pop("along"))
    if not all(isinstance(value, bool | int | float) for value in (*measured.values(), *chain(*along))):
        raise ValueError("a measure is no number")
    return StudyRow(**said, compared=Compared(tokens=[], along=along, **measured))
