"""What a result depends on, in a form that can be compared: versions, files, code and device. No weights are loaded."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vlmprune import errors, spec
from vlmprune._version import __version__
from vlmprune.errors import UnsupportedError
from vlmprune.parts.facts import ModelFacts
from vlmprune.patches import FAMILIES, family_of

__all__ = ["commit", "device", "facts_of", "files", "library", "method", "model", "of_files", "versions"]

#: Files above this many bytes are told apart by size and time of their last change.
HASHED = 256 * 2**20
PACKAGES = ("transformers", "torch", "lmms-eval")
CODE = {".py", ".cu", ".cuh", ".cpp", ".h"}
#: Folders of the package that change no answer, or are hashed file by file.
APART = {"methods", "eval", "patches", "cli", "runtime", "verify", "__pycache__"}
#: Files of this folder that change no answer: they plan, store and describe.
ABOUT = {"cells", "fingerprints", "plan", "plugin", "progress", "store", "survey", "taskindex", "words"}


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
    number = wanted.partition(":")[2] or "0"
    if wanted.startswith("cuda") and number.isdigit() and int(number) < torch.cuda.device_count():
        return torch.cuda.get_device_name(int(number))
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
    where = {"files": files(Path(source.place))} if source.local else {"hub": source.place, "commit": commit}
    return facts, where | ({"adapter": files(Path(source.adapter))} if source.adapter else {})


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
    hidden = {"__pycache__", ".git", ".cache"}
    return of_files(folder, (p for p in folder.rglob("*") if not hidden & {*p.relative_to(folder).parts}))


def of_files(folder: Path, paths: Iterable[Path]) -> str:
    """The same of some files, named as they lie below `folder`, in whatever order they come."""
    total = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file()):
        about = path.stat()
        if about.st_size > HASHED:
            content = f"{about.st_size} {about.st_mtime_ns}".encode()
        else:
            content = hashlib.sha256(path.read_bytes()).digest()
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        total.update(f"{name.as_posix()}\0".encode() + content)
    return total.hexdigest()


def shared_files() -> list[Path]:
    """Those that `library` hashes, and others beside them."""
    root, patches, mine = (Path(inspect.getfile(one)).parent for one in (errors, family_of, library))
    found = [path for path in root.rglob("*") if not APART & {*path.relative_to(root).parts}]
    found += [path for path in patches.rglob("*") if "__pycache__" not in path.parts]
    found += [path for path in mine.glob("*.py") if path.stem not in ABOUT]
    return found + [root / "runtime" / f"{name}.py" for name in ("answering", "loading", "pictures")]


def library() -> str:
    """A hash of the code of vlmprune that every result depends on, so that an edit is noticed at the same version.

    Methods are not in it, which `method` hashes, nor what only checks, draws or describes.
    """
    code = sorted(
        (path for path in shared_files() if path.suffix in CODE), key=lambda path: (path.parent.name, path.name)
    )
    return hashlib.sha256("".join(f"{path.name} {code_of(str(path))}\n" for path in code).encode()).hexdigest()


def method(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A method as keys hold it: its name, the code that is its own, and the content of trained weights.

    With the code in it, an edited method is measured again while its version is still the same.
    """
    made = spec.build(name, options, none=True)
    code = [code_of(source) for source in sources([type(part) for part in made])]
    weights = [found for part in made if (found := weights_of(part)) is not None]
    return {"method": name, "code": code, **({"weights": weights} if weights else {})}


def sources(classes: list[type]) -> list[str]:
    """The files of classes and of what they inherit, and those of their packages that these import, at any remove.

    Python's own are left out, and what `library` hashes.
    """
    todo = [base.__module__ for cls in classes for base in cls.__mro__ if base is not object]
    found: dict[str, str] = {}
    while todo:
        name = todo.pop(0)
        file = source_of(name)
        if name in found or file is None:
            continue
        found[name] = file
        near = "vlmprune.methods." if name.startswith("vlmprune.") else name.partition(".")[0]
        todo += [other for other in imports(file, name) if other.startswith(near)]
    return list(dict.fromkeys(found.values()))


def source_of(name: str) -> str | None:
    """The file of a module; None of one that is not loaded, is Python's own, or has no source."""
    own = name in sys.builtin_module_names or name.partition(".")[0] in sys.stdlib_module_names
    file = getattr(sys.modules.get(name), "__file__", None)
    return None if own or file is None or not file.endswith(".py") else file


def imports(file: str, name: str) -> list[str]:
    """The modules that a source file imports anywhere, by full names; what it takes out of them may stand there too."""
    package = name if Path(file).stem == "__init__" else name.rpartition(".")[0]
    made: list[str] = []
    for node in ast.walk(ast.parse(Path(file).read_bytes())):
        if isinstance(node, ast.Import):
            made += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            made += [module, *(f"{module}.{one.name}" for one in node.names)]
    return made


def code_of(path: str) -> str:
    """Short hash of a source file, as it is now."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def weights_of(part: Any) -> str | None:
    """A hash of what a method has learnt, wherever it was loaded from: modules and tensors among its fields."""
    import torch

    total = hashlib.sha256()
    learnt = {name: value for name, value in vars(part).items() if isinstance(value, torch.nn.Module | torch.Tensor)}
    for field, value in sorted(learnt.items()):
        module = isinstance(value, torch.nn.Module)
        total.update(f"{field} {getattr(value, 'config', None)!r}".encode())
        for name, tensor in sorted((value.state_dict() if module else {"": value}).items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest() if learnt else None


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
