"""What the model that lmms-eval asks is tested on."""

from __future__ import annotations

import pytest
import tiny_folders

SIZES = {"llava": [(24, 24), (40, 30), (24, 60)], "llava_next": [(24, 24), (48, 24), (30, 70), (48, 48)]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny random models on disk, by family."""
    root = tmp_path_factory.mktemp("tiny")
    return {family: str(tiny_folders.save(root / family, family)) for family in SIZES}


@pytest.fixture(scope="session")
def docs(tmp_path_factory):
    """Eleven questions of different lengths about no, one or two pictures of different shapes, by family."""
    import harness  # not all tests here need lmms-eval

    made = {}
    for family, sizes in SIZES.items():
        rows = []
        for i in range(11):
            shown = [tiny_folders.noise_picture(*sizes[(i + k) % len(sizes)], seed=10 * i + k) for k in range(i % 3)]
            words = " ".join(f"word{(7 * i + k) % 40}" for k in range(1 + (5 * i) % 7))
            rows.append({"question": words, "answer": "", "image": [harness.as_file(p) for p in shown]})
        made[family] = harness.save_docs(tmp_path_factory.mktemp(f"docs_{family}"), rows)
    return made
