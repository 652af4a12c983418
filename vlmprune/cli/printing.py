"""What `vlmprune run` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlmprune.runtime.errors import printable
from vlmprune.runtime.tables import OVERHEAD, change, table

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from vlmprune.runtime.answering import Outcome
    from vlmprune.runtime.loading import Loaded

__all__ = ["Asked", "as_json", "as_text", "save"]

AVERAGE = "Layer average: visual tokens a decoder layer sees, newlines included, averaged over all layers."
CROPPED = "{name}: the model sees {share:.0%} of it; its image processor cuts off the rest, before any method."


@dataclass(frozen=True)
class Asked:
    """A prompt about pictures (with the names of their files), and what came of it."""

    loaded: Loaded
    prompt: str
    files: Sequence[str]
    images: Sequence[Image.Image]
    plain: str
    outcomes: Sequence[Outcome]

    @cached_property
    def seen(self) -> list[float]:
        """How much of every picture the model sees at all."""
        from vlmprune.runtime.draw import seen_share

        grids, image_processor = self.outcomes[0].trace.grids, self.loaded.processor.image_processor
        return [seen_share(image_processor, i.size, grid) for i, grid in zip(self.images, grids, strict=True)]


def as_text(asked: Asked) -> str:
    """What a person reads."""
    first = asked.outcomes[0]
    newlines, timed = first.total["newlines_before"], first.times is not None
    before = first.total["patches_before"]
    word = "average" if "average" in first.job.options else "keep"
    columns = ["method", word, "patches left", "newlines left", "layer average", "prefill", "speed-up", "answer"]
    rows = [["full model", "-", str(before), str(newlines), f"{before + newlines:.1f}", "", "", line(asked.plain)]]
    for outcome in asked.outcomes:
        total, times = outcome.total, outcome.times
        rows.append(
            [
                outcome.job.method,
                outcome.job.budget,
                change(before, total["patches_after"]),
                change(newlines, total["newlines_after"]),
                f"{outcome.layer_average:.1f}",
                f"{times['plain_ms']:.1f} -> {times['pruned_ms']:.1f} ms" if times else "",
                f"{times['ratio']:.2f}x" if times else "",
                line(outcome.answer),
            ]
        )
    hidden = [*(["newlines left"] if not newlines else []), *(["prefill", "speed-up"] if not timed else [])]
    shown = [name for name in columns if name not in hidden]
    cells = [[row[columns.index(name)] for name in shown] for row in rows]
    pictures = ", ".join(
        f"{printable(f)} ({i.width} x {i.height})" for f, i in zip(asked.files, asked.images, strict=True)
    )
    lines = [asked.loaded.description, f"{pictures}: {line(asked.prompt)}", "", table(shown, cells, shown[1:-1]), ""]
    lines += [
        CROPPED.format(name=printable(f), share=s) for f, s in zip(asked.files, asked.seen, strict=True) if s < 0.99
    ]
    lines.append(AVERAGE)
    if timed:
        pairs = first.times["pairs"]
        lines.append(f"Prefill: through the first token, full model -> pruned; medians of {pairs} interleaved pairs.")
        if asked.loaded.source.embedded:
            lines.append(OVERHEAD)
    return "\n".join(lines)


def line(text: str) -> str:
    """A model's answer on one line."""
    return " ".join(text.split()) or "(empty)"


def as_json(asked: Asked) -> dict[str, Any]:
    """The same for a program, image by image."""
    model = asked.loaded.model
    pictures = zip(asked.files, asked.images, asked.seen, strict=True)
    return {
        "model": asked.loaded.source.name,
        "family": model.config.model_type,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt": asked.prompt,
        "images": [{"file": f, "width": i.width, "height": i.height, "seen": round(s, 3)} for f, i, s in pictures],
        "full": {"answer": asked.plain},
        "pruned": [
            {
                "method": outcome.job.method,
                "options": outcome.job.options,
                "answer": outcome.answer,
                "images": outcome.trace.counts,
                "layer_average": outcome.layer_average,
                "kv_lengths": outcome.trace.kv_lengths,
                "cuts": [
                    {"layer": c.layer, "method": c.method, "positions": c.positions, "merged": c.merge is not None}
                    for c in outcome.trace.cuts
                ],
                "prefill": outcome.times,
            }
            for outcome in asked.outcomes
        ],
        "times_bound_by_overhead": asked.loaded.source.embedded,
    }


def save(target: Path, asked: Asked) -> None:
    """Draw one row of panels per picture, one panel per method, and write the file."""
    from vlmprune.runtime import draw
    from vlmprune.runtime.pictures import write_picture

    image_processor, rows = asked.loaded.processor.image_processor, []
    for i, image in enumerate(asked.images):
        row = [draw.plain_panel(image, "full model", [f"answer: {line(asked.plain)}"])]
        for outcome in asked.outcomes:
            more = [f"answer: {line(outcome.answer)}"]
            row.append(draw.kept_panel(image, outcome.trace, image_processor, i, outcome.job.label, more))
        rows.append(row)
    write_picture(draw.sheet(rows, heading=asked.prompt), target)
