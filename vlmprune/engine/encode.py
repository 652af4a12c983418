"""Where pictures are encoded: what a call brings, the model's own encoders, and what these are told and noted of.

A tower, which other models may share, knows neither whose call it is in nor which views are one picture, and `generate`
throws the sizes of pictures away: `Encode` stands before the encoders of one instance, and keeps both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.engine.channels import OWNER, SIZES
from vlmprune.engine.placement import loaded
from vlmprune.engine.plan import Plan
from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import ImageGrid
from vlmprune.patches import Family
from vlmprune.patches.base import Bound

__all__ = ["PIXELS", "Call", "Encode", "check_fixed", "encode", "encoder", "given_pixels", "ready_outputs"]

PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


def ready_outputs(kwargs: dict) -> dict[str, Any]:
    """The encoders' outputs that a call brings, by modality: of pictures that were encoded before it."""
    return {m: output for m, output in (kwargs.get("mm_encoder_outputs") or {}).items() if output is not None}


def given_pixels(kwargs: dict, modality: str) -> bool:
    """Whether a call brings pictures of one kind."""
    return any(kwargs.get(name) is not None and len(kwargs[name]) > 0 for name in PIXELS[modality])


def encode(module: nn.Module, kwargs: dict, family: Family) -> dict[str, Any]:
    """Run the model's own encoders on what a call brings, as `generate` does; takes their arguments out of `kwargs`.

    Returns:
        The encoders' outputs by modality, those that the call brought ready included.
    """
    ready, pictured = ready_outputs(kwargs), [m for m in family.modalities if given_pixels(kwargs, m)]
    kwargs.pop("mm_encoder_outputs", None)
    check_kinds(family, ready, pictured)
    used: set[str] = set()
    for modality in pictured:
        run = own_encoder(module, modality)
        known = (inspect.signature(run).parameters.keys() & kwargs.keys()) - {"kwargs"}
        with loaded(module):
            ready[modality] = run(
                **{name: kwargs[name] for name in known if kwargs[name] is not None}, return_dict=True
            )
        used |= known - {*family.shared}
    for name in used:
        del kwargs[name]
    return ready


def check_kinds(family: Family, ready: dict[str, Any], pictured: list[str]) -> None:
    """Refuse pictures of a kind that a family has not, and pixels beside their encoder's output."""
    if strange := [m for m in ready if m not in family.modalities]:
        raise UnsupportedError(f"{strange[0]} input of {family.model_type} models is not supported.")
    if family.alike and len({*ready, *pictured}) > 1:
        raise UnsupportedError(
            f"pictures and videos in one call are not supported: {family.model_type} models write one placeholder for "
            "both, and cannot tell them apart (unpruned, too). Ask about one of them at a time."
        )
    if twice := [m for m in pictured if m in ready]:
        raise ValueError(f"give pixels or mm_encoder_outputs for input of kind {twice[0]!r}, not both.")


def own_encoder(module: nn.Module, modality: str) -> Callable[..., Any]:
    """What encodes pictures of one kind; a replica has the original's `Encode`, and gets one of its own."""
    run = getattr(module, encoder(modality))
    copied = isinstance(run, Encode) and run.module is not module
    return Encode(module, run.plan, modality) if copied else run


@dataclass(frozen=True)
class Call:
    """What a tower, which other models may share, is told of the call it is in.

    Attributes:
        plan: of the model whose call it is.
        sizes: of `Family.sizes` of what it encodes; None where packing depends on the model alone.
        grids: layouts of what it encodes, where a cut behind the tower wants them.
    """

    plan: Plan
    sizes: list[Any] | None = None
    grids: list[ImageGrid] | None = None


class Encode(Bound):
    """Stands before `get_image_features` or `get_video_features` on one instance.

    It tells the tower, which other models may share, whose call it is in, and notes the sizes of what is encoded, which
    `generate` throws away. A bound attribute of the instance and not a hook, because no module is called with them.
    """

    def __init__(self, module: nn.Module, plan: Plan, modality: str):
        self.module, self.plan, self.modality = module, plan, modality
        self.__signature__ = inspect.signature(self.encode().__get__(module))

    @staticmethod
    def wanted(plan: Plan, modality: str) -> bool:
        """Whether there is anything to tell or to note."""
        return plan.in_tower or plan.family.sized(modality)

    def encode(self) -> Callable[..., Any]:
        """The method of the model's class; torch.compile would look a bound one up on the instance, where this is."""
        return getattr(type(self.module), encoder(self.modality))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan, known = self.plan, self.plan.family.sized(self.modality)
        told = plan.in_tower and plan.enabled
        if not known and not plan.projector_cuts:
            owner = {OWNER: Call(plan)} if told else {}
            return self.encode()(self.module, *args, **kwargs, **owner)
        given = self.named(args, kwargs)
        sizes = self.sizes(given)
        if told:
            given[OWNER] = Call(plan, sizes, self.grids(sizes) if plan.projector_cuts else None)
        output = self.encode()(self.module, **given)
        if known and not isinstance(output, tuple):
            setattr(output, SIZES, sizes)
        return output

    def grids(self, sizes: list[Any]) -> list[ImageGrid]:
        """The layouts of what is encoded."""
        return [self.plan.grid(self.module, self.modality, size) for size in sizes]

    def sizes(self, given: dict[str, Any]) -> list[Any]:
        """What the packing of every image or video depends on, None where on nothing."""
        if not self.plan.family.sized(self.modality):
            return [None] * len(given["pixel_values"])
        return self.plan.family.sizes(self.modality, given)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, sizes on the host."""
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        # the host only computes with these on the host: one read here spares it one per image
        for name in ("image_sizes", "batch_num_images"):
            if given.get(name) is not None:
                given[name] = torch.as_tensor(given[name]).cpu()
        check_fixed(self.plan.family, self.module.config, given)
        return given


def encoder(modality: str) -> str:
    """Name of a model's method that encodes images or videos."""
    return f"get_{modality}_features"


def check_fixed(family: Family, config: Any, given: dict[str, Any]) -> None:
    """Refuse arguments of a call that contradict the config, by which layouts and taps are traced."""
    for name in family.fixed:
        if given.get(name) is not None and given[name] != getattr(config, name, given[name]):
            raise UnsupportedError(f"{name}={given[name]!r} per call is not supported: set it in the model's config.")
