"""`vlmprune report`: write the report of a run again, finished or not."""

from __future__ import annotations

import argparse
from typing import Any

from vlmprune.runtime.errors import UserError

__all__ = ["add_to"]

EXAMPLES = """\
examples:
  vlmprune report runs/demo      report.html, report.md, results.csv, results.json and plots/ in that folder

`vlmprune eval` writes the report when it ends. This writes it again: of a run that was stopped, with matplotlib
installed later, or by a newer version. Nothing is measured.

exit codes: 0 written, 2 there is no run in that folder, or it cannot be written to
"""


def add_to(verbs: Any) -> None:
    """Add this verb's parser."""
    made = verbs.add_parser(
        "report",
        help="write the report of a run of `vlmprune eval` again",
        description="Write the report of a run of `vlmprune eval` into its folder, and print its table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("folder", metavar="FOLDER", help="the run's output folder")
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Write the files, print the table and where they are.

    Raises:
        UserError: no run in the folder, or one that cannot be read or written to.
    """
    from vlmprune.eval import report
    from vlmprune.eval.lmms.store import StoreError

    try:
        results = report.read(args.folder)
        files = report.write(args.folder, results)
    except StoreError as error:
        raise UserError(str(error)) from None
    print(report.summary(args.folder, results), end="\n\n")
    for file in files:
        print(f"report: {file}")
