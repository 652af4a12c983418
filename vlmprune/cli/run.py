"""`vlmprune run`: one prompt about pictures, with and without pruning."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
    from vlmprune.runtime.videos import VideoClip

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune run --image scene.png --prompt "what colour is the circle ?"
  vlmprune run --image scene.png --prompt "which digit is in the picture ?" --keep 26 --save kept.png
  vlmprune run --image a.jpg b.jpg --prompt "What differs?" --model llava-hf/llava-v1.6-mistral-7b-hf \\
      --method fopru,vtc_cls,random --keep 0.25,0.1 --device cuda
  vlmprune run --image scene.png --prompt "is there a red square ?" --method fastv --option layer=3
  vlmprune run --video film.mp4 --frames 16 --prompt "What happens?" --model Qwen/Qwen2.5-VL-3B-Instruct --save kept.png

The default model, scene-llava, comes with the package; it knows drawn scenes and 66 words. It understands, among
others: is there a red circle ? / what colour is the cross ? / what shape is the bottom right object ? / where is the
blue 3 ? / how many red objects are there ? / which digit is in the picture ? / what is left of the square ?
"""


AVERAGE = "Layer average: visual tokens a decoder layer sees, newlines included, averaged over all layers."
TIMED = "Prefill: through the first token, full model -> pruned; medians of {pairs} interleaved pairs."
SMALLER = (
    "Fewer pixels: the picture itself is smaller (its processor's max_pixels): less work for the vision tower too."
)

CROPPED = "{name}: the model sees {share:.0%} of it; its image processor cuts off the rest, before any method."


class RunCommand(flags.Verb):
    """The verb, whose `--image a b` means `--image a --image b`, and `--video a b` alike."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, list(apart(list(apart(args, "--image")), "--video")))


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
    prompt: Annotated[str, Option(metavar="TEXT", help="what to ask; the model's chat template is put around it")],
    image: Annotated[list[str], Option(metavar="FILE", help="picture, or several")] = [],  # noqa: B006
    video: Annotated[list[str], Option(metavar="FILE", help="video, or several, behind the pictures")] = [],  # noqa: B006
    frames: flags.Frames = None,
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
    """Answer a prompt about pictures or videos, with and without pruning.

    Shows what it costs, of the full model and of pruned ones (without --method: fopru; without --keep and --average: a
    quarter of the patches).
    """
    from vlmprune.runtime.pictures import check_target, read_picture
    from vlmprune.runtime.videos import FRAMES, read_video

    check_asked(prompt, image, video, frames)
    wanted = flags.wanted(method, keep, average, option, recipe)
    target = check_target(save) if save else None
    visuals = [*map(read_picture, image), *(read_video(path, frames or FRAMES) for path in video)]

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import Bar, show, status

    todo = wanted.jobs()
    loaded = loading.open_model(model, device, dtype, videos=bool(video))
    answering.check(loaded, todo)
    prepare = partial(loading.model_inputs, visuals=visuals, prompt=prompt)
    inputs = prepare(loaded)
    loading.warn_of_words(loaded, [prompt])
    loading.warn_of_photographs(loaded.source.name, loading.strange_pictures(loaded, visuals))
    with Bar(1 + len(todo)) as bar:
        status("full model: answering")
        plain, outcomes = answering.run_jobs(loaded, todo, inputs, max_new_tokens, bar, repeats, prepare)

    asked = AnsweredPrompt(loaded, prompt, [*image, *video], visuals, plain, outcomes)
    show(json.dumps(in_json(asked), indent=2) if as_json else in_text(asked))
    if target is not None:
        draw_kept(target, asked)
        print(f"kept tokens: {target}", file=sys.stderr if as_json else sys.stdout)


def check_asked(prompt: str, image: Sequence[str], video: Sequence[str], frames: int | None) -> None:
    """Refuse what asks nothing, or about nothing.

    Raises:
        UserError: that.
    """
    if not prompt.strip():
        raise UserError("--prompt is empty.")
    check_text(prompt, "--prompt")
    if not image and not video:
        raise UserError("name a picture (--image) or a video (--video).")
    if frames is not None and not video:
        raise UserError("--frames is of videos: name one (--video).")


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt about pictures and, behind them, videos (with the names of their files), and what came of it."""

    loaded: Loaded
    prompt: str
    files: Sequence[str]
    visuals: Sequence[Image.Image | VideoClip]
    plain: str
    outcomes: Sequence[Outcome]

    @property
    def timed(self) -> bool:
        return self.outcomes[0].times is not None

    @cached_property
    def seen(self) -> list[float]:
        """How much of every picture or video the model sees at all."""
        from vlmprune.runtime.draw import eyes, seen_share

        both = zip(self.visuals, self.outcomes[0].trace.grids, strict=True)
        return [seen_share(eyes(self.loaded.processor, grid), visual.size, grid) for visual, grid in both]


def columns(asked: AnsweredPrompt) -> dict[str, list[str]]:
    """The table's columns: the full model's cell, then one per outcome; left out where nothing is to be said."""
    outcomes, total = asked.outcomes, asked.outcomes[0].total
    made = {
        "method": ["full model", *(o.name for o in outcomes)],
        "average" if "average" in outcomes[0].job.options else "keep": ["-", *(o.job.budget for o in outcomes)],
        "patches left": left_of(outcomes, "patches"),
    }
    if total["newlines_before"]:
        made["newlines left"] = left_of(outcomes, "newlines")
    whole = total["patches_before"] + total["newlines_before"]
    made["layer average"] = [f"{whole:.1f}", *(f"{o.layer_average:.1f}" for o in outcomes)]
    made |= time_columns([outcome.times for outcome in outcomes]) if asked.timed else {}
    return made | {"answer": [line(asked.plain), *(line(o.answer) for o in outcomes)]}


def left_of(outcomes: Sequence[Outcome], kind: str) -> list[str]:
    """The column of how many "patches" or "newlines" are left."""
    before = outcomes[0].total[f"{kind}_before"]
    return [str(before), *(change(before, outcome.total[f"{kind}_after"]) for outcome in outcomes)]


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
    sizes = [f"{file} ({size_of(visual)})" for file, visual in zip(files, asked.visuals, strict=True)]
    lines = [asked.loaded.description, f"{', '.join(sizes)}: {line(asked.prompt)}", ""]
    lines += [table(shown, rows, shown[1:-1]), ""]
    lines += [CROPPED.format(name=f, share=s) for f, s in zip(files, asked.seen, strict=True) if s < 0.99]
    lines.append(AVERAGE)
    if any(outcome.whole for outcome in asked.outcomes):
        lines.append(SMALLER)
    if asked.timed:
        lines.append(TIMED.format(**asked.outcomes[0].times))
        lines += [OVERHEAD] if asked.loaded.source.embedded else []
    return "\n".join(lines)


def size_of(visual: Image.Image | VideoClip) -> str:
    """How large a picture or a video is, in words."""
    wide, tall = visual.size
    shots = getattr(visual, "frames", None)
    return f"{wide} x {tall}" + (f", {len(shots)} of {visual.total} frames" if shots else "")


def line(text: str) -> str:
    """A model's answer on one line."""
    return " ".join(text.split()) or "(empty)"


def in_json(asked: AnsweredPrompt) -> dict[str, Any]:
    """The same for a program, image by image."""
    visuals = [*zip(asked.files, asked.visuals, asked.seen, strict=True)]
    pictures = sum(not hasattr(visual, "frames") for visual in asked.visuals)
    return {
        **asked.loaded.about,
        "prompt": asked.prompt,
        "images": [file_in_json(*one) for one in visuals[:pictures]],
        "videos": [file_in_json(*one) for one in visuals[pictures:]],
        "full": {"answer": asked.plain},
        "pruned": [outcome_in_json(outcome, pictures) for outcome in asked.outcomes],
        "times_bound_by_overhead": asked.loaded.source.embedded,
    }


def outcome_in_json(outcome: Outcome, pictures: int) -> dict[str, Any]:
    """What came of a method; so many of its counts are of pictures, and the others of videos."""
    cuts = [
        {"layer": cut.layer, "method": cut.method, "positions": cut.positions, "merged": cut.merge is not None}
        for cut in outcome.trace.cuts
    ]
    return {
        "method": outcome.job.method,
        "options": outcome.job.options,
        "answer": outcome.answer,
        "fewer_pixels": outcome.whole is not None,
        "images": outcome.counts[:pictures],
        "videos": outcome.counts[pictures:],
        "layer_average": outcome.layer_average,
        "kv_lengths": outcome.trace.kv_lengths,
        "cuts": cuts,
        "prefill": outcome.times,
    }


def file_in_json(file: str, visual: Image.Image | VideoClip, seen: float) -> dict[str, Any]:
    """A picture or a video, and how much of it the model sees."""
    wide, tall = visual.size
    about = {"file": file, "width": wide, "height": tall, "seen": round(seen, 3)}
    if hasattr(visual, "frames"):
        about |= {"frames": list(visual.numbers), "seconds": list(visual.seconds), "of": visual.total}
    return about


def draw_kept(target: Path, asked: AnsweredPrompt) -> None:
    """Draw one row of panels per picture, one panel per method (of a video, one row each), and write the file."""
    from vlmprune.runtime import draw
    from vlmprune.runtime.pictures import write_picture

    processor, plain = asked.loaded.processor, line(asked.plain)
    said = [(o.job.label, o.trace, line(o.answer)) for o in asked.outcomes]
    rows = [row for i, v in enumerate(asked.visuals) for row in draw.answer_panels(v, processor, plain, said, i)]
    write_picture(draw.sheet(rows, heading=asked.prompt), target)
