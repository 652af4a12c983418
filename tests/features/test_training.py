"""Training through a pruned forward: gradients are those of the sequence that the trace tells, worked out by hand."""

from __future__ import annotations

import re

import probes
import pytest
import reference
import scenes
import tiny
import torch
from reference import Rule
from transformers.modeling_layers import GradientCheckpointingLayer

import vlmprune
from vlmprune import UnsupportedError

F64 = torch.float64
FORCED = scenes.FORCED
STEP = 1e-3  # of finite differences, along a unit vector; norms compute in float32, so not much smaller
# old transformers checkpoint around the hooks of a layer, newer ones inside
OUTSIDE = "__call__" in vars(GradientCheckpointingLayer)


@pytest.fixture
def trained():
    """`trained(model)` sets it to training; whatever a test turned on is off afterwards."""
    used = []

    def get(model):
        used.append(model)
        return model.train()

    yield get
    for model in used:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.zero_grad()
        model.eval()


def lesson(prompt):
    """A prompt with its answer, which is what there is to learn."""
    ids = torch.cat((prompt["input_ids"], torch.tensor([FORCED])), 1)
    return prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(logits):
    """Of `(tokens, vocab)` logits that end with those at the answer; in float64, which transformers' own is not."""
    return torch.nn.functional.cross_entropy(logits[-len(FORCED) - 1 : -1], torch.tensor(FORCED))


def weights_of(model):
    """One weight of every part."""
    inner = model.model
    layers = inner.language_model.layers
    named = [inner.vision_tower.encoder.layers[1].mlp.fc1, layers[0].self_attn.k_proj, layers[-1].mlp.up_proj]
    return [inner.multi_modal_projector.linear_1.weight, *(module.weight for module in named)]


def close(got, want):
    assert len(got) == len(want)
    for mine, its in zip(got, want, strict=True):
        assert its.abs().max() > 1e-6
        probes.same(mine, its, 1e-6 * its.abs().max().item())  # norms compute in float32


def by_hand(model, prompt, trace, weights, **wrong):
    features = reference.image_features(model, prompt), reference.video_features(model, prompt)
    logits, _ = scenes.replay(model, prompt, features, trace, **wrong)
    return torch.autograd.grad(loss_of(logits), weights)


@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_gradients_of_a_training_step(family_scene, name, support, trained):
    scene = family_scene
    support("training step", scene, name)
    model, prompt, weights = trained(scene.model), scene.prompt(), weights_of(scene.model)
    with scenes.start(scene, name) as handle:
        out = model(**lesson(prompt), labels=labels_of(prompt))
        got = torch.autograd.grad(loss_of(out.logits[0]), weights)
        want = by_hand(model, prompt, handle.trace, weights)
        close(got, want)
        assert abs(out.loss.item() - loss_of(out.logits[0]).item()) < 1e-5
        wrong = {"positions": "contiguous" if handle.trace.cuts[0].positions == "original" else "original"}
        other = by_hand(model, prompt, handle.trace, weights, **wrong)
        assert name == "tome" or probes.gap(other[0], want[0]) > 1e-5 * want[0].abs().max()


def labels_of(prompt):
    ids = lesson(prompt)["input_ids"]
    return torch.where(torch.arange(ids.shape[1]) < prompt["input_ids"].shape[1], -100, ids)


@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_a_step_along_the_gradient_changes_the_loss_by_as_much(name, support, trained):
    """Finite differences, which know nothing of how a gradient came about; merging in the tower included."""
    scene = scenes.Scene(*scenes.FAMILIES["next"])
    support("training step", scene, name)
    model, prompt = trained(scene.model), lesson(scene.prompt())
    weights = weights_of(model)
    with scenes.start(scene, name):
        grads = torch.autograd.grad(loss_of(model(**prompt).logits[0]), weights)
        for weight, grad in zip(weights, grads, strict=True):
            way = grad / grad.norm()
            losses, start = [], weight.detach().clone()
            with torch.no_grad():
                for step in (STEP, -STEP):
                    weight.copy_(start + step * way)
                    losses.append(loss_of(model(**prompt).logits[0]))
                weight.copy_(start)
            slope = (losses[0] - losses[1]) / (2 * STEP)
            torch.testing.assert_close(slope, grad.norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_gradient_checkpointing(family_scene, name, reentrant, support, trained):
    """Layers run again in the backward pass, their cuts do not."""
    scene = family_scene
    refused = "this transformers runs hooks again" if OUTSIDE else None
    support("gradient checkpointing", scene, name, refused=refused)
    model, prompt, weights = trained(scene.model), lesson(scene.prompt()), weights_of(scene.model)
    with scenes.start(scene, name) as handle:
        want = torch.autograd.grad(loss_of(model(**prompt).logits[0]), weights)
        trace = handle.trace
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ran = []
        count = model.model.language_model.layers[2].mlp.register_forward_pre_hook(lambda *given: ran.append(1))
        loss = loss_of(model(**prompt).logits[0])  # use_cache as it comes
        if OUTSIDE:
            with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
                loss.backward()
        else:
            loss.backward()
            assert len(ran) == 2
            close([weight.grad for weight in weights], want)
            assert handle.trace.kept() == trace.kept()
            assert len(handle.trace.cuts) == len(trace.cuts)
            assert handle.trace.kv_lengths == trace.kv_lengths
        count.remove()


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize(
    "rules",
    [[Rule(0)], [Rule(2, 2)], [Rule(0, positions="original"), Rule(1, 2, merge=True), Rule(3, 4, 3)]],
    ids=["before", "inside", "three"],
)
@pytest.mark.skipif(OUTSIDE, reason="this transformers checkpoints around the hooks, which is refused")
def test_checkpointed_gradients_are_those_by_hand(tiny_model, rules, reentrant, trained):
    model = trained(tiny_model(dtype=F64))
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == tiny.IMAGE, -100)
    weight = model.model.multi_modal_projector.linear_1.weight
    by_rules = reference.loss(model, reference.run(model, prompt, rules), labels[0].tolist())
    (want,) = torch.autograd.grad(by_rules, weight)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with vlmprune.patch(model, probes.rules(*rules)):
        for _ in range(2):  # and again, with a frame of its own
            weight.grad = None
            model(**prompt, labels=labels).loss.backward()
            probes.same(weight.grad, want, 1e-6 * want.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.skipif(OUTSIDE, reason="this transformers checkpoints around the hooks, which is refused")
def test_checkpointing_while_soft_masks_are_trained(tiny_model, reentrant, trained, support):
    model = tiny_model(dtype=F64)
    words = "soft masks cannot be trained under re-entrant checkpointing" if reentrant else None
    support(
        "training ATP under " + ("re-entrant " if reentrant else "") + "gradient checkpointing", model, "atp", words
    )
    thresholds, prompt = (
        tiny.modules(model, train=True, biases=(-0.3, 1.5)),
        tiny.prompt(model, [4, "image", 6], [(24, 24)]),
    )
    trained(model)
    with vlmprune.patch(model, "atp", thresholds=thresholds):
        want = torch.autograd.grad(loss_of(model(**prompt).logits[0]), list(thresholds.parameters()))
        assert max(grad.abs().max() for grad in want) > 1e-6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            with pytest.raises(UnsupportedError, match="'use_reentrant': False"):
                model(**prompt)
            return
        got = torch.autograd.grad(loss_of(model(**prompt).logits[0]), list(thresholds.parameters()))
        for mine, its in zip(got, want, strict=True):
            probes.same(mine, its)


@pytest.mark.parametrize("name", ["fopru", "tome"])
def test_layers_of_the_tower_that_are_run_again_are_refused(name):
    """Checkpointing of somebody else's, around a layer and its hooks."""
    model = tiny.model(dtype=F64)
    layer = model.model.vision_tower.encoder.layers[1]
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with vlmprune.patch(model, name, keep=0.3):
        model.model.vision_tower.encoder.layers[1] = Again(layer)
        with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
            model(**prompt).logits.sum().backward()


class Again(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


def test_training_mode_without_dropout_is_evaluation(tiny_model, trained):
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    for name in scenes.CUTTERS:
        with vlmprune.patch(model, name, keep=0.3), torch.no_grad():
            want = model.eval()(**prompt).logits
            assert torch.equal(trained(model)(**prompt).logits, want)


# LoRA


RANK, ALPHA = 2, 6
TARGETS = ["q_proj", "k_proj", "v_proj", "fc1", "up_proj", "linear_1"]


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed (make install does)")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def adapters(wrapped):
    """Name of every adapted weight in the plain model, with its A and B."""
    return {
        name.removeprefix("base_model.model.") + ".weight": (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for name, m in wrapped.named_modules()
        if hasattr(m, "lora_A")
    }


def merged_by_hand(scene, wrapped):
    """The plain model with W + (alpha / rank) B A for weights."""
    model = tiny.model(dtype=F64, **scene.options)
    with torch.no_grad():
        for name, (a, b) in adapters(wrapped).items():
            model.get_parameter(name).add_(b @ a, alpha=ALPHA / RANK)
    return model


LORA_SCENES = ["llava", "next", "vip", "onevision", "next-video-video"]


@pytest.mark.parametrize("name", scenes.CUTTERS)
@pytest.mark.parametrize("kind", LORA_SCENES)
def test_lora(kind, name, support):
    """A step, an answer, and a merge; the patch comes before or after the adapter, on the adapter or its model."""
    scene = scenes.Scene(*scenes.FAMILIES[kind])
    support("LoRA (peft)", scene, name)
    if words := scene.refusal(name):
        pytest.skip(f"refused, as it should be: {words}")
    prompt, given = scene.prompt(), scenes.options(scene.model, name)
    model = tiny.model(dtype=F64, **scene.options)
    early = name in ("fopru", "todre")
    if early:
        handle = vlmprune.patch(model, name, **given)
    wrapped = lora(model)
    if not early:
        handle = vlmprune.patch(wrapped if name == "fastv" else model, name, **given)
    assert handle.model is model
    loss_of(wrapped.train()(**lesson(prompt)).logits[0]).backward()
    twin = merged_by_hand(scene, wrapped)
    with vlmprune.patch(twin, name, **given) as other:
        names = list(adapters(wrapped))
        assert len(names) > 20
        twin(**lesson(prompt))
        assert handle.trace.kept() == other.trace.kept()
        features = reference.image_features(twin, prompt), reference.video_features(twin, prompt)
        logits, _ = scenes.replay(twin, prompt, features, handle.trace)
        grads = torch.autograd.grad(loss_of(logits), [twin.get_parameter(n) for n in names], allow_unused=True)
        largest = max(grad.abs().max().item() for grad in grads if grad is not None)
        for grad, (a, b) in zip(grads, adapters(wrapped).values(), strict=True):
            for mine, its in ((a.grad, b.T @ grad), (b.grad, grad @ a.T)) if grad is not None else ():
                probes.same(mine, its * ALPHA / RANK, 1e-5 * largest)  # norms compute in float32
        answer = twin.generate(**prompt, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            want = twin(**prompt).logits
    wrapped.eval()
    assert torch.equal(wrapped.generate(**prompt, max_new_tokens=4, do_sample=False), answer)
    whole = wrapped.merge_and_unload()
    assert whole is model
    if name == "tome":  # its hook went with the adapter
        with pytest.raises(UnsupportedError, match="patch the model again"):
            model(**prompt)
        vlmprune.patch(model, name, **given)
    with torch.no_grad():
        probes.same(model(**prompt).logits, want)
        plain = twin(**prompt).logits
        probes.same(vlmprune.unpatch(model)(**prompt).logits, plain)
        probes.far(want, plain)


def test_an_adapter_around_a_key_projection_that_is_read(support):
    """Patched before: the keys would come without the adapter."""
    model = tiny.model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    vlmprune.patch(model, "tome", keep=0.3)
    wrapped = lora(model)
    with pytest.raises(UnsupportedError, match=re.escape("tower layer") + ".*patch the model again"):
        wrapped(**prompt)
    vlmprune.patch(wrapped, "tome", keep=0.3)
    wrapped(**prompt)


def test_what_to_patch_of_an_adapted_model():
    wrapped = lora(tiny.model())
    with pytest.raises(UnsupportedError, match="the PEFT model around it"):
        vlmprune.patch(wrapped.base_model, "random", keep=3)  # the LoraModel in between
    assert vlmprune.patch(wrapped, "random", keep=3).model is wrapped.get_base_model()
