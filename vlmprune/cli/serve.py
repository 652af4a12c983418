"""`vlmprune serve`: vLLM's OpenAI-compatible server with a pruned model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.status import note

__all__ = ["COMMAND", "verb"]

EXAMPLES = """\
examples:
  vlmprune serve --model llava-hf/llava-1.5-7b-hf --method vtc_cls --keep 64
  vlmprune serve --model scene-llava --method fopru --keep 0.25 --port 8001 --dtype float32
  vlmprune serve --model llava-hf/llava-1.5-7b-hf --recipe tune-out/recipe.yaml
  vlmprune serve --model llava-hf/llava-v1.6-mistral-7b-hf --method divprune --keep 10% --tensor-parallel-size 2

What is not told here goes to vLLM as it is. A request brings its own budget as "mm_processor_kwargs":
{"vlmprune_keep": 25}. Which methods can be served: vlmprune ls methods
"""
TRUST, NO_TRUST = "--trust-request-mm-kwargs", "--no-trust-request-mm-kwargs"
PLUGIN = "vlmprune"  # as its entry point calls it
SERVER = "vllm.entrypoints.openai.api_server"


class ServeCommand(flags.Verb):
    """Flags of vLLM's server pass through."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.context_settings |= {"ignore_unknown_options": True, "allow_extra_args": True}


COMMAND = ServeCommand


def verb(
    context: Context,
    model: Annotated[str, flags.MODEL],
    method: Annotated[str | None, Option(metavar="NAME", help="the method (a+b: one after the other)")] = None,
    keep: flags.OneKeep = None,
    average: Annotated[str | None, Option(metavar="N", help="the same; of served methods both mean one thing")] = None,
    option: flags.Options = [],  # noqa: B006 - typer copies it
    recipe: flags.Recipe = None,
) -> None:
    """Serve a pruned model by vLLM's OpenAI-compatible server; takes all flags of vLLM's own."""
    options = flags.options_of(option) | flags.budget_of(keep, average)
    if made := flags.alone(recipe, method=method, keep=keep, average=average, option=option):
        method, options = made.method, made.options
        flags.refuse_family(model, made)
    if method is None:
        raise UserError("name a --method, or a --recipe.")
    command = command_for(model, method, options, context.args)
    note(f"starting {' '.join(command[:4])} ...")
    sys.stdout.flush()
    os.execv(command[0], command)  # so that signals are the server's


def place_of(model: str) -> str:
    """What vLLM is to load: a folder, an id on the hub, or an address that it understands itself.

    Raises:
        UserError: none of these, or the folder of an adapter.
    """
    from vlmprune.runtime import loading

    if "://" in model:
        return model
    if loading.is_adapter(Path(model).expanduser()):
        raise UserError(
            f"{model} is the folder of an adapter: serve its base with vLLM's --enable-lora --lora-modules."
        )
    return loading.find_model(model).place


def command_for(model: str, method: str, options: dict, rest: Sequence[str]) -> list[str]:
    """The command that serves a model: what is not ours goes to vLLM as it is.

    Raises:
        UserError: there is no vLLM or no such model, something that cannot be served, or a flag that is ours to set.
    """
    from vlmprune.serving.settings import check_version
    from vlmprune.vllm import overrides

    for flag in ("--hf-overrides", "--model"):
        if has(flag, rest) or any(replaces(text, flag) for text in rest):
            raise UserError(f"{flag} cannot be given to vLLM here: vlmprune serve sets it.")
    loaded = os.environ.get("VLLM_PLUGINS")
    if loaded is not None and PLUGIN not in loaded.split(","):
        raise UserError(f"VLLM_PLUGINS={loaded!r} keeps vLLM from loading the plugin: unset it, or add {PLUGIN}.")
    place = place_of(model)
    with user_mistakes():
        if unsure := check_version():
            note(unsure)
        made = overrides(place, method, **options)["hf_overrides"]
    command = [*server(place), "--hf-overrides", json.dumps(made)]
    if place != model and not has("--served-model-name", rest):
        command += ["--served-model-name", model]
    if not has(TRUST, rest) and not has(NO_TRUST, rest):
        command.append(TRUST)  # a request may bring its own budget
    return command + list(rest)


def has(flag: str, given: Sequence[str]) -> bool:
    """Whether a flag is among those given, as `--flag`, `--flag=value` or with underscores."""
    return any(text.partition("=")[0].replace("_", "-") == flag for text in given)


def replaces(text: str, flag: str) -> bool:
    """Whether vLLM reads a text as this flag, and its value in the place of ours: `--flag.key`, or the flag cut off."""
    name = text.partition("=")[0].partition(".")[0].replace("_", "-")
    return name == flag or (len(name) > len("--hf-") and flag.startswith(name))


def server(place: str) -> list[str]:
    """vLLM's server for a model: `vllm serve` where that command works, else the module behind it."""
    found = shutil.which("vllm", path=os.path.dirname(sys.executable))
    try:
        metadata.version("vllm")  # its command asks for that, and dies in builds of another name
    except metadata.PackageNotFoundError:
        found = None
    return [found, "serve", place] if found else [sys.executable, "-m", SERVER, "--model", place]
