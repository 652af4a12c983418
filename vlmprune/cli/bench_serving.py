"""`vlmprune bench --engine vllm`: what pruning brings where requests are served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vlmprune import spec
from vlmprune.cli import flags
from vlmprune.runtime.errors import user_mistakes

__all__ = ["USED", "time_serving"]

DEFAULTS: dict[str, Any] = {
    "method": "vtc_cls", "keep": "144,64", "shape": "small-half", "prompt_tokens": 20, "new_tokens": 16, "pairs": 3,
    "concurrency": "1,8,32",
}  # fmt: skip
#: The flags that count.
USED = {*DEFAULTS, "option", "model", "json"}


def time_serving(args: SimpleNamespace) -> None:
    """Measure and print.

    Raises:
        UserError: no vLLM, or something that cannot be served.
    """
    from vlmprune.eval.bench import results, run
    from vlmprune.runtime.status import show
    from vlmprune.serving.settings import check_version

    asked = {key: value if getattr(args, key, None) is None else getattr(args, key) for key, value in DEFAULTS.items()}
    options = flags.options_of(args.option)
    with user_mistakes():
        keeps = [spec.read_budget(text) for text in flags.words_of(asked["keep"], "--keep")]
        spec.jobs([asked["method"]], [{"keep": keep} for keep in keeps], options)
    flying = flags.whole_numbers(asked["concurrency"], "--concurrency")
    with user_mistakes():
        check_version()

    from vlmprune.eval.bench import serving, serving_report

    asked |= {"model": args.model, "option": args.option} | ({"shape": None} if args.model else {})
    with user_mistakes():
        found = serving.measured(asked, options, keeps, flying)
    show(serving_report.as_text(found))
    if args.json:
        run.write(args.json, lambda path: results.write_json(found, path))
