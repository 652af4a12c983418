"""The architectures: vLLM's own, whose pictures enter the language model pruned."""

from __future__ import annotations

from typing import Any

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.parts.taps import ClusterOf
from vlmprune.serving import host
from vlmprune.serving.choice import ServedPicture
from vlmprune.serving.front import PrunedInfo, PrunedNextInfo, PrunedProcessor, refuse
from vlmprune.serving.merge import Tower, install
from vlmprune.serving.rule import averages_heads
from vlmprune.serving.served import Request, Served
from vlmprune.serving.settings import KEEP
from vlmprune.serving.watch import TowerWatcher, built_for, look_only

__all__ = [
    "VlmpruneLlavaForConditionalGeneration",
    "VlmpruneLlavaNextForConditionalGeneration",
    "VlmpruneLlavaOnevisionForConditionalGeneration",
]


class PrunedEncoding:
    """Mixin of a model: what stays of the pictures is what `embed_multimodal` returns."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        refuse(vllm_config.model_config, vllm_config.lora_config)
        self.served = Served(self.config, host.stand_in(self.config))
        self.most = vllm_config.scheduler_config.max_num_batched_tokens
        self.watcher = self.watch(vllm_config, prefix)

    def watch(self, vllm_config: Any, prefix: str) -> TowerWatcher:
        """Look at what the methods want to see; budgets of requests do not change that."""
        encoder, facts, plan = self.vision_tower.vision_model.encoder, self.served.facts, self.served.choice().plan
        layers, merges = encoder.layers, self.served.choice().merges
        taps = [tap for tap in plan.measured if tap.layer >= 0]  # others are told by what merges
        # where something merges in the tower, another budget may do so in other layers
        keys = range(len(layers)) if ClusterOf() in plan.tower_taps else plan.key_layers
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
        odd = next((tap for tap in taps if not averages_heads(tap, facts)), None)
        if odd is not None and layers[0].self_attn.tp_size > 1:
            raise UnsupportedError(
                f"{self.served.choice().names} looks at {odd}, which ranks of tensor parallelism, each seeing its own "
                "heads, cannot average: leave --tensor-parallel-size away, and use --data-parallel-size."
            )
        watcher = TowerWatcher(layers, taps, keys, facts, host.mean_over_ranks)
        if merges:
            install(encoder, watcher)
        return watcher

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
        """Pictures that the tower encodes together: with as many patches as vLLM lets tokens into one step.

        It counts pictures by the tokens that stay, which would make the tower's batches larger the more is pruned.
        """
        cuts, held = [0], 0
        for index, size in enumerate(sizes):
            patches = self.served.grid(size).encoded  # what un-padding takes away was encoded too
            if held and held + patches > self.most:
                cuts.append(index)
                held = 0
            held += patches
        return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]

    def encode(self, requests: list[Request], sizes: list, pixels: Any) -> list[torch.Tensor]:
        """What stays of some pictures: all are encoded together, and those of one budget are cut together.

        Where something is merged in the tower or behind it, those of one budget are encoded together.
        """
        budgets: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            budgets.setdefault((request.keep, isinstance(request.keep, int)), []).append(i)
        pictures = [
            ServedPicture(self.served.grid(size), request.number) for size, request in zip(sizes, requests, strict=True)
        ]
        made: list[torch.Tensor | None] = [None] * len(pictures)
        apart = self.served.choice().merges
        if not apart:
            features, seen = self.see(pictures, sizes, pixels)
        for (keep, _), mine in budgets.items():
            choice, some = self.served.choice(keep), [pictures[i] for i in mine]
            if apart:
                self.watcher.tower = Tower(choice, [one.grid for one in some])
                try:
                    rows, share = self.see(some, [sizes[i] for i in mine], [pixels[i] for i in mine])
                finally:
                    self.watcher.tower = None
            else:
                rows, share = [features[i] for i in mine], share_of(seen, pictures, mine)
            for i, one in zip(mine, choice.rows(some, share, rows), strict=True):
                made[i] = one
        return made

    def see(self, pictures: list[ServedPicture], sizes: list, pixels: Any) -> tuple[Any, dict]:
        """Unpruned features of pictures, and what was measured meanwhile."""
        self.watcher.take()  # of a run that failed
        if self.served.family.needs_sizes:
            # pictures of one request are padded to the same number of views: their own are enough
            views = [views[: picture.grid.views] for views, picture in zip(pixels, pictures, strict=True)]
            features = super().embed_multimodal(pixel_values=views, image_sizes=torch.tensor(sizes))
        else:
            pixels = pixels if isinstance(pixels, torch.Tensor) else torch.stack(pixels)
            features = super().embed_multimodal(pixel_values=pixels)
        return features, self.watcher.take()


def share_of(seen: dict, pictures: list[ServedPicture], mine: list[int]) -> dict:
    """Taps of the views of some pictures alone."""
    if len(mine) == len(pictures):
        return seen
    starts = [0]
    for picture in pictures:
        starts.append(starts[-1] + picture.grid.views)
    views = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine])
    return {tap: values[views.to(values.device)] for tap, values in seen.items()}


class LlavaInfo(PrunedInfo, host.LlavaProcessingInfo):
    """Of `llava`."""


class LlavaProcessor(PrunedProcessor, host.LlavaMultiModalProcessor):
    """Of `llava`."""


@host.MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=host.LlavaDummyInputsBuilder)
class VlmpruneLlavaForConditionalGeneration(PrunedEncoding, host.LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    hf_to_vllm_mapper = host.NAMES | host.LlavaForConditionalGeneration.hf_to_vllm_mapper


class NextInfo(PrunedNextInfo, host.LlavaNextProcessingInfo):
    """Of `llava_next`."""


class NextProcessor(PrunedProcessor, host.LlavaNextMultiModalProcessor):
    """Of `llava_next`."""


@host.MULTIMODAL_REGISTRY.register_processor(NextProcessor, info=NextInfo, dummy_inputs=host.LlavaDummyInputsBuilder)
class VlmpruneLlavaNextForConditionalGeneration(PrunedEncoding, host.LlavaNextForConditionalGeneration):
    """LLaVA-1.6 / LLaVA-NeXT."""

    hf_to_vllm_mapper = host.NAMES | host.LlavaNextForConditionalGeneration.hf_to_vllm_mapper


class OnevisionInfo(PrunedNextInfo, host.LlavaOnevisionProcessingInfo):
    """Of `llava_onevision`; prompts with videos are refused by vLLM, which counts those that a model takes."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": None}

    def candidates(self) -> set[tuple[int, int]]:
        own = host.LlavaOnevisionProcessingInfo.get_image_size_with_most_features(self)  # just not shrunk
        return {(own.height, own.width), *super().candidates()}


class OnevisionProcessor(PrunedProcessor, host.LlavaOnevisionMultiModalProcessor):
    """Of `llava_onevision`."""


@host.MULTIMODAL_REGISTRY.register_processor(
    OnevisionProcessor, info=OnevisionInfo, dummy_inputs=host.LlavaOnevisionDummyInputsBuilder
)
class VlmpruneLlavaOnevisionForConditionalGeneration(PrunedEncoding, host.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    hf_to_vllm_mapper = host.NAMES | host.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
