"""Which prompts to ask about which pictures or videos: from a folder or pattern and a file of prompts to pairs."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

from vlmprune.errors import did_you_mean
from vlmprune.runtime.errors import UserError, brief, printable

__all__ = ["ENDINGS", "VIDEOS", "Pair", "check_text", "find_pictures", "labelled", "read_pairs"]

#: File names that count as pictures in a folder.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".ppm")
#: And as videos.
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
#: By the flag that names them: what is looked for, and how it is called in a folder.
KINDS = {"--images": ("picture", ENDINGS), "--video": ("video", VIDEOS)}
JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Pair:
    """A prompt (of that line of the prompts file) about a picture or a video (its name below the folder).

    `answers` are those that count as right, where the file gives some; `frames` how many are read of a video, None of a
    picture.
    """

    picture: str
    path: Path
    prompt: str
    line: int
    answers: tuple[str, ...] = ()
    frames: int | None = None


def find_pictures(where: str, flag: str = "--images") -> tuple[Path, dict[str, Path]]:
    """The picture files, or video files, that `where` means, sorted by name.

    Args:
        where: a folder, a pattern (`photos/*.jpg`, `photos/**/*.png`), or one file.
        flag: "--images" or "--video".

    Returns:
        The folder that names are relative to, and the files by name.

    Raises:
        UserError: no such folder, or no picture or video in it.
    """
    base, found = look(where, flag)
    named = {file.relative_to(base).as_posix(): file for file in sorted(found) if file.is_file()}
    if not named:
        thing, endings = KINDS[flag]
        example = f"'{where}/**/*{'.jpg' if flag == '--images' else '.mp4'}'"
        hint = "" if glob.has_magic(where) else f" {thing.title()}s in folders below it are found by {example}."
        raise UserError(f"{flag} {where}: no {thing}s there ({', '.join(e[1:] for e in endings)}).{hint}")
    return base, named


def look(where: str, flag: str) -> tuple[Path, list[Path]]:
    """The folder that `where` means, and what may be pictures (or videos) in it.

    Raises:
        UserError: no such folder.
    """
    path, endings = Path(where).expanduser(), KINDS[flag][1]
    try:
        path.stat()
    except FileNotFoundError:
        return fitting(where, path, flag)
    except OSError as error:
        raise UserError(f"{flag} {printable(where)}: {error.strerror}.") from None
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, [file for file in path.iterdir() if file.suffix.lower() in endings]
    return fitting(where, path, flag)


def fitting(where: str, path: Path, flag: str) -> tuple[Path, list[Path]]:
    """The folder that a pattern starts from, and what may be pictures among what it fits; as of `look`."""
    if not glob.has_magic(where):
        raise UserError(f"{flag} {where}: no such {'folder' if flag == '--images' else 'file or folder'}.")
    base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    if not base.is_dir():
        raise UserError(f"{flag} {where}: there is no folder {base}.")
    endings = KINDS[flag][1]
    return base, [file for file in map(Path, glob.glob(str(path), recursive=True)) if file.suffix.lower() in endings]


def read_pairs(images: str, prompts: str, limit: int | None = None, frames: int | None = None) -> list[Pair]:
    """Every prompt with the pictures (or videos) it is about, sorted by picture; repetitions count once.

    Args:
        images: as `find_pictures` takes it.
        prompts: a file with one prompt a line, each about all pictures; or with one JSON object a line, `{"image": name
            or pattern, "prompt": text}` (or "video"), where a missing image means all pictures, and `"answer"` is a
            right one, or a list of them.
        limit: take only the first so many pictures.
        frames: of every video; None where they are pictures.

    Raises:
        UserError: nothing there, or a line that is not understood (it is named).
    """
    base, named = find_pictures(images, "--images" if frames is None else "--video")
    found: dict[tuple[str, str], Pair] = {}
    for line, image, prompt, answers in read_prompts(prompts):
        mine = named if image is None else meant(image, base, named)
        if not mine:
            raise UserError(f"{prompts}, line {line}: {no_picture(image, base, named)}")
        for name, path in mine.items():
            found.setdefault((name, prompt), Pair(name, path, prompt, line, answers, frames))
    chosen = sorted({pair.picture for pair in found.values()})[:limit]
    order = {name: i for i, name in enumerate(chosen)}
    return sorted((pair for pair in found.values() if pair.picture in order), key=lambda p: (order[p.picture], p.line))


def labelled(pairs: Sequence[Pair], file: str) -> bool:
    """Whether the prompts of a file have answers that count as right.

    Raises:
        UserError: some have and some have not.
    """
    given = bool(pairs[0].answers)
    if odd := next((pair for pair in pairs if bool(pair.answers) != given), None):
        raise UserError(f"{file}, line {odd.line}: give an answer to every prompt, or to none.")
    return given


def no_picture(image: str, base: Path, named: dict[str, Path]) -> str:
    """What to say of an image that means none of the pictures there are."""
    pattern = f" It fits none of the names there, such as {printable(next(iter(named)))!r}."
    hint = pattern if glob.has_magic(image) else did_you_mean(image, named)
    return f"no picture {printable(image)!r} in {base}.{hint}"


def meant(image: str, base: Path, named: dict[str, Path]) -> dict[str, Path]:
    """The pictures that a line's image means: one by its name, those of a pattern, or a file that is no `named` one."""
    if image in named:  # a name may have brackets in it
        return {image: named[image]}
    if mine := {name: path for name, path in named.items() if fnmatch(name, image)}:
        return mine
    return {} if glob.has_magic(image) or not is_file(base / image) else {image: base / image}


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name too long for one is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_prompts(file: str) -> Iterator[tuple[int, str | None, str, tuple[str, ...]]]:
    """Line number, image (None for all), prompt and right answers of every line that is not blank."""
    path = Path(file).expanduser()
    lines = [(i, line.strip()) for i, line in enumerate(text_of(path, file).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} has no prompt in it: write one a line, or one JSON object a line.")
    as_json = path.suffix.lower() in JSON_LINES or is_object(lines[0][1])
    for number, line in lines:
        yield (number, *parse_object(line, f"{file}, line {number}")) if as_json else (number, None, line, ())


def text_of(path: Path, file: str) -> str:
    """The text of a prompts file, which errors call `file`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: this is not UTF-8 text.") from None
    except FileNotFoundError:
        raise UserError(f"no such prompts file: {file}") from None
    except OSError as error:
        raise UserError(f"cannot read the prompts file {file}: {brief(error)}") from None


def is_object(line: str) -> bool:
    """Whether a line of a file without a telling name is JSON with a prompt in it."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and "prompt" in value


def parse_object(line: str, where: str) -> tuple[str | None, str, tuple[str, ...]]:
    """Image (None for all), prompt and right answers (`answer`: a text or a list of them) of one JSON line."""
    value = object_in(line, where)
    prompt, image = value["prompt"], value.get("image", value.get("video"))
    if not is_text(prompt) or not prompt.strip():
        raise UserError(f"{where}: the prompt must be a text that is not empty, and it is {prompt!r}.")
    if image is not None and not is_text(image):
        raise UserError(f"{where}: the image must be the name of a picture or a pattern, and it is {image!r}.")
    check_text(prompt, f"{where}: the prompt")
    answers = value.get("answer", [])
    answers = answers if isinstance(answers, list) else [answers]
    if not all(is_text(answer) for answer in answers):
        raise UserError(f"{where}: the answer must be a text or a list of texts, and it is {value['answer']!r}.")
    return image, prompt.strip(), tuple(answers)


def object_in(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line, which has a prompt."""
    wanted = 'expected {"image": "a.jpg", "prompt": "what is this?"}'
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({brief(error)}); {wanted}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; {wanted}.")
    if "prompt" not in value:
        raise UserError(f"{where}: it has no 'prompt', only {', '.join(map(repr, value)) or 'nothing'}; {wanted}.")
    return value


def is_text(value: Any) -> bool:
    """Whether a value is a text with something in it."""
    return isinstance(value, str) and value != ""


def check_text(text: str, what: str) -> None:
    """Refuse text that no tokenizer takes: bytes of a command line that are not UTF-8, halves of a surrogate pair.

    Raises:
        UserError: it begins with `what` and says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character (U+{code:04X})"
        raise UserError(f"{what} is not valid UTF-8: {found} at character {error.start + 1}.") from None
