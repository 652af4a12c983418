"""What methods know of a model: numbers, and no module. And how a user's layer numbers fit them."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.errors import UnsupportedError

__all__ = ["ModelFacts", "check_layer", "need_cls", "need_crops", "need_patches", "need_sparse", "need_views"]
__all__ += ["scale_tower_layer"]


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that methods choose their layers by.

    Attributes:
        family: the model's `model_type`.
        tower_layers: number of layers of the vision tower.
        feature_layer: 0-based tower layer whose output becomes the visual features.
        has_cls: whether the tower has a [CLS] token.
        decoder_layers: number of layers of the language model.
        views: whether one image may have several views (thumbnail and crops).
        view_patches: tokens of one view, which are patches where `unit` is 1; 0 where pictures have any size.
        unit: patches along a side of the square that one token is made of.
        closed: whether features leave the tower through a norm behind its last layer.
        axes: on how many axes a token's position lies: 1, or 3 (time, height and width: M-RoPE).
        packed: whether the tower reads pictures of any size as one sequence.
        recurrent: decoder layers that have a state instead of attention.
        sparse: whether such a tower can read a part of a picture's patches.
        windowed: tower layers in which a patch sees its window alone.
        tower_from: checkpoint that the vision tower came from, where the model's config tells it.
    """

    family: str
    tower_layers: int
    feature_layer: int
    has_cls: bool
    decoder_layers: int
    views: bool
    view_patches: int
    axes: int = 1
    packed: bool = False
    windowed: tuple[int, ...] = ()
    tower_from: str | None = None
    unit: int = 1
    closed: bool = False
    recurrent: tuple[int, ...] = ()
    sparse: bool = False

    @property
    def attending(self) -> tuple[int, ...]:
        """The decoder layers that have attention."""
        return tuple(layer for layer in range(self.decoder_layers) if layer not in self.recurrent)

    @property
    def attention_layer(self) -> int:
        """The last tower layer up to the feature layer whose patches see all of the picture."""
        return max((layer for layer in range(self.feature_layer + 1) if layer not in self.windowed), default=0)


def scale_tower_layer(layer: int, facts: ModelFacts) -> int:
    """Scale tower layer `layer` of a 24-layer tower to this tower: round(layer * L / 24), at most L - 2."""
    return max(0, min(round(layer * facts.tower_layers / 24), facts.tower_layers - 2))


def check_layer(name: str, layer: int, layers: int, lowest: int = 0) -> int:
    """Check a user's layer number (negative counts from the end) and return it as an index.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{name}={layer!r} must be an int.")
    index = layer + layers if layer < 0 else layer
    if not lowest <= index < layers:
        raise ValueError(f"{name}={layer} is out of range: this model allows {lowest}..{layers - 1}.")
    return index


def need_cls(method: str, facts: ModelFacts, way_out: str) -> None:
    """Raise UnsupportedError if the tower has no [CLS] token; `way_out` names the documented fallback."""
    if not facts.has_cls:
        raise UnsupportedError(
            f"{method} reads the attention of the tower's [CLS] token, and this tower has none; {way_out}."
        )


def need_crops(method: str, facts: ModelFacts, does: str) -> None:
    """Raise UnsupportedError if images have no thumbnail and crops; `does` is what the method does among them."""
    if not facts.views:
        raise UnsupportedError(
            f"{method} {does} among the crops of an image, and {facts.family} models have a single view or do not tell "
            "how their views lie."
        )


def need_views(
    method: str,
    facts: ModelFacts,
    way_out: str,
    does: str = "changes what the vision tower reads or makes of equal views",
) -> None:
    """Raise UnsupportedError if the tower has no views of one size; `way_out` names what to do instead."""
    if facts.packed:
        raise UnsupportedError(
            f"{method} {does}, and this tower packs pictures of any size into one sequence; {way_out}."
        )


def need_sparse(method: str, facts: ModelFacts) -> None:
    """Raise UnsupportedError if the tower cannot read a part of a picture's patches."""
    if not facts.sparse:
        raise UnsupportedError(
            f"{method} drops tokens before the vision tower reads their patches, and that of {facts.family} models "
            "reads pictures whole: the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL alone take a part of one."
        )


def need_patches(method: str, facts: ModelFacts) -> None:
    """Raise UnsupportedError if tokens are not patches of the tower as its layers leave them.

    What is merged or picked inside the tower, or behind it, would then be no tokens.
    """
    need_views(method, facts, "take a method that cuts in the language model")
    if facts.unit > 1:
        why = f"makes one token of {facts.unit} x {facts.unit} patches"
    elif facts.closed:
        why = "hands on its features through a norm, behind which nothing can be merged as its layers left it"
    else:
        return
    raise UnsupportedError(
        f"{method} merges patches in or behind the vision tower, and that of {facts.family} models {why}: take a "
        "method that cuts before or in the language model."
    )
