"""Other towers and language models than those of test_methods.py: served answers are those of transformers."""

from __future__ import annotations

import pytest
import serving_models
from serving_engine import agree, expected

pytestmark = pytest.mark.vllm

SETTINGS = {
    "llava-siglip-mistral": [("fopru", 6), ("divprune", 0.5)],
    "next-mistral": [("vtc_cls", 20), ("fopru", 0.3), ("todre", 12, {"tau": None})],
}
CASES = [(name, *case) for name, cases in SETTINGS.items() for case in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: serving_models.save(root / name, name) for name in serving_models.MODELS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
def test_random_models(engines, folders, case):
    name, method, keep, *more = case
    options = {"keep": keep, **(more[0] if more else {})}
    prompts = serving_models.prompts(60)
    agree(engines(folders[name], method, **options).ask(prompts), expected(folders[name], prompts, method, **options))
