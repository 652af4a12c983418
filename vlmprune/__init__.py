"""Visual token pruning for LLaVA-style Hugging Face models, in one line.

import vlmprune

vlmprune.patch(model, "fopru", keep=64)
model.generate(**inputs)
vlmprune.unpatch(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vlmprune._compat import check_torchvision
from vlmprune._version import __version__

check_torchvision()

if TYPE_CHECKING:
    from vlmprune.api import Handle, patch, unpatch
    from vlmprune.errors import CutNotRunError, UnsupportedError
    from vlmprune.methods.base import Method, Pruner, register
    from vlmprune.parts.cuts import Cut, Decoder, Merge, Reduction
    from vlmprune.parts.layout import Layout
    from vlmprune.runtime import from_pretrained, load
    from vlmprune.trace import Trace
    from vlmprune.verify import check

__all__ = [
    "Cut",
    "CutNotRunError",
    "Decoder",
    "Handle",
    "Layout",
    "Merge",
    "Method",
    "Pruner",
    "Reduction",
    "Trace",
    "UnsupportedError",
    "__version__",
    "check",
    "from_pretrained",
    "load",
    "patch",
    "register",
    "unpatch",
]

_SUBPACKAGES = ("kernels", "methods", "vllm")

# Imported when first asked for, so that `vlmprune --help` does not wait for torch and transformers.
_HOMES = {
    "api": ("Handle", "patch", "unpatch"),
    "parts.cuts": ("Cut", "Decoder", "Merge", "Reduction"),
    "errors": ("CutNotRunError", "UnsupportedError"),
    "parts.layout": ("Layout",),
    "methods.base": ("Method", "Pruner", "register"),
    "runtime": ("from_pretrained", "load"),
    "verify": ("check",),
    "trace": ("Trace",),
}


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return import_module(f"vlmprune.{name}")
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"vlmprune.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
