"""`vlmprune check`: a self-test of methods on the user's own model and machine."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import CommandError, UserError, brief, user_mistakes

if TYPE_CHECKING:
    from vlmprune.methods.base import Method
    from vlmprune.runtime.loading import Loaded
    from vlmprune.spec import Job
    from vlmprune.verify import Report, Subject

__all__ = ["verb"]

# before the LLM, inside it, at both, merging before it and in the tower, stacked
METHODS = "fopru,fastv,transprune,todre,pool,tome,fopru+fastv"
EXAMPLES = """\
examples:
  vlmprune check
  vlmprune check --model llava-hf/llava-1.5-7b-hf --device cuda --dtype float32
  vlmprune check --model llava-hf/llava-v1.6-mistral-7b-hf --method fopru,globalcom2+transprune --keep 64

Random pictures and texts are run pruned, and again by hand, without the engine's hooks: the kept rows through the
model's own layers, and the whole prompt with dropped columns masked. A difference counts when it is well above what the
unpruned model shows between ways of computing the same, and a deliberate mistake must lie well above that in turn:
where it does not, the line is inconclusive (?). float32 tells best; bfloat16 and float16 may leave a line open. Where
the run by hand is not even the unpruned model's, the check does not know this model and says so (!).

exit codes: 0 nothing failed and at most one line is inconclusive, 1 anything else, 2 wrong usage
"""


def verb(
    model: flags.Model = "scene-llava",
    method: flags.SomeMethods = None,
    keep: flags.Keep = None,
    average: flags.Average = None,
    option: flags.Options = [],  # noqa: B006
    recipe: flags.Recipe = None,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
    report: Annotated[bool, Option("--report", help="end with a block for a bug report though nothing failed")] = False,
    as_json: flags.Json = False,
) -> None:
    """Prove on your model and machine that pruning computes what it says.

    Pruned equals by hand, cache, batches, decoding, positions, unpatching. Without --method: those of
    fopru,fastv,transprune,todre,pool,tome,fopru+fastv that the model can run. One budget (default: a quarter of the
    patches); in a+b, a keeps twice that.
    """
    wanted = flags.wanted(method, keep, average, option, recipe, METHODS)
    if len(wanted.budgets) > 1:
        raise UserError("check takes one budget.")

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.runtime import answering, loading

    todo = methods_of(wanted, wanted.named and method is not None)
    loaded = loading.open_model(model, device, dtype)
    answering.check(loaded, [] if wanted.recipe is None else [wanted.recipe])
    subject = subject_of(loaded)
    skipped = {name: why for name, methods in todo.items() if (why := refusal(loaded, name, methods))}
    refuse_skipped(loaded, skipped, len(todo), named=method is not None)
    reports = run_checks(loaded, subject, {name: todo[name] for name in todo if name not in skipped}, not as_json)
    if wrong := tell(model_name(loaded), reports, skipped, as_json, report):
        raise CommandError(wrong)


def tell(name: str, reports: dict[str, Report], skipped: dict[str, str], as_json: bool, report: bool) -> str:
    """Print what stands below the rows, or JSON; returns what speaks against a success, empty if nothing does."""
    from vlmprune.verify import told

    wrong = told.verdict(reports)
    if as_json:
        print(json.dumps(told.in_json(name, reports, skipped), indent=2))
        return wrong
    print(told.in_text(reports, skipped))
    if wrong or report:
        print("", told.block(name, reports, skipped), sep="\n")
    return wrong and f"{wrong} (block for a bug report above)"


def methods_of(wanted: flags.Wanted, named: bool) -> dict[str, list[Method]]:
    """What every name on the command line, or the recipe, stands for; `named` as of `spec.jobs`."""
    from vlmprune import spec

    if wanted.recipe is not None:
        return {wanted.recipe.method: wanted.recipe.build()}
    with user_mistakes():
        parts = dict.fromkeys(part for name in wanted.methods for part in spec.names_of(name))
        own = {job.method: job.options for job in spec.jobs(list(parts), wanted.budgets, wanted.options, named=named)}
        return {name: staggered(name, own).build() for name in wanted.methods}


def subject_of(loaded: Loaded) -> Subject:
    """The model as the checks take it."""
    from vlmprune.errors import UnsupportedError
    from vlmprune.verify import Subject

    try:
        return Subject(loaded.model)
    except (UnsupportedError, ValueError) as error:
        raise UserError(brief(error, 600)) from None


def refuse_skipped(loaded: Loaded, skipped: dict[str, str], count: int, named: bool) -> None:
    """Give up where a method was named that cannot run, or none of all `count` can."""
    if skipped and named:
        name, why = next(iter(skipped.items()))
        raise UserError(f"{name} on {loaded.source.name}: {why}")
    if len(skipped) == count:
        raise UserError(f"{loaded.source.name} can run none of {', '.join(skipped)}: name others with --method.")


def run_checks(loaded: Loaded, subject: Subject, todo: dict[str, list[Method]], told: bool) -> dict[str, Report]:
    """Check the methods one by one; if `told`, the rows are printed as they come, into a file or a pipe too."""
    from vlmprune.runtime.answering import guarded
    from vlmprune.runtime.status import Bar, show, status

    reports: dict[str, Report] = {}
    with Bar(len(todo)) as bar:
        for name, methods in todo.items():
            step = lambda text, name=name: status(f"{name}: {text}")  # noqa: E731
            reports[name] = guarded(lambda methods=methods, step=step: subject.check(methods, step=step))
            if told:
                show(beginning(loaded, todo) * (len(reports) == 1) + row_of(name, reports[name], todo))
            bar.step()
    return reports


def staggered(name: str, options: dict[str, dict[str, Any]]) -> Job:
    """The job that `a` or `a+b` means, of options by method; in the latter all but the last keep twice the budget."""
    from vlmprune.spec import BUDGETS, Job, names_of

    *early, last = names_of(name)

    def twice(key: str, amount: Any) -> Any:
        return amount if key not in BUDGETS else min(2 * amount, 1.0) if isinstance(amount, float) else 2 * amount

    made = {f"{part}.{key}": twice(key, value) for part in early for key, value in options[part].items()}
    return Job(name, made | {f"{last}.{key}": value for key, value in options[last].items()})


def refusal(loaded: Loaded, name: str, methods: list[Method]) -> str:
    """Why the model cannot run these methods; empty if it can."""
    import vlmprune

    try:
        vlmprune.patch(loaded.model, methods).unpatch()
    except (TypeError, ValueError, vlmprune.UnsupportedError) as error:
        return brief(error)
    return ""


def line_of(cells: list[str], names: Collection[str]) -> list[str]:
    """The lines of a table of checks with one row, its first column as wide as the longest of `names`."""
    from vlmprune.runtime.tables import table
    from vlmprune.verify import CHECKS

    wide = max(map(len, names))
    return table(["method".ljust(wide), *CHECKS], [[cells[0].ljust(wide), *cells[1:]]]).splitlines()


def beginning(loaded: Loaded, names: Collection[str]) -> str:
    """What stands above the rows."""
    from vlmprune.verify import CHECKS

    return "\n".join([loaded.description, "", *line_of(["", *("" for _ in CHECKS)], names)[:2], ""])


def row_of(name: str, report: Report, names: Collection[str]) -> str:
    """A method's row."""
    return line_of([name, *(line.outcome for line in report.lines)], names)[-1]


def model_name(loaded: Loaded) -> str:
    """As it may be shown to others: a folder's path is the user's own."""
    return "a local folder" if loaded.source.local and not loaded.source.embedded else loaded.source.name
