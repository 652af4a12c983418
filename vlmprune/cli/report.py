"""`vlmprune report`: write the report of a run again, finished or not."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from vlmprune.runtime.errors import UserError

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune report runs/demo      report.html, report.md, results.csv, results.json and plots/ in that folder

`vlmprune eval` writes the report when it ends. This writes it again: of a run that was stopped, with matplotlib
installed later, or by a newer version. Nothing is measured.

exit codes: 0 written, 2 there is no run in that folder, or it cannot be written to
"""


def verb(folder: Annotated[str, Argument(metavar="FOLDER", help="the run's output folder")]) -> None:
    """Write the report of a run of `vlmprune eval` into its folder again, and print its table."""
    from vlmprune.eval import report
    from vlmprune.eval.lmms.store import StoreError

    try:
        results = report.read(folder)
        files = report.write(folder, results)
    except StoreError as error:
        raise UserError(str(error)) from None
    print(report.summary(folder, results), end="\n\n")
    for file in files:
        print(f"report: {file}")
