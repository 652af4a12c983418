"""What stage 2 of ToDRE takes for text: everything outside the system prefix, before the image or behind it."""

from __future__ import annotations

import probes
import pytest
import tiny
import tiny_folders
import torch
from transformers import DynamicCache

import vlmprune
from vlmprune.methods import ToDRE
from vlmprune.parts.templates import system_prefix

F64 = torch.float64
DECIDES = 2  # the layer whose attention decides, of 4
EDGE = 1e-6  # eager attention softmaxes in float32


def shares(prompt, system):
    """Share of the text's attention that goes to the image and of the image's that goes to the text, by hand."""
    plain = tiny.shared(dtype=F64, attn="eager")
    weights = plain(**probes.step_inputs(prompt), output_attentions=True).attentions[DECIDES][0].mean(0)
    real = [c for c, shown in enumerate(prompt["attention_mask"][0].tolist()) if shown]
    visual = [c for c in real if prompt["input_ids"][0, c] == tiny.IMAGE]
    start = visual[0] if system is None else min(real[system] if system < len(real) else len(weights), visual[0])
    text = [c for c in real if c >= start and c not in visual]
    return float(weights[text][:, visual].sum(1).mean()), float(weights[visual][:, text].sum(1).mean())


def decisions(model, prompts, tau, system):
    """Whether the tokens of the single image of every prompt are left."""
    batch = prompts[0] if len(prompts) == 1 else tiny.batch(prompts)
    with vlmprune.patch(model, "todre", keep=1.0, tau=tau, system=system) as handle:
        model(**probes.step_inputs(batch))
        return [counts["patches_after"] > 0 for counts in handle.trace.counts]


@pytest.mark.parametrize(
    ("parts", "system"),
    [
        *(([4, "image", 6], system) for system in (None, 0, 2, 4, 99)),
        *(([9, "image", 2], system) for system in (None, 4)),
        ([12, "image"], 4),
        ([0, "image", 5], 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_text_is_all_that_is_not_system(parts, system):
    model = tiny.shared(dtype=F64)
    prompt = tiny.prompt(model, parts, [(24, 24)])
    to_image, to_text = shares(prompt, system)
    assert (to_text > 0) == (system is not None and system < parts[0])
    top = max(to_image, to_text)
    assert decisions(model, [prompt], top + EDGE, system) == [False]
    assert decisions(model, [prompt], top - EDGE, system) == [True]


@torch.no_grad()
def test_a_question_in_front_of_the_image_decides_with_both_halves():
    """Each half alone would drop the image; the other one keeps it."""
    model, kept = tiny.shared(dtype=F64), set()
    for seed in range(8):
        prompt = tiny.prompt(model, [9, "image", 2], [(24, 24)], seed=seed)
        to_image, to_text = shares(prompt, 2)
        low, high = sorted((to_image, to_text))
        kept.add(to_image < to_text)
        assert decisions(model, [prompt], (low + high) / 2, 2) == [True]
        alone, _ = shares(prompt, None)
        assert decisions(model, [prompt], (low + high) / 2, None) == [alone >= (low + high) / 2]
    assert True in kept, "of no prompt would the text's share alone have dropped the image"


@torch.no_grad()
def test_the_prefix_is_counted_in_every_row():
    """Left padding, and rows with and without text in front of the image, decide as alone."""
    model = tiny.shared(dtype=F64)
    prompts = [
        tiny.prompt(model, parts, [(24, 24)], seed=s)
        for s, parts in enumerate(([9, "image", 2], [2, "image", 6], [5, "image", 4]))
    ]
    tops = sorted(max(shares(prompt, 2)) for prompt in prompts)
    for tau in ((tops[0] + tops[1]) / 2, (tops[1] + tops[2]) / 2):
        want = [max(shares(prompt, 2)) >= tau for prompt in prompts]
        assert decisions(model, prompts, tau, 2) == want == [decisions(model, [p], tau, 2)[0] for p in prompts]
        assert len({*want}) == 2


@torch.no_grad()
def test_a_prefix_that_the_cache_holds():
    """The conversation's first tokens are its prefix, in whichever call they come."""
    model = tiny.shared(dtype=F64)
    prompt = tiny.prompt(model, [9, "image", 2], [(24, 24)])
    ids, total = prompt["input_ids"], prompt["input_ids"].shape[1]
    for cached, system in ((2, 2), (1, 4), (5, 5), (5, 3)):
        plain = tiny.shared(dtype=F64, attn="eager")
        weights = plain(**prompt, output_attentions=True).attentions[DECIDES][0].mean(0)
        visual, text = list(range(9, 25)), [*range(max(cached, system), 9), 25, 26]
        top = max(float(weights[text][:, visual].sum(1).mean()), float(weights[visual][:, text].sum(1).mean()))
        for tau, left in ((top + EDGE, False), (top - EDGE, True)):
            with vlmprune.patch(model, "todre", keep=1.0, tau=tau, system=system) as handle:
                cache = DynamicCache(config=model.config.text_config)
                model(input_ids=ids[:, :cached], past_key_values=cache, use_cache=True)
                model(
                    input_ids=ids[:, cached:], attention_mask=torch.ones(1, total), past_key_values=cache,
                    position_ids=torch.arange(cached, total)[None], pixel_values=prompt["pixel_values"], use_cache=True,
                )  # fmt: skip
                assert (handle.trace.counts[0]["patches_after"] > 0) == left


@pytest.mark.parametrize("where", [[22], [21, 24], [20, 22, 25], [1, 23]], ids=str)
@pytest.mark.parametrize("system", [None, 2])
@torch.no_grad()
def test_hidden_words_have_no_say(where, system):
    model = tiny.shared(dtype=F64)
    for seed in range(3):
        full = tiny.prompt(model, [4, "image", 6], [(24, 24)], seed=seed)
        hidden = full | {"attention_mask": full["attention_mask"].clone()}
        hidden["attention_mask"][0, where] = 0
        stay = [c for c in range(full["input_ids"].shape[1]) if c not in where]
        short = full | {name: full[name][:, stay] for name in ("input_ids", "attention_mask")}
        with_words, without = max(shares(full, system)), max(shares(short, system))
        tau = (with_words + without) / 2
        assert decisions(model, [hidden], tau, system) == decisions(model, [short], tau, system) == [without > tau]
        assert decisions(model, [full], tau, system) == [with_words > tau] != [without > tau]


def test_the_template_tells_the_prefix():
    processor = tiny_folders.processor()
    assert system_prefix(processor) == 2  # <s> user:
    assert ToDRE(keep=4, system=processor).system == 2
    assert ToDRE(keep=4).told_by(processor).system == 2
    assert ToDRE(keep=4, system=7).told_by(processor).system == 7
    processor.chat_template = "word1 word2 word3 " + tiny_folders.TEMPLATE.replace("{{ bos_token }}", "")
    assert system_prefix(processor) == 4  # no start token is added by this tokenizer
    processor.chat_template = None
    assert ToDRE(keep=4).told_by(processor).system is None
    with pytest.raises(ValueError, match="has no chat template that tells the system prefix: give a number"):
        ToDRE(keep=4, system=processor)


def test_a_picture_may_make_one_more_token_of_the_prefix():
    """A blank in front of a word is part of that word, and a token of its own in front of a picture."""

    class Words:
        bos_token = "<s>"

        def convert_tokens_to_ids(self, token):
            return {"<image>": 9}[token]

        def __call__(self, text, add_special_tokens=True):
            assert text.startswith("<s>") != add_special_tokens
            known = {"<s>": [1], "user: <image>": [2, 3, 9], "user: what": [2, 4], "user: 7": [2, 5]}
            for start, ids in list(known.items())[1:]:
                if text.removeprefix("<s>").startswith(start):
                    return {"input_ids": [1, *ids, 6, 7]}
            raise AssertionError(text)

    class Template:
        tokenizer, chat_template, image_token = Words(), "there is one", "<image>"

        def apply_chat_template(self, turns, add_generation_prompt):
            ((turn,), content) = (turns, "")
            content = "".join("<image>" if p["type"] == "image" else p["text"] for p in turn["content"])
            return f"<s>user: {content} assistant:"

    assert system_prefix(Template()) == 3


@pytest.mark.parametrize("system", [-1, 1.5, "2", True])
def test_bad_prefixes(system):
    with pytest.raises(ValueError, match=r"system=.* must be a number of tokens of at least 0, a processor"):
        ToDRE(keep=4, system=system)
