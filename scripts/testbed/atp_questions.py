"""Questions about drawn scenes, to train ATP's modules for an embedded model on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmprune.methods.atp.data import Row

from . import asking, scenes


class SceneQuestions(Sequence[Row]):
    """Freshly drawn scenes of the embedded models' kind, one question each; no handwriting of the test split."""

    def __init__(self, length: int, seed: int = 0):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        rng = np.random.default_rng([7, self.seed, index])
        crowded = rng.random() < 0.1
        scene = scenes.crowded_scene(rng) if crowded else scenes.quadrant_scene(rng, size=(17, 25))
        question, answer = asking.training_questions(rng, scene, 8)[int(rng.integers(8))]
        return scene.image(), question, answer
