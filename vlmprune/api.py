"""The public interface: patch a model, run it, unpatch it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmprune import registry
from vlmprune.engine import hooks as engine
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.parts.cuts import Cut, Decoder, Pixels, Projector, Vision
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.taps import ClusterOf, TowerTap
from vlmprune.patches import family_of
from vlmprune.trace import Trace

__all__ = ["Handle", "patch", "unpatch"]


class Handle:
    """What `patch` returns: the trace, a way to switch off, and a context manager that unpatches when left.

    A cache from a pruned call remembers what each of its rows holds. Do not reorder or select its rows by hand: what
    is remembered would not follow (beam search reorders rows of one prompt, which are alike).
    """

    def __init__(self, model: nn.Module, methods: list[Method], plan: engine.Plan):
        self.model, self.methods, self._plan = model, methods, plan

    @property
    def trace(self) -> Trace | None:
        """What the last pruned prefill did; None before the first one."""
        return self._plan.trace

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Run the plain model inside the `with`, for an A/B.

        It holds for the calls of this thread: another thread, one started inside the block too, goes on pruning, and a
        cache that was filled by a pruned prefill stays pruned.

        Raises:
            RuntimeError: the model was unpatched or patched anew since this handle was made.
        """
        if not engine.installed(self.model, self._plan):
            raise RuntimeError("this handle's patch is no longer on the model: it was unpatched or patched anew.")
        with self._plan.disabled():
            yield self.model

    def unpatch(self) -> nn.Module:
        """As `vlmprune.unpatch(model)`."""
        return unpatch(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, {', '.join(map(repr, self.methods))})"


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def patch(
    model: nn.Module,
    method: str | Method | Iterable[str | Method],
    *,
    keep: int | float | None = None,
    **options: Any,
) -> Handle:
    """Make a LLaVA-style model read fewer visual tokens.

    Nothing but hooks on this instance changes; every later call that carries images is pruned, calls without images
    run as before. A patched model is patched anew: the earlier patch goes.

    Args:
        model: a Hugging Face model of a supported family (`vlmprune ls models`), or a PEFT model around one.
        method: a name (`vlmprune ls methods`), a method object, or a list of them that run one after the other.
        keep: patches per image (int), or a fraction of them (float), that enter the LLM or are left after the last cut;
            of a video, patches of all its frames together.
        **options: the method's other options, such as `average=` or `positions=`.

    Returns:
        A handle with the `trace` of the last prefill; also a context manager.

    Raises:
        TypeError, ValueError: an unknown method or option, or a bad value.
        UnsupportedError: the model, or this method on this model, is not supported.
    """
    model = unwrap(model)
    methods = registry.build(method, options if keep is None else {"keep": keep, **options})
    family = family_of(model)
    facts = family.facts(family.inner(model))
    by_method = [(made.name or type(made).__name__, made.cuts(facts)) for made in methods]
    check_methods(by_method)
    cuts = [(name, cut) for name, made in by_method for cut in made]
    check_cuts(cuts, facts)
    stages = (Pixels, Vision, Projector, Decoder)
    order = sorted(cuts, key=lambda entry: (stages.index(type(entry[1].at)), entry[1].at.layer))
    plan = engine.Plan(family, facts, order)
    engine.remove(model)
    engine.install(model, plan)
    return Handle(model, methods, plan)


def check_methods(methods: list[tuple[str, list[Cut]]]) -> None:
    """Refuse methods that cannot share a model: their cuts would not mean what they say."""
    merging = [name for name, cuts in methods if any(isinstance(cut.at, Vision | Projector) for cut in cuts)]
    if len(merging) > 1:
        raise UnsupportedError(
            f"{merging[0]!r} and {merging[1]!r} both merge tokens in or behind the vision tower, and each "
            "counts on all of them: take one of the two."
        )
    cutting = [name for name, cuts in methods if any(isinstance(cut.at, Decoder) for cut in cuts)]
    for name, cuts in methods:
        if len(cutting) > 1 and any(cut.reorders for cut in cuts):
            other = next(n for n in [*cutting, name] if n != name)
            raise UnsupportedError(
                f"{name!r} writes its tokens in an order of its own and cannot be combined with {other!r}, which reads "
                "their places: use it alone, or without parity='released'."
            )


def check_cuts(cuts: list[tuple[str, Cut]], facts: ModelFacts) -> None:
    """Refuse cuts that this model has no layer for, and taps on a tower that is merged."""
    for name, cut in cuts:
        if isinstance(cut.at, Pixels | Projector):
            continue
        where, first, layers = (
            ("decoder", 0, facts.decoder_layers) if isinstance(cut.at, Decoder) else ("tower", 1, facts.tower_layers)
        )
        if not first <= cut.at.layer < layers:
            raise ValueError(
                f"{name} cuts at {where} layer {cut.at.layer}, and this model allows {first}..{layers - 1}."
            )
    merging = next((name for name, cut in cuts if isinstance(cut.at, Vision)), None)
    for name, cut in cuts:
        for tap in cut.see:
            if merging and isinstance(cut.at, Decoder) and isinstance(tap, TowerTap) and not isinstance(tap, ClusterOf):
                raise UnsupportedError(
                    f"{merging!r} merges tokens inside the vision tower and {name!r} looks at that tower ({tap}): "
                    "combine it with a method that needs no tower tap."
                )


def unpatch(model: nn.Module) -> nn.Module:
    """Take the patch off a model (or a PEFT model around it) and return it; harmless on an unpatched model.

    A cache from a pruned call belongs to the patch: go on with it only while the model is patched (by any method, and
    in `Handle.disabled()` too). Without the hooks the model counts positions by the short cache, and says other tokens
    without an error. Leaving `with patch(...)` unpatches.

    Raises:
        TypeError: not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch needs a model, not {type(model).__name__}.")
    engine.remove(unwrap(model))
    return model
