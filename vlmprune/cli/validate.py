"""`vlmprune validate`: what is wrong with a config, before any weight is read."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from vlmprune.cli import eval as evaluation
from vlmprune.cli import flags
from vlmprune.runtime.tables import counted

__all__ = ["verb"]


def verb(
    config: flags.Config,
    overrides: flags.Overrides = [],  # noqa: B006
    no_model: Annotated[
        bool, Option("--no-model", help="read no config.json either, so that what depends on it stays unchecked")
    ] = False,
) -> None:
    """Check the YAML file of `vlmprune eval`.

    Keys, types, methods and their options, task names, and whether every method and budget fits the model, of which
    only the config.json is read.
    """
    from vlmprune.eval.lmms import words

    plan = evaluation.planned(config, overrides, look_at_model=not no_model)
    print(*words.about(plan), sep="\n")
    unchecked = " (the model was not looked at)" if no_model else ""
    print(f"{config} is fine: {counted(len(plan.cells), 'cell')}{unchecked}.")
