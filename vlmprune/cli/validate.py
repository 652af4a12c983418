"""`vlmprune validate`: what is wrong with a config, before any weight is read."""

from __future__ import annotations

import argparse
from typing import Any

from vlmprune.cli import eval as evaluation
from vlmprune.runtime.tables import counted

__all__ = ["add_to"]


def add_to(verbs: Any) -> None:
    """Add this verb's parser."""
    made = verbs.add_parser(
        "validate",
        help="check the YAML file of an evaluation",
        description=(
            "Check the YAML file of `vlmprune eval`: keys, types, methods and their options, task names, and whether "
            "every method and budget fits the model. Of a model only its config.json is read."
        ),
        allow_abbrev=False,
    )
    evaluation.add_config(made)
    made.add_argument(
        "--no-model", action="store_true", help="read no config.json either, so that what depends on it stays unchecked"
    )
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Print what the config means; what is wrong is raised."""
    plan = evaluation.planned(args, look_at_model=not args.no_model)
    for line in evaluation.about(plan):
        print(line)
    unchecked = " (the model was not looked at)" if args.no_model else ""
    print(f"{args.config} is fine: {counted(len(plan.cells), 'cell')}{unchecked}.")
