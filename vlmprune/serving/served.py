"""One model as it is served: its layouts by picture size, and its methods at every budget that requests bring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.parts.budget import check_keep
from vlmprune.parts.layout import ImageGrid
from vlmprune.parts.packing import Layouts
from vlmprune.patches import FAMILIES, Family
from vlmprune.serving.choice import Choice
from vlmprune.serving.settings import KEEP, methods_of, read_settings, salt, with_keep

__all__ = ["Request", "Served", "check", "family_for", "stand_in"]

BUDGETS = 64  # that are remembered in one process


def family_for(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        UnsupportedError: one that vLLM packs in another way than the config says.
    """
    ratio = getattr(config, "vision_aspect_ratio", None)
    if config.model_type == "llava_onevision" and ratio != "anyres_max_9":
        raise UnsupportedError(f"vision_aspect_ratio={ratio!r}: vLLM packs as 'anyres_max_9' whatever the config says.")
    if config.model_type == "qwen3_vl" and not (config.text_config.rope_parameters or {}).get("mrope_interleaved"):
        raise UnsupportedError(
            "the config of this qwen3_vl model does not say mrope_interleaved=True among its text_config's "
            "rope_parameters, as published ones do: transformers has the axes of positions so anyhow, vLLM would not."
        )
    family = FAMILIES[config.model_type]
    if family.suited(config) is not family:
        raise UnsupportedError(
            f"{config.model_type} with a tower of type {config.vision_config.model_type!r} is not served pruned."
        )
    return family


def stand_in(config: Any) -> SimpleNamespace:
    """What `Family.facts` asks of a model, whatever its family calls that: its config, and how many layers it has."""
    vision = config.vision_config
    layers = [None] * (vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers)
    tower = SimpleNamespace(encoder=SimpleNamespace(layers=layers, layer=layers), blocks=layers)
    return SimpleNamespace(
        config=config,
        vision_tower=tower,
        visual=tower,
        language_model=SimpleNamespace(layers=[None] * config.text_config.num_hidden_layers),
    )


def check(config: Any) -> None:
    """Find out before an engine starts whether it can serve the settings in a config.

    Raises:
        ValueError, TypeError, UnsupportedError: it cannot.
    """
    family = family_for(config)
    Choice(methods_of(read_settings(config)), family, family.facts(stand_in(config))).check()


@dataclass(frozen=True)
class Request:
    """What the front end tells the model of a picture: a row of numbers that rides along with its pixels.

    Attributes:
        keep: the request's own budget, or None for the engine's.
        placeholders: how many the prompt got for it.
        number: of its content, below 2**40; 0 where no method has a seed.
    """

    keep: int | float | None
    placeholders: int
    number: int

    def row(self) -> list[float]:
        """As float64, which holds all of it exactly."""
        keep = math.nan if self.keep is None else float(min(self.keep, 2**53))  # more than any picture has
        return [keep, float(isinstance(self.keep, int)), float(self.placeholders), float(self.number)]

    @classmethod
    def of(cls, row: list[float]) -> Request:
        """The reverse."""
        keep, whole, placeholders, number = row
        return cls(None if math.isnan(keep) else int(keep) if whole else keep, int(placeholders), int(number))


class Served:
    """What front end and model both know, each in its own process.

    Args:
        config: the model's, with our settings in it.
        inner: what answers a `Family` (see `host.stand_in`).

    Raises:
        ValueError, TypeError, UnsupportedError: settings that cannot be served.
    """

    def __init__(self, config: Any, inner: Any):
        self.config, self.inner, self.family = config, inner, family_for(config)
        self.settings, self.facts = read_settings(config), self.family.facts(inner)
        self.salt, self.layouts = salt(self.settings), Layouts()
        self.choices = lru_cache(maxsize=BUDGETS)(self.compile)
        self.choice().check()

    def compile(self, keep: int | float | None, whole: bool) -> Choice:
        """The methods at a budget; 1 and 1.0 are two of them, which a cache would not tell apart by themselves."""
        settings = self.settings if keep is None else with_keep(self.settings, keep)
        return Choice(methods_of(settings), self.family, self.facts)

    def choice(self, keep: int | float | None = None) -> Choice:
        """The methods at the engine's budget, or at a request's own."""
        return self.choices(keep, isinstance(keep, int))

    def grid(self, size: Any, modality: str = "image") -> ImageGrid:
        """The layout of a picture of a size (of `Family.sizes`)."""
        return self.layouts.find((modality, size), lambda: self.family.packing(self.inner, modality, size))

    def kept(self, size: Any, keep: int | float | None = None, modality: str = "image") -> int:
        """Placeholders of a picture after pruning.

        Raises:
            ValueError: a budget or a picture that a method refuses.
        """
        try:
            return self.choice(keep).count(self.grid(size, modality))
        except (TypeError, UnsupportedError) as error:  # what vLLM answers with a 400 is a ValueError
            raise ValueError(str(error)) from error

    def keep_of(self, kwargs: Any) -> int | float | None:
        """The budget that a request brings as its `mm_processor_kwargs`, checked.

        Raises:
            ValueError: none that the methods take; anything else among them. Layouts and placeholders follow the
                engine's own arguments of the picture processor: with others the engine would end in the tower.
        """
        if strange := [str(key) for key in kwargs if key != KEEP]:
            raise ValueError(
                f"{strange[0]!r} among a request's mm_processor_kwargs: a pruned engine takes {KEEP} alone, and other "
                f"arguments of the picture processor when it starts.{did_you_mean(strange[0], [KEEP])}"
            )
        keep = kwargs.get(KEEP)
        if keep is None:
            return None
        try:
            keep = check_keep(keep)  # plain: True is remembered as 1 is, and numpy's 5 would come to the model as 5.0
            self.choice(keep)
        except (TypeError, UnsupportedError, ValueError) as error:
            raise ValueError(f"{KEEP}={keep!r}: {error}") from error
        return keep
