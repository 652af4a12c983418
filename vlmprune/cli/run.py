"""`vlmprune run`: one prompt about pictures, with and without pruning."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import UserError, printable, user_mistakes
from vlmprune.runtime.prompts import check_text
from vlmprune.runtime.tables import OVERHEAD, change, table

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.runtime.answering import Outcome
    from vlmprune.runtime.loading import Loaded

__all__ = ["verb"]

KEEP = "0.25"
EXAMPLES = """\
examples:
  vlmprune run --image scene.png --prompt "what colour is the circle ?"
  vlmprune run --image scene.png --prompt "which digit is in the picture ?" --keep 26 --save kept.png
  vlmprune run --image a.jpg b.jpg --prompt "What differs?" --model llava-hf/llava-v1.6-mistral-7b-hf \\
      --method fopru,vtc_cls,random --keep 0.25,0.1 --device cuda
  vlmprune run --image scene.png --prompt "is there a red square ?" --method fastv --option layer=3

The default model, scene-llava, comes with the package; it knows drawn scenes and 66 words. It understands, among
others: is there a red circle ? / what colour is the cross ? / what shape is the bottom right object ? / where is the
blue 3 ? / how many red objects are there ? / which digit is in the picture ? / what is left of the square ?
"""


AVERAGE = "Layer average: visual tokens a decoder layer sees, newlines included, averaged over all layers."
CROPPED = "{name}: the model sees {share:.0%} of it; its image processor cuts off the rest, before any method."


class Command(flags.Verb):
    """The verb, whose `--image a b` means `--image a --image b`."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, list(apart(args, "--image")))


def apart(words: Sequence[str], flag: str) -> Iterator[str]:
    """Put a flag before all but the first of the words that follow it."""
    after = None  # words since the flag; None: another flag came
    for word in words:
        if word.startswith("-"):
            after = 0 if word == flag else None
        elif after is not None:
            after += 1
            if after > 1:
                yield flag
        yield word


def verb(
    image: Annotated[list[str], Option(metavar="FILE", help="picture, or several")],
    prompt: Annotated[str, Option(metavar="TEXT", help="what to ask; the model's chat template is put around it")],
    model: flags.Model = "scene-llava",
    method: flags.Methods = "fopru",
    keep: flags.Keep = None,
    average: flags.Average = None,
    option: flags.Options = [],  # noqa: B006
    save: Annotated[str | None, Option(metavar="FILE", help="draw the kept tokens over the picture")] = None,
    max_new_tokens: flags.Longest = 64,
    repeats: Annotated[int, Option(metavar="N", help="timed pairs of prefills, 0 for none")] = 5,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
    as_json: flags.Json = False,
) -> None:
    """Answer a prompt about pictures, with and without pruning.

    Shows what it costs, of the full model and of pruned ones (without --keep and --average: a quarter of the patches).
    """
    from vlmprune.runtime.pictures import check_target, read_picture

    flags.least(1, max_new_tokens=max_new_tokens)
    flags.least(0, repeats=repeats)
    if not prompt.strip():
        raise UserError("--prompt is empty.")
    check_text(prompt, "--prompt")
    methods = flags.words_of(method, "--method")
    budgets, named = flags.budgets_of(keep, average, KEEP)
    options = flags.options_of(option)
    target = check_target(save) if save else None
    images = [read_picture(path) for path in image]

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune import spec
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import Bar, note, show, status

    with user_mistakes():
        todo = spec.jobs(methods, budgets, options, named)
    loaded = loading.load(loading.find_model(model), loading.pick_device(device), dtype)
    answering.check(loaded, todo)
    inputs = loading.model_inputs(loaded, images, prompt)
    if loaded.source.embedded and (strange := loading.unknown_words(loaded, prompt)):
        note(f"{loaded.source.name} does not know these words: {', '.join(strange)}")
    loading.warn_of_photographs(loaded.source.name, loading.strange_pictures(loaded, images))
    with Bar(1 + len(todo)) as bar:
        status("full model: answering")
        plain = answering.answer(loaded, inputs, max_new_tokens)
        outcomes = []
        for job in todo:
            bar.step()
            outcomes.append(answering.run_job(loaded, job, inputs, max_new_tokens, repeats))

    asked = Asked(loaded, prompt, image, images, plain, outcomes)
    show(json.dumps(in_json(asked), indent=2) if as_json else in_text(asked))
    if target is not None:
        draw_kept(target, asked)
        print(f"kept tokens: {target}", file=sys.stderr if as_json else sys.stdout)


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


def in_text(asked: Asked) -> str:
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


def in_json(asked: Asked) -> dict[str, Any]:
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


def draw_kept(target: Path, asked: Asked) -> None:
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
