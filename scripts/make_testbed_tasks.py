"""Writes eval/tasks/: the shipped questions as parquet files and lmms-eval's YAML files about them.

python scripts/make_testbed_tasks.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vlmprune.eval import tasks, testbed

NOTE = "# Written by scripts/make_testbed_tasks.py.\n"
SHARED = """\
output_type: generate_until
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 3
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: {version}
"""
TASK = """\
include: _shared.yaml
task: {group}_{category}
task_alias: {category}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {split}.parquet
process_docs: !function utils.{category}
"""
GROUP = """\
group: {group}
task:
{members}
aggregate_metric_list:
  - metric: exact_match
    aggregation: mean
    weight_by_size: true
metadata:
  version: {version}
"""


def table(split: str) -> pa.Table:
    """Questions in their order, with the picture's file in each row."""
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "picture_id", "category", "question", "answer")}
        | {"image": datasets.Image()}
    )
    records = testbed.questions(split)
    columns: dict[str, list] = {
        name: [getattr(record, name) for record in records] for name in features if name != "image"
    }
    columns["image"] = [{"bytes": record.picture, "path": None} for record in records]
    return pa.table(columns, schema=features.arrow_schema)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tasks.path()))
    out = parser.parse_args().out
    (out / "_shared.yaml").write_text(NOTE + SHARED.format(version=testbed.VERSION))
    for split, group in tasks.GROUPS.items():
        # a picture is stored once: its rows point into the column's dictionary, which must not outgrow its page
        pq.write_table(table(split), out / f"{split}.parquet", compression="zstd", dictionary_pagesize_limit=2**26)
        members = tasks.names(split)
        for name in members:
            category = name.removeprefix(f"{group}_")
            (out / f"{name}.yaml").write_text(NOTE + TASK.format(group=group, category=category, split=split))
        listed = "\n".join(f"  - {name}" for name in members)
        (out / f"{group}.yaml").write_text(NOTE + GROUP.format(group=group, members=listed, version=testbed.VERSION))


if __name__ == "__main__":
    main()
