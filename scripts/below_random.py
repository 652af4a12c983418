"""Why some methods fall below `random` on scene-llava: which tokens of the things in a picture survive their cuts.

    python scripts/below_random.py

For every method and a variant of it: the decoder layer of each cut, the share of all visual tokens behind it and that
of the tokens that show a thing (of which a blind choice keeps the same share), and right answers. Then what V2Drop goes
by: how far each decoder layer moves tokens that show a thing, and those of the background, in the unpruned model.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch
from testbed import scenes, scoring, split

import vlmprune
from vlmprune.eval import tasks, testbed
from vlmprune.runtime import loading

MODEL, KEEP = "scene-llava", 0.5
LATER = (11, 17, 22)  # of 32: here in front of layers 2, 3 and 4 of 6, where the first of the published ones is layer 1
JOBS = [
    ("random", {}),
    ("v2drop", {}),
    ("v2drop", {"prune_layers": LATER}),
    ("sparsevlm", {}),
    ("sparsevlm", {"version": "+"}),
    ("sparsevlm", {"positions": "original"}),
    ("sparsevlm", {"prune_layers": LATER}),
    ("pyramiddrop", {}),
    ("pyramiddrop", {"prune_layers": (3, 7, 16)}),
    ("showui", {}),
]


def on_things(question: testbed.Question) -> np.ndarray:
    """(patches,) bool, the patches that show a thing."""
    name, number = question.picture_id.split("-")
    return scenes.patch_owner(split.test_scene(name, split.SIZES[name][2] + int(number)).owner) > 0


def seen_by(loaded: loading.Loaded, method: str, options: dict, questions: list[testbed.Question]) -> str:
    """What the cuts of a method keep, and how many of the questions it answers right."""
    shares: dict[int, list[tuple[float, float]]] = {}
    right = 0
    with vlmprune.patch(loaded.model, method, keep=KEEP, **options) as handle:
        for question in questions:
            right += scoring.answer(loaded.model, loaded.processor, [question]) == [question.answer]
            things = on_things(question)
            for cut in handle.trace.cuts:
                keep = cut.keep[0].numpy()
                shares.setdefault(cut.layer, []).append((keep.mean(), keep[things].mean()))
    means = {layer: np.mean(found, 0) for layer, found in shares.items()}
    cuts = ", ".join(f"{layer}: {100 * whole:.0f} % / {100 * mine:.0f} %" for layer, (whole, mine) in means.items())
    return f"{cuts:<52} {100 * right / len(questions):.0f} % right"


@torch.no_grad()
def moves(loaded: loading.Loaded, questions: list[testbed.Question]) -> np.ndarray:
    """(layers, 2) how far layers move tokens that show a thing, and others: means of L2 lengths over pictures."""
    found = []
    for question in questions:
        inputs = loading.model_inputs(loaded, [question.image], question.question)
        image = inputs["input_ids"][0] == loaded.model.config.image_token_id
        states = loaded.model(**inputs, output_hidden_states=True).hidden_states
        length = torch.stack([(b - a)[0, image].norm(dim=-1) for a, b in itertools.pairwise(states[:-1])])
        things = torch.from_numpy(on_things(question))
        found.append(torch.stack((length[:, things].mean(1), length[:, ~things].mean(1)), 1).numpy())
    return np.mean(found, 0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=56, help="the first so many of docs/table.md of each split")
    limit = parser.parse_args().questions
    loaded = loading.load(loading.find_model(MODEL))
    for name in ("sparse", "crowded"):
        questions = tasks.mixed(name)[:limit]
        print(f"\n{name}, keep={KEEP}: in front of layer: tokens left / of those on things, answers")
        for method, options in JOBS:
            told = ", ".join([method, *(f"{word}={value}" for word, value in options.items())])
            print(f"{told:<40} {seen_by(loaded, method, options, questions)}", flush=True)
        print("L2 length of what a layer adds: to tokens on things, to others")
        for layer, (mine, rest) in enumerate(moves(loaded, questions)):
            print(f"layer {layer}: {mine:.2f}, {rest:.2f}")


if __name__ == "__main__":
    main()
