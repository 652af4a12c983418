"""Time of the first token against visual tokens, every method beside its oracle's line."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from vlmprune.runtime.errors import UserError, extra
from vlmprune.runtime.files import write_whole
from vlmprune.runtime.tables import counted

__all__ = ["check_plot", "plot"]

MARKERS = "osD^vP*X<>hp"


def check_plot(path: str) -> None:
    """Refuse a file that no plot can be written into.

    Raises:
        UserError: it has another ending, or matplotlib is not installed.
    """
    known = extra("matplotlib.backend_bases", "--plot needs matplotlib: pip install 'vlmprune[plot]'.").FigureCanvasBase
    if Path(path).suffix.lstrip(".").lower() not in known.get_supported_filetypes():
        raise UserError(f"--plot {path}: name it .png, .svg or .pdf.")


def plot(results: dict[str, Any], path: str | Path) -> None:
    """Draw one panel per batch size and save the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: an ending that matplotlib cannot write, or nothing to draw.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells, batches = results["cells"], list(dict.fromkeys(cell["batch"] for cell in results["cells"]))
    if not cells:
        raise ValueError("there is nothing to draw: no cell was measured.")
    colours = pyplot.get_cmap("tab10")
    methods = dict.fromkeys(cell["method"] for cell in cells)
    looks = {method: (colours(i % 10), MARKERS[i % len(MARKERS)]) for i, method in enumerate(methods)}
    size = (5.4 * len(batches) + 1.6, 4.6)
    figure, axes = pyplot.subplots(1, len(batches), figsize=size, squeeze=False, layout="constrained")
    for batch, axis in zip(batches, axes[0], strict=True):
        draw_batch(axis, batch, [cell for cell in cells if cell["batch"] == batch], looks)
    axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    settings, machine = results["settings"], results["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {counted(machine['threads'], 'thread')}"
    figure.suptitle(f"{settings['model']}, {settings['dtype']}, {where}", fontsize="medium")
    made = io.BytesIO()
    try:
        figure.savefig(made, dpi=130, format=Path(path).suffix[1:].lower())
    finally:
        pyplot.close(figure)
    write_whole(Path(path), made.getvalue())


def draw_batch(axis: Any, batch: int, cells: list[dict[str, Any]], looks: Mapping[str, tuple[Any, str]]) -> None:
    """Draw one panel: the unpruned model, and every method with its oracle's line."""
    from matplotlib.ticker import ScalarFormatter

    visual = cells[0]["tokens"]["visual"]
    plain = median(cell["first_token_ms"]["unpruned"]["median"] for cell in cells)
    axis.plot(visual, plain, "*", color="black", markersize=13, label="unpruned", zorder=3)
    for method, look in looks.items():
        if own := [cell for cell in cells if cell["method"] == method]:
            draw_method(axis, method, own, look, (visual, plain))
    axis.set(
        xlabel="visual tokens per prompt, mean over decoder layers",
        ylabel="first token, ms (median, quartiles)",
        title=f"batch {batch}",
    )
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.grid(alpha=0.25)


def draw_method(
    axis: Any, method: str, cells: list[dict[str, Any]], look: tuple[Any, str], unpruned: tuple[float, float]
) -> None:
    """Draw a method's points with bars from quartile to quartile, and its oracle's line up to the unpruned model.

    The line is a ceiling of its own: cuts at other depths cost otherwise at the same mean.
    """
    colour, marker = look
    cells = sorted(cells, key=lambda cell: cell["tokens"]["layer_average"])
    tokens, first = [cell["tokens"]["layer_average"] for cell in cells], [cell["first_token_ms"] for cell in cells]
    x, y = (*tokens, unpruned[0]), (*(times["oracle"]["median"] for times in first), unpruned[1])
    axis.plot(x, y, color=colour, linewidth=1.2, label=f"{method}: oracle", zorder=1)
    pruned = [times["pruned"] for times in first]
    bars = [[t["median"] - t["low"] for t in pruned], [t["high"] - t["median"] for t in pruned]]
    look = {"color": colour, "fmt": marker, "markersize": 6, "capsize": 3, "elinewidth": 1, "alpha": 0.85, "zorder": 2}
    axis.errorbar(tokens, [t["median"] for t in pruned], bars, label=method, **look)
