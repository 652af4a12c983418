"""The public interface: patch a model, run it, unpatch it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vlmprune import spec
from vlmprune._compat import check_transformers
from vlmprune.cost.budget import Costs, check_share, solve
from vlmprune.engine import install as engine
from vlmprune.engine.compile import compile_plan
from vlmprune.engine.plan import Plan
from vlmprune.methods.base import Method
from vlmprune.patches import family_of
from vlmprune.recipe import FILE, check_family, is_recipe, read_recipe, recipe_of
from vlmprune.trace import Trace

__all__ = ["Handle", "patch", "unpatch"]


class Handle:
    """What `patch` returns: the trace, a way to switch off, and a context manager.

    Leaving a `with` block makes the model what it was before the call of `patch`: another patch that was on it is back,
    whatever was patched or unpatched inside the block. Blocks that are not left in the order in which they were entered
    end all the same with the model as it was before the first.

    A cache from a pruned call remembers what each of its rows holds. Do not reorder or select its rows by hand: what
    is remembered would not follow (beam search reorders rows of one prompt, which are alike).
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self._plan = model, plan

    @property
    def methods(self) -> list[Method]:
        """The methods of this patch."""
        return list(self._plan.methods)

    @property
    def trace(self) -> Trace:
        """What the last pruned prefill did.

        Raises:
            RuntimeError: there was none since the model was patched.
        """
        if self._plan.trace is None:
            raise RuntimeError(
                "nothing was pruned since this patch was made: a trace comes with the first call that carries images."
            )
        return self._plan.trace

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the recipe of this patch into a folder, beside what `model.save_pretrained(folder)` put there.

        `vlmprune.from_pretrained(folder)` loads both.

        Raises:
            ValueError: a method without a registered name, or with an option that is no plain value.
            OSError: it cannot be written.
        """
        folder = Path(folder).expanduser()
        recipe = recipe_of(self.methods, family=self._plan.family.model_type)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(recipe.text(), encoding="utf-8")
        return folder / FILE

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Run the plain model inside the `with`, for an A/B.

        It holds for the calls of this thread: another thread, one started inside the block too, goes on pruning, and a
        cache that was filled by a pruned prefill stays pruned.

        Raises:
            RuntimeError: the model was unpatched or patched anew since this handle was made.
        """
        self._check_on()
        with self._plan.disabled():
            yield self.model

    def unpatch(self) -> nn.Module:
        """As `vlmprune.unpatch(model)`, for this patch alone.

        Raises:
            RuntimeError: the model was unpatched or patched anew since this handle was made.
        """
        self._check_on()
        return unpatch(self.model)

    def __enter__(self) -> Handle:
        self._check_on()
        if self._plan.entered:
            raise RuntimeError("the `with` block of this handle is open already: a handle is entered once.")
        self._plan.entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        plan = self._plan
        plan.entered, plan.left = False, True
        now = engine.current(self.model)
        if now is not None and now is not plan and now.entered:
            return  # not the innermost block: that one ends with what was before this
        engine.swap(self.model, behind(plan, lambda before: not before.left))

    def _check_on(self) -> None:
        if engine.current(self.model) is not self._plan:
            raise RuntimeError("this handle's patch is no longer on the model: it was unpatched or patched anew.")

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, {', '.join(map(repr, self.methods))})"


def behind(plan: Plan, wanted: Callable[[Plan], bool]) -> Plan | None:
    """The nearest of the plans that a plan took the place of that is as `wanted`, or None."""
    before = plan.before
    while before is not None and not wanted(before):
        before = before.before
    return before


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def patch(
    model: nn.Module,
    method: str | Method | Iterable[str | Method],
    *,
    keep: int | float | None = None,
    flops: float | None = None,
    kv: float | None = None,
    warmup: bool = True,
    **options: Any,
) -> Handle:
    """Make a vision-language model read fewer visual tokens.

    Nothing but hooks on this instance changes; every later call that carries images is pruned, calls without images
    run as before. A patched model is patched anew: the earlier patch goes (and comes back where this one's `with` block
    ends). If anything fails, the model is left as it was.

    Args:
        model: a Hugging Face model of a supported family (`vlmprune ls models`), or a PEFT model around one.
        method: a name (`vlmprune ls methods`), a method object, or a list of them (or names joined by `+`) that run one
            after the other; or a recipe, the path of a .yaml file, which says all options itself.
        keep: patches per image (int), or a fraction of them (float), that enter the LLM or are left after the last cut;
            of a video, patches of all its frames together.
        flops: the budget in another word: the FLOPs of a whole prefill as a share of the unpruned model's (of one
            picture of the tower's own size and 60 text tokens; `vlmprune budget` shows all words beside each other).
            The largest `keep` that meets it is taken.
        kv: the same for the bytes in the cache behind the prefill.
        warmup: on a CUDA device load the kernels now (the first time on a machine they are tried too, which takes
            minutes), so that the first prefill does not, and one that is captured into a CUDA graph need not.
        **options: the method's other options, such as `average=` or `positions=`.

    Returns:
        A handle with the `trace` of the last prefill; also a context manager.

    Raises:
        TypeError, ValueError: an unknown method or option, or a bad value.
        UnsupportedError: the model, or this method on this model, is not supported.
        RuntimeError: the model is the inner part of one that is patched.
        ImportError: a release of transformers that vlmprune was not tested with.
    """
    check_transformers()
    model = unwrap(model)
    given = options if keep is None else {"keep": keep, **options}
    family = family_of(model)
    told = {word: share for word, share in (("flops", flops), ("kv", kv)) if share is not None}
    if told:
        given = given | {"keep": keep_for(model, method, given, told)}
    methods = methods_of(method, given, family.model_type)
    plan = compile_plan(methods, family, family.facts(family.inner(model)))
    before = plan.before = engine.current(model)
    engine.swap(model, plan)
    if before is not None and not before.entered:
        before.before = behind(before, lambda other: other.entered)  # no longer than blocks are open
    if warmup:
        engine.warm_up(model)
    return Handle(model, plan)


def methods_of(method: Any, given: dict[str, Any], family: str) -> list[Method]:
    """The method objects that `patch` is asked for, on a model of a family."""
    if not is_recipe(method):
        return spec.build(method, given)
    if given:
        raise TypeError(f"{next(iter(given))}= cannot be combined with a recipe: change {method}, or name its method.")
    recipe = read_recipe(method)
    check_family(str(method), recipe.family, family)
    return recipe.build()


def keep_for(model: nn.Module, method: Any, given: dict[str, Any], told: dict[str, float]) -> float:
    """The fraction that a budget in FLOPs or bytes of the cache means for a method on a model.

    Raises:
        TypeError, ValueError: no such share, no budget in one word, or one that the method cannot meet.
        UnsupportedError: what the method costs is not known before it has seen a picture.
    """
    (word, share), *more = told.items()
    if more or spec.budgets_in(given) or is_recipe(method):
        raise ValueError(
            f"{word}={share} is a budget, and there is another one: give one of keep, average, flops and kv."
        )
    if not isinstance(method, str):
        raise TypeError(f"{word}= needs the method's name: a method object has its budget.")
    share, costs = check_share(word, share), Costs(model)
    return solve(
        costs.grid.patches,
        lambda keep: spec.build(method, {"keep": keep, **given}),
        lambda methods: costs.of(methods).over(costs.unpruned)[word],
        share,
        f"{word}={share} by {method}",
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Take the patch off a model (or a PEFT model around it) and return it; harmless on an unpatched model.

    A cache from a pruned call belongs to the patch: go on with it only while the model is patched (by any method, and
    in `Handle.disabled()` too). Without the hooks the model counts positions by the short cache, and says other tokens
    without an error.

    Parts that the model shares with another one stay as that one's patch has made them, which does not act in this
    model's calls.

    Raises:
        TypeError: not a model.
        RuntimeError: the inner part of a patched model: unpatch that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch needs a model, not {type(model).__name__}.")
    engine.swap(unwrap(model), None)
    return model
