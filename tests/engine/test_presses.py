"""Cutting the cache further behind a pruned prompt, as a press does: the same as by hand, or an error.

kvpress itself cannot be installed beside a supported transformers (docs/kv-cache.md); `press` is its key-norm one.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import vlmprune
from vlmprune.patches.host import returned_cache, with_cache

SHARE = 0.5


def press(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
    """Keep the half of a layer's columns whose keys are shortest, head by head, behind a prompt's attention."""
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    if kwargs["hidden_states"].shape[1] == 1:
        return
    layer = cache.layers[module.layer_idx]
    kept = max(1, int(SHARE * layer.keys.shape[2]))
    at = (-layer.keys.norm(dim=-1)).topk(kept, dim=-1).indices.sort(-1).values[..., None]
    layer.keys, layer.values = (x.gather(2, at.expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values))


@pytest.fixture
def pressed(tiny_model):
    """A model with presses on its attention; they are taken off again."""
    model = tiny_model(dtype=torch.float64)
    layers = model.model.language_model.layers
    hooks = [layer.self_attn.register_forward_hook(press, with_kwargs=True) for layer in layers]
    yield model
    for hook in hooks:
        hook.remove()


def by_hand(model, prompt, kept, start, tokens):
    """Logits of a prompt whose visual tokens `kept` alone go in, and of the tokens behind it, without a patch."""
    inner, ids = model.model, prompt["input_ids"][0].tolist()
    image = [i for i, token in enumerate(ids) if token == model.config.image_token_id]
    stay = [i for i in range(len(ids)) if i not in image or i - start in kept]
    features = torch.cat(tuple(inner.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output))
    embeds = inner.get_input_embeddings()(prompt["input_ids"])
    embeds[0, image] = features
    out = inner.language_model(inputs_embeds=embeds[:, stay], use_cache=True)
    said = [model.lm_head(out.last_hidden_state[:, -1])]
    cache = returned_cache(out)
    for number, token in enumerate(tokens[:-1]):
        place = torch.tensor([[len(stay) + number]])
        more = with_cache(cache) | {"position_ids": place}
        step = inner.language_model(inputs_embeds=inner.get_input_embeddings()(token[None, None]), **more)
        said.append(model.lm_head(step.last_hidden_state[:, -1]))
    return torch.cat(said), cache


def test_a_press_behind_a_pruned_prompt_is_the_one_by_hand(pressed):
    model, start = pressed, 2
    prompt = tiny.prompt(model, [start, "image", 3], [(24, 24)])
    asked = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        with vlmprune.patch(model, "fopru", keep=6) as handle:
            out = model.generate(**prompt, **asked)
            kept = handle.trace.kept()
        tokens = out.sequences[0, prompt["input_ids"].shape[1] :]
        want, cache = by_hand(model, prompt, set(kept), start, tokens)
        other, _ = by_hand(model, prompt, {t + 1 for t in kept}, start, tokens)
    got = torch.cat(out.logits)  # which generate makes float32
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    assert (got - other).abs().max() > 1e-4
    # one budget: half of what the method left, and the answer behind it
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == [int(SHARE * (6 + 5)) + 4] * 4 == [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("method", ["fopru", "fastv"])
def test_padded_batches_are_refused(pressed, method):
    """A mask is by columns, and a press leaves other columns in every head."""
    prompt = tiny.prompt(pressed, [2, "image", 3], [(24, 24)])
    both = {name: torch.cat((value, value)) for name, value in prompt.items()}
    mask = torch.ones_like(both["input_ids"])
    mask[1, 0] = 0
    with (
        torch.no_grad(),
        vlmprune.patch(pressed, method, keep=6),
        pytest.raises(vlmprune.UnsupportedError, match=r"columns have gone .* \(a KV-cache press"),
    ):
        pressed.generate(**both | {"attention_mask": mask}, max_new_tokens=3, do_sample=False)
