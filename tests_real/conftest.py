"""Models of real weights, assembled once into a folder that stays: `make test-real` (docs/real-weights.md)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import real_weights


@pytest.fixture(scope="session")
def real():
    """The folder of `scripts/real_weights.py`."""
    folder = Path(os.environ["VLMPRUNE_REAL"])
    if not (folder / "llava-next" / "processor_config.json").exists():
        real_weights.assemble(folder)
    return folder


@pytest.fixture(scope="session")
def load(real):
    """`load(name, dtype)`: one of the models, loaded once."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made.clear()  # one at a time in memory
            made[name, dtype] = AutoModelForImageTextToText.from_pretrained(real / name, dtype=dtype).eval()
        return made[name, dtype]

    return get
