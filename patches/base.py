"""What the engine must know of a model family, and the parts that families share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layers import TowerLayer
from vlmprune.parts.layout import ImageGrid
from vlmprune.parts.packing import Packing
from vlmprune.patches.language_models import LANGUAGE_MODELS, is_recurrent
from vlmprune.patches.towers import TOWERS, packed_views, pooled, tower_layer

__all__ = ["Bound", "Family"]


def feature_index(given: int | Sequence[int], layers: int) -> int:
    """0-based tower layer whose output is entry `given` of `hidden_states`, which has one entry more than layers."""
    if not isinstance(given, int):  # several layers are concatenated; the deepest leads
        given = max(f if f >= 0 else layers + 1 + f for f in given)
    return max((given if given >= 0 else layers + 1 + given) - 1, 0)


class Bound:
    """Base of what stands before a method of one instance, as its attribute; `unpatch` finds it by type and plan."""

    plan: Any  # an engine's Plan


class Family:
    """One Hugging Face `model_type`: where its parts are and how it packs views into visual tokens.

    A new family overrides `model_type`, and what differs of `grid`, `pack`, `sizes` and `needs_sizes`; one that reads
    videos also `modalities` and `pack_video`.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    trunk: ClassVar[str] = "vision_tower"  # the inner model's attribute that the tower is
    axes: ClassVar[int] = 1  # on how many axes a token's position lies: 1, or 3 (M-RoPE)
    packed: ClassVar[bool] = False  # whether the tower reads pictures of any size as one sequence
    bounds_pixels: ClassVar[bool] = False  # whether its processor bounds every picture's number of pixels
    sparse: ClassVar[bool] = False  # whether such a tower can read a part of a picture's patches (`token_pixels`, ...)
    views: ClassVar[bool] = False
    needs_sizes: ClassVar[bool] = False  # whether the packing of images depends on more than the model
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    usual_tower: ClassVar[str] = "clip_vision_model"  # of the published checkpoints
    single: ClassVar[str] = ""  # of a family with views: which images have one view alone
    shrinks: ClassVar[tuple[str, ...]] = ()  # what packing may blend patches of: "image", "video"
    usual_unit: ClassVar[int] = 1  # `unit` of the published checkpoints
    usual_attends: ClassVar[int] = 1  # every how manieth of their decoder layers has attention
    image: ClassVar[str] = ""  # what a budget per image is of, where that is not simply a picture
    text: ClassVar[str] = "language_model"  # the one that is its language model
    projector: ClassVar[str] = "multi_modal_projector"  # and that between the two, by its path
    by_formula: ClassVar[bool] = False  # whether `cost.flops` counts its tower and projector
    handing: ClassVar[bool] = True  # whether the tower hands its keyword arguments to its layers
    closed: ClassVar[bool] = False  # whether features leave the tower through a norm behind its last layer
    listed: ClassVar[bool] = False  # whether the views of all pictures of a row come as one list
    runs: ClassVar[bool] = False  # whether what stands between two texts is one picture, of as many views as it has
    kinds: ClassVar[tuple[str, ...]] = ()  # arguments that say of every column what it is, for the masks
    origin: ClassVar[int] = 0  # position of a prompt's first token
    # arguments of a call that must be as the config says, since the layout and the taps are traced by it
    fixed: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")
    stamped: ClassVar[bool] = False  # whether text stands between the frames of a video
    alike: ClassVar[bool] = False  # whether pictures and videos have one placeholder, so that no prompt can have both
    # arguments of the encoders that the inner model goes on to need
    shared: ClassVar[tuple[str, ...]] = ()
    # arguments of the language model: which columns are visual, `(batch, length)` bool, and what it adds to these
    # behind its layers 0, 1, ...: a list of `(visual tokens of the batch, dim)`
    injected: ClassVar[tuple[str, str] | None] = None
    # keyword arguments of decoder layers, besides mask, positions and rotary embedding, that hold something for every
    # column of a call, and along which axis (that of its rows is the one before): a cut takes of them what it leaves
    layer_columns: ClassVar[Mapping[str, int]] = {}

    def suited(self, config: Any) -> Family:
        """The family of a model with this `config`, where one class serves models that are built differently."""
        return self

    def inner(self, model: nn.Module) -> nn.Module:
        """The module that joins tower, projector and language model (`LlavaModel`): itself, or inside `model`."""
        if hasattr(model, self.text) and hasattr(model, self.trunk):
            return model
        if not hasattr(inner := getattr(model, "model", None), self.trunk):
            raise UnsupportedError(
                f"{type(model).__name__} has no vision tower where {self.title} has it: give the whole model, or the "
                "PEFT model around it."
            )
        return inner

    def towers(self, inner: nn.Module) -> list[nn.Module]:
        """The vision towers, all built alike: one, or one for every modality."""
        return [getattr(inner, self.trunk)]

    def tower_layers(self, tower: nn.Module) -> nn.ModuleList:
        return tower.encoder.layers

    def language_model(self, inner: nn.Module) -> nn.Module:
        return getattr(inner, self.text)

    def decoder_layers(self, inner: nn.Module) -> nn.ModuleList:
        return self.language_model(inner).layers

    def token(self, inner: nn.Module, modality: str = "image") -> int:
        """Id of the placeholder."""
        return getattr(inner.config, f"{modality}_token_id")

    def side(self, inner: nn.Module, size: Any = None) -> tuple[int, int]:
        """(rows, cols) of tokens in one view of an image of `size` (of `sizes`); mostly of any.

        They are the tower's patches where `unit` is 1.
        """
        vision = inner.config.vision_config
        return (vision.image_size // vision.patch_size // self.unit(inner),) * 2

    def unit(self, inner: nn.Module) -> int:
        """Patches along a side of the square that one token is made of."""
        return 1

    def facts(self, inner: nn.Module) -> ModelFacts:
        """Check that the model is one we know, and return its facts.

        Raises:
            UnsupportedError: an unknown tower or language model, or an unsupported feature selection.
        """
        has_cls = self.check_parts(inner)
        self.check_strategy(inner, has_cls)
        layers = len(self.tower_layers(self.towers(inner)[0]))
        return ModelFacts(
            family=self.model_type,
            tower_layers=layers,
            feature_layer=feature_index(self.feature_layer(inner), layers),
            has_cls=has_cls,
            decoder_layers=len(self.decoder_layers(inner)),
            views=self.views,
            view_patches=math.prod(self.side(inner)),
            axes=self.axes,
            packed=self.packed,
            sparse=self.sparse,
            windowed=self.windowed(inner),
            tower_from=tower_from(inner.config.vision_config),
            unit=self.unit(inner),
            closed=self.closed,
            recurrent=tuple(i for i, layer in enumerate(self.decoder_layers(inner)) if is_recurrent(layer)),
        )

    def usual(self, view_patches: int = 576) -> ModelFacts:
        """Facts of a model as the published ones are, of a common size: what can be told without a model."""
        layers = 32
        return ModelFacts(
            family=self.model_type,
            tower_layers=24,
            feature_layer=23 if self.packed or self.closed else 22,
            has_cls=TOWERS[self.usual_tower],
            decoder_layers=layers,
            views=self.views,
            view_patches=0 if self.packed else view_patches,
            axes=self.axes,
            packed=self.packed,
            sparse=self.sparse,
            unit=self.usual_unit,
            closed=self.closed,
            recurrent=tuple(i for i in range(layers) if (i + 1) % self.usual_attends),
        )

    def check_parts(self, inner: nn.Module) -> bool:
        """Refuse an unknown tower or language model; returns whether the tower has a [CLS] token."""
        tower, text = inner.config.vision_config.model_type, inner.config.text_config.model_type
        if tower not in TOWERS:
            raise UnsupportedError(f"vision tower {tower!r} is not supported; supported: {', '.join(TOWERS)}.")
        if text not in LANGUAGE_MODELS:
            raise UnsupportedError(
                f"language model {text!r} is not supported; supported: {', '.join(LANGUAGE_MODELS)}."
            )
        return TOWERS[tower]

    def check_strategy(self, inner: nn.Module, has_cls: bool) -> None:
        """Refuse a feature selection that makes [CLS] a visual token, or a patch none."""
        strategy = self.strategy(inner)
        if has_cls and strategy != "default":
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} makes the tower's [CLS] token a visual token, which is "
                "not supported; use 'default'."
            )
        if not has_cls and strategy != "full":
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} drops the first patch of a tower without a [CLS] token; "
                "use 'full'."
            )

    def windowed(self, inner: nn.Module) -> tuple[int, ...]:
        """Tower layers in which a patch sees its window alone."""
        return ()

    def strategy(self, inner: nn.Module) -> str:
        """Whether the tower's first token is dropped ("default") or not ("full")."""
        # hosts without the choice take all that leaves the tower
        return getattr(inner.config, "vision_feature_select_strategy", "full")

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        """What the processor must know of the model to write one placeholder for every feature."""
        vision = inner.config.vision_config
        return {
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(TOWERS[vision.model_type]),
            "vision_feature_select_strategy": self.strategy(inner),
        }

    def feature_layer(self, inner: nn.Module) -> int | Sequence[int]:
        """As the config counts: entry of the tower's hidden states that becomes the features, or several."""
        return getattr(inner.config, "vision_feature_layer", -1)

    def sizes(self, modality: str, given: dict[str, Any]) -> list[Any]:
        """What the packing of every image (`grid`, `pack`) or video depends on besides the model.

        Args:
            modality: "image" or "video".
            given: arguments of `get_image_features` or `get_video_features`, numbers on the host.

        Returns:
            (height, width) per image, the number of frames per video.
        """
        if modality == "video":
            batch, frames = given["pixel_values_videos"].shape[:2]
            return [frames] * batch
        if given.get("image_sizes") is None:
            raise ValueError(f"{self.model_type} models need the image_sizes that their processor makes: hand them on.")
        return [tuple(size) for size in given["image_sizes"].tolist()]

    def tower_views(
        self, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], sizes: Sequence[Any]
    ) -> list[tuple[TowerLayer, torch.Tensor]]:
        """What a tap measures a tower layer by: its adapter and its input `(views, patches, dim)`.

        Several of both, in order, where the layer reads views of several sizes (`packed`).

        Args:
            kwargs: the other arguments of the layer.
            sizes: of `sizes`, of all that the tower reads.
        """
        if not self.packed:
            return [(tower_layer(layer), hidden)]
        return packed_views(layer, hidden, kwargs["position_embeddings"], self.view_sizes(sizes))

    def view_sizes(self, sizes: Sequence[Any]) -> list[int]:
        """Patches of every view that a packed tower reads, in order; a patch sees its own view alone."""
        raise NotImplementedError

    def tokens_of(self, tower: nn.Module, values: torch.Tensor, sizes: Sequence[Any], unit: int) -> torch.Tensor:
        """What was measured of a tower's patches, `(views, patches, ...)`, by token, `(views, tokens, ...)`.

        They differ where one token is made of several patches, or where the tower reads these in an order of its own.

        Args:
            sizes: of `sizes`, of all that the tower read.
            unit: of the model (`unit`).
        """
        return values if unit == 1 else pooled(values, (math.isqrt(values.shape[1]),) * 2, unit)

    def token_pixels(self, tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """`(tokens, numbers)`, the pixels of every token of what a `sparse` tower is handed, in raster order."""
        raise NotImplementedError

    def token_sizes(self, tower: nn.Module, sizes: Sequence[Any]) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of tokens of images or videos of these sizes (of `sizes`)."""
        raise NotImplementedError

    def reading_order(self, tower: nn.Module, sizes: Sequence[Any]) -> torch.Tensor | None:
        """`(tokens,)` long, which token a `sparse` tower reads where; None for raster order."""
        return None

    def mergers(self, tower: nn.Module) -> list[nn.Module]:
        """The modules of a `sparse` tower that make `(tokens, dim)` of what its layers write."""
        raise NotImplementedError

    def of_patches(self, kwargs: dict[str, Any], stay: torch.Tensor, before: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of a layer of a `sparse` tower for some of its patches.

        Args:
            stay: `(patches that stay,)` long, their numbers in the order of reading.
            before: `(patches + 1,)` long, how many of those in front of each stay.
        """
        raise NotImplementedError

    def sized(self, modality: str) -> bool:
        """Whether the packing of an image or video depends on more than the model, which `sizes` tells."""
        return self.needs_sizes or modality == "video"

    def items(self, inner: nn.Module, modality: str, features: Any, known: list[Any]) -> list[int]:
        """Tokens of every image, or of every video, of what an encoder made; not asked where `runs` tells.

        Args:
            features: the encoder's output, whose `pooler_output` lists `(tokens, dim)` parts.
            known: what the packing of each depends on (of `sizes`).
        """
        return [len(item) for item in features.pooler_output]

    def blocks(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """`(batch, length)` number of the group of neighbours that see each other whatever their order, -1 for none.

        None where attention is causal throughout. A group is a run of columns without a gap.

        Args:
            kwargs: arguments of the inner model.
        """
        return None

    def said_of(self, inner: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the processor says of every token of `(batch, length)` prompts beside its id: arguments of the model."""
        if self.axes == 1:
            return {}
        kinds = (ids == self.token(inner, modality) for modality in self.modalities)
        return {"mm_token_type_ids": sum(number * kind for number, kind in enumerate(kinds, 1))}

    def told_kinds(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """`token_type_ids` of a call with pictures.

        Raises:
            ValueError: there are none: the host would say nothing and let pictures see less of themselves.
        """
        if (types := kwargs.get("token_type_ids")) is None:
            raise ValueError(
                f"{self.model_type} models need the token_type_ids that their processor makes, by which pictures see "
                "all of themselves: hand them on."
            )
        return types

    def bind(self, model: nn.Module, plan: Any) -> None:
        """Set `Bound` attributes where no hook reaches what the engine has to know."""

    def open(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inner model's arguments with what a host keeps elsewhere put where the engine looks for it.

        That is `input_ids` with a placeholder per visual token, and features as `pixel_values` or `mm_encoder_outputs`.
        """
        return kwargs

    def close(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The reverse of `open`: arguments that the host's inner model takes."""
        return kwargs

    def grid(self, inner: nn.Module, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        """Views of an image of `size` (height, width), and its (vertical, horizontal) number of crops."""
        return 1, (1, 1)

    def pack(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor, size: Any) -> torch.Tensor:
        """Pack `(views, patches, dim)` of one image into `(tokens, dim)` exactly as the model does."""
        return views[0]

    def pack_video(self, inner: nn.Module, frames: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        """Pack `(frames, patches, dim)` of one video into `(tokens, dim)` exactly as the model does."""
        raise UnsupportedError(f"{self.model_type} models read no videos.")

    def packing(self, inner: nn.Module, modality: str, size: Any) -> Packing:
        """How an image or video of a size (of `sizes`) is packed."""
        if modality == "video":
            return Packing(partial(self.pack_video, inner), size, *self.side(inner), (1, 1), frames=size)
        if self.runs:
            return Packing(lambda x, newline: x.flatten(0, 1), size, *self.side(inner), (1, 1), apart=True)
        views, grid = self.grid(inner, size)
        return Packing(lambda x, newline: self.pack(inner, x, newline, size), views, *self.side(inner, size), grid)

    def video_grid(self, inner: nn.Module, frames: int) -> ImageGrid:
        """The layout of one video, traced through `pack_video`."""
        return self.packing(inner, "video", frames).trace()

    def image_grid(self, inner: nn.Module, size: tuple[int, int] | None) -> ImageGrid:
        """The layout of one image, traced through `pack`."""
        return self.packing(inner, "image", size).trace()


def tower_from(vision: Any) -> str | None:
    """The checkpoint that a vision tower came from: as its config says, or the CLIP tower that LLaVA models have."""
    if name := getattr(vision, "_name_or_path", None):
        return name
    told = tuple(getattr(vision, field, None) for field in ("model_type", "hidden_size", "patch_size", "image_size"))
    return "openai/clip-vit-large-patch14-336" if told == ("clip_vision_model", 1024, 14, 336) else None
