"""Accuracy against cost, drawn."""

from __future__ import annotations

from pathlib import Path

from .lines import COSTS_BY, Table, pareto
from .summary import KINDS


def draw(table: Table, path: Path) -> None:
    """Accuracy against cost: a row for each model, a column for each cost, a colour for each group."""
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        len(table.models), len(COSTS_BY), figsize=(4.2 * len(COSTS_BY), 3.4 * len(table.models)), squeeze=False
    )
    for axes, model in zip(grid, table.models, strict=True):
        lines = [line for line in model.lines if line.method != "downsample"]
        for axis, (kind, cost) in zip(axes, COSTS_BY.items(), strict=True):
            for group, told in {**KINDS, "nothing": "controls"}.items():
                mine = [line for line in lines if line.group == group and cost(line) is not None]
                look = {"marker": "x", "color": "black"} if group == "nothing" else {"marker": "o", "alpha": 0.7}
                axis.scatter(
                    [100 * cost(line) for line in mine], [line.score for line in mine], s=18, label=told, **look
                )
            front = [line for line in pareto(model, cost) if cost(line) is not None]
            axis.step([100 * cost(line) for line in front], [line.score for line in front], where="post", color="0.6")
            axis.axhline(model.full.score, linestyle=":", color="0.5")
            axis.set(title=model.name, xlabel=f"{kind}, % of unpruned", ylabel="right answers, %")
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
