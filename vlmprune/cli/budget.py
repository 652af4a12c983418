"""`vlmprune budget`: one budget in all its words, for a method on a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import UserError, user_mistakes

if TYPE_CHECKING:
    from vlmprune.cost.budget import Costs, PromptCost
    from vlmprune.methods.base import Method
    from vlmprune.runtime.loading import Loaded

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune budget --method fastv --keep 0.5
  vlmprune budget --method fopru --flops 0.5 --model llava-hf/llava-1.5-7b-hf --device cuda
  vlmprune budget --method vtc_cls --first-token 0.6       the largest budget with 0.6 of the time to the first token

Everything is a share of the unpruned model, of one prompt: a picture of the vision tower's own size (twice that both
ways where pictures are cut into crops) with --text tokens of text. FLOPs and bytes are computed and count the whole
prefill (tower, projector, decoder layers, head); times are measured here, pairs of an unpruned and a pruned prefill.
What a method keeps by the picture (globalcom2, atp, todre's second stage) has no cost that is known beforehand.
"""
SHARE = "a share of the unpruned model's (0.5 or 50%)"


def share(text: str) -> Any:
    """A flag that takes a share."""
    return Option(metavar="SHARE", help=f"the budget in {text}: {SHARE}")


def verb(
    method: Annotated[str, Option(metavar="NAME", help="the method (`vlmprune ls methods`)")],
    model: flags.Model = "scene-llava",
    keep: flags.OneKeep = None,
    average: Annotated[str | None, Option(metavar="N", help="the same as a mean over all decoder layers")] = None,
    flops: Annotated[str | None, share("FLOPs of a prefill")] = None,
    kv: Annotated[str | None, share("bytes in the cache")] = None,
    first_token: Annotated[str | None, share("time to the first token, measured")] = None,
    option: flags.Options = [],  # noqa: B006
    text: Annotated[int, flags.number("text tokens of the prompt", 2)] = 60,
    repeats: Annotated[int, flags.number("timed pairs of prefills, 0 for none", 0)] = 5,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
    as_json: flags.Json = False,
) -> None:
    """Tell what a budget means in all other words: patches, layer average, FLOPs, cache, time.

    Without a budget the method's own schedule, where it has one.
    """
    flags.one_of(keep=keep, average=average, flops=flops, kv=kv, first_token=first_token)
    flags.least(0 if first_token is None else 1, repeats=repeats)
    options = flags.options_of(option) | flags.budget_of(keep, average)

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune import spec
    from vlmprune.cost.budget import Costs, check_share
    from vlmprune.runtime import loading
    from vlmprune.runtime.status import show

    with user_mistakes():
        spec.takes(method)
        asked = {"flops": flops, "kv": kv, "first_token": first_token}
        goal = {
            word: check_share(word, spec.read_share(v, flags.flag(word))) for word, v in asked.items() if v is not None
        }
        if not goal:
            spec.build(method, options)
    loaded = loading.open_model(model, device, dtype)
    with user_mistakes(f"{method} on {loaded.source.name}: "):
        costs = Costs(loaded.model, text)
        timed = timer(loaded, text, repeats)
        for word, target in goal.items():
            options["keep"] = solved(costs, timed, method, options, word, target)
        methods = spec.build(method, options)
        found = costs.of(methods)
        times = timed(methods) if repeats else None
    told = in_json(costs, found, times, loaded, method, options)
    show(json.dumps(told, indent=2) if as_json else in_text(told))


def timer(loaded: Loaded, text: int, repeats: int) -> Callable[[list[Method]], dict[str, float]]:
    """Times of first tokens, unpruned and pruned, on random text around a random picture."""
    from vlmprune.eval.bench.workload import make_workload
    from vlmprune.runtime.answering import guarded, prefill_times

    work: list[Any] = []

    def timed(methods: list[Method]) -> dict[str, float]:
        work[:] = work or [guarded(make_workload, loaded.model, 1, text)]
        return guarded(prefill_times, loaded, methods, work[0].inputs, repeats)

    return timed


def solved(costs: Costs, timed: Callable, method: str, options: dict[str, Any], word: str, target: float) -> float:
    """The fraction that meets a budget in another word."""
    from vlmprune import spec
    from vlmprune.cost.budget import solve

    def share(methods: list[Method]) -> float:
        if word == "first_token":
            return 1 / timed(methods)["ratio"]
        return costs.of(methods).over(costs.unpruned)[word]

    if spec.budgets_in(options):
        raise UserError(f"{flags.flag(word)} is a budget, and an --option is another one: give one.")
    return solve(
        costs.grid.patches,
        lambda keep: spec.build(method, {**options, "keep": keep}),
        share,
        target,
        f"{flags.flag(word)} {target}",
    )


def in_json(
    costs: Costs,
    found: PromptCost,
    times: dict[str, float] | None,
    loaded: Loaded,
    method: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """All words, for a program."""
    whole, shares = costs.unpruned, found.over(costs.unpruned)
    rows = {name: (getattr(whole, name), getattr(found, name), shares[name]) for name in shares}
    if times is not None:
        rows["first_token_ms"] = (times["plain_ms"], times["pruned_ms"], 1 / times["ratio"])
    told = {name: dict(zip(("unpruned", "pruned", "share"), row, strict=True)) for name, row in rows.items()}
    prompt = {"picture": list(costs.size), "patches": costs.grid.patches, "text": costs.text}
    return {"model": loaded.source.name, "method": method, "options": options, "prompt": prompt, "costs": told}


LINES = {
    "left": ("visual tokens left", "", 0, "keep={:.4g}"),
    "layer_average": ("layer average", "", 1, "average={:.4g}"),
    "flops": ("FLOPs", " G", 3, "flops={:.4g}"),
    "language_flops": ("of them the decoder's", " G", 3, ""),
    "kv": ("cache", " MB", 3, "kv={:.4g}"),
    "first_token_ms": ("first token", " ms", 2, ""),
}
UNITS = {" G": 1e9, " MB": 1e6}


def in_text(told: dict[str, Any]) -> str:
    """What a person reads."""
    from vlmprune.runtime.tables import table
    from vlmprune.spec import write_value

    prompt, given = told["prompt"], ", ".join(f"{k}={write_value(v)}" for k, v in told["options"].items())
    height, width = prompt["picture"]
    head = f"{told['method']}{f' ({given})' if given else ''} on {told['model']}"
    about = f"A picture of {width} x {height} ({prompt['patches']} patches) and {prompt['text']} text tokens."
    header, rows = ["", "unpruned", "pruned", "share", "as a budget"], [cells(*one) for one in told["costs"].items()]
    return "\n".join([head, about, "", table(header, rows, header[1:4])])


def cells(name: str, row: dict[str, float]) -> list[str]:
    """A row of the table."""
    title, unit, digits, way = LINES[name]
    scale, share = UNITS.get(unit, 1), row["share"]
    shown = [f"{row[who] / scale:.{digits}f}{unit}" for who in ("unpruned", "pruned")]
    return [title, *shown, f"{100 * share:.1f} %", way.format(math.ceil(1e4 * share - 1e-9) / 1e4)]
