"""vLLM's front end with pruned pictures: so many placeholders as stay, and a note of it for the model.

Arguments of overridden methods keep vLLM's names: it passes them by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from vlmprune.parts.layout import ImageGrid
from vlmprune.serving import host
from vlmprune.serving.served import Request, Served
from vlmprune.serving.settings import KEEP

__all__ = ["PrunedInfo", "PrunedNextInfo", "PrunedProcessor", "QwenInfo", "QwenProcessor"]
__all__ += ["SizedProcessor", "TiledInfo", "refuse"]


def refuse(model_config: Any, lora_config: Any = None) -> None:
    """Refuse what would go wrong without a word.

    Raises:
        ValueError: a setting of the engine that pruning does not allow.
    """
    multimodal = model_config.multimodal_config
    if multimodal.enable_mm_embeds:
        raise ValueError(
            "enable_mm_embeds lets requests bring embeddings instead of pictures, which nothing would prune: start a "
            "server without pruning for them."
        )
    if multimodal.get_limit_per_prompt("image") == 0:
        raise ValueError(
            "limit_mm_per_prompt allows no pictures, so there is nothing to prune: start vLLM's own class."
        )
    if KEEP in (multimodal.mm_processor_kwargs or {}):
        raise ValueError(f"{KEEP} is for single requests; an engine's own budget is keep, among its vlmprune settings.")
    if lora_config is not None and lora_config.enable_tower_connector_lora:
        raise ValueError("enable_tower_connector_lora counts the tower's tokens by those that stay: leave it away.")


class PrunedInfo:
    """Mixin of vLLM's processing info: how many tokens a picture has after pruning."""

    @cached_property
    def served(self) -> Served:
        """The settings and methods of this engine.

        Raises:
            ValueError: they cannot be served.
        """
        config = self.get_hf_config()
        refuse(self.ctx.model_config)
        return Served(config, host.stand_in(config))

    def counting(self) -> dict[str, Any]:
        """What vLLM's count of a picture's tokens asks for besides its size."""
        return {}

    def size(self, width: int, height: int) -> Any:
        """What the packing of a picture depends on (of `Family.sizes`)."""
        return (height, width) if self.served.family.needs_sizes else None

    def whole_image_tokens(self, width: int, height: int) -> int:
        """Tokens of a picture before pruning, as vLLM counts them."""
        return super().get_num_image_tokens(image_width=width, image_height=height, **self.counting())

    def kept(self, width: int, height: int, keep: int | float | None) -> int:
        """Tokens of a picture after pruning.

        Raises:
            RuntimeError: vLLM counts other tokens before it than its packing makes.
        """
        size = self.size(width, height)
        made, told = self.served.grid(size).tokens, self.whole_image_tokens(width, height)
        if made != told:
            raise RuntimeError(f"a picture of {width} x {height}: vLLM counts {told} tokens and packs {made}.")
        return self.served.kept(size, keep)

    def get_num_image_tokens(self, *, image_width: int, image_height: int, **counting: Any) -> int:
        return self.kept(image_width, image_height, None)


class PrunedNextInfo(PrunedInfo):
    """The same where a picture's size says how much there is to encode.

    vLLM measures its memory on one picture, and makes room in its caches for the tokens of one. Its own choices for
    both go by the tokens: with pruning these say nothing of the work, and the picture may be one that a method refuses.
    """

    def candidates(self) -> set[tuple[int, int]]:
        """(height, width) of pictures among which are the largest: no padding is taken away from these."""
        return {tuple(size) for size in self.get_hf_config().image_grid_pinpoints}

    def grid(self, height: int, width: int) -> ImageGrid:
        """The layout of a picture."""
        return self.served.grid(self.size(width, height))

    @cached_property
    def largest(self) -> tuple[tuple[int, int], int]:
        """(height, width) of the picture with most to encode, and the most tokens that stay of a picture.

        Raises:
            ValueError: the methods take no picture at all.
        """
        sizes, kept, refused = self.candidates(), {}, None
        for of in ("encoded", "tokens", "newlines"):
            # most first; the first that is taken is enough, for a grid is read off faster than a count
            for size in sorted(sizes, key=lambda one: (-getattr(self.grid(*one), of), one)):
                try:
                    kept[of] = size, self.kept(size[1], size[0], None)
                except ValueError as error:
                    refused = error
                else:
                    break
        if not kept:
            raise refused
        return kept["encoded"][0], max(count for _, count in kept.values())

    def get_image_size_with_most_features(self, max_pixels: int | None = None) -> Any:
        height, width = self.largest[0]
        return host.ImageSize(width=width, height=height)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        return {"image": self.largest[1]}


class PicturesAlone(PrunedNextInfo):
    """The same of models that read videos too: prompts with these are refused by vLLM, which counts what it takes."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": None, "video": 0}  # vLLM reads the names of their processor's arguments off this


class QwenInfo(PicturesAlone):
    """Of models that read pictures of any size."""

    def counting(self) -> dict[str, Any]:
        return {"image_processor": self.get_image_processor(), "mm_kwargs": {}}

    def size(self, width: int, height: int) -> Any:
        resized, _ = self._get_vision_info(image_width=width, image_height=height, num_frames=1, **self.counting())
        patch = self.get_hf_config().vision_config.patch_size
        return 1, resized.height // patch, resized.width // patch

    def candidates(self) -> set[tuple[int, int]]:
        own = super(PrunedNextInfo, self).get_image_size_with_most_features()
        square = math.isqrt(own.height * own.width)  # where that is a strip, which a method may refuse
        return {(own.height, own.width), (square, square)}


class TiledInfo(PicturesAlone):
    """Of models that divide a picture into tiles, and are told their number alone."""

    def counting(self) -> dict[str, Any]:
        # as the processor has it, which vLLM's count does not know
        return {"processor": self.get_hf_processor(), "mm_kwargs": {"crop_to_patches": True}}

    def size(self, width: int, height: int) -> Any:
        tokens, view = self.whole_image_tokens(width, height), self.served.facts.view_patches
        return tokens // view

    def candidates(self) -> set[tuple[int, int]]:
        height, width = self.get_hf_config().vision_config.image_size
        return {(height * down, width * across) for across, down in self.resolve_target_ratios()}


class PrunedProcessor:
    """Mixin of vLLM's processor: placeholders by the budget, which rides along with the pixels."""

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        salt = self.info.served.salt
        return {kind: [f"{one}-{salt}" for one in made] for kind, made in super()._get_mm_hashes(inputs).items()}

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._get_hf_mm_inputs(mm_items, {key: v for key, v in hf_kwargs.items() if key != KEEP})

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        keep = self.info.served.keep_of(hf_kwargs)
        made = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if "pixel_values" in made:
            images = mm_items.get_items("image", host.ImageProcessorItems)
            requests = [self.request(images, i, keep, made) for i in range(images.get_count())]
            made[KEEP] = torch.tensor([request.row() for request in requests], dtype=torch.float64)
        return made

    def request(self, images: Any, index: int, keep: int | float | None, made: Any) -> Request:
        """What the model is told of one picture; `made` is what the picture processor made of all."""
        number = 0
        if self.info.served.choice(keep).by_content:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            number = int(host.MultiModalHasher.hash_kwargs(algorithm, image=images.get(index))[:10], 16)
        return Request(keep, self.placeholders(images, index, keep, made), number)

    def placeholders(self, images: Any, index: int, keep: int | float | None, made: Any = None) -> int:
        """How many one picture gets."""
        size = images.get_image_size(index)
        return self.info.kept(size.width, size.height, keep)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        return fields | {KEEP: host.MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token, keep = self.info.get_hf_config().image_token_index, self.info.served.keep_of(hf_processor_mm_kwargs)

        def replacement(index: int) -> list[int]:
            images = mm_items.get_items("image", host.ImageProcessorItems)
            return [token] * self.placeholders(images, index, keep)

        return [host.PromptReplacement(modality="image", target=[token], replacement=replacement)]


class SizedProcessor(PrunedProcessor):
    """The same where the picture processor says what a picture was made into: `size_field` of what it returns."""

    size_field: str

    def placeholders(self, images: Any, index: int, keep: int | float | None, made: Any = None) -> int:
        size = made[self.size_field][index].tolist()
        return self.info.served.kept(tuple(size) if isinstance(size, list) else size, keep)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        own = {key: value for key, value in hf_processor_mm_kwargs.items() if key != KEEP}
        (update,) = (
            one
            for one in super(PrunedProcessor, self)._get_prompt_updates(mm_items, own, out_mm_kwargs)
            if one.modality == "image"
        )
        token = self.info.get_hf_config().image_token_id

        def replacement(index: int) -> Any:
            whole = update.replacement(index)
            plain = isinstance(whole, list)
            ids = list(whole if plain else whole.full)
            count = Request.of(out_mm_kwargs["image"][index][KEEP].data.tolist()).placeholders
            first, spare = ids.index(token), ids.count(token) - count
            del ids[first : first + spare]
            return ids if plain else host.PromptUpdateDetails.select_token_id(ids, token)

        return [host.PromptReplacement(modality="image", target=update.target, replacement=replacement)]


class QwenProcessor(SizedProcessor):
    """The same where a prompt's positions follow from the sizes of its pictures."""

    size_field = "image_grid_thw"

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        made = super().get_dummy_inputs(*args, **kwargs)
        return replace(made, prompt=[*made.prompt, 0])

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Refuse prompts that end with a picture: where an answer stands is read off the last token.

        Raises:
            ValueError: nothing stands behind the last picture.
        """
        # before anything is done: what vLLM's caches count as sent must be sent
        if inputs.prompt[-1:] == [self.info.get_hf_config().image_token_id]:
            raise ValueError("a pruned prompt must go on behind its last picture.")
        return super().apply(inputs, timing_ctx)
