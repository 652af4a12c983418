"""The architectures: vLLM's own, whose pictures enter the language model pruned."""

from __future__ import annotations

from typing import Any

import torch

from vlmprune.serving import host
from vlmprune.serving.choice import Picture
from vlmprune.serving.front import PrunedInfo, PrunedNextInfo, PrunedProcessor, refuse
from vlmprune.serving.served import Request, Served
from vlmprune.serving.settings import KEEP
from vlmprune.serving.watch import Watcher, built_for, look_only

__all__ = [
    "VlmpruneLlavaForConditionalGeneration",
    "VlmpruneLlavaNextForConditionalGeneration",
    "VlmpruneLlavaOnevisionForConditionalGeneration",
]


class Pruned:
    """Mixin of a model: what stays of the pictures is what `embed_multimodal` returns."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        refuse(vllm_config.model_config, vllm_config.lora_config)
        self.served = Served(self.config, host.stand_in(self.config))
        self.most = vllm_config.scheduler_config.max_num_batched_tokens
        self.watcher = self.watch(vllm_config, prefix)

    def watch(self, vllm_config: Any, prefix: str) -> Watcher:
        """Look at what the methods want to see; budgets of requests do not change that."""
        layers, facts = self.vision_tower.vision_model.encoder.layers, self.served.facts
        taps = self.served.choice().plan.measured
        kind = type(layers[0])
        for index in range(len(layers), built_for(taps, facts, len(layers))):
            layers.append(
                look_only(kind, issubclass(kind, host.CLIPEncoderLayer))(
                    self.config.vision_config,
                    quant_config=vllm_config.quant_config,
                    prefix=f"{prefix}vision_tower.vision_model.encoder.layers.{index}",
                    attn_cls=host.MMEncoderAttention,
                )
            )
        return Watcher(layers, taps, facts, host.mean_over_ranks)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """`(count, dim)` of every picture; vLLM hands over pictures of several requests at once, in any order.

        Raises:
            RuntimeError: other rows than the prompt has placeholders, which vLLM would cut off without a word.
        """
        told, pixels = kwargs.pop(KEEP, None), kwargs.get("pixel_values")
        if pixels is None:
            return super().embed_multimodal(**kwargs)
        if told is None:
            raise RuntimeError("pixels came without what the front end notes of every picture.")
        requests = [Request.of(row) for row in torch.as_tensor(told).view(-1, 4).tolist()]
        sizes = self.sizes(kwargs.get("image_sizes"), len(requests))
        made: list[torch.Tensor] = []
        for part in self.parts(sizes):
            made += self.encode(requests[part], sizes[part], pixels[part])
        for rows, request in zip(made, requests, strict=True):
            if len(rows) != request.placeholders:
                raise RuntimeError(f"{len(rows)} tokens stay of a picture with {request.placeholders} placeholders.")
        return made

    def note(self, keep: int | float | None, size: Any, count: int) -> torch.Tensor:
        """What the front end would send of some pictures of a size, to run `embed_multimodal` without it."""
        one = Request(keep, self.served.kept(size, keep), 0)
        return torch.tensor([one.row()] * count, dtype=torch.float64)

    def sizes(self, given: Any, count: int) -> list[tuple[int, int] | None]:
        """What the packing of every picture depends on."""
        if not self.served.family.needs_sizes:
            return [None] * count
        return [tuple(size) for size in torch.as_tensor(given).tolist()]

    def parts(self, sizes: list) -> list[slice]:
        """Pictures that the tower encodes together: as many as vLLM would of an unpruned model.

        It counts them by what stays, which would make the tower's batches larger the more is pruned.
        """
        cuts, held = [0], 0
        for index, size in enumerate(sizes):
            tokens = self.served.grid(size).tokens
            if held and held + tokens > self.most:
                cuts.append(index)
                held = 0
            held += tokens
        return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]

    def encode(self, requests: list[Request], sizes: list, pixels: Any) -> list[torch.Tensor]:
        """What stays of some pictures, of one or several budgets."""
        grids = [self.served.grid(size) for size in sizes]
        self.watcher.take()  # of a run that failed
        if self.served.family.needs_sizes:
            # pictures of one request are padded to the same number of views: their own are enough
            pixels = [views[: grid.views] for views, grid in zip(pixels, grids, strict=True)]
            features = super().embed_multimodal(pixel_values=pixels, image_sizes=torch.tensor(sizes))
        else:
            features = super().embed_multimodal(pixel_values=pixels)
        seen, starts = self.watcher.take(), [0]
        for grid in grids:
            starts.append(starts[-1] + grid.views)
        made: list[torch.Tensor | None] = [None] * len(grids)
        for key in dict.fromkeys((request.keep, isinstance(request.keep, int)) for request in requests):
            mine = [i for i, r in enumerate(requests) if (r.keep, isinstance(r.keep, int)) == key]
            if len(mine) < len(grids):
                views = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine])
                share = {tap: values[views.to(values.device)] for tap, values in seen.items()}
            else:
                share = seen
            pictures = [Picture(grids[i], requests[i].number) for i in mine]
            rows = self.served.choice(key[0]).rows(pictures, share, [features[i] for i in mine])
            for i, one in zip(mine, rows, strict=True):
                made[i] = one
        return made


class LlavaInfo(PrunedInfo, host.LlavaProcessingInfo):
    """Of `llava`."""


class LlavaProcessor(PrunedProcessor, host.LlavaMultiModalProcessor):
    """Of `llava`."""


@host.MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=host.LlavaDummyInputsBuilder)
class VlmpruneLlavaForConditionalGeneration(Pruned, host.LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    hf_to_vllm_mapper = host.NAMES | host.LlavaForConditionalGeneration.hf_to_vllm_mapper


class NextInfo(PrunedNextInfo, host.LlavaNextProcessingInfo):
    """Of `llava_next`."""


class NextProcessor(PrunedProcessor, host.LlavaNextMultiModalProcessor):
    """Of `llava_next`."""


@host.MULTIMODAL_REGISTRY.register_processor(NextProcessor, info=NextInfo, dummy_inputs=host.LlavaDummyInputsBuilder)
class VlmpruneLlavaNextForConditionalGeneration(Pruned, host.LlavaNextForConditionalGeneration):
    """LLaVA-1.6 / LLaVA-NeXT."""

    hf_to_vllm_mapper = host.NAMES | host.LlavaNextForConditionalGeneration.hf_to_vllm_mapper


class OnevisionInfo(PrunedInfo, host.LlavaOnevisionProcessingInfo):
    """Of `llava_onevision`; prompts with videos are refused by vLLM, which counts those that a model takes."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": None}


class OnevisionProcessor(PrunedProcessor, host.LlavaOnevisionMultiModalProcessor):
    """Of `llava_onevision`."""


@host.MULTIMODAL_REGISTRY.register_processor(
    OnevisionProcessor, info=OnevisionInfo, dummy_inputs=host.LlavaOnevisionDummyInputsBuilder
)
class VlmpruneLlavaOnevisionForConditionalGeneration(Pruned, host.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    hf_to_vllm_mapper = host.NAMES | host.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
