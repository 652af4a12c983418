"""Pruned models in vLLM: `LLM(model, **vlmprune.vllm.overrides(model, "vtc_cls", keep=64))`."""

from vlmprune.serving.settings import overrides

__all__ = ["overrides"]
