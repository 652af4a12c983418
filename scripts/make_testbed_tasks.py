"""Writes eval/tasks/: the shipped questions as parquet files and lmms-eval's YAML files about them.

python scripts/make_testbed_tasks.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from testbed import asking
from testbed import split as splits

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
#: Tasks across the categories: alias, function that chooses. Their version is that of the choice, not of the split.
ACROSS = {"mixed": ("all categories", "spread"), "absent": ("things that are not there", "absent")}
WHOLE = """\
include: _shared.yaml
task: {group}_{name}
task_alias: {alias}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {split}.parquet
process_docs: !function utils.{choose}
metadata:
  version: 2
"""
CAPTION = """\
include: _shared.yaml
task: {name}
task_alias: {alias}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: captions.parquet
doc_to_text: !function utils.{ask}
process_results: !function utils.score_caption
generation_kwargs:
  max_new_tokens: {longest}
  temperature: 0
  do_sample: false
metric_list:
  - metric: objects
    aggregation: mean
    higher_is_better: true
  - metric: made_up
    aggregation: mean
    higher_is_better: false
"""
#: Tasks that ask for captions: alias, function that asks, longest answer.
HOW = (("short captions", "ask_caption", 25), ("long captions", "ask_long_caption", 100))
CAPTIONS = dict(zip(tasks.CAPTIONS, HOW, strict=True))
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


def captions(each: int = 60) -> pa.Table:
    """Pictures of three or four objects, with a short caption: crowded ones, and as many of the sparse."""
    rows = []
    for name in ("crowded", "sparse"):
        pictures = {record.picture_id: record.picture for record in testbed.questions(name)}
        first = splits.SIZES[name][2]
        scenes = ((picture, splits.test_scene(name, first + int(picture.rpartition("-")[2]))) for picture in pictures)
        many = [(picture, scene) for picture, scene in scenes if len(scene.things) > 2][:each]
        rows += [
            (picture, asking.caption(scene), {"bytes": pictures[picture], "path": None}) for picture, scene in many
        ]
    text = datasets.Value("string")
    features = datasets.Features({"picture_id": text, "answer": text, "image": datasets.Image()})
    return pa.table(dict(zip(features, zip(*rows, strict=True), strict=True)), schema=features.arrow_schema)


def write(table: pa.Table, path: Path) -> None:
    """A picture is stored once: its rows point into the column's dictionary, which must not outgrow its page."""
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**26)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tasks.path()))
    out = parser.parse_args().out
    (out / "_shared.yaml").write_text(NOTE + SHARED.format(version=testbed.VERSION))
    for split, group in tasks.GROUPS.items():
        write(table(split), out / f"{split}.parquet")
        for name in ACROSS if tasks.absent(split) else ("mixed",):
            alias, choose = ACROSS[name]
            told = WHOLE.format(group=group, name=name, alias=alias, split=split, choose=choose)
            (out / f"{group}_{name}.yaml").write_text(NOTE + told)
        members = tasks.names(split)
        for name in members:
            category = name.removeprefix(f"{group}_")
            (out / f"{name}.yaml").write_text(NOTE + TASK.format(group=group, category=category, split=split))
        listed = "\n".join(f"  - {name}" for name in members)
        (out / f"{group}.yaml").write_text(NOTE + GROUP.format(group=group, members=listed, version=testbed.VERSION))
    write(captions(), out / "captions.parquet")
    for name, (alias, ask, longest) in CAPTIONS.items():
        (out / f"{name}.yaml").write_text(NOTE + CAPTION.format(name=name, alias=alias, ask=ask, longest=longest))


if __name__ == "__main__":
    main()
