"""Time of the first token against visual tokens, every method beside its oracle's line."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import median
from typing import Any

from vlmprune.runtime.files import write_whole

__all__ = ["plot"]

MARKERS = "osD^vP*X<>hp"


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
    from matplotlib.ticker import ScalarFormatter

    cells, batches = results["cells"], list(dict.fromkeys(cell["batch"] for cell in results["cells"]))
    if not cells:
        raise ValueError("there is nothing to draw: no cell was measured.")
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    colours = pyplot.get_cmap("tab10")
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(5.4 * len(batches) + 1.6, 4.6), squeeze=False, layout="constrained"
    )
    for batch, axis in zip(batches, axes[0], strict=True):
        mine = [cell for cell in cells if cell["batch"] == batch]
        visual = mine[0]["tokens"]["visual"]
        plain = median(cell["first_token_ms"]["unpruned"]["median"] for cell in mine)
        axis.plot(visual, plain, "*", color="black", markersize=13, label="unpruned", zorder=3)
        for number, method in enumerate(methods):
            own = [cell for cell in mine if cell["method"] == method]
            if not own:
                continue
            own.sort(key=lambda cell: cell["tokens"]["layer_average"])
            # a ceiling of its own: cuts at other depths cost otherwise at the same mean
            points = [(cell["tokens"]["layer_average"], cell["first_token_ms"]["oracle"]["median"]) for cell in own]
            axis.plot(
                *zip(*points, (visual, plain), strict=True),
                color=colours(number % 10),
                linewidth=1.2,
                label=f"{method}: oracle",
                zorder=1,
            )
            times = [cell["first_token_ms"]["pruned"] for cell in own]
            middle = [t["median"] for t in times]
            bars = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
            axis.errorbar(
                [cell["tokens"]["layer_average"] for cell in own],
                middle,
                bars,
                fmt=MARKERS[number % len(MARKERS)],
                color=colours(number % 10),
                markersize=6,
                capsize=3,
                elinewidth=1,
                label=method,
                alpha=0.85,
                zorder=2,
            )
        axis.set(
            xlabel="visual tokens per prompt, mean over decoder layers",
            ylabel="first token, ms (median, quartiles)",
            title=f"batch {batch}",
        )
        axis.set_xlim(left=0)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.25)
    axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    settings, machine = results["settings"], results["machine"]
    threads = machine["threads"]
    where = machine.get("gpu") or f"{machine['processor']}, {threads} thread{'s' * (threads > 1)}"
    figure.suptitle(f"{settings['model']}, {settings['dtype']}, {where}", fontsize="medium")
    made = io.BytesIO()
    try:
        figure.savefig(made, dpi=130, format=Path(path).suffix[1:].lower())
    finally:
        pyplot.close(figure)
    write_whole(Path(path), made.getvalue())
