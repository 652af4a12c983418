"""Write docs/table.md from benchmarks/table.json and table-costs.json (`scripts/table_results.py` makes them).

    python scripts/table_page.py

Every number and every sentence that judges follows from these files; tests/test_table.py writes the page again.
"""

from __future__ import annotations

import json
from collections import Counter

from table import picture
from table.lines import BUDGETS, Model, Table
from table.rows import details, left_out, long_captions, overview
from table.summary import summary
from table.words import budget_name
from table_results import ANSWERS, COSTS, ROOT, asked

PAGE = ROOT / "docs" / "table.md"


def origin(table: Table) -> str:
    """Where the numbers come from."""
    told = [
        f"commit {(run['commit'] or 'unknown')[:12]}, {run['day']}, {run['device']}, "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version and name != "python")
        for run in table.about["runs"]
    ]
    runs = "; ".join(told)
    lost = table.about["missing"]
    unfinished = f" **{lost} cells of the run are missing still, and so are their rows.**" if lost else ""
    about = "\n".join(f"- {model.name}: {composition(model)}." for model in table.models)
    return f"""\
{about}

One question about every picture, the categories in turns, so that each has its share; what is not there is asked about
in questions of its own. Measured: {runs}.{unfinished}"""


def composition(model: Model) -> str:
    """How many questions there are about what."""
    counts = Counter(one.category for task in model.tasks for one in asked(task, model.counts[task]))
    told = ", ".join(f"{count} {category}" for category, count in counts.most_common())
    return f"{len(model.clusters)} questions about {len(set(model.clusters))} pictures ({told})"


def unmeasured(table: Table) -> str:
    """How many rows have no costs yet."""
    lines = [line for model in table.models for line in model.lines if line is not model.full]
    lacking = sum(line.cost is None for line in lines)
    return f"Of {len(lines)} rows {lacking} have no costs yet, and are on no front of FLOPs or time." if lacking else ""


def page(table: Table) -> str:
    """The whole page."""
    bullets = "\n\n".join(summary(table))
    tables = []
    for model in table.models:
        budgets = [budget for budget in (*BUDGETS, None) if model.at(budget)]
        parts = [
            f"### {model.name}\n\nUnpruned: {model.full.score:.1f}. ▲ and ▼: above and below `random` for certain.\n"
        ]
        parts.append(overview(model) + "\n")
        parts += [f"#### {model.name}, {budget_name(budget)}\n\n{details(model, budget)}\n" for budget in budgets]
        tables += parts
    return f"""\
<!-- Written by scripts/table_page.py from benchmarks/table.json and benchmarks/table-costs.json: do not edit. -->
# Every method in one table

All methods that run on the [embedded models](../eval/testbed/README.md), beside `random` (three seeds), `grid`,
`pool`, `m3` (nested pooling without its training), `downsample` (fewer pixels, all tokens: it saves nothing) and the
native rival (fewer pixels or crops for equal tokens), at a half, a quarter, a tenth and a twentieth of the visual
tokens. **These are models of two million parameters that answer questions about drawn scenes. Nothing here is a claim
about any other model**: a method that leads here may lose on photographs, and the other way round
([ledger](#the-ledger)). No method was tuned to them. All run with their sources' options, except where a model lacks
something: `todre` starts from the mean patch where there is no [CLS] token, and `cdpruner` reads the question by the
language model's embeddings, for these towers have no text half. They renumber positions or keep them as their sources
do, which matters to models this small ([results](results.md)). `prunesid` and `tcc` draw numbers too, and ran with one
seed.

```bash
vlmprune eval table.yaml                              # under an hour of one CPU core; started again, it goes on
python scripts/table_results.py answers runs/table    # -> benchmarks/table.json
python scripts/table_results.py costs                 # -> benchmarks/table-costs.json
python scripts/table_page.py                          # -> this page
```

{origin(table)}

Differences are paired, question by question, in points, with 95 % intervals that resample whole pictures. **Bold** is
what stays certain after Holm's correction for all {table.comparisons} comparisons of this page with the unpruned
model and with `random` together, at 5 %; p values are those of the exact randomization test over pictures, so that
they can be as small as that needs. An interval without 0 in it that is not bold may be chance.

## In short

{bullets}

![Accuracy against tokens over layers, FLOPs and time of a prefill](table.png)

Crosses are controls (the native rival too), the dotted line the unpruned model, the grey one the front.

## All rows

*tokens*: in the mean over the decoder's layers, of those of the prompt; *FLOPs*: of a whole prefill as torch counts
them, the method's own work included; *time*: above 1 is faster; *false yes*: per cent of the questions about things
that are not there. {unmeasured(table)}

{chr(10).join(tables)}
{long_captions(table)}
## What was not asked

{left_out(table)}

## The ledger

What papers and single-evaluator tables publish for LLaVA-1.5-7B stands in
[table-llava-1.5-7b.yaml](../configs/table-llava-1.5-7b.yaml), number by number with source and definition. With a GPU
and the weights, `vlmprune eval table-llava-1.5-7b.yaml` measures the same cells and its report sets ours against
theirs. It was not run by us.
"""


def main() -> None:
    """Write the page and its picture."""
    answers = json.loads(ANSWERS.read_text())
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else None
    table = Table(answers, costs)
    PAGE.write_text(page(table), encoding="utf-8")
    picture.draw(table, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
