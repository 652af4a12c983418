"""The lmms-eval model `vlmprune`: any supported Hugging Face model, with or without pruning, through one code.

    lmms-eval eval --model vlmprune --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=todre,keep=64 \\
        --tasks gqa,pope --batch_size 8 --log_samples --output_path out

Everything that changes an answer is in `--model_args`, so lmms-eval's response cache (`--use_cache`) tells runs apart.
`method=none` is the whole model.

Several GPUs: `accelerate launch` runs one copy of the model on each and lmms-eval deals the documents out.

    accelerate launch --num_processes 8 -m lmms_eval eval --model vlmprune --model_args ... --tasks ...
    # two nodes of 8 GPUs; on the second one --machine_rank 1
    accelerate launch --multi_gpu --num_machines 2 --machine_rank 0 --num_processes 16 \\
        --main_process_ip HOST --main_process_port 29500 -m lmms_eval eval --model vlmprune ...
    # two processes on a CPU: `accelerate launch --cpu` would start one process only, unless it is given MPI hosts
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m lmms_eval eval --model vlmprune ...

A model that is too large for one GPU: `device_map=auto` in `--model_args`, without `accelerate launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

import vlmprune
from vlmprune import spec
from vlmprune.errors import did_you_mean
from vlmprune.eval.lmms.measure import Cost, Record, StopAt, Stopwatch, criteria, summary
from vlmprune.eval.lmms.parallel import place
from vlmprune.eval.lmms.pictures import Reader
from vlmprune.parts.templates import image_token, started_once
from vlmprune.patches import family_of
from vlmprune.runtime import answering, loading
from vlmprune.runtime.errors import CommandError, UserError, brief, user_mistakes
from vlmprune.runtime.fewer_pixels import FewerPixels, fitted
from vlmprune.spec import NONE

__all__ = ["VlmPrune"]

#: Longest answer where a task does not say; lmms-eval's own LLaVA models have the same.
MAX_NEW_TOKENS = 1024
DTYPES = ("auto", "float32", "bfloat16", "float16")
PADDING = "__padding_only__"  # lmms-eval's mark on requests that only keep the processes in step


@dataclass
class Counts(TokenCounts):
    """Token counts of one request as `--log_samples` writes them, with what the request cost."""

    record: Record | None = None

    def to_dict(self) -> dict[str, Any]:
        cost = asdict(self.record) if self.record else {}
        return super().to_dict() | {key: value for key, value in cost.items() if key not in ("task", "doc")}


@dataclass(frozen=True)
class ReadyRequest:
    """One request, ready for the processor: the prompt with a placeholder for each image, and the images."""

    request: Instance
    text: str
    images: list[Image.Image]


class VlmPrune(lmms):
    """A chat model for lmms-eval: loads once, prunes as `method` says, measures what it does.

    Args:
        pretrained: an embedded model, a folder, or an id on the hub.
        method: `none`, a name (`vlmprune ls methods`), or names joined by `+`.
        batch_size: prompts answered together; a batch gives the answers of its prompts alone.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float32 on a CPU, the checkpoint's own on a GPU), "float32", "bfloat16" or "float16".
        attn_implementation: as for `from_pretrained`.
        device_map: as for `from_pretrained`, "auto" for a model that one GPU cannot hold.
        template: file with a Jinja chat template, for a model that has none or another one.
        plain_pictures: convert pictures plainly, to compare with published numbers (`Reader`). Either way a warning
            counts the pictures for which it makes a difference.
        image_processor: other settings of the image processor, such as `{"max_pixels": 12800}`.
        max_batch_size: accepted because lmms-eval passes it; no meaning here.
        **options: the method's options, `keep`, `average` and `seed` among them; with several methods
            `globalcom2.keep` says whose. None is a value: `tau=None` is todre without its second stage.

    Raises:
        UserError: an unknown method or option, a bad value, a model that cannot be loaded or that the method does not
            fit, a device that is not there, no chat template.

    Attributes:
        progress: where set, called with (requests answered, all requests) after every batch, and no bar is shown.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = NONE,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device_map: str | None = None,
        template: str | None = None,
        plain_pictures: bool | str = False,
        image_processor: Mapping[str, Any] | None = None,
        max_batch_size: int | str | None = None,
        **options: Any,
    ):
        super().__init__()
        self.batch_size = whole("batch_size", batch_size)
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
        with user_mistakes():
            options = {key: spec.read_given(key, value) for key, value in options.items()}
            spec.build(method, options, none=True)  # mistakes are found before weights are read
        loading_options = {"attn_implementation": attn_implementation, "device_map": device_map}
        loading_options = {key: value for key, value in loading_options.items() if value is not None}
        device, accelerator = place(device, device_map)
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if image_processor:
            loading_options["image_processor"] = dict(image_processor)
        self.loaded = loading.load(loading.find_model(pretrained), device, dtype, **loading_options)
        self.loaded.processor.tokenizer.padding_side = "left"
        set_template(self.loaded, template)
        self._arguments = {"pretrained": pretrained, "dtype": dtype, **loading_options}
        if template is not None:
            self._arguments["template"] = self.loaded.processor.chat_template
        self.read = Reader(flag("plain_pictures", plain_pictures))
        if self.read.plain:
            self._arguments["plain_pictures"] = True
        self.progress: Callable[[int, int], None] | None = None
        self._new: list[Record] = []  # of this process, since the last evaluation ended
        self._seconds = 0.0
        self._records: list[Record] = []  # of all processes
        self._warm = False
        self.use(method, **options)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.loaded.model.device

    def __repr__(self) -> str:
        """All that an answer depends on: lmms-eval takes it as the key of the response cache."""
        given = self._arguments | {"method": self.method} | self.options
        return f"VlmPrune({', '.join(f'{key}={value!r}' for key, value in given.items())})"

    def use(self, method: str, **options: Any) -> None:
        """Prune the loaded model by another method from now on; `none` unpatches it.

        Raises:
            UserError: as for the class; the model is then as it was.
        """
        with user_mistakes():
            made = spec.build(method, options, none=True)
        with user_mistakes(f"{method} on {self.loaded.source.name}: "):
            processor = fitted(self.loaded.processor, made, family_of(self.loaded.model))
            told = [method.told_by(processor) for method in made]
            self.handle = vlmprune.patch(self.loaded.model, told) if told else None
        if not made:
            vlmprune.unpatch(self.loaded.model)
        self.method, self.options, self.processor = method, options, processor

    def take_records(self) -> list[dict[str, Any]]:
        """What the requests since the last call cost, by task and document; see `measure.Record`.

        With several processes, all of them have the records of all once an evaluation is over. Answers that came from
        lmms-eval's response cache have no record.
        """
        records = sorted([*self._records, *self._new], key=lambda record: (record.task, record.doc))
        self._records, self._new, self._seconds = [], [], 0.0
        return [asdict(record) for record in records]

    def gathered(self) -> tuple[list[Record], float]:
        """What all processes have measured since the last evaluation ended, and their seconds together."""
        if self.world_size == 1:
            return self._new, self._seconds
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, (self._new, self._seconds))
        return [record for part, _ in parts for record in part], sum(seconds for _, seconds in parts)

    def clean(self) -> None:
        """Called by lmms-eval in every process when all is answered: sums up, and keeps the model for what comes."""
        records, seconds = self.gathered()
        self._records += records
        self._new, self._seconds = [], 0.0
        if records:
            tokens = sum(record.output_tokens for record in records)
            speed = tokens / seconds if seconds else 0.0
            log_metrics(seconds, tokens, speed, {"num_requests": len(records), **summary(records)})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests: in batches of equal generation arguments, longest prompts first, in the order given."""
        order = Collator(
            requests,
            sort_fn=lambda request: -len(request.args[0]),
            group_fn=lambda request: request.args[2],
            grouping=True,
        )
        made: list[GenerationResult] = []
        hidden = self.rank != 0 or self.progress is not None
        with tqdm(total=len(requests), disable=hidden, desc=f"vlmprune ({self.method})") as bar:
            for batch in order.get_batched(n=self.batch_size):
                try:
                    self.warm_up(batch)
                    made += self.answer(batch)
                except CommandError as error:
                    docs = ", ".join(str(request.doc_id) for request in batch)
                    raise type(error)(f"task {batch[0].task_name}, documents {docs}: {error}") from error
                bar.update(len(batch))
                if self.progress is not None:
                    self.progress(len(made), len(requests))
        self.read.tell()
        return order.get_original(made)

    def warm_up(self, requests: Sequence[Instance]) -> None:
        """Answer the first batch after loading, and forget it.

        The first call is the slowest (memory is claimed, kernels are loaded), and it would be counted against whatever
        is measured first, which is most often the unpruned model.
        """
        if not self._warm:
            self.answer(requests)
            self._new, self._seconds, self._warm = [], 0.0, True
            self.read.odd.clear()  # they come again

    def answer(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer one batch, whose requests have the same generation arguments."""
        given = requests[0].args[2]
        asked = [self.ask(request) for request in requests]
        inputs = self.inputs(asked)
        length = inputs["input_ids"].shape[1]
        arguments = generation_arguments(given)
        until = strings(given.get("until"))
        tokenizer, model = self.loaded.processor.tokenizer, self.loaded.model
        # beams are reordered under way, and a stop string in one of them does not end the others
        stop = StopAt(until, tokenizer, length) if until and arguments["num_beams"] == 1 else None
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with Stopwatch(model) as watch:
            out = answering.guarded(
                lambda: model.generate(**inputs, **arguments, pad_token_id=pad, stopping_criteria=criteria(watch, stop))
            )
        new = out[:, length:].tolist()
        counts = [produced(row, model.generation_config.eos_token_id, pad) for row in new]
        texts = [cut_off(t, until) for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
        self._seconds += watch.cost.total_s
        speed, prompts = watch.cost.decode_speed(counts), inputs["attention_mask"].sum(1).tolist()
        visual = self.visual_tokens(asked, inputs["input_ids"], arguments["num_beams"])
        records = self.noted(requests, visual, counts, watch.cost, speed)
        answered = zip(texts, prompts, counts, records, strict=True)
        return [GenerationResult(text, Counts(*numbers, record=record)) for text, *numbers, record in answered]

    def visual_tokens(
        self, asked: Sequence[ReadyRequest], input_ids: torch.Tensor, beams: int
    ) -> list[tuple[int, int, float]]:
        """`tokens` of every request; where pictures were made smaller, before that there were those of the whole."""
        found = [self.tokens(input_ids, row, beams) for row in range(len(asked))]
        if not isinstance(smaller := self.processor.image_processor, FewerPixels):
            return found
        whole = [sum(map(smaller.tokens, one.images)) for one in asked]
        return [(before, *after) for before, (_, *after) in zip(whole, found, strict=True)]

    def noted(
        self,
        requests: Sequence[Instance],
        visual: Sequence[tuple[int, int, float]],
        counts: Sequence[int],
        cost: Cost,
        speed: float | None,
    ) -> list[Record]:
        """What answering every request took; those that lmms-eval has doubled to fill a batch are not counted."""
        records = [
            Record(asked.task_name, asked.doc_id, *tokens, cost.ttft_s, count, speed, cost.peak_memory_bytes)
            for asked, tokens, count in zip(requests, visual, counts, strict=True)
        ]
        real = zip(requests, records, strict=True)
        self._new += [record for request, record in real if not request.metadata.get(PADDING)]
        return records

    def ask(self, request: Instance) -> ReadyRequest:
        """Turn a request into prompt and images.

        Raises:
            UserError: it has video or audio, or the template does not write one placeholder for each image.
        """
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise UserError(f"video and audio are not supported, and a document of {task} has some.")
        text = self.prompt_text(messages.to_hf_messages(), len(images))
        return ReadyRequest(request, text, [self.read(image) for image in images])

    def prompt_text(self, turns: list[dict[str, Any]], images: int) -> str:
        """The prompt by the chat template; raises as `ask` does."""
        processor = self.loaded.processor
        token = image_token(processor)
        for part in (part for turn in turns for part in turn["content"] if part["type"] == "text"):
            part["text"] = part["text"].replace(token, "")  # the images come apart, and each has its placeholder
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        if text.count(token) != images:
            raise UserError(
                f"the chat template of {self.loaded.source.name} writes {text.count(token)} {token} for {images} "
                "images: give another one with template=FILE."
            )
        return text

    def inputs(self, asked: Sequence[ReadyRequest]) -> dict[str, torch.Tensor]:
        """Processor's output for a left-padded batch, on the device."""
        processor, texts = self.processor, [one.text for one in asked]
        # prompt by prompt: LLaVA-OneVision prepares several pictures of one prompt differently
        images = [one.images for one in asked if one.images]
        once = started_once(processor, texts[0])
        try:
            made = processor(text=texts, images=images or None, padding=True, return_tensors="pt", **once)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"the model's processor cannot prepare this: {brief(error)}") from error
        made = {name: value.to(self.device) for name, value in made.items()}
        if "pixel_values" in made:
            made["pixel_values"] = made["pixel_values"].to(self.loaded.model.dtype)
        return made

    def tokens(self, input_ids: torch.Tensor, row: int, beams: int) -> tuple[int, int, float]:
        """Visual tokens of a batch row: of the prompt, entering the language model, mean over its layers."""
        before = int((input_ids[row] == self.loaded.model.config.image_token_id).sum())
        if self.handle is None or not before:
            return before, before, float(before)
        trace = self.handle.trace
        images = [i for i, sample in enumerate(trace.sample) if sample == row * beams]
        return before, sum(map(trace.entering, images)), sum(map(trace.layer_average, images))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval's chat models generate."""
        raise UserError("vlmprune answers tasks that generate text, and this one compares likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused."""
        raise UserError("vlmprune answers tasks of one round, and this one has several.")


def whole(name: str, value: int | str) -> int:
    """A number of at least 1, as text too."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name}={value!r} is not a whole number of at least 1.")
    return number


def flag(name: str, value: bool | str) -> bool:
    """True or False, as text too."""
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise UserError(f"{name}={value!r} is neither True nor False.")
    return known[str(value).lower()]


def set_template(loaded: loading.Loaded, template: str | None) -> None:
    """Give the processor a chat template, or check that it has one."""
    if template is not None:
        file = Path(template).expanduser()
        if not file.is_file():
            raise UserError(f"template={template}: there is no such file; it takes a Jinja chat template.")
        loaded.processor.chat_template = file.read_text()
    if not getattr(loaded.processor, "chat_template", None):
        raise UserError(
            f"{loaded.source.name} has no chat template, so it is unknown how its prompts look: give one with "
            "template=FILE (Jinja)."
        )


def generation_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What `generate` gets for a task's `generation_kwargs`.

    Greedy unless the task samples: by `do_sample`, or, as everywhere in lmms-eval, by a temperature above 0. What
    `generate` does not know (`until`, which is read elsewhere, and hints to other models) is left out.

    Raises:
        UserError: several answers to one question are asked for.
    """
    known = vars(GenerationConfig())
    made = {key: value for key, value in given.items() if key in known and value is not None}
    if made.get("num_return_sequences", 1) > 1:
        raise UserError("num_return_sequences above 1 is not supported: use lmms-eval's --repeats.")
    temperature = made.get("temperature", 0)
    made["do_sample"] = bool(made.get("do_sample", temperature > 0))
    if not made["do_sample"]:
        # a checkpoint's own sampling settings would cause warnings
        made |= dict.fromkeys(("temperature", "top_p", "top_k"))
    elif temperature == 0:
        made.pop("temperature", None)
    made["num_beams"] = made.get("num_beams", 1)
    made["max_new_tokens"] = made.get("max_new_tokens", given.get("max_gen_toks", MAX_NEW_TOKENS))
    return made


def strings(until: str | Sequence[str] | None) -> list[str]:
    """A task's `until` as a list; empty strings would stop at once."""
    return [s for s in ([until] if isinstance(until, str) else until or []) if s]


def cut_off(text: str, until: Sequence[str]) -> str:
    """The text before the first of `until`, without blanks around it."""
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))].strip()


def produced(row: Sequence[int], end: int | Sequence[int] | None, pad: int | None) -> int:
    """How many tokens of a padded row were generated; the end token counts."""
    ends = {end} if isinstance(end, int) else set(end or ())
    for i, token in enumerate(row):
        if token in ends:
            return i + 1
    count = len(row)
    while count and row[count - 1] == pad:
        count -= 1
    return count
