"""The page of `vlmprune app`: drop a picture, ask, and see what was kept and what it cost.

Everything that is computed is `answering`'s and `draw`'s; this file lays it out with Gradio.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from vlmprune import registry, spec
from vlmprune.runtime import answering, draw, loading
from vlmprune.runtime.errors import CommandError, user_mistakes
from vlmprune.runtime.pictures import read_picture
from vlmprune.runtime.status import Bar
from vlmprune.runtime.tables import change

if TYPE_CHECKING:
    import gradio
    from PIL import Image

    from vlmprune.runtime.answering import Outcome
    from vlmprune.runtime.loading import Loaded

__all__ = ["Asker", "page"]

HEADER = ["method", "answer", "patches", "first token, ms", "times as fast"]
PAIRS = 3  # timed pairs of prefills
LONGEST = 64  # tokens of an answer


class Asker:
    """A loaded model that is asked by one visitor at a time: a patch is on the whole model."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.turn = Lock()

    def fitting(self) -> list[str]:
        """The methods that run on this model, as they are by default."""
        found = []
        for name in registry.names():
            try:
                with user_mistakes():
                    todo = spec.jobs([name], [{"keep": 0.25}], {}, named=False)
                answering.check(self.loaded, todo)
            except CommandError:
                continue
            found.append(name)
        return found

    def ask(
        self, file: str | None, prompt: str, methods: Sequence[str], keep: float
    ) -> tuple[list[list[str]], list[tuple[Image.Image, str]], str]:
        """Answer with and without pruning.

        Args:
            file: a picture file.
            prompt: what to ask about it.
            methods: names of methods.
            keep: the fraction of patches that stays.

        Returns:
            Rows under `HEADER`, the unpruned model first; pictures of what was kept after every cut, with captions; and
            a sentence about what the numbers are.

        Raises:
            CommandError: no picture, no prompt, a file that is no picture, a method that does not fit.
        """
        if file is None:
            raise CommandError("Drop a picture first.")
        if not prompt.strip():
            raise CommandError("Ask something.")
        if not methods:
            raise CommandError("Choose a method.")
        image = read_picture(file)
        with user_mistakes():
            todo = spec.jobs(list(methods), [{"keep": keep}], {}, named=False)
        with self.turn, Bar(1 + len(todo)) as bar:
            prepare = partial(loading.model_inputs, visuals=[image], prompt=prompt)
            plain, outcomes = answering.run_jobs(self.loaded, todo, prepare(self.loaded), LONGEST, bar, PAIRS, prepare)
        return rows(plain, outcomes), self.drawn(image, outcomes), self.about(image, prompt)

    def drawn(self, image: Image.Image, outcomes: Sequence[Outcome]) -> list[tuple[Image.Image, str]]:
        """What every method kept: a picture for each of its cuts, and of crops and thumbnail."""
        made = []
        for outcome in outcomes:
            for cut, trace in draw.cut_by_cut(outcome.trace):
                panel = draw.kept_panel(image, trace, self.loaded.processor.image_processor, 0, outcome.job.method)
                made += [
                    (picture, f"{outcome.job.method}, {where(cut)}: {panel.lines[0]}") for picture in panel.pictures
                ]
        return made

    def about(self, image: Image.Image, prompt: str) -> str:
        """What a visitor should know about these answers and times."""
        told = [f"{self.loaded.description}. Times: medians of {PAIRS} interleaved pairs of prefills."]
        if self.loaded.source.embedded:
            told.append("A model this small is bound by overhead: its times say nothing about a large one.")
            if strange := loading.unknown_words(self.loaded, prompt):
                told.append(f"It does not know these words: {', '.join(strange)}.")
            if loading.strange_pictures(self.loaded, [image]):
                told.append("It knows drawn scenes only: its answers about photographs mean nothing.")
        return " ".join(told)


def where(layer: int) -> str:
    """Where a cut is, in words."""
    return "before the language model" if layer <= 0 else f"at layer {layer}"


def rows(plain: str, outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The table."""
    total, times = outcomes[0].total, outcomes[0].times
    made = [["unpruned", plain, str(total["patches_before"]), f"{times['plain_ms']:.1f}" if times else "", "1.00"]]
    for outcome in outcomes:
        total, times = outcome.total, outcome.times
        left = change(total["patches_before"], total["patches_after"])
        timed = [f"{times['pruned_ms']:.1f}", f"{times['ratio']:.2f}"] if times else ["", ""]
        made.append([outcome.name, outcome.answer, left, *timed])
    return made


def page(asker: Asker, examples: Sequence[tuple[str, str]] = ()) -> gradio.Blocks:
    """The page.

    Args:
        asker: whom it asks.
        examples: picture files with a prompt, to begin with.
    """
    import gradio as gr

    methods = asker.fitting()

    def answer(file: str | None, prompt: str, chosen: list[str], keep: float) -> tuple[Any, Any, str]:
        try:
            return asker.ask(file, prompt, chosen, keep)
        except CommandError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="vlmprune", analytics_enabled=False) as made:
        gr.Markdown(
            f"# vlmprune\n{asker.loaded.source.name}, with a part of its visual tokens, beside itself with all of them."
        )
        with gr.Row():
            with gr.Column(scale=1):
                picture = gr.Image(type="filepath", label="picture", value=examples[0][0] if examples else None)
                prompt = gr.Textbox(label="prompt", value=examples[0][1] if examples else "")
                chosen = gr.Dropdown(methods, value=[m for m in ("fopru", "random") if m in methods], multiselect=True,
                                     label="methods")  # fmt: skip
                keep = gr.Slider(0.02, 1.0, value=0.25, step=0.01, label="fraction of patches that stays")
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=2):
                table = gr.Dataframe(headers=HEADER, label="answers", interactive=False, wrap=True)
                gallery = gr.Gallery(label="what was kept", columns=2, object_fit="contain")
                note = gr.Markdown()
        gr.on(
            [button.click, prompt.submit],
            answer,
            [picture, prompt, chosen, keep],
            [table, gallery, note],
            api_name="ask",
            concurrency_limit=1,
        )
        if len(examples) > 1:
            gr.Examples([list(example) for example in examples], [picture, prompt])
    return made
