"""Other families, towers and language models: served answers are those of transformers."""

from __future__ import annotations

import pytest
import serving_models
from serving_engine import agree, expected, questions

pytestmark = pytest.mark.vllm

SETTINGS = {
    "onevision": [("fopru", 40), ("vtc_cls", 0.2, {"fallback": "received"}), ("divprune", 24), ("pool", 30)],
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


@pytest.mark.parametrize(
    ("method", "options"),
    [("fopru", {"keep": 128}), ("vtc_cls", {"keep": 0.1}), ("divprune", {"keep": 64}), ("pool", {"keep": 200})],
)
def test_anyres_of_the_embedded_model(engines, method, options):
    prompts = questions("scene-llava-next")
    found = engines("scene-llava-next", method, **options).ask(prompts)
    agree(found, expected("scene-llava-next", prompts, method, **options))
