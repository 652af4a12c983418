"""`vlmprune bench --engine vllm`: what pruning brings where requests are served."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlmprune import spec
from vlmprune.cli import flags
from vlmprune.runtime.errors import user_mistakes

__all__ = ["USED", "time_serving"]

#: The flags that count.
USED = {"method", "keep", "option", "model", "shape", "prompt_tokens", "new_tokens", "pairs", "concurrency", "json"}
DEFAULTS: dict[str, Any] = {
    "method": "vtc_cls", "keep": "144,64", "shape": "small-half", "prompt_tokens": 20, "new_tokens": 16, "pairs": 3,
    "concurrency": "1,8,32",
}  # fmt: skip
#: One process, so that two engines can take turns and a request is not waited for by another process.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
NOTE = """\
In flight: requests at a time, each with a picture and a text of its own; a new one follows where one ends. Unpruned:
vLLM's own class. Ceiling: the same, fed embeddings of as many rows as are kept, without tower and choice. All take
turns, round by round; speed-up is the median over rounds, in brackets its 95 % interval (below six rounds the range).
First token: median and 95th percentile of what a request waits. Blocks: of keys and values that a request holds."""


def time_serving(args: SimpleNamespace) -> None:
    """Measure and print.

    Raises:
        UserError: no vLLM, or something that cannot be served.
    """
    from vlmprune.eval.bench import results, run
    from vlmprune.runtime.status import show

    asked = {key: value if getattr(args, key, None) is None else getattr(args, key) for key, value in DEFAULTS.items()}
    with user_mistakes():
        keeps = [spec.read_budget(text) for text in flags.words_of(asked["keep"], "--keep")]
        spec.jobs([asked["method"]], [{"keep": keep} for keep in keeps], flags.options_of(args.option))
    flying = flags.whole_numbers(asked["concurrency"], "--concurrency")
    found = measured(args, asked, keeps, flying)
    show(as_text(found))
    if args.json:
        run.write(args.json, lambda path: results.write_json(found, path))


def measured(args: SimpleNamespace, asked: dict[str, Any], keeps: list, flying: list[int]) -> dict[str, Any]:
    """All rows, with the settings and the machine."""
    from vlmprune.serving.settings import check_version

    with user_mistakes():
        check_version()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import torch

    from vlmprune import embedded
    from vlmprune.eval.bench import results, serving, serving_model, shapes

    with tempfile.TemporaryDirectory() as scratch, user_mistakes():
        folder = Path(scratch)
        if args.model is None:
            serving_model.save(shapes.find_shape(asked["shape"]), folder)
        elif args.model in embedded.NAMES:
            serving_model.with_older_names(embedded.path(args.model), folder)
        else:
            folder = Path(args.model)
        options = flags.options_of(args.option)
        engines = serving.Engines(folder, asked["method"], options, keeps, asked["prompt_tokens"])
        rows = []
        for number in flying:
            rows += serving.compare(engines, keeps, number, asked["pairs"], max(number, 2), asked["new_tokens"])
        costs = serving.embedding(engines, keeps, 2 * asked["pairs"] + 1, 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = asked | {"model": args.model, "shape": None if args.model else asked["shape"], "option": args.option}
    return {"asked": told, "rows": rows, "embed_multimodal": costs, "machine": results.describe_machine(device)}


def as_text(found: dict[str, Any]) -> str:
    """Tables for a person."""
    from vlmprune.runtime.tables import table

    head = ("in flight", "who", "keep", "prompt", "blocks", "requests/s", "tokens/s", "first token s", "speed-up")
    rows = [
        (
            str(one["in_flight"]), one["runner"], "" if one["keep"] is None else str(one["keep"]), str(one["prompt"]),
            str(one["blocks"]), f"{one['requests_per_second']:.2f}", f"{one['tokens_per_second']:.1f}",
            f"{one['first_median']:.2f}, {one['first_95']:.2f}", interval(one["speedup"]),
        )
        for one in found["rows"]
    ]  # fmt: skip
    costs = [f"{one['keep']}: {interval(one['cost'])}" for one in found["embed_multimodal"]]
    pictures = found["embed_multimodal"][0]["pictures"]
    return "\n".join(
        (
            table(head, rows, right=("in flight", "keep", "prompt", "blocks", "requests/s", "tokens/s")),
            f"\nembed_multimodal of {pictures} pictures, pruned over vLLM's own: {'; '.join(costs)}\n",
            NOTE,
        )
    )


def interval(one: dict[str, float]) -> str:
    """`2.51 [2.40, 2.63]`."""
    return f"{one['median']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
