"""Conversations of several turns for the tests of the engine, held with a pruned model and run by hand."""

from __future__ import annotations

from contextlib import nullcontext

import probes
import reference
import tiny
import tiny_qwen
import torch
from reference import Rule
from scenes import Turn
from tiny import CACHE
from transformers import DynamicCache, StaticCache

RULES = {
    "0": [Rule(0)],
    "0-original": [Rule(0, positions="original")],
    "2": [Rule(2)],
    "2-original": [Rule(2, positions="original")],
    "several": [Rule(0, 2), Rule(2, 5, 3, positions="original"), Rule(3, 4, 3)],
    "merge": [Rule(1, merge=True)],
}
FEW = {name: RULES[name] for name in ("0", "2-original", "several")}
MODELS = {
    "llama": {},
    "next": {"family": "llava_next"},
    "mistral-window": {"text": "mistral", "sliding_window": 9},
    "qwen2-mixed": {"text": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
}
TURNS = [([3, "image", 6], [(24, 24)]), ([2, "image", 1, "image", 4], [(40, 24), (24, 60)]), (["image", 5], [(24, 60)])]
ROWS = [  # what three prompts bring to three turns
    [([3, "image", 6], [(24, 24)]), ([2, "image", 4], [(40, 24)]), ([4], [])],
    [([9], []), (["image", 1, "image", 2], [(24, 60), (24, 24)]), (["image", 3], [(24, 24)])],
    [(["image", 2, "image", 4], [(40, 24), (24, 60)]), ([5], []), ([2, "image", 2], [(24, 60)])],
]


def turns_of(model, parts=TURNS):
    return [tiny.prompt(model, p, sizes, seed) for seed, (p, sizes) in enumerate(parts)]


def joined(turns, *, images=True):
    """Turns as one prompt; `images=False` has those of the last turn alone."""
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    pictured = [turn for turn in (turns if images else turns[-1:]) if "pixel_values" in turn]
    return (tiny.batch(pictured) if pictured else {}) | text(ids, turns[0])


def count(turn):
    return len(turn.get("image_grid_thw", turn.get("pixel_values", ())))


def expect(model, turns, rules, forced):
    """`rules`: for every turn its own."""
    steps = [(count(turn), mine) for turn, mine in zip(turns, rules, strict=True)]
    with torch.no_grad():
        return reference.run(model, joined(turns), [], forced[0].tolist(), turns=steps).logits


def moved(rules):
    """The same cuts with the other position policy in the first."""
    return [*reference.other_positions(rules[:1]), *rules[1:]]


def with_answer(turn, answer):
    ids = torch.cat((turn["input_ids"], answer), 1)
    return turn | text(ids, turn)


def text(ids, turn):
    """What goes with the ids of one row, as in a turn of the same model."""
    types = {"mm_token_type_ids": tiny_qwen.types(ids)} if "mm_token_type_ids" in turn else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | types


def answered(turns, answer):
    """The same turns, each but the last with the answer that it got."""
    return [*(with_answer(turn, answer) for turn in turns[:-1]), turns[-1]]


def caches(model, kind, columns=400):
    text = model.config.text_config
    return DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=columns)


@torch.no_grad()
def by_hand(model, turn, cache, before, **extra):
    """A turn by a call of the model, its new tokens alone; `before` columns are in the cache's conversation."""
    length = turn["input_ids"].shape[1]
    mask = torch.ones(1, before + length, dtype=torch.long)
    return model(**(turn | {"attention_mask": mask} | extra), **{CACHE: cache}, use_cache=True)


@torch.no_grad()
def converse(model, rows, kind, ways, forced):
    """Logits `(rows, 1 + forced, vocab)` behind the last turn of a batch, padded as `ways` says in every turn."""
    cache, ids, mask = caches(model, kind), None, None
    for turn, way in enumerate(ways):
        new = tiny.batch([row[turn] for row in rows], way)
        ids = new["input_ids"] if ids is None else torch.cat((ids, new["input_ids"]), 1)
        mask = new["attention_mask"] if mask is None else torch.cat((mask, new["attention_mask"]), 1)
        asked = new | {"input_ids": ids, "attention_mask": mask}
        last = turn == len(ways) - 1
        steps = forced if last else forced[:, :1]
        got = probes.generated_logits(model, asked, steps, **{CACHE: cache}, disable_compile=True)
        if not last:  # what was forced was read, what came behind it was not
            ids, mask = torch.cat((ids, steps), 1), torch.cat((mask, torch.ones_like(steps)), 1)
    return got


def padded(ids, columns):
    """Ids and mask of one row behind columns of padding."""
    fill = torch.full((1, columns), tiny.PAD)
    mask = torch.cat((torch.zeros_like(fill), torch.ones_like(ids)), 1)
    return {"input_ids": torch.cat((fill, ids), 1), "attention_mask": mask}


def talk(model, handle, turns, padding, cache):
    """A conversation of one row through `generate`, behind columns of padding.

    `turns` are (kind, inputs), where "plain" ones run while the patch is disabled and "text" ones have no picture.

    Returns:
        The turns as they went, and the logits behind the last one and behind every token that was forced after it.
    """
    done, forced = [], probes.random_tokens(1, 2, seed=padding)
    for kind, turn in turns:
        before = torch.tensor([[token for said in done for token in said.ids]], dtype=torch.long)
        asked = turn | padded(torch.cat((before, turn["input_ids"]), 1), padding)
        with handle.disabled() if kind == "plain" else nullcontext():
            features = reference.image_features(model, turn), []
            logits = probes.generated_logits(model, asked, forced, **{CACHE: cache}, disable_compile=True)[0]
        trace = handle.trace if kind == "pruned" else None
        done.append(Turn(turn["input_ids"][0].tolist() + forced[0].tolist(), features, trace))
    last = done[-1]
    done[-1] = Turn(last.ids[: -forced.shape[1]], last.features, last.trace)
    return done, logits, forced[0].tolist()
