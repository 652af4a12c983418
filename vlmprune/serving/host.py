"""All that is taken from vLLM: nothing else here imports it, and another release is refused before anything is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import vllm

from vlmprune.serving import served
from vlmprune.serving.settings import check_version

check_version(vllm.__version__)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce  # noqa: E402
from vllm.model_executor.layers.attention import MMEncoderAttention  # noqa: E402
from vllm.model_executor.models.clip import CLIPEncoderLayer  # noqa: E402
from vllm.model_executor.models.interns1 import (  # noqa: E402
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.llava import (  # noqa: E402
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (  # noqa: E402
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (  # noqa: E402
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (  # noqa: E402
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.hasher import MultiModalHasher  # noqa: E402
from vllm.multimodal.inputs import MultiModalFieldConfig  # noqa: E402
from vllm.multimodal.parse import ImageProcessorItems, ImageSize  # noqa: E402
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails  # noqa: E402

__all__ = [
    "LLM",
    "MULTIMODAL_REGISTRY",
    "NAMES",
    "CLIPEncoderLayer",
    "ImageProcessorItems",
    "ImageSize",
    "InternS1DummyInputsBuilder",
    "InternS1ForConditionalGeneration",
    "InternS1MultiModalProcessor",
    "InternS1ProcessingInfo",
    "LlavaDummyInputsBuilder",
    "LlavaForConditionalGeneration",
    "LlavaMultiModalProcessor",
    "LlavaNextForConditionalGeneration",
    "LlavaNextMultiModalProcessor",
    "LlavaNextProcessingInfo",
    "LlavaOnevisionDummyInputsBuilder",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionMultiModalProcessor",
    "LlavaOnevisionProcessingInfo",
    "LlavaProcessingInfo",
    "MMEncoderAttention",
    "MultiModalFieldConfig",
    "MultiModalHasher",
    "PromptReplacement",
    "PromptUpdateDetails",
    "Qwen2_5_VLDummyInputsBuilder",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLMultiModalProcessor",
    "Qwen2_5_VLProcessingInfo",
    "Qwen3VLDummyInputsBuilder",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMultiModalProcessor",
    "Qwen3VLProcessingInfo",
    "SamplingParams",
    "mean_over_ranks",
    "stand_in",
]

#: Folders that transformers 5 saved have no `vision_model.` in the names of the tower's weights; vLLM knows the older
#: names alone.
NAMES = WeightsMapper(
    orig_to_new_prefix={
        f"{front}vision_tower.{part}": f"vision_tower.vision_model.{part}"
        for front in ("", "model.")
        for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    }
)


def mean_over_ranks(values: Any) -> Any:
    """The mean of a contiguous tensor over the ranks of tensor parallelism."""
    return tensor_model_parallel_all_reduce(values) / get_tensor_model_parallel_world_size()


def stand_in(config: Any) -> SimpleNamespace:
    """`served.stand_in` that packs as vLLM does."""
    made = served.stand_in(config)
    made.pack_image_features = lambda *args, **kwargs: pack(made, *args, **kwargs)
    return made


def pack(inner: Any, views: list, sizes: list, *args: Any, image_newline: Any, **kwargs: Any) -> tuple[list, None]:
    """`pack_image_features` of transformers' models, done by vLLM's method."""
    host, size = SimpleNamespace(config=inner.config, image_newline=image_newline), torch.tensor(sizes[0])
    if inner.config.model_type == "llava_next":
        merge = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
        return [merge(host, size, views[0], strategy="spatial_unpad")], None
    merge = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
    return [merge(host, size, views[0], image_newline=image_newline, strategy="spatial_unpad")], None
