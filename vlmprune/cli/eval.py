"""`vlmprune eval`: everything that a YAML file asks for, measured through lmms-eval, and a report."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import CommandError, UserError, brief, user_mistakes
from vlmprune.runtime.status import note

if TYPE_CHECKING:
    from vlmprune.eval.lmms.plan import EvalPlan

__all__ = ["planned", "verb"]

EXAMPLES = """\
examples:
  vlmprune init my.yaml
  vlmprune eval demo.yaml --dry-run
  vlmprune eval my.yaml --set limit=20 --set output=runs/try --set 'keep=[0.5, 64]'
  accelerate launch --num_processes 8 -m vlmprune eval my.yaml

`vlmprune init my.yaml` writes a file that explains every key; demo.yaml and others come with the package and are found
by name. A run that was stopped goes on when it is started again; what was measured
with another config, version or model is measured anew, and only that.

exit codes: 0 all is measured, 1 something failed, 2 the config is wrong or the folder in use, 130 interrupted
"""


def planned(file: str, overrides: list[str], look_at_model: bool = True) -> EvalPlan:
    """Read the config and make its plan.

    Raises:
        UserError: everything that is wrong with it, one line each.
    """
    from vlmprune.eval.config.schema import load_config
    from vlmprune.eval.lmms.plan import make_plan
    from vlmprune.yamls.tree import Mistakes

    try:
        config = load_config(file, overrides)
        if config.path != Path(file).expanduser():
            note(f"{file}: the file of that name that comes with vlmprune, {config.path}")
        return make_plan(config, look_at_model=look_at_model)
    except Mistakes as error:
        lines = str(error).splitlines()
        start = "" if len(lines) == 1 else f"{len(lines)} mistakes in the config\n"
        raise UserError(start + "\n".join(lines)) from None


def with_recipe(config: str, overrides: list[str], recipe: str) -> EvalPlan:
    """The plan in which a recipe has the place of the config's methods.

    Raises:
        UserError: as `planned`; a mistake in the recipe, or one for another family of models.
    """
    from vlmprune.recipe import read_recipe

    with user_mistakes():
        made = read_recipe(recipe)
    plan = planned(config, [*overrides, f"methods={json.dumps([made.entry()])}"])
    for job in plan.jobs:
        flags.refuse_family(job.setting.model, made.job)
    return plan


def verb(
    config: flags.Config,
    overrides: flags.Overrides = [],  # noqa: B006
    recipe: Annotated[
        str | None, Option(metavar="FILE", help="a recipe (a YAML file) in the place of the config's methods")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="print the plan and how long it may take, and stop")] = False,
) -> None:
    """Measure methods at budgets on benchmarks through lmms-eval, as a YAML file says, and report."""
    from vlmprune.eval.lmms import run as runner
    from vlmprune.eval.lmms import survey, words
    from vlmprune.eval.lmms.progress import Show
    from vlmprune.eval.lmms.store import StoreError
    from vlmprune.eval.lmms.taskindex import INSTALL, have_lmms_eval

    if not have_lmms_eval() and not dry_run:
        raise UserError(f"{INSTALL}.")
    plan = planned(config, overrides) if recipe is None else with_recipe(config, overrides, recipe)
    told = [*words.about(plan), *(words.dry(plan, survey.survey(plan, plan.config.output)) if dry_run else ())]
    first = runner.rank() == 0
    if first:
        print("\n".join(told), flush=True)
    if dry_run:
        return
    try:
        with Show(len(plan.cells)) if first else nullcontext() as show:
            done = runner.run_plan(plan, show, sys.argv)
    except StoreError as error:
        raise UserError(str(error)) from None
    if first:
        report(plan, done.failed)


def report(plan: EvalPlan, failed: dict[str, str]) -> None:
    """Write the report, print its table, and say what failed.

    Raises:
        CommandError: a cell failed.
    """
    from vlmprune.eval import report as reports
    from vlmprune.eval.lmms.run import LOG

    folder = plan.config.output
    try:
        results = reports.read(folder)
        files = reports.write(folder, results)
        print(f"\n{reports.summary(folder, results)}\n\nreport: {files[0]}", flush=True)
    except Exception as error:  # the cells are safe, and a user must hear of them
        raise CommandError(
            f"all is measured and stored in {folder}, but the report failed: {type(error).__name__}: {brief(error)}. "
            f"`vlmprune report {folder}` tries again."
        ) from error
    if failed:
        shown = [f"  {name}: {why}" for name, why in list(failed.items())[:10]]
        shown += [f"  and {len(failed) - 10} more"] if len(failed) > 10 else []
        told = f"{folder / LOG} has the details; the next run tries them again"
        raise CommandError("\n".join([f"{len(failed)} of {len(plan.cells)} cells failed ({told}):", *shown]))
