"""What vlmprune runs on, and a plain answer when the environment does not fit.

Two questions, both cheap when all is well:

- :func:`check_transformers`, asked by whatever touches a model (``vlmprune.patches.host``, ``patch``, loading), reads
  the installed version from the package's metadata and imports nothing. Registry, methods, taps, selection, layout,
  budgets and kernels are tensor code and run beside any transformers.
- :func:`check_torchvision`, asked at ``import vlmprune``: whether a torchvision is there, and whether it can be used.
  One that is installed but cannot be imported breaks every LLaVA class of transformers, whose own message ("Could not
  import module ...") names neither torchvision nor a way out. No torchvision at all is fine.
"""

from __future__ import annotations

import importlib
import re
import sys
from importlib import util
from pathlib import Path

from vlmprune._version import __version__

__all__ = ["SUPPORTED_TRANSFORMERS", "VersionError", "check_torchvision", "check_transformers"]

#: The range of tested releases, as pip understands it and the package's metadata declares it.
SUPPORTED_TRANSFORMERS = next(
    line.removeprefix("transformers").strip()
    for line in Path(__file__).with_name("requirements.txt").read_text().splitlines()
    if line.startswith("transformers")
)


class VersionError(ImportError):
    """The transformers of this environment is none that vlmprune was tested with."""


def check_transformers() -> None:
    """Raise ``VersionError`` unless the transformers of this environment is one that vlmprune was tested with.

    The message says what was found, what is supported and how to get it. transformers itself is imported only where it
    has no metadata to read (a source folder on the path).
    """
    found = _transformers_version()
    oldest, too_new = map(_major_minor, re.findall(r"[\d.]+", SUPPORTED_TRANSFORMERS))
    if found is not None and oldest <= _major_minor(found) < too_new:
        return
    newer = found is not None and _major_minor(found) >= too_new
    why = (
        " That is newer than any release it was tested with, and a release may change what hooks see." if newer else ""
    )
    raise VersionError(
        f"vlmprune {__version__} supports transformers {SUPPORTED_TRANSFORMERS}, and found {found or 'none'}.{why} "
        f"To fix it: pip install 'transformers{SUPPORTED_TRANSFORMERS}'" + (", or a newer vlmprune" if newer else "")
    )


def check_torchvision() -> None:
    """Raise ``ImportError`` with the fix if a torchvision is installed that cannot be imported.

    Costs a look at the path where there is none, and the loading of its compiled operators where there is a healthy
    one. torchvision itself is imported only when those do not load, to be sure: some versions work without them.
    """
    if "torchvision" in sys.modules:  # imported already, or hidden on purpose (None)
        return
    spec = util.find_spec("torchvision")
    if spec is None or _operators_load(spec.submodule_search_locations or ()):
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a broken binary raises ImportError, OSError, RuntimeError, AttributeError, ...
        raise ImportError(_torchvision_message(error)) from error


def _transformers_version() -> str | None:
    """The version in use or about to be: of the imported module, else of the metadata, else of a folder on the path."""
    if "transformers" not in sys.modules:
        found = _distribution_version("transformers")
        if found is not None:
            return found
        if util.find_spec("transformers") is None:
            return None
    return getattr(importlib.import_module("transformers"), "__version__", None)


def _distribution_version(name: str) -> str | None:
    from importlib import metadata  # late: it is most of what `import vlmprune` would cost

    try:
        return metadata.version(name) or None
    except metadata.PackageNotFoundError:
        return None


def _major_minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version; a development version or candidate counts as the version it leads to."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def _operators_load(folders: list[str] | tuple[str, ...]) -> bool:
    """Whether torchvision's compiled operators load into this torch and are there afterwards."""
    libraries = [path for folder in folders for path in Path(folder).glob("_C*") if path.suffix in {".so", ".pyd"}]
    if not libraries:
        return False
    try:
        import torch

        torch.ops.load_library(libraries[0])
        return hasattr(torch.ops.torchvision, "nms")
    except (ImportError, OSError, RuntimeError):
        return False


def _torchvision_message(error: Exception) -> str:
    torch = _distribution_version("torch") or "(unknown version)"
    torchvision = _distribution_version("torchvision") or "(unknown version)"
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return (
        f"torchvision {torchvision} is installed but cannot be imported next to torch {torch}"
        f"{_mismatch(torch)} ({reason}). While it is there, transformers cannot import any LLaVA model or processor.\n"
        "To fix it, either\n"
        "  pip uninstall torchvision\n"
        "(nothing here needs it: without it pictures are prepared with Pillow), or reinstall torch and torchvision as\n"
        "a matching pair, both from the same package index: a CPU torch and a CUDA torchvision do not fit.\n"
        "vLLM does need it: beside that, put scripts/torchvision_shim.py into place, as docs/serving.md says."
    )


def _mismatch(torch: str) -> str:
    """Which torch the installed torchvision asks for, where that is another one."""
    for requirement in _requirements("torchvision"):
        wanted = re.match(r"torch\s*\(?==\s*([\w.]+)", requirement)
        if wanted and wanted[1] != torch.partition("+")[0]:
            return f", and asks for torch {wanted[1]}"
    return ""


def _requirements(name: str) -> list[str]:
    from importlib import metadata

    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
