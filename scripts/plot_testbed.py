"""Draws the embedded models' learning curves from the training logs.

python scripts/plot_testbed.py --train .train --out eval/testbed/curves.png
python scripts/plot_testbed.py --qwen --out eval/testbed/curves-qwen.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from vlmprune.eval.testbed.words import CATEGORIES

#: Panel: the training folders whose logs it joins.
STAGES = {"tower": ["tower"], "scene-llava": ["scene-llava", "scene-llava-2"], "scene-llava-next": ["scene-llava-next"]}


def curve(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Minutes and values of one logged quantity, a tower report's included."""
    found = [(r["spent"] / 60, r.get(name, r.get("report", {}).get(name))) for r in rows]
    found = [(m, v) for m, v in found if v is not None]
    return [m for m, _ in found], [v for _, v in found]


def draw_qwen(folder: Path, out: Path) -> None:
    """scene-qwen's three stages, of the logs that `train_qwen.py` leaves."""
    shown = {"tower": ("colour", "value", "row", "column"), "look": ("found",), "lm": (*CATEGORIES, "all")}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, (stage, names) in zip(axes, shown.items(), strict=True):
        rows = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
        for name in names:
            minutes, values = curve(rows, name)
            if values:
                axis.plot(minutes, values, "k" if name == "all" else "", lw=2 if name == "all" else 1, label=name)
        axis.set(title=f"scene-qwen, {stage}", xlabel="minutes", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("share right")
    figure.savefig(out, dpi=90)


def main() -> None:
    """One panel a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path(".train"))
    parser.add_argument("--out", type=Path, default=Path("eval/testbed/curves.png"))
    parser.add_argument("--qwen", action="store_true", help="scene-qwen's stages instead")
    args = parser.parse_args()
    if args.qwen:
        return draw_qwen(args.train / "scene-qwen", args.out)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, (stage, folders) in zip(axes, STAGES.items(), strict=True):
        rows: list[dict] = []
        for log in (args.train / folder / "log.jsonl" for folder in folders):
            found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            before = rows[-1]["spent"] if rows else 0
            rows += [row | {"spent": row["spent"] + before} for row in found]
        shown = ("value", "digit", "cls_middle", "found1_L-2", "half_L-2") if stage == "tower" else CATEGORIES
        for name in shown:
            if stage == "tower":  # a loss of the same name is logged beside the report's accuracy
                points = [(r["spent"] / 60, r["report"][name]) for r in rows if "report" in r]
                axis.plot([m for m, _ in points], [v for _, v in points], ".-", lw=1, label=name)
            else:
                axis.plot(*curve(rows, name), lw=1, label=name)
        if stage != "tower":
            axis.plot(*curve(rows, "all"), "k", lw=2, label="all")
        axis.set(title=stage, xlabel="minutes", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("share right")
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
