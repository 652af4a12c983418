"""Other towers and language models than those of test_methods.py: served answers are those of transformers."""

from __future__ import annotations

import pytest
import serving_models
from serving_engine import Prompt, agree, expected

pytestmark = pytest.mark.vllm

SETTINGS = {
    "llava-siglip-mistral": [("fopru", 6), ("divprune", 0.5)],
    "next-mistral": [("vtc_cls", 20), ("fopru", 0.3), ("todre", 12, {"tau": None})],
    "qwen2_5_vl": [("fopru", 6), ("vscan", 0.4, {"layer": None})],
    "qwen3_vl": [("fopru", 6), ("vscan", 0.4, {"layer": None})],  # one that leaves rows as they are, one that merges
    "internvl": [("vtc_cls", 6), ("vscan", 0.4, {"layer": None})],
    "internvl-qwen3": [("fopru", 0.4)],
}
CASES = [(name, *case) for name, cases in SETTINGS.items() for case in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: serving_models.save(root / name, name) for name in SETTINGS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
def test_random_models(engines, folders, case, record_property):
    name, method, keep, *more = case
    options = {"keep": keep, **(more[0] if more else {})}
    prompts = serving_models.prompts(60)
    if name in serving_models.OTHERS:
        prompts += mixed()
    engine, wanted = engines(folders[name], method, **options), expected(folders[name], prompts, method, **options)
    record_property("worst", agree(engine.ask(prompts), wanted))
    if name in serving_models.OTHERS:  # again, from the caches, and in another order
        agree(engine.ask(prompts[::-1]), wanted[::-1])


def mixed():
    """Several pictures in both orders and the same one twice, other budgets, and text alone."""
    two = serving_models.prompts(12, pictures=2)
    two += [Prompt(prompt.images[::-1], prompt.question) for prompt in two[:6]]
    two += [Prompt(prompt.images[:1] * 2, prompt.question) for prompt in two[:6]]
    more = [prompt.at(other) for prompt in two for other in (1.0, 0.2, 2)]
    return two + more + [Prompt((), prompt.question) for prompt in two[:6]]
