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
from vlmprune.runtime.errors import UserError, printable
from vlmprune.runtime.prompts import check_text
from vlmprune.runtime.tables import OVERHEAD, change, table

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.runtime.answering import Outcome
    from vlmprune.runtime.loading import Loaded

__all__ = ["verb"]

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
TIMED = "Prefill: through the first token, full model -> pruned; medians of {pairs} interleaved pairs."
CROPPED = "{name}: the model sees {share:.0%} of it; its image processor cuts off the rest, before any method."


class RunCommand(flags.Verb):
    """The verb, whose `--image a b` means `--image a --image b`."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, list(apart(args, "--image")))


COMMAND = RunCommand


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
    method: flags.SomeMethods = None,
    keep: flags.Keep = None,
    average: flags.Average = None,
    option: flags.Options = [],  # noqa: B006
    recipe: flags.Recipe = None,
    save: Annotated[str | None, Option(metavar="FILE", help="draw the kept tokens over the picture")] = None,
    max_new_tokens: flags.Longest = 64,
    repeats: Annotated[int, flags.number("timed pairs of prefills, 0 for none", 0)] = 5,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
    as_json: flags.Json = False,
) -> None:
    """Answer a prompt about pictures, with and without pruning.

    Shows what it costs, of the full model and of pruned ones (without --method: fopru; without --keep and --average: a
    quarter of the patches).
    """
    from vlmprune.runtime.pictures import check_target, read_picture

    if not prompt.strip():
        raise UserError("--prompt is empty.")
    check_text(prompt, "--prompt")
    wanted = flags.wanted(method, keep, average, option, recipe)
    target = check_target(save) if save else None
    images = [read_picture(path) for path in image]

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import Bar, note, show, status

    todo = wanted.jobs()
    loaded = loading.open_model(model, device, dtype)
    answering.check(loaded, todo)
    inputs = loading.model_inputs(loaded, images, prompt)
    if loaded.source.embedded and (strange := loading.unknown_words(loaded, prompt)):
        note(f"{loaded.source.name} does not know these words: {', '.join(strange)}")
    loading.warn_of_photographs(loaded.source.name, loading.strange_pictures(loaded, images))
    with Bar(1 + len(todo)) as bar:
        status("full model: answering")
        plain, outcomes = answering.run_jobs(loaded, todo, inputs, max_new_tokens, bar, repeats)

    asked = AnsweredPrompt(loaded, prompt, image, images, plain, outcomes)
    show(json.dumps(in_json(asked), indent=2) if as_json else in_text(asked))
    if target is not None:
        draw_kept(target, asked)
        print(f"kept tokens: {target}", file=sys.stderr if as_json else sys.stdout)


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt about pictures (with the names of their files), and what came of it."""

    loaded: Loaded
    prompt: str
    files: Sequence[str]
    images: Sequence[Image.Image]
    plain: str
    outcomes: Sequence[Outcome]

    @property
    def timed(self) -> bool:
        return self.outcomes[0].times is not None

    @cached_property
    def seen(self) -> list[float]:
        """How much of every picture the model sees at all."""
        from vlmprune.runtime.draw import seen_share

        grids, image_processor = self.outcomes[0].trace.grids, self.loaded.processor.image_processor
        return [seen_share(image_processor, i.size, grid) for i, grid in zip(self.images, grids, strict=True)]


def columns(asked: AnsweredPrompt) -> dict[str, list[str]]:
    """The table's columns: the full model's cell, then one per outcome; left out where nothing is to be said."""
    outcomes, total = asked.outcomes, asked.outcomes[0].total
    patches, newlines = total["patches_before"], total["newlines_before"]
    made = {
        "method": ["full model", *(o.job.method for o in outcomes)],
        "average" if "average" in outcomes[0].job.options else "keep": ["-", *(o.job.budget for o in outcomes)],
        "patches left": [str(patches), *(change(patches, o.total["patches_after"]) for o in outcomes)],
    }
    if newlines:
        made["newlines left"] = [str(newlines), *(change(newlines, o.total["newlines_after"]) for o in outcomes)]
    made["layer average"] = [f"{patches + newlines:.1f}", *(f"{o.layer_average:.1f}" for o in outcomes)]
    made |= time_columns([outcome.times for outcome in outcomes]) if asked.timed else {}
    return made | {"answer": [line(asked.plain), *(line(o.answer) for o in outcomes)]}


def time_columns(times: Sequence[dict[str, float]]) -> dict[str, list[str]]:
    """The columns of what took how long."""
    return {
        "prefill": ["", *(f"{t['plain_ms']:.1f} -> {t['pruned_ms']:.1f} ms" for t in times)],
        "speed-up": ["", *(f"{t['ratio']:.2f}x" for t in times)],
    }


def in_text(asked: AnsweredPrompt) -> str:
    """What a person reads."""
    made, files = columns(asked), [printable(file) for file in asked.files]
    shown, rows = list(made), [list(row) for row in zip(*made.values(), strict=True)]
    sizes = [f"{file} ({i.width} x {i.height})" for file, i in zip(files, asked.images, strict=True)]
    lines = [asked.loaded.description, f"{', '.join(sizes)}: {line(asked.prompt)}", ""]
    lines += [table(shown, rows, shown[1:-1]), ""]
    lines += [CROPPED.format(name=f, share=s) for f, s in zip(files, asked.seen, strict=True) if s < 0.99]
    lines.append(AVERAGE)
    if asked.timed:
        lines.append(TIMED.format(**asked.outcomes[0].times))
        lines += [OVERHEAD] if asked.loaded.source.embedded else []
    return "\n".join(lines)


def line(text: str) -> str:
    """A model's answer on one line."""
    return " ".join(text.split()) or "(empty)"


def in_json(asked: AnsweredPrompt) -> dict[str, Any]:
    """The same for a program, image by image."""
    pictures = zip(asked.files, asked.images, asked.seen, strict=True)
    return {
        **asked.loaded.about,
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


def draw_kept(target: Path, asked: AnsweredPrompt) -> None:
    """Draw one row of panels per picture, one panel per method, and write the file."""
    from vlmprune.runtime import draw
    from vlmprune.runtime.pictures import write_picture

    image_processor, plain = asked.loaded.processor.image_processor, line(asked.plain)
    said = [(o.job.label, o.trace, line(o.answer)) for o in asked.outcomes]
    rows = [draw.answer_panels(image, image_processor, plain, said, i) for i, image in enumerate(asked.images)]
    write_picture(draw.sheet(rows, heading=asked.prompt), target)
