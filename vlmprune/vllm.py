"""Pruned models in vLLM: `LLM(model, **vlmprune.vllm.overrides(model, "vtc_cls", keep=64))`."""

from __future__ import annotations

from typing import Any

from vlmprune.errors import UnsupportedError
from vlmprune.serving.plugin import ARCHITECTURES
from vlmprune.serving.served import check
from vlmprune.serving.settings import SETTINGS, check_version

__all__ = ["overrides"]


def overrides(model: str, method: str, **options: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make it prune: `LLM(model, **overrides(model, "vtc_cls", keep=64))`.

    Args:
        model: folder or hub id, as `LLM` gets it.
        method: a name, or several joined by `+`.
        **options: as of `vlmprune.patch`.

    Returns:
        `{"hf_overrides": ...}`: our architecture, and the settings as an attribute of the model's config.

    Raises:
        TypeError, ValueError: as of `vlmprune.patch`, for a wrong method, option or value.
        UnsupportedError: a model that cannot be served pruned, a method that cannot be on it, or another vLLM.
    """
    from transformers import AutoConfig

    check_version()
    if not isinstance(method, str):
        raise TypeError(
            f"method={method!r}: an engine is told the method by its name, or several joined by '+', and its options "
            "beside it."
        )
    settings = {"method": method, **options}
    config = AutoConfig.from_pretrained(model)
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"{model} is a model of type {config.model_type!r}, which vLLM cannot serve pruned; served: "
            f"{', '.join(ARCHITECTURES)}."
        )
    setattr(config, SETTINGS, settings)
    check(config)
    return {"hf_overrides": {"architectures": [ARCHITECTURES[config.model_type]], SETTINGS: settings}}
