"""Engines of vLLM in this process, and what vlmprune on transformers says to the same prompts."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, replace
from functools import cache

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune import embedded
from vlmprune.eval import testbed
from vlmprune.serving.settings import KEEP

LONGEST = 6
CLOSE = 1e-4  # of log-probabilities
SPLITS = {"scene-llava": "sparse", "scene-llava-next": "next", "scene-qwen": "qwen"}


@dataclass(frozen=True)
class Prompt:
    """Pictures and a question; `keep` is the request's own budget."""

    images: tuple[Image.Image, ...]
    question: str
    keep: int | float | None = None

    def at(self, keep):
        return replace(self, keep=keep)


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer with their log-probabilities, and the length of the prompt that the model saw."""

    tokens: list[int]
    logprobs: list[float]
    prompt: int


def where(model):
    return str(embedded.path(model)) if model in embedded.NAMES else str(model)


def questions(model, count=60):
    """Prompts about one picture each."""
    return [Prompt((record.image,), record.question) for record in testbed.questions(SPLITS[model])[:count]]


def several(model, count):
    """Prompts about two pictures, every pair in both orders, and about the same one twice."""
    made, pictures = [], [record.image for record in testbed.questions(SPLITS[model])[: 4 * count : 4]]
    asked = [record.question for record in testbed.questions(SPLITS[model])[: 4 * count : 4]]
    for i in range(count // 3):
        one, other = pictures[i], pictures[i + 1]
        made += [Prompt((one, other), asked[i]), Prompt((other, one), asked[i]), Prompt((one, one), asked[i])]
    return made


@cache
def reference(model):
    """Model and processor on transformers."""
    loaded = AutoModelForImageTextToText.from_pretrained(where(model), dtype=torch.float32).eval()
    return loaded, AutoProcessor.from_pretrained(where(model))


def written(model, prompt):
    """A prompt by the chat template, one placeholder a picture."""
    content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": prompt.question}]
    return reference(model)[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def token_ids(model, prompt):
    tokenizer = reference(model)[1].tokenizer
    return tokenizer(written(model, prompt), add_special_tokens=False)["input_ids"]


def expected(model, prompts, method=None, nested=True, **options):
    """Answers of vlmprune on transformers, one prompt at a time; prompts without a method are not pruned.

    `nested` says that the pictures of a prompt go to the processor in a list of their own.
    """
    return [answer(model, prompt, method, options, nested) for prompt in prompts]


@torch.no_grad()
def answer(model, prompt, method, options, nested):
    host, processor = reference(model)
    given = {"images": [list(prompt.images)] if nested else list(prompt.images)} if prompt.images else {}
    inputs = processor(text=written(model, prompt), **given, return_tensors="pt", add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    made = dict(options) if prompt.keep is None else options | {"keep": prompt.keep}
    handle = vlmprune.patch(host, method, **made) if method else None
    try:
        out = host.generate(
            **inputs, max_new_tokens=LONGEST, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        if handle is not None and prompt.images:
            length = handle.trace.kv_lengths[0]
    finally:
        if handle is not None:
            vlmprune.unpatch(host)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logs = [logits[0].double().log_softmax(-1)[token].item() for logits, token in zip(out.logits, tokens, strict=True)]
    return Answer(tokens, logs, length)


def content_number(engine, image):
    """What is added to the seed of methods that draw: a number of the picture's content."""
    from vllm.multimodal.hasher import MultiModalHasher

    algorithm = engine.llm.llm_engine.model_config.multimodal_config.mm_hasher_algorithm
    return int(MultiModalHasher.hash_kwargs(algorithm, image=image)[:10], 16)


class Engines:
    """Makes engines, and ends the one before."""

    def __init__(self):
        self.key = self.llm = None

    def __call__(self, model, method=None, engine=None, **options):
        key = repr((model, method, options, engine))
        if key != self.key:
            self.stop()
            self.llm, self.key = start(model, method, options, engine or {}), key
        return Engine(model, self.llm)

    def stop(self):
        if self.llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.key = None
            gc.collect()
            cleanup_dist_env_and_memory()


def start(model, method, options, engine):
    from vllm import LLM

    import vlmprune.vllm

    given = vlmprune.vllm.overrides(where(model), method, **options) if method else {}
    settings = {
        "enforce_eager": True, "dtype": "float32", "max_model_len": 3072, "limit_mm_per_prompt": {"image": 2},
        "distributed_executor_backend": "uni", "block_size": 32,
    }  # fmt: skip
    return LLM(where(model), **given, **settings | engine)


class Engine:
    """One engine of one model."""

    def __init__(self, model, llm):
        self.model, self.llm = model, llm

    def ask(self, prompts, shuffled=True):
        """Answers to prompts, batched as the scheduler likes; in another order than they are given."""
        from vllm import SamplingParams

        order = list(range(len(prompts)))
        if shuffled:
            random.Random(0).shuffle(order)
        given = [self.request(prompts[i]) for i in order]
        out = self.llm.generate(given, SamplingParams(temperature=0, max_tokens=LONGEST, logprobs=0), use_tqdm=False)
        found = dict(zip(order, map(self.read, out), strict=True))
        return [found[i] for i in range(len(prompts))]

    def request(self, prompt):
        made = {"prompt_token_ids": token_ids(self.model, prompt)}
        if prompt.images:
            made["multi_modal_data"] = {"image": list(prompt.images)}
        if prompt.keep is not None:
            made["mm_processor_kwargs"] = {KEEP: prompt.keep}
        return made

    def read(self, output):
        (made,) = output.outputs
        logs = [entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs, strict=True)]
        return Answer(list(made.token_ids), logs, len(output.prompt_token_ids))

    @property
    def inner(self):
        """The model that runs."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def agree(found, wanted):
    """All answers are equal, token by token, log-probabilities within `CLOSE`; returns the largest difference."""
    assert len(found) == len(wanted)
    assert [a.prompt for a in found] == [a.prompt for a in wanted]
    assert [a.tokens for a in found] == [a.tokens for a in wanted]
    worst = max(
        abs(x - y) for a, b in zip(found, wanted, strict=True) for x, y in zip(a.logprobs, b.logprobs, strict=True)
    )
    assert worst < CLOSE
    return worst
