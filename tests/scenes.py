"""Models of every family with what they are shown, methods started on them, and their traces carried out by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import pytest
import reference
import tiny
import tiny_qwen
import torch
from tiny import CACHE

import vlmprune
from vlmprune import UnsupportedError, registry

F64 = torch.float64
ONEVISION = {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"}
# models, and what they are shown
FAMILIES = {
    "llava": ({}, "images"),
    "llava-siglip-qwen2": ({"tower": "siglip", "text": "qwen2"}, "images"),
    "next": ({"family": "llava_next"}, "images"),
    "next-mistral": ({"family": "llava_next", "text": "mistral", "sliding_window": 24}, "images"),
    "vip": ({"family": "vipllava"}, "images"),
    "onevision": (ONEVISION, "images"),
    "onevision-shrunk": (ONEVISION, "shrunk"),
    "onevision-video": (ONEVISION, "videos"),
    "next-video": ({"family": "llava_next_video"}, "images"),
    "next-video-video": ({"family": "llava_next_video"}, "videos"),
}
# the same, for families whose positions lie on three axes (tests/patches/test_qwen.py)
QWEN = {
    "qwen2-vl": ({"family": "qwen2_vl"}, "images"),
    "qwen2-vl-video": ({"family": "qwen2_vl"}, "videos"),
    "qwen2.5-vl": ({"family": "qwen2_5_vl"}, "images"),
    "qwen2.5-vl-video": ({"family": "qwen2_5_vl"}, "videos"),
    "qwen3-vl": ({"family": "qwen3_vl"}, "images"),
    "qwen3-vl-video": ({"family": "qwen3_vl"}, "videos"),
    "qwen3-vl-moe": ({"family": "qwen3_vl_moe"}, "images"),
}
# the same, of what has files of its own (tests/patches/test_glm.py, test_recurrent.py)
OWN = {
    "glm-4v": ({"family": "glm4v"}, "images"),
    "glm-4v-video": ({"family": "glm4v"}, "videos"),
    "qwen3.5": ({"family": "qwen3_5"}, "images"),
    "qwen3.5-video": ({"family": "qwen3_5"}, "videos"),
}
# (height, width) of the first image, large where its canvas is to be shrunk
LARGE = {"images": (40, 24), "shrunk": (90, 96), "videos": (40, 24)}
FORCED = [9, 33, 21]
FEW = ["llava", "next", "vip", "onevision", "next-video", "next-video-video"]  # of FAMILIES, where time matters
CUTTERS = ["fopru", "fastv", "todre", "tome"]  # before the language model, in it, both, and in the tower
OPTIONS = {
    "todre": lambda model: {"keep": 0.4, "tau": 0.35},
    "cdpruner": lambda model: {"keep": 0.4, "relevance": "embeddings"},
    "transprune": lambda model: {"keep": 0.3},
    "pixelprune": lambda model: {},
    "atp": lambda model: {"thresholds": tiny.modules(model, biases=(-0.3, 1.5))},
}
# methods of videos alone
MOVING = [name for name in registry.names() if "image" in registry.find(name).refuses_inputs]
REPEATS = ("pixelprune",)  # methods that drop what repeats in a picture, on packed towers alone
STILL = [name for name in registry.names() if name not in (*MOVING, *REPEATS)]
CROPS = ("globalcom2", "globalcom2_fixed", "lrs")  # methods of images that are cut into crops
REFUSED = {
    (name, kind): f"{kind} models have a single view" for name in CROPS for kind in (*tiny.SINGLE, *tiny_qwen.CLASSES)
}
REFUSED |= {
    (name, kind): "packs pictures of any size"
    for name in ("downsample", "flowcut", "pitome", "prumerge", "prumerge_plus", "showui", "tome", "visionzip")
    for kind in tiny_qwen.CLASSES
}
REFUSED[("transprune", "glm4v")] = "puts that through norms"
# by their own schedules these cut in front of the first layer with attention, or look at one without
STATES = ("atp", "catp", "pyramiddrop", "sparsevlm", "todre", "transprune", "v2drop", "vflowopt", "vscan")
REFUSED |= {(name, "qwen3_5"): "recurrent" for name in STATES}
REFUSED |= {(name, kind): "reads pictures whole" for name in REPEATS for kind in ("glm4v", "qwen3_5")}
REFUSED |= {
    (name, kind): "reads pictures whole" for name in REPEATS for kind in tiny.CLASSES.keys() - tiny_qwen.CLASSES.keys()
}
#: What the page on support says where an error's words, of which tests look for a part, are of one case.
TOLD = {
    "packs pictures of any size": "the tower packs pictures of any size into one sequence: nothing can be merged, "
    "picked or shrunk in it",
    "merges patches in or behind": "a token is no patch as the tower's layers leave it: none can be merged or picked",
    "shares a budget among the crops": "crops whose grid is known are needed",
    "chooses among the crops": "crops whose grid is known are needed",
    "have a single view": "crops whose grid is known are needed",
    "a still picture has none": "of videos alone",
    "reads pictures whole": "of towers that pack pictures of any size alone",
    "frames of a video are no screenshots": "of still pictures alone",
    "tokens alone": "in a prompt longer than the window, attention in a layer that has one says nothing of the rest",
    "recurrent": "it cuts in front of the first layer with attention, or looks at one that has none",
    "puts that through norms": "what blocks write goes through norms before it is added",
}
FALLBACK = {
    "vtc_cls": {"fallback": "received"},
    "globalcom2": {"score": "distinct"},
    "globalcom2_fixed": {"score": "distinct"},
    "todre": {"pivot": "mean"},
    "tcc": {"fallback": "received"},
}


@dataclass(frozen=True)
class Scene:
    """A model and what it is shown."""

    options: dict
    kind: str

    @cached_property
    def model(self):
        return tiny.shared(dtype=F64, **self.options)

    @property
    def label(self):
        """The scene's name."""
        return next(name for name, given in (FAMILIES | QWEN | OWN).items() if given == (self.options, self.kind))

    def apart(self, name=None):
        """Whether pictures are left out of prompts with videos: for a method of videos, or one placeholder for both."""
        return name in MOVING or self.model.config.model_type == "glm4v"

    def shown(self, name, prompt):
        """A prompt with pictures of which a method drops something."""
        repeats = name in REPEATS and self.model.config.model_type in tiny_qwen.CLASSES
        return tiny_qwen.repeated(self.model, prompt) if repeats else prompt

    def prompt(self, name=None):
        """Several pictures in one prompt; with videos, images and videos mixed, where a method takes images."""
        return self.shown(name, self.several(name))

    def several(self, name=None):
        """The prompt of `prompt`, of noise."""
        if self.kind == "videos" and self.apart(name):
            return tiny.prompt(self.model, [4, "video", 3, "video", 5], [], videos=[3, 3])
        if self.kind == "videos":
            parts = [4, "video", 3, "image", 2, "video", 5]
            return tiny.prompt(self.model, parts, [(40, 24)], videos=[3, 3])
        return tiny.prompt(self.model, [4, "image", 3, "image", 5], [LARGE[self.kind], (20, 70)])

    def rows(self, name=None):
        """Prompts that differ in all they can, of what a method takes: several images have one view each, to some."""
        if self.kind == "videos":
            parts = [([3, "video", 4], [], [3]), ([6], [], []), (["image", 2, "video", 9, "video"], [(20, 70)], [3, 3])]
            if self.apart(name):
                parts[2] = (["video", 9, "video"], [], [3, 3])
        else:
            sizes = [LARGE[self.kind], (20, 70), (24, 24)]
            # Qwen-VL tells neighbouring images apart by what stands between them
            two = ["image", 1, "image", 9] if reference.on_axes(self.model) else ["image", "image", 9]
            parts = [([3, "image", 4], sizes[:1], []), ([6], [], []), (two, sizes[1:], [])]
            if name and "single" in registry.find(name).refuses_inputs:
                parts[2] = (["image", 9], sizes[1:2], [])
        return [
            self.shown(name, tiny.prompt(self.model, p, sizes, seed=s, videos=videos, together=True))
            for s, (p, sizes, videos) in enumerate(parts)
        ]

    def questions(self, name=None):
        """Two prompts with one picture or video each."""
        if self.kind == "videos":
            made = [tiny.prompt(self.model, [3, "video", 4 + s], [], seed=s, videos=[2]) for s in range(2)]
        else:
            sizes = [LARGE[self.kind], (20, 70)]
            made = [tiny.prompt(self.model, [3, "image", 4 + s], [sizes[s]], seed=s, together=True) for s in range(2)]
        return [self.shown(name, prompt) for prompt in made]

    def refused(self, name):
        """Why a method cannot be had on this model, or not with what it is shown; None if it can."""
        return REFUSED.get((name, self.model.config.model_type)) or self.refusal(name)

    def refusal(self, name):
        """Why a method is not run on what it is shown, in its own words."""
        why = registry.find(name).refuses_inputs
        kinds = {"images": ["image"], "shrunk": ["image", "shrunk"], "videos": ["video", "shrunk"]}[self.kind]
        return next((why[kind] for kind in kinds if kind in why), None)


def claim(support, scene, name, *features):
    """Claim features of a method on a scene; where `start` skips, as refused."""
    for feature in features:
        support(feature, scene.label, name, refused=scene.refused(name))


def told(words):
    """What the page says of a refusal in these words; None of None."""
    return next((text for part, text in TOLD.items() if part in words), words) if words else None


def options(model, name):
    """Options of a method that make a difference, with its documented fallback where it needs a [CLS] token."""
    given = OPTIONS[name](model) if name in OPTIONS else {"keep": 0.4}
    clip = model.config.vision_config.model_type == "clip_vision_model"
    return given if clip else given | FALLBACK.get(name, {})


def start(scene, name):
    """Patch the scene's model with a method.

    What cannot be is refused in the words expected, and the test is skipped for all to see.
    """
    model, given = scene.model, options(scene.model, name)
    if words := REFUSED.get((name, model.config.model_type)):
        with pytest.raises(UnsupportedError, match=words):
            vlmprune.patch(model, name, **given)
    else:
        handle = vlmprune.patch(model, name, **given)
        if not (words := scene.refusal(name)):
            return handle
        told = pytest.raises(UnsupportedError, match=re.escape(f"{name} {words}"))
        with torch.no_grad(), handle, told:
            model(**scene.prompt())
    pytest.skip(f"refused, as it should be: {words}")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        ids: list of its tokens.
        features: `(tokens, dim)` per image and then per video, as the patched tower makes them.
        trace: what was cut; None where nothing was.
    """

    ids: list
    features: tuple = ((), ())
    trace: object = None


def replay(model, prompt, features, trace, wrong=False, positions=None, forced=FORCED, added=None):
    """As `replay_turns`, for a prompt that is all there is; also whether anything was cut."""
    turn = Turn(prompt["input_ids"][0].tolist(), features, trace)
    made = replay_turns(model, [turn], wrong, positions, forced=forced, prompt=prompt, added=added)
    return made, bool(changes_of(trace))


def changes_of(trace):
    """The cuts of a trace that took something of its first image."""
    now, changes = None, []
    for cut in trace.cuts:
        # padded to the longest image
        changed = cut.keep[0].sum() < trace.grids[0].tokens if now is None else not torch.equal(cut.keep[0], now)
        changes += [cut] if changed else []
        now = cut.keep[0]
    return changes


def stands(model, prompt, forced, astray):
    """Where the tokens of a prompt stand, and what is added behind layers (`reference.places`, `reference.injected`).

    Args:
        astray: whether forced tokens count on by their columns, wrong where positions lie on several axes.
    """
    place, length = reference.places(model, prompt, forced), prompt["input_ids"].shape[1]
    if astray and place.ndim > 1:
        place = torch.cat((place[:, :length], torch.arange(length, length + forced).expand(3, -1)), 1)
    return place, reference.injected(model, prompt, length + forced)


def replay_turns(model, turns, wrong=False, positions=None, at=-1, forced=FORCED, prompt=None, added=None):
    """Logits of the last turn's last token and of every forced one, from what the turns' traces say was kept.

    Args:
        wrong: swap one kept token of the first image of turn `at` at its first cut for a dropped one.
        positions: another position policy than the trace's in turn `at`.
        prompt: all turns in one, where positions lie on several axes.
        added: what the patched model adds behind layers (of `reference.injected`); None for what it does as it is.
    """
    config = model.config
    ids = torch.tensor([token for turn in turns for token in turn.ids] + list(forced))
    x, length = model.get_input_embeddings()(ids), len(ids) - len(forced)
    place, more = (torch.arange(len(x)), []) if prompt is None else stands(model, prompt, len(forced), positions)
    more = more if added is None else list(added)
    images, cuts, start = [], [], 0
    for turn in turns:
        first, end = len(images), start + len(turn.ids)
        film = "image_token_id" if config.model_type == "glm4v" else "video_token_id"
        for token, given in zip((config.image_token_id, getattr(config, film, None)), turn.features, strict=True):
            holes = (ids[start:end] == token).nonzero().flatten() + start if given else ids[:0]
            x = x.index_put((holes,), torch.cat(list(given))) if given else x
            edges = [0, *accumulate(len(f) for f in given)]
            assert edges[-1] == len(holes)
            images += [holes[a:b].tolist() for a, b in pairwise(edges)]
        cuts += [(cut, first, len(images), turn is turns[at]) for cut in (turn.trace.cuts if turn.trace else [])]
        start = end
    changes = changes_of(turns[at].trace) if wrong else []
    columns = list(range(len(x)))
    alive = [[True] * len(image) for image in images]
    for index in range(config.text_config.num_hidden_layers):
        x = x + more[index - 1][columns] if 0 < index <= len(more) else x
        for cut, first, end, twin in [c for c in cuts if c[0].layer == index]:
            drop = set()
            for i, image in list(enumerate(images))[first:end]:
                own = i - first
                keep = cut.keep[own, : len(image)].tolist()
                if changes and own == 0 and cut is changes[0] and any(keep):
                    gone = max(t for t, k in enumerate(keep) if k)
                    come = next(t for t in reversed(range(len(keep))) if not keep[t] and alive[i][t])
                    keep[gone], keep[come] = False, True
                if cut.merge is not None:
                    here = {c: r for r, c in enumerate(columns)}
                    matrix = x.new_zeros(len(image), len(image))
                    for t in range(len(image)):
                        if cut.merge.into[own, t] < len(image) and alive[i][t]:
                            matrix[cut.merge.into[own, t], t] += cut.merge.weight[own, t]
                    stay = [k and a for k, a in zip(keep, alive[i], strict=True)]
                    x = reference.merged(matrix, x, [here.get(c) for c in image], alive[i], stay)
                    more = [
                        reference.merged(matrix, side, image, alive[i], stay) if number >= index else side
                        for number, side in enumerate(more)
                    ]
                drop |= {c for c, k, a in zip(image, keep, alive[i], strict=True) if a and not k}
                alive[i] = [a and k for a, k in zip(alive[i], keep, strict=True)]
            policy = positions if positions and twin and place.ndim == 1 else cut.positions
            if policy == "contiguous":
                place = place - torch.tensor([sum(d < c for d in drop) for c in columns])
            stay = [r for r, c in enumerate(columns) if c not in drop]
            x, place, columns = x[stay], place[..., stay], [columns[r] for r in stay]
        x = reference.run_layer(model, index, x, place)
    x = model.model.language_model.norm(x)
    last = [max(r for r, c in enumerate(columns) if c < length)]
    return model.lm_head(x[last + [r for r, c in enumerate(columns) if c >= length]])


def with_cache(model, inputs, positions=None):
    """Logits at the last token and after every forced token, `(1 + forced, batch, vocab)`, with a cache."""
    inputs = dict(inputs)
    mask, on_axes = inputs["attention_mask"], reference.on_axes(model)
    if not on_axes:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    out = model(**inputs, use_cache=True)
    rows = torch.arange(len(mask))
    logits, cache, step = [out.logits[rows, last]], out[CACHE], mask.sum(1, keepdim=True)
    pictured = "pixel_values" in inputs or "pixel_values_videos" in inputs
    delta = model.model.rope_deltas if on_axes and pictured else 0  # the host's note, of which the engine must not ask
    for token in FORCED:
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        ids = torch.full((len(mask), 1), token)
        place = torch.stack((step, *[step + delta] * 3)) if on_axes else step
        out = model(input_ids=ids, attention_mask=mask, position_ids=place, **{CACHE: cache}, use_cache=True)
        logits.append(out.logits[:, -1])
        step = step + 1
    return torch.stack(logits)
