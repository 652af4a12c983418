"""What a plan is and how long it may take, in words."""

from __future__ import annotations

from vlmprune.eval.lmms.plan import EvalPlan, ModelJob
from vlmprune.eval.lmms.survey import Survey, TimeLeft, estimate
from vlmprune.runtime.tables import counted
from vlmprune.spec import budget_text

__all__ = ["about", "dry"]


def about(plan: EvalPlan) -> list[str]:
    """What is going to be run, and what not."""
    made = [line for job in plan.jobs for line in about_job(job)]
    for left in plan.skipped:
        who = f"{left['model']}: {left['label']} {budget_text(left['budget'])}".rstrip()
        made.append(f"left out: {who}: {left['reason']}")
    return [*made, *(f"note: {note}" for note in plan.notes)]


def about_job(job: ModelJob) -> list[str]:
    """One model with what is run on it."""
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


def dry(plan: EvalPlan, found: Survey) -> list[str]:
    """The cells one by one, and how long they may take."""
    rows = [f"  {cell.id}  {found.reasons.get(cell.id, 'measured')}" for _, cell in plan.cells]
    end = how_long(len(found.todo), estimate(plan, found, plan.config.output))
    return [f"cells, in {plan.config.output}:", *rows, *found.told(), end]


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
