"""Engines of vLLM in this process, and what vlmprune on transformers says to the same prompts."""

from __future__ import annotations

import gc
import random
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

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


def questions(model, count=60, every=1):
    """Prompts about one picture each; there are about six in a row about the same one."""
    records = testbed.questions(SPLITS[model])[: count * every : every]
    return [Prompt((record.image,), record.question) for record in records]


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
    made = []
    for keep, some in groupby(prompts, key=lambda prompt: (type(prompt.keep), prompt.keep)):  # 1 is not 1.0
        given = options if keep[1] is None else options | {"keep": keep[1]}
        handle = vlmprune.patch(reference(model)[0], method, **given) if method else None
        try:
            made += [answer(model, prompt, handle, nested) for prompt in some]
        finally:
            if handle is not None:
                handle.unpatch()
    return made


@torch.no_grad()
def answer(model, prompt, handle, nested):
    host, processor = reference(model)
    given = {"images": [list(prompt.images)] if nested else list(prompt.images)} if prompt.images else {}
    inputs = processor(text=written(model, prompt), **given, return_tensors="pt", add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    out = host.generate(
        **inputs, max_new_tokens=LONGEST, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    if handle is not None and prompt.images:
        length = handle.trace.kv_lengths[0]
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logs = [logits[0].double().log_softmax(-1)[token].item() for logits, token in zip(out.logits, tokens, strict=True)]
    return Answer(tokens, logs, length)


def content_number(engine, image):
    """What is added to the seed of methods that draw: a number of the picture's content."""
    from vllm.multimodal.hasher import MultiModalHasher

    algorithm = engine.llm.llm_engine.model_config.multimodal_config.mm_hasher_algorithm
    return int(MultiModalHasher.hash_kwargs(algorithm, image=image)[:10], 16)


class Engines:
    """Makes engines, and ends the one before.

    Where one lives that differs in its method and options alone, these are exchanged, which takes a second instead of
    fifteen. `fresh` says that one must start.
    """

    def __init__(self):
        self.kind = self.told = self.llm = None

    def __call__(self, model, method=None, engine=None, fresh=False, **options):
        kind, told = repr((where(model), engine)), repr((method, options))
        if (kind, told) != (self.kind, self.told) or fresh:
            live, self.told = (
                self.llm if kind == self.kind and can_exchange(method, engine) and not fresh else None,
                None,
            )
            if live is None:
                self.stop()
                self.llm, self.kind = start(model, method, options, engine or {}), kind
            else:
                exchange(live, model, method, options)
            self.told = told
        return Engine(model, self.llm)

    def stop(self):
        if self.llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            self.kind = self.told = self.llm = None
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


def can_exchange(method, engine):
    """Whether an engine of this kind takes other settings while it lives: one process, nothing compiled."""
    return method is not None and not {"distributed_executor_backend", "enforce_eager"}.intersection(engine or {})


def exchange(llm, model, method, options):
    """Give a live engine other settings, by all that a start does about them.

    They are checked and written into the model's config; the front end's processor and the model are made anew of
    that, the model by vLLM's loader with its weights, and room for its keys and values; the largest picture is asked
    for again. All caches are emptied.
    """
    from vllm.config import set_current_vllm_config
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    import vlmprune.vllm

    told = vlmprune.vllm.overrides(where(model), method, **options)["hf_overrides"]
    engine, runner = llm.llm_engine, runner_of(llm)
    for config in (engine.model_config, runner.model_config):
        config.hf_config.update(told)
    renderer = engine.renderer
    renderer.mm_processor = MULTIMODAL_REGISTRY.create_processor(engine.model_config, tokenizer=renderer.tokenizer)
    # no name may be taken twice
    for made in (runner.compilation_config.static_forward_context, runner.attn_groups, runner.kv_caches):
        made.clear()
    with set_current_vllm_config(runner.vllm_config):
        runner.load_model()
        runner.initialize_kv_cache(runner.kv_cache_config)
    scheduler = engine.engine_core.engine_core.scheduler
    budget = MultiModalBudget(runner.vllm_config, runner.mm_registry)
    runner.mm_budget, scheduler.max_num_encoder_input_tokens = budget, budget.encoder_compute_budget
    scheduler.encoder_cache_manager.cache_size = budget.encoder_cache_size
    runner.reset_mm_cache()
    clear(llm)


def clear(llm):
    """Empty the caches of pictures that were read and encoded, and of keys and values."""
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    llm.reset_prefix_cache()


def runner_of(llm):
    """What runs the model of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


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
        return runner_of(self.llm).model


def agree(found, wanted):
    """All answers are equal, token by token, log-probabilities within `CLOSE`; returns the largest difference."""
    assert [a.prompt for a in found] == [a.prompt for a in wanted]
    pairs = list(zip(found, wanted, strict=True))
    assert [a.tokens for a in found] == [a.tokens for a in wanted], odd([a.tokens != b.tokens for a, b in pairs])
    worst = [max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) for a, b in pairs]
    assert max(worst) < CLOSE, odd([one >= CLOSE for one in worst]) + f", the largest difference {max(worst)}"
    return max(worst)


def odd(which):
    """Which of some answers differ, for a failed test."""
    return f"{sum(which)} of {len(which)} answers differ: {[i for i, one in enumerate(which) if one]}"


@contextmanager
def deciding(plan, wrap):
    """Let `wrap(own)` decide in the place of `own`, the one function by which the methods of a plan cut."""
    before = plan.cuts[:]
    ((name, cut),) = before
    plan.cuts[:] = [(name, replace(cut, reduce=wrap(cut.reduce)))]
    try:
        yield
    finally:
        plan.cuts[:] = before
