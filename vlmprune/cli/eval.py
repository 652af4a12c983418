"""`vlmprune eval`: everything that a YAML file asks for, measured through lmms-eval, and a report."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import CommandError, UserError, brief, user_mistakes
from vlmprune.runtime.status import Bar, note, status
from vlmprune.runtime.tables import counted

if TYPE_CHECKING:
    from vlmprune.eval.lmms.cells import Cell
    from vlmprune.eval.lmms.plan import EvalPlan, ModelJob
    from vlmprune.eval.lmms.survey import Survey, TimeLeft

__all__ = ["about", "planned", "verb"]

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
    from vlmprune.eval.lmms import survey
    from vlmprune.eval.lmms.store import StoreError
    from vlmprune.eval.lmms.taskindex import INSTALL, have_lmms_eval

    if not have_lmms_eval() and not dry_run:
        raise UserError(f"{INSTALL}.")
    first = runner.rank() == 0
    plan = planned(config, overrides) if recipe is None else with_recipe(config, overrides, recipe)
    if first:
        print("\n".join(about(plan)), flush=True)
    if dry_run:
        if first:
            print(dry(plan, survey.survey(plan, plan.config.output)))
        return
    with Show(len(plan.cells)) if first else nullcontext() as show:
        try:
            done = runner.run_plan(plan, show, sys.argv)
        except StoreError as error:
            raise UserError(str(error)) from None
    if first:
        report(plan, done.failed)


def about(plan: EvalPlan) -> list[str]:
    """What is going to be run, and what not."""
    from vlmprune.spec import budget_text

    made = [line for job in plan.jobs for line in about_job(job)]
    for left in plan.skipped:
        who = f"{left['model']}: {left['label']} {budget_text(left['budget'])}".rstrip()
        made.append(f"left out: {who}: {left['reason']}")
    return [*made, *(f"note: {note}" for note in plan.notes)]


def about_job(job: ModelJob) -> list[str]:
    """One model with what is run on it."""
    from vlmprune.spec import budget_text

    labels = dict.fromkeys(cell.label for cell in job.cells)
    budgets = dict.fromkeys(filter(None, (budget_text(cell.budget) for cell in job.cells)))
    limit = "" if job.setting.limit is None else f", the first {counted(job.setting.limit, 'sample')} of each"
    return [
        f"{job.setting.name}: {counted(len(job.cells), 'cell')}",
        f"  methods  {', '.join(labels)}",
        f"  budgets  {', '.join(budgets) or '-'}",
        f"  tasks    {', '.join(tasks_of(job))}{limit}",
    ]


def tasks_of(job: ModelJob) -> list[str]:
    """The names of its tasks, those of a group by the group's."""
    groups: dict[str, set[str]] = {}
    for cell in job.cells:
        groups.setdefault(cell.group or cell.task, set()).add(cell.task)
    return [name if found == {name} else f"{name} ({counted(len(found), 'task')})" for name, found in groups.items()]


def dry(plan: EvalPlan, found: Survey) -> str:
    """The cells one by one, and how long they may take."""
    from vlmprune.eval.lmms.survey import estimate

    rows = [f"  {cell.id}  {found.reasons.get(cell.id, 'measured')}" for _, cell in plan.cells]
    end = how_long(len(found.todo), estimate(plan, found, plan.config.output))
    return "\n".join([f"cells, in {plan.config.output}:", *rows, *found.told(), end])


def how_long(todo: int, estimate: TimeLeft) -> str:
    """How long so many cells may take, in a sentence."""
    if not todo:
        return "Nothing is left to measure."
    if estimate.unknown == todo:
        return (
            "How long this takes is unknown: nothing like it was measured in this folder yet. To find out, run it with "
            "--set limit=4, then ask again."
        )
    more = f", and {counted(estimate.unknown, 'cell')} that nothing is known about" if estimate.unknown else ""
    by = f"by the {counted(estimate.measured, 'cell')} measured in this folder"
    return f"About {clock(estimate.seconds)}, {by} (loading models not counted){more}."


def clock(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


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


class Show(Bar):
    """Progress on stderr: a bar over cells in a terminal, a line per cell elsewhere."""

    def start(self, found: Survey) -> None:
        """Say what is there already."""
        for line in found.told():
            self.say(line)
        self.at(len(found.done))

    def loading(self, job: ModelJob) -> None:
        """A model is about to be loaded."""
        self.say(f"loading {job.setting.name} ...")

    def cell(self, job: ModelJob, cell: Cell) -> None:
        """A cell begins."""
        status(f"{cell.model}: {cell.title} on {cell.task}")

    def samples(self, answered: int, of: int) -> None:
        """So many of a cell's samples are answered."""
        self.at(int(self.done) + min(answered / max(of, 1), 0.999))

    def finished(self, cell: Cell, content: dict[str, Any]) -> None:
        """A cell is on disk."""
        self.at(int(self.done) + 1)
        where = f"{cell.model}: {cell.title} on {cell.task}"
        if content["error"] is not None:
            self.say(f"failed: {where}: {content['error']}")
        elif self.rich is None:
            value = content["metrics"][content["metric"]]["value"]
            told = f"{content['metric']} {value:.4g}, {content['elapsed_s']:.1f} s"
            self.say(f"[{self.done}/{self.total}] {where}: {told}")
