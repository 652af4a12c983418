"""The model and the machine, as a bug report needs them: no names of people, files or folders."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch
from torch import nn

from vlmprune._version import __version__

__all__ = ["about"]


def about(model: nn.Module) -> dict[str, Any]:
    """Versions, device, sizes, dtype and attention of a model."""
    config = model.config
    text, vision = config.text_config, config.vision_config
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    sizes = {
        "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads", "sliding_window": "sliding_window",
    }  # fmt: skip
    return {
        "vlmprune": __version__,
        "transformers": metadata.version("transformers"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": where,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": text._attn_implementation,
        "model_type": config.model_type,
        "language_model": {"type": text.model_type} | {name: getattr(text, key, None) for name, key in sizes.items()},
        "tower": {
            "type": vision.model_type,
            "layers": getattr(vision, "num_hidden_layers", None) or vision.depth,
            "image_size": getattr(vision, "image_size", None),  # None where pictures have any size
            "patch_size": vision.patch_size,
        },
    }
