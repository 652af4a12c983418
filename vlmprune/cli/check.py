"""`vlmprune check`: a self-test of methods on the user's own model and machine."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from vlmprune.cli.flags import add_budget, add_device
from vlmprune.cli.run import parse_budget, parse_option, words_of
from vlmprune.runtime.errors import CommandError, UserError, brief

if TYPE_CHECKING:
    from vlmprune.methods.base import Method
    from vlmprune.runtime.loading import Loaded
    from vlmprune.verify import Line, Report

__all__ = ["add_to"]

KEEP = "0.25"
WORDS = {"pass": "pass", "FAIL": "fail", "?": "inconclusive", "-": "not applicable"}
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
where it does not, the line is inconclusive (?). float32 tells best; bfloat16 and float16 leave more lines open.

exit codes: 0 nothing failed, 1 a check failed, 2 wrong usage
"""


def add_to(verbs: Any) -> None:
    """Add this verb's parser."""
    made = verbs.add_parser(
        "check",
        help="prove on your model and machine that pruning computes what it says",
        description="Check methods on a model: pruned equals by hand, cache, batches, decoding, positions, unpatching.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "--model", default="scene-llava", metavar="NAME", help="embedded model, folder or hub id (default: %(default)s)"
    )
    add(
        "--method",
        metavar="NAME[,NAME]",
        help=f"methods; a+b runs one after the other (default: those of {METHODS} that the model can run)",
    )
    add_budget(
        made,
        keep=f"patches per image (64), or a fraction (0.1 or 10%%); in a+b, a keeps twice that (default: {KEEP})",
        option="an option of the methods that have it (`vlmprune ls methods NAME`); may be repeated",
        metavar="N",
    )
    add_device(made)
    add("--report", action="store_true", help="end with a block for a bug report though nothing failed")
    add("--json", action="store_true", help="print JSON")
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked early, load the model, check the methods, print."""
    asked = words_of(args.method if args.method is not None else METHODS, "--method")
    word = "keep" if args.average is None else "average"
    named = getattr(args, word) is not None
    options = dict(parse_option(text) for text in args.option)

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.errors import UnsupportedError
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import status
    from vlmprune.verify import Subject

    budget = {word: parse_budget(getattr(args, word) if named else KEEP, word)}
    parts = [part.strip() for name in asked for part in name.split("+")]
    jobs = answering.jobs(parts, [budget], options, asked=named and args.method is not None)
    todo = {name: stacked(name, {job.method: job.options for job in jobs}, word) for name in asked}
    device = loading.pick_device(args.device)
    loaded = loading.load(loading.find_model(args.model), device, args.dtype)
    try:
        subject = Subject(loaded.model)
    except UnsupportedError as error:
        raise UserError(str(error)) from None
    reports, skipped = {}, {}
    for name, methods in todo.items():
        if why := refusal(loaded, name, methods):
            if args.method is not None:
                raise UserError(f"{name} on {loaded.source.name}: {why}")
            skipped[name] = why
        else:
            reports[name] = answering.guarded(
                lambda methods=methods, name=name: subject.check(methods, step=lambda text: status(f"{name}: {text}"))
            )
    status()
    if not reports:
        raise UserError(f"{loaded.source.name} can run none of {', '.join(skipped)}: name others with --method.")
    failed = [name for name, report in reports.items() if not report.passed]
    if args.json:
        print(json.dumps(as_json(loaded, reports, skipped), indent=2))
    else:
        print(as_text(loaded, reports, skipped))
        if failed or args.report:
            print("\n" + block(loaded, reports, skipped))
    if failed:
        raise CommandError(f"failed: {', '.join(failed)}" + ("" if args.json else " (block for a bug report above)"))


def stacked(name: str, options: dict[str, dict[str, Any]], word: str) -> list[Method]:
    """The methods that `a` or `a+b` means; in the latter all but the last keep twice the budget, which `word` names."""
    from vlmprune import registry

    *early, last = [part.strip() for part in name.split("+")]
    made = []
    for part in early:
        mine = dict(options[part])
        if word in mine:
            mine[word] = min(2 * mine[word], 1.0) if isinstance(mine[word], float) else 2 * mine[word]
        made += registry.build(part, mine)
    return [*made, *registry.build(last, options[last])]


def refusal(loaded: Loaded, name: str, methods: list[Method]) -> str:
    """Why the model cannot run these methods; empty if it can."""
    import vlmprune

    try:
        vlmprune.patch(loaded.model, methods).unpatch()
    except (TypeError, ValueError, vlmprune.UnsupportedError) as error:
        return brief(error)
    return ""


def as_text(loaded: Loaded, reports: dict[str, Report], skipped: dict[str, str]) -> str:
    """A table of methods and checks, what the checks are, and a line for all that is no plain pass."""
    from vlmprune.runtime.tables import table
    from vlmprune.verify import CHECKS

    rows = [[name, *(line.outcome for line in report.lines)] for name, report in reports.items()]
    lines = [loaded.description, "", table(["method", *CHECKS], rows), ""]
    lines += [f"{check:{max(map(len, CHECKS))}}  {what}" for check, what in CHECKS.items()]
    for outcome, word in WORDS.items():
        told = [
            f"{word}: {name}, {line.check}{details(line)}" if outcome != "-" else f"{word}: {line.check}{details(line)}"
            for name, report in reports.items()
            for line in report.lines
            if line.outcome == outcome != "pass"
        ]
        lines += ["", *dict.fromkeys(told)] if told else []
    lines += ["", *(f"skipped: {name}: {why}" for name, why in skipped.items())] if skipped else []
    return "\n".join(lines)


def details(line: Line) -> str:
    """Words and numbers behind an outcome, with what leads up to them."""
    said = "; ".join(part for part in (line.told, line.numbers) if part)
    return f": {said}" if said else ""


def as_json(loaded: Loaded, reports: dict[str, Report], skipped: dict[str, str]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "model": model_name(loaded),
        "about": next((report.about for report in reports.values()), {}),
        "reports": [
            {
                "method": name,
                "options": report.options,
                "passed": report.passed,
                "checks": {
                    line.check: {
                        "outcome": WORDS[line.outcome],
                        "told": line.told, "off": line.off, "noise": line.noise, "deliberate_mistake": line.twin,
                    }
                    for line in report.lines
                },
            }
            for name, report in reports.items()
        ],
        "skipped": skipped,
    }  # fmt: skip


def model_name(loaded: Loaded) -> str:
    """As it may be shown to others: a folder's path is the user's own."""
    return "a local folder" if loaded.source.local and not loaded.source.embedded else loaded.source.name


def without_paths(text: str) -> str:
    """`text` with everything that looks like a path of the user's left out."""
    return re.sub(r"(?:[A-Za-z]:)?[\\/~][^\s'\",;()]*[\\/][^\s'\",;()]*", "(path)", text)


def block(loaded: Loaded, reports: dict[str, Report], skipped: dict[str, str]) -> str:
    """What to paste into a bug report."""
    about = next((report.about for report in reports.values()), {})
    lines = ["```", f"vlmprune check, model: {model_name(loaded)}"]
    for name, value in about.items():
        said = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name}: {said}")
    for name, report in reports.items():
        lines += [f"{name}: {', '.join(report.options)}"]
        lines += [f"  {line.check:9} {line.outcome:4}{details(line)}" for line in report.lines]
    lines += [f"skipped {name}: {why}" for name, why in skipped.items()]
    return without_paths("\n".join([*lines, "```"]))
