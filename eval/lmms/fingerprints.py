"""What a result depends on, in a form that can be compared: versions, files, code and device. No weights are loaded."""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vlmprune._version import __version__
from vlmprune.errors import UnsupportedError
from vlmprune.eval.naming import methods_of
from vlmprune.parts.facts import ModelFacts
from vlmprune.patches import FAMILIES, family_of

__all__ = ["commit", "device", "facts_of", "files", "method", "model", "versions"]

#: Files above this many bytes are told apart by size and time of their last change.
HASHED = 256 * 2**20
PACKAGES = ("transformers", "torch", "lmms-eval")


@cache
def versions() -> dict[str, str | None]:
    """Versions of what computes the results; None for what is not installed."""
    found: dict[str, str | None] = {"vlmprune": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device(wanted: str) -> str:
    """`cpu`, or the name of the GPU that `wanted` means here."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and torch.cuda.is_available():
        number = wanted.partition(":")[2]
        if not number or (number.isdigit() and int(number) < torch.cuda.device_count()):
            return torch.cuda.get_device_name(int(number or 0))
    return wanted


def model(name: str) -> tuple[ModelFacts, dict[str, Any]]:
    """Facts and fingerprint of a model, from its config.json and its files.

    Args:
        name: an embedded model, a folder or a hub id.

    Raises:
        ValueError: no such model, or its config cannot be read.
        UnsupportedError: a family, tower or language model that is not supported.
    """
    from transformers import AutoConfig

    from vlmprune.runtime.errors import UserError, brief
    from vlmprune.runtime.loading import find_model, refuse_original
    from vlmprune.runtime.status import quiet

    try:
        source = find_model(name)
    except UserError as error:
        raise ValueError(str(error).replace("--model", "`model`")) from None
    with quiet():
        try:
            refuse_original(source)
            config = AutoConfig.from_pretrained(source.place, local_files_only=source.local)
        except UserError as error:
            raise UnsupportedError(str(error)) from None
        except Exception as error:  # transformers and the hub raise nearly anything
            raise ValueError(f"cannot read the config.json of {name}: {brief(error)}") from None
        facts = facts_of(config, name)
    commit = getattr(config, "_commit_hash", None)
    return facts, {"files": files(Path(source.place))} if source.local else {"hub": name, "commit": commit}


def facts_of(config: Any, name: str) -> ModelFacts:
    """The facts of a model that has a transformers config and no weights.

    Raises:
        ValueError: no model can be built from this config.
        UnsupportedError: not a model that is supported.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"{name} is a {config.model_type!r} model, which is not supported; supported: {known}.")
    try:
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config)
    except Exception as error:
        raise ValueError(f"{name}: no model can be built from its config.json: {error}") from None
    family = family_of(empty)
    return family.facts(family.inner(empty))


def files(folder: Path) -> str:
    """A hash of a folder's files: names and contents, of very large files the size and time of change."""
    total = hashlib.sha256()
    hidden = {"__pycache__", ".git", ".cache"}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not hidden & {*p.relative_to(folder).parts}):
        about = path.stat()
        if about.st_size > HASHED:
            content = f"{about.st_size} {about.st_mtime_ns}".encode()
        else:
            content = hashlib.sha256(path.read_bytes()).digest()
        total.update(f"{path.relative_to(folder).as_posix()}\0".encode() + content)
    return total.hexdigest()


def method(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A method as keys hold it: its name, the code of its classes, and the files of trained weights.

    With the code in it, an edited method is measured again while its version is still the same.
    """
    made = methods_of(name, options)
    code = [code_of(source) for source in sources([type(part) for part in made])]
    weights = [found for part in made if (found := weights_of(part)) is not None]
    return {"method": name, "code": code, **({"weights": weights} if weights else {})}


def sources(classes: list[type]) -> list[str]:
    """The source files of classes and of what they inherit, without those of Python itself."""
    found = []
    for cls in dict.fromkeys(base for one in classes for base in one.__mro__ if base is not object):
        try:
            found.append(inspect.getfile(cls))
        except (TypeError, OSError):  # made in a console
            continue
    return list(dict.fromkeys(found))


@cache
def code_of(path: str) -> str:
    """Short hash of a source file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def weights_of(part: Any) -> str | None:
    """A hash of a method's trained modules, wherever they were loaded from."""
    modules = getattr(part, "thresholds", None)
    if modules is None:
        return None
    total = hashlib.sha256(repr(modules.config).encode())
    for name, value in sorted(modules.state_dict().items()):
        total.update(name.encode() + value.float().cpu().numpy().tobytes())
    return total.hexdigest()


@cache
def commit() -> str | None:
    """The commit of the checkout that vlmprune runs from, with `+changes` where files differ; None outside of one."""
    import subprocess

    here = Path(inspect.getfile(family_of)).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None or git("ls-files", "--error-unmatch", "base.py") is None:
        return None  # no checkout, or an installation that lies inside another project's
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
