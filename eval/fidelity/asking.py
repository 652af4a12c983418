"""What `vlmprune fidelity` and `tune` ask about which pictures, and where they keep what comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vlmprune.runtime.errors import CommandError, UserError, brief, printable
from vlmprune.runtime.prompts import Pair, read_pairs
from vlmprune.runtime.status import note
from vlmprune.runtime.tables import counted

if TYPE_CHECKING:
    from vlmprune.runtime.loading import Loaded

__all__ = ["check_prompts", "drawn", "held", "left_out", "of_pictures", "of_videos", "refuse_nothing"]


@contextmanager
def held(folder: Path, verb: str, resume: bool) -> Iterator[Path]:
    """The folder that a verb writes into, for this run alone.

    Raises:
        UserError: it is in use, or holds a run and nobody said `resume`.
        CommandError: it cannot be written into.
    """
    from vlmprune.eval.fidelity.journal import JournalError, refuse_second
    from vlmprune.eval.lmms.store import StoreError, locked

    try:
        with locked(folder, verb, "--out FOLDER"):
            refuse_second(folder, resume, verb)
            yield folder
    except (StoreError, JournalError) as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise CommandError(f"cannot write into {folder}: {brief(error)}") from None


def of_pictures(images: str | None, file: str | None, limit: int | None, folder: Path, model: str) -> list[Pair]:
    """The prompts about the user's pictures, or about those that come with the model.

    Raises:
        UserError: pictures without prompts, or prompts without pictures.
    """
    if images is not None and file is not None:
        return read_pairs(images, file, limit)
    if images is file is None and model == "scene-llava":
        return drawn(folder, limit)
    raise UserError(
        "name --images and --prompts (one a line), or --data with answers; without any the model scene-llava is "
        "tried on pictures that come with it."
    )


def of_videos(video: str, file: str | None, limit: int | None, frames: int) -> list[Pair]:
    """The prompts about the user's videos.

    Raises:
        UserError: there are none, or nothing that reads videos.
    """
    from vlmprune.runtime.videos import check_reader

    check_reader()
    if file is None:
        raise UserError("name --prompts (one a line), or --data with answers, to ask about the videos.")
    return read_pairs(video, file, limit, frames)


def drawn(folder: Path, limit: int | None) -> list[Pair]:
    """Pictures with questions and answers that come with the package, written as a user's would be."""
    from vlmprune.eval import testbed

    pictures, lines = folder / "pictures", []
    pictures.mkdir(exist_ok=True)
    for question in testbed.questions("sparse"):
        file = pictures / f"{question.picture_id}.webp"
        if not file.is_file():
            file.write_bytes(question.picture)
        lines.append(json.dumps({"image": file.name, "prompt": question.question, "answer": question.answer}))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_pairs(str(pictures), str(data), limit)


def check_prompts(loaded: Loaded, pairs: Sequence[Pair], file: str) -> None:
    """Refuse prompts that place several pictures, and name words that an embedded model does not know."""
    from vlmprune.parts.templates import image_token
    from vlmprune.runtime.loading import warn_of_words

    token = image_token(loaded.processor)
    for pair in pairs:
        if pair.prompt.count(token) > 1:
            raise UserError(
                f"{file}, line {pair.line}: the prompt has {token} more than once, and is about one picture."
            )
    warn_of_words(loaded, [pair.prompt for pair in pairs])


def left_out(names: Sequence[str]) -> None:
    """Say which pictures could not be read, if there are any."""
    if names:
        few = ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
        note(f"{counted(len(names), 'picture')} could not be read, and left out: {few}")


def refuse_nothing(skipped: dict[str, str], interrupted: bool) -> NoReturn:
    """End where no picture was measured."""
    if interrupted:
        raise KeyboardInterrupt
    name, why = next(iter(skipped.items()))
    raise UserError(f"none of the {counted(len(skipped), 'picture')} could be read, the first of them {name}: {why}")
