"""A silent no-op is the field's most common bug: what cannot run raises, and what is not supported is named."""

from __future__ import annotations

from dataclasses import dataclass

import probes
import pytest
import tiny
import torch
from reference import Rule
from tiny import CACHE
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    SiglipVisionConfig,
    ViTConfig,
)

import vlmprune
from vlmprune import CutNotRunError, UnsupportedError

FAMILIES = ["llava", "llava_next"]


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(40, 24)])


def encode(model, prompt):
    vision = {k: prompt[k] for k in ("pixel_values", "image_sizes") if k in prompt}
    return {k: v for k, v in prompt.items() if k not in vision} | {
        "mm_encoder_outputs": {"image": model.get_image_features(**vision, return_dict=True)}
    }


# Cuts that did not run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["unpatched", "disabled"])
def test_features_without_their_taps(tiny_model, family, how):
    model = tiny_model(family=family)
    prompt = prompt_of(model)
    encoded = encode(model, prompt)
    with vlmprune.patch(model, "vtc_cls", keep=5) as handle, torch.no_grad():
        if how == "disabled":
            with handle.disabled():
                encoded = encode(model, prompt)
        with pytest.raises((CutNotRunError, UnsupportedError), match="features"):
            model(**encoded)
        # and the same features computed in place are fine
        got = model(**encode(model, prompt)).logits
        assert torch.equal(got, model(**prompt).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_another_patch_are_not_enough(tiny_model, family):
    model = tiny_model(family=family)
    prompt = prompt_of(model)
    with vlmprune.patch(model, "vtc_cls", keep=5):
        encoded = encode(model, prompt)
    with vlmprune.patch(model, "fopru", keep=5), pytest.raises(CutNotRunError, match="VisionAttention"):
        model(**encoded)


def dropping(function, allowed):
    """A wrapper that loses the keyword arguments it does not know, as some do."""
    return lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k in allowed})


LAYER = ("attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings")
LANGUAGE = ("attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache")
MODEL = (
    "input_ids",
    "pixel_values",
    "image_sizes",
    "attention_mask",
    "position_ids",
    CACHE,
    "mm_encoder_outputs",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "random"])
@pytest.mark.parametrize("where", ["model", "language_model"])
def test_a_wrapper_that_drops_keyword_arguments(family, method, where):
    model = tiny.model(family=family)
    inner = model.model if where == "model" else model.model.language_model
    inner.forward = dropping(inner.forward, MODEL if where == "model" else LANGUAGE)
    prompt = prompt_of(model)
    with vlmprune.patch(model, method, keep=5), torch.no_grad():
        with pytest.raises(CutNotRunError, match=method):
            model(**prompt)
        with pytest.raises(CutNotRunError, match=method):
            model.generate(**prompt, max_new_tokens=2, do_sample=False)
        model(**tiny.prompt(model, [4], []))


@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "random"])
def test_a_tower_that_drops_keyword_arguments(method):
    model = tiny.model()
    tower = model.model.vision_tower
    tower.forward = dropping(tower.forward, ("pixel_values", "output_hidden_states", "return_dict"))
    prompt = prompt_of(model)
    with vlmprune.patch(model, method, keep=5), torch.no_grad():
        if method == "vtc_cls":
            with pytest.raises(CutNotRunError):
                model(**prompt)
        else:
            model(**prompt)


def test_a_decoder_layer_that_is_never_reached(tiny_model):
    """Early exit: fewer layers run than the cut needs."""
    model = tiny_model()
    prompt, layers = prompt_of(model), model.model.language_model.layers
    with vlmprune.patch(model, "fastv", keep=5, layer=3):
        model.model.language_model.layers = layers[:2]
        try:
            with pytest.raises(CutNotRunError, match="layer 3"):
                model(**prompt)
        finally:
            model.model.language_model.layers = layers


# Calls that are refused by name


@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions(tiny_model, family):
    model = tiny_model(family=family, attn="eager")
    prompt = prompt_of(model)
    with vlmprune.patch(model, "random", keep=5) as handle:
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model(**prompt, output_attentions=True)
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model.generate(**prompt, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)
        with handle.disabled():
            assert model(**prompt, output_attentions=True).attentions is not None
        assert model(**tiny.prompt(model, [4], []), output_attentions=True).attentions is not None


def test_output_attentions_by_config():
    model = tiny.model(attn="eager")
    prompt = prompt_of(model)
    model.config.text_config.output_attentions = True  # the only one that transformers follows
    with vlmprune.patch(model, "random", keep=5), pytest.raises(UnsupportedError, match="output_attentions"):
        model(**prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds_with_images(tiny_model, family):
    model = tiny_model(family=family)
    prompt = prompt_of(model)
    ids = prompt.pop("input_ids")
    with vlmprune.patch(model, "random", keep=5), pytest.raises(UnsupportedError, match="inputs_embeds"):
        model(**prompt, inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_is_right_or_refused(tiny_model, family):
    model = tiny_model(family=family, dtype=torch.float64)
    prompt, forced = prompt_of(model), probes.random_tokens(1, 3)
    whole = probes.generated_logits(model, prompt, forced)
    plain = {size: probes.generated_logits(model, prompt, forced, prefill_chunk_size=size) for size in (3, 8, 500)}
    with vlmprune.patch(model, probes.rules(Rule(0), Rule(2, 2))):
        want = probes.generated_logits(model, prompt, forced)
        for size in (3, 8, 500):
            try:
                got = probes.generated_logits(model, prompt, forced, prefill_chunk_size=size)
            except UnsupportedError as refused:
                if "prefill_chunk_size" not in str(refused):
                    raise
            else:
                # transformers 5.20 drops the images of a chunked prefill, with or without a patch
                dropped = (plain[size][:, -4:] - whole).abs().max() > 1e-3
                probes.same(got[:, -4:], plain[size][:, -4:] if dropped else want)


def test_placeholders_without_images_are_not_pruned(tiny_model):
    """A call prunes if and only if it carries image features."""
    model = tiny_model()
    prompt = {"input_ids": prompt_of(model)["input_ids"]}
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "random", keep=5):
            assert torch.equal(model(**prompt).logits, plain)


MASKS = {
    "a prefix": lambda mask: mask[:20, :20].fill_(True),
    "hidden patches": lambda mask: mask[20:, 3:7].fill_(False),
    "two prompts": lambda mask: mask[12:, :12].fill_(False),
}


@pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_masks_that_are_more_than_padding(tiny_model, method, change, support):
    """Layers behind a cut get a causal mask over what is left; nothing of these would be heeded there."""
    model = tiny_model()
    support("masks of your own (4-D)", model, method, refused="layers behind a cut get a causal mask over what is left")
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    change(mask)
    with torch.no_grad(), vlmprune.patch(model, method, keep=5) as handle:
        with pytest.raises(UnsupportedError, match="takes a 2-D attention_mask"):
            model(**(prompt | {"attention_mask": mask[None, None]}), use_cache=False)
        with handle.disabled():
            model(**(prompt | {"attention_mask": mask[None, None]}), use_cache=False)


@pytest.mark.parametrize("cache", [None, DynamicCache])
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_prompts_packed_into_one_row(tiny_model, method, cache, support):
    model = tiny_model()
    support("packed prompts", model, method, refused="one prompt per row, padded")
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    packed = {
        "input_ids": prompt["input_ids"].repeat(1, 2),
        "pixel_values": prompt["pixel_values"].repeat(2, 1, 1, 1),
        "position_ids": torch.arange(length).repeat(2)[None],
        CACHE: cache and cache(config=model.config.text_config),
    }
    with torch.no_grad(), vlmprune.patch(model, method, keep=5):
        with pytest.raises(UnsupportedError, match="one prompt per row"):
            model(**packed)
        model(**(packed | {"position_ids": torch.arange(2 * length)[None]}))


@pytest.mark.parametrize("hidden", [slice(5, 8), slice(3, 11)])
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_a_mask_that_hides_visual_tokens(tiny_model, method, hidden):
    model = tiny_model()
    prompt = prompt_of(model)
    first = int((prompt["input_ids"][0] == tiny.IMAGE).nonzero()[0])
    mask = torch.ones_like(prompt["input_ids"])
    mask[0, first + hidden.start : first + hidden.stop] = 0
    with torch.no_grad(), vlmprune.patch(model, method, keep=5):
        told = f"hides {hidden.stop - hidden.start} visual tokens of prompt 0"
        with pytest.raises(UnsupportedError, match=told):
            model(**(prompt | {"attention_mask": mask}))


# Models that are refused by name


def composed(vision, text, **options):
    torch.manual_seed(0)
    made = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, **options)
    return LlavaForConditionalGeneration(made)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**SMALL, image_size=24, patch_size=6, projection_dim=8)
SIGLIP = SiglipVisionConfig(**SMALL, image_size=24, patch_size=6, vision_use_head=False)
LLAMA = LlamaConfig(**SMALL, vocab_size=32)


@pytest.mark.parametrize("text", [Gemma2Config(**SMALL, vocab_size=32, head_dim=8), PhiConfig(**SMALL, vocab_size=32)],
                         ids=["gemma2", "phi"])  # fmt: skip
def test_unknown_language_models(text):
    with pytest.raises(UnsupportedError, match=rf"'{text.model_type}'.*llama, mistral, qwen2"):
        vlmprune.patch(composed(CLIP, text), "random", keep=5)


def test_unknown_towers():
    model = composed(ViTConfig(**SMALL, image_size=24, patch_size=6), LLAMA)
    with pytest.raises(UnsupportedError, match=r"'vit'.*clip_vision_model"):
        vlmprune.patch(model, "random", keep=5)


@pytest.mark.parametrize(("vision", "strategy"), [(CLIP, "full"), (SIGLIP, "default")], ids=["clip", "siglip"])
def test_feature_selections_that_miscount_patches(vision, strategy):
    with pytest.raises(UnsupportedError, match=f"'{strategy}'"):
        vlmprune.patch(composed(vision, LLAMA, vision_feature_select_strategy=strategy), "random", keep=5)


def test_a_refused_patch_changes_nothing(tiny_model):
    model = tiny_model()
    handle = vlmprune.patch(model, "random", keep=5)
    for bad in ({"method": "fastv", "layer": 99}, {"method": "nonsense"}, {"method": "random", "keep": 0}):
        with pytest.raises((ValueError, TypeError)):
            vlmprune.patch(model, **bad)
    with torch.no_grad():
        model(**prompt_of(model))
    assert handle.trace.cuts[0].method == "random"


def test_unknown_families():
    model = AutoModelForCausalLM.from_config(LLAMA)
    with pytest.raises(UnsupportedError, match=r"'llama'.*llava"):
        vlmprune.patch(model, "random", keep=5)
    with pytest.raises(TypeError, match="Linear"):
        vlmprune.patch(torch.nn.Linear(2, 2), "random", keep=5)
    with pytest.raises(TypeError):
        vlmprune.patch(None, "random", keep=5)


def test_a_wrong_promise_of_counts_is_noticed(tiny_model):
    model = tiny_model()
    prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)])
    with vlmprune.patch(model, Liar()), pytest.raises(RuntimeError, match=r"promised \[9\]"):
        model(**prompt)


@dataclass(frozen=True)
class Liar(vlmprune.Method):
    def cuts(self, facts):
        return [vlmprune.Cut(vlmprune.Decoder(0), (), self.reduce)]

    def reduce(self, seen, layout):
        keep = layout.alive.clone()
        keep[:, ::2] = False
        return vlmprune.Reduction(keep, counts=[9])
