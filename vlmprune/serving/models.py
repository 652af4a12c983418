"""The architectures: vLLM's own, whose pictures enter the language model pruned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.parts.taps import ClusterOf
from vlmprune.serving import host
from vlmprune.serving.choice import ServedPicture
from vlmprune.serving.front import (
    PrunedInfo,
    PrunedNextInfo,
    PrunedProcessor,
    QwenInfo,
    QwenProcessor,
    SizedProcessor,
    TiledInfo,
    refuse,
)
from vlmprune.serving.merge import Tower, install
from vlmprune.serving.rule import averages_heads
from vlmprune.serving.served import Request, Served
from vlmprune.serving.settings import KEEP
from vlmprune.serving.watch import AttentionWatcher, TowerWatcher, built_for, look_only

__all__ = [
    "VlmpruneInternVLForConditionalGeneration",
    "VlmpruneLlavaForConditionalGeneration",
    "VlmpruneLlavaNextForConditionalGeneration",
    "VlmpruneLlavaOnevisionForConditionalGeneration",
    "VlmpruneQwen2_5_VLForConditionalGeneration",
    "VlmpruneQwen3VLForConditionalGeneration",
]

DIGIT = 128  # places travel as two digits to this base each, which bfloat16 holds exactly


class PrunedEncoding:
    """Mixin of a model: what stays of the pictures is what `embed_multimodal` returns.

    Attributes:
        levels: of which a row of features is made (`Choice.rows`).
    """

    levels = 1

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
        self.check_ranks(taps, layers[0].self_attn.tp_size)
        watcher = TowerWatcher(layers, taps, keys, facts, host.mean_over_ranks)
        if merges:
            install(encoder, watcher)
        return watcher

    def check_ranks(self, taps: list, ranks: int) -> None:
        """Refuse to look at what ranks cannot average.

        Raises:
            UnsupportedError: something is looked at that is no mean over heads.
        """
        odd = next((tap for tap in taps if not averages_heads(tap, self.served.facts)), None)
        if odd is not None and ranks > 1:
            raise UnsupportedError(
                f"{self.served.choice().names} looks at {odd}, which ranks of tensor parallelism, each seeing its own "
                "heads, cannot average: leave --tensor-parallel-size away, and use --data-parallel-size."
            )

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
        sizes = self.sizes(kwargs, len(requests))
        pixels, made = self.apart(pixels, sizes), []
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

    def sizes(self, kwargs: dict[str, Any], count: int) -> list:
        """What the packing of every picture depends on (of `Family.sizes`)."""
        if not self.served.family.needs_sizes:
            return [None] * count
        return [tuple(size) for size in torch.as_tensor(kwargs["image_sizes"]).tolist()]

    def apart(self, pixels: Any, sizes: list) -> Any:
        """The pixels of every picture, in order."""
        return pixels

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
                rows = [features[i] for i in mine]
                share = share_of(seen, pictures, mine, self.served.facts.packed)
            for i, kept in zip(mine, choice.rows(some, share, rows, self.levels), strict=True):
                made[i] = self.placed(*kept, sizes[i])
        return made

    def placed(self, rows: torch.Tensor, places: torch.Tensor, size: Any) -> torch.Tensor:
        """Rows of a picture `(count, dim)` with what must be known of their places `(count,)`: here nothing."""
        return rows

    def see(self, pictures: list[ServedPicture], sizes: list, pixels: Any) -> tuple[Any, dict]:
        """Unpruned features of pictures, and what was measured meanwhile."""
        self.watcher.take()  # of a run that failed
        if self.served.family.needs_sizes:
            # pictures of one request are padded to the same number of views: their own are enough
            views = [views[: picture.grid.views] for views, picture in zip(pixels, pictures, strict=True)]
            features = self.unpruned(pixel_values=views, image_sizes=torch.tensor(sizes))
        else:
            pixels = pixels if isinstance(pixels, torch.Tensor) else torch.stack(pixels)
            features = self.unpruned(pixel_values=pixels)
        return features, self.watcher.take()

    def unpruned(self, **kwargs: Any) -> Any:
        """What vLLM's own class makes of pictures."""
        return super().embed_multimodal(**kwargs)


def share_of(seen: dict, pictures: list[ServedPicture], mine: list[int], packed: bool) -> dict:
    """Taps of some pictures alone; they come by views, or by tokens from a tower that reads all as one (`packed`)."""
    if len(mine) == len(pictures):
        return seen
    starts = [0]
    for picture in pictures:
        starts.append(starts[-1] + (picture.grid.encoded if packed else picture.grid.views))
    views = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine])
    return {tap: values[views.to(values.device)] for tap, values in seen.items()}


class AttentiveEncoding(PrunedEncoding):
    """The same with a tower whose attention turns or norms what it projects; nothing merges in or behind it."""

    def watch(self, vllm_config: Any, prefix: str) -> TowerWatcher:
        if vllm_config.compilation_config.compile_mm_encoder:
            raise UnsupportedError("compile_mm_encoder hides the tower's layers from the methods: leave it away.")
        tower, facts, choice = getattr(self, self.served.family.trunk), self.served.facts, self.served.choice()
        taps = [tap for tap in choice.plan.measured if tap.layer >= 0]
        self.check_ranks(taps, vllm_config.parallel_config.tensor_parallel_size)
        layers = self.served.family.tower_layers(tower)
        return AttentionWatcher(tower, layers, taps, self.served.family, facts, host.mean_over_ranks)


class EncodingOnAxes(AttentiveEncoding):
    """The same where positions lie on three axes (M-RoPE): a token that stays keeps the position that it had.

    Text stands where it would without pruning, which follows from the sizes of pictures. Where the tokens of a picture
    stand is known when it was encoded: it travels with the rows as further columns, as vLLM has it of videos that it
    prunes itself (`SupportsMultiModalPruning`). So nothing is lost where a cache has the picture, or a part of it.

    vLLM's runner takes these columns off by `recompute_mrope_positions`. That for CPUs does not: there they come to
    `embed_input_ids`, and act in the call of `forward` that follows it.

    Attributes:
        places: of the tokens of this step, which are of pictures `(tokens,)` bool, and where these stand.
    """

    places: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        check_axes(vllm_config)
        # vLLM asks for positions of embeddings where this says that it prunes videos, of which there are none
        vllm_config.model_config.multimodal_config.video_pruning_rate = 0.5
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def sizes(self, kwargs: dict[str, Any], count: int) -> list:
        return [tuple(size) for size in torch.as_tensor(kwargs["image_grid_thw"]).view(-1, 3).tolist()]

    def apart(self, pixels: Any, sizes: list) -> Any:
        return pixels.split([math.prod(size) for size in sizes])

    def see(self, pictures: list[ServedPicture], sizes: list, pixels: Any) -> tuple[Any, dict]:
        self.watcher.take()
        self.watcher.sizes = sizes
        made = self.unpruned(pixel_values=torch.cat(list(pixels)), image_grid_thw=torch.tensor(sizes))
        return [rows[:, : self.width] for rows in made], self.watcher.take()

    @property
    def width(self) -> int:
        """Of a picture's rows, without where they stand."""
        return self.visual.out_hidden_size

    def placed(self, rows: torch.Tensor, places: torch.Tensor, size: Any) -> torch.Tensor:
        _, cols = self.served.family.side(self, size)
        at = torch.stack((places // cols, places % cols), 1)
        return torch.cat((rows, torch.cat((at // DIGIT, at % DIGIT), 1).to(rows)), 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[torch.Tensor, int]:
        """`(3, tokens)` positions, of a picture's tokens its first one; and what a count is off behind them."""
        positions = torch.arange(len(input_tokens)).repeat(3, 1)
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            start, behind = feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length
            size = tuple(feature.data["image_grid_thw"].data.tolist())
            first = int(positions[0, start])
            positions[:, start:behind] = first
            reach = first + max(self.served.family.side(self, size))
            positions[:, behind:] = torch.arange(reach, reach + len(input_tokens) - behind)
        return positions, behind_all(positions)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """Rows without the columns that tell their places, positions with these, and what a count is off behind them.

        Args:
            multimodal_embeddings: of the next placeholders behind `num_computed_tokens`, in order.

        Raises:
            RuntimeError: other rows than placeholders.
        """
        if not multimodal_embeddings:
            return [], mrope_positions, behind_all(mrope_positions)
        rows, told = self.split(multimodal_embeddings)
        holes = torch.as_tensor(input_ids, device=mrope_positions.device) == self.config.image_token_id
        holes[:num_computed_tokens] = False
        positions = moved(mrope_positions, holes.nonzero().flatten()[: len(told)], told)
        return rows, positions, behind_all(positions)

    def split(self, made: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Rows of pictures, and where all of them stand `(rows, 2)`."""
        told = torch.cat([rows[:, -4:] for rows in made]).long()
        return [rows[:, :-4] for rows in made], told[:, :2] * DIGIT + told[:, 2:]

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> torch.Tensor:
        self.places = None
        if multimodal_embeddings is not None and any(rows.shape[1] > self.width for rows in multimodal_embeddings):
            multimodal_embeddings, told = self.split(multimodal_embeddings)
            self.places = is_multimodal, told
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.places is not None:
            pictures, told = self.places
            self.places = None
            positions = moved(positions, pictures.nonzero().flatten().to(positions.device), told)
        return super().forward(input_ids, positions, *args, **kwargs)


def moved(positions: torch.Tensor, at: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Positions `(3, tokens)` whose columns `at` stand in a picture where it is told `(rows, 2)`.

    Raises:
        RuntimeError: other columns than were told of.
    """
    if len(at) != len(told):
        raise RuntimeError(f"{len(told)} rows of pictures came for {len(at)} placeholders.")
    positions = positions.clone()
    positions[1:, at] = positions[0, at] + told.T.to(positions)
    return positions


def behind_all(positions: torch.Tensor) -> int:
    """What is added to a count of tokens behind a prompt `(3, tokens)`, which ends with text."""
    return int(positions[0, -1]) + 1 - positions.shape[1]


def check_axes(vllm_config: Any) -> None:
    """Refuse what vLLM cannot do with positions that travel with embeddings.

    Raises:
        UnsupportedError: a setting of the engine.
    """
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedError(
            "--pipeline-parallel-size: vLLM tells the first stage alone where tokens that were kept stand. Use "
            "--tensor-parallel-size or --data-parallel-size."
        )
    if vllm_config.speculative_config is not None:
        raise UnsupportedError(
            "speculative decoding: vLLM hands the draft model pictures without where their tokens stand. Leave "
            "--speculative-config away."
        )
    if vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data":
        raise UnsupportedError(
            "--mm-encoder-tp-mode data gives every rank other pictures, and what it sees of them stays there: leave it "
            "away."
        )


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


class Qwen2_5_VLInfo(QwenInfo, host.Qwen2_5_VLProcessingInfo):
    """Of `qwen2_5_vl`."""


class Qwen2_5_VLProcessor(QwenProcessor, host.Qwen2_5_VLMultiModalProcessor):
    """Of `qwen2_5_vl`."""


@host.MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=Qwen2_5_VLInfo, dummy_inputs=host.Qwen2_5_VLDummyInputsBuilder
)
class VlmpruneQwen2_5_VLForConditionalGeneration(EncodingOnAxes, host.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class Qwen3VLInfo(QwenInfo, host.Qwen3VLProcessingInfo):
    """Of `qwen3_vl`."""


class Qwen3VLProcessor(QwenProcessor, host.Qwen3VLMultiModalProcessor):
    """Of `qwen3_vl`."""


@host.MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=host.Qwen3VLDummyInputsBuilder
)
class VlmpruneQwen3VLForConditionalGeneration(EncodingOnAxes, host.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose rows bring along what is added behind its first layers."""

    @property
    def levels(self) -> int:
        return 1 + self.deepstack_num_level


class InternVLInfo(TiledInfo, host.InternS1ProcessingInfo):
    """Of `internvl`."""


class InternVLProcessor(SizedProcessor, host.InternS1MultiModalProcessor):
    """Of `internvl`."""

    size_field = "image_num_patches"


@host.MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=InternVLInfo, dummy_inputs=host.InternS1DummyInputsBuilder
)
class VlmpruneInternVLForConditionalGeneration(AttentiveEncoding, host.InternS1ForConditionalGeneration):
    """InternVL, of the format of transformers."""

    def sizes(self, kwargs: dict[str, Any], count: int) -> list:
        return torch.as_tensor(kwargs["image_num_patches"]).flatten().tolist()

    def apart(self, pixels: Any, sizes: list) -> Any:
        return pixels.split(sizes)

    def see(self, pictures: list[ServedPicture], sizes: list, pixels: Any) -> tuple[Any, dict]:
        self.watcher.take()
        told = {"image_num_patches": torch.tensor(sizes), "image_token_id": torch.tensor(self.config.image_token_id)}
        made = self.unpruned(pixel_values=torch.cat(list(pixels)), **told)
        return made, self.watcher.take()
