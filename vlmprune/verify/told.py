"""What checks found, in words, for a program, and for a bug report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmprune.verify.verdict import CHECKS, OPEN, Line, Report

__all__ = ["block", "in_json", "in_text", "verdict", "without_paths"]

WORDS = {"pass": "pass", "FAIL": "fail", "!": "unknown model", "?": "inconclusive", "-": "not applicable"}


def verdict(reports: dict[str, Report]) -> str:
    """What speaks against a success, over all methods; empty if nothing does."""
    failed, unknown = ([name for name, r in reports.items() if getattr(r, what)] for what in ("failed", "unknown"))
    still_open = sum(len(report.open) for report in reports.values())
    said = {
        f"failed: {', '.join(failed)}": failed,
        f"by hand, the unpruned model is not reproduced: {', '.join(unknown)}": unknown,
        f"inconclusive: {still_open} lines, too many to call it a proof": still_open > OPEN,
    }
    return "; ".join(text for text, holds in said.items() if holds)


def in_text(reports: Mapping[str, Report], skipped: Mapping[str, str]) -> str:
    """What stands below the rows: what the checks are, and a line for all that is no plain pass."""
    wide = max(map(len, CHECKS))
    told: dict[str, dict[str, None]] = {outcome: {} for outcome in WORDS}
    for name, report in reports.items():
        for line in report.lines:
            told[line.outcome][line_in_text(name, line)] = None  # what does not apply is told once for all
    parts = [[f"{check:{wide}}  {what}" for check, what in CHECKS.items()]]
    parts += [list(told[outcome]) for outcome in WORDS if outcome != "pass"]
    parts.append([f"skipped: {name}: {why}" for name, why in skipped.items()])
    return "\n".join("\n".join(["", *part]) for part in filter(None, parts))


def line_in_text(name: str, line: Line) -> str:
    """A check that is no plain pass."""
    who = "" if line.outcome == "-" else f"{name}, "
    return f"{WORDS[line.outcome]}: {who}{line.check}{details(line)}"


def details(line: Line) -> str:
    """Words and numbers behind an outcome, with what leads up to them."""
    return f": {line.words}" if line.words else ""


def in_json(model: str, reports: dict[str, Report], skipped: dict[str, str]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "model": model,
        "about": about(reports),
        "reports": [report_in_json(name, report) for name, report in reports.items()],
        "skipped": skipped,
    }


def report_in_json(name: str, report: Report) -> dict[str, Any]:
    """One method's checks."""
    checks = {
        line.check: {
            "outcome": WORDS[line.outcome],
            "told": line.told, "off": line.off, "noise": line.noise, "deliberate_mistake": line.twin,
        }
        for line in report.lines
    }  # fmt: skip
    return {"method": name, "options": report.options, "passed": report.passed, "checks": checks}


def about(reports: dict[str, Report]) -> dict[str, Any]:
    """What all reports say of model and machine."""
    return next((report.about for report in reports.values()), {})


def without_paths(text: str) -> str:
    """`text` with everything that looks like a path of the user's left out."""
    return re.sub(r"(?:[A-Za-z]:)?[\\/~][^\s'\",;()]*[\\/][^\s'\",;()]*", "(path)", text)


def block(model: str, reports: dict[str, Report], skipped: dict[str, str]) -> str:
    """What to paste into a bug report."""
    lines = [f"vlmprune check, model: {model}"]
    for name, value in about(reports).items():
        said = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name}: {said}")
    for name, report in reports.items():
        lines.append(f"{name}: {', '.join(report.options)}")
        lines += [f"  {line.check:9} {line.outcome:4}{details(line)}" for line in report.lines]
    lines += [f"skipped {name}: {why}" for name, why in skipped.items()]
    return without_paths("\n".join(["```", *lines, "```"]))
