"""Tests of serving. Those that start an engine need vLLM, in an environment of its own: `make test-serving`."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

VLLM = find_spec("vllm") is not None
if VLLM:
    os.environ.pop("TRITON_INTERPRET", None)  # vLLM would take Triton for usable
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in this process, where a test can look into it
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def pytest_collection_modifyitems(items):
    if not VLLM:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-serving"))


@pytest.fixture(scope="session")
def engines():
    """`engines(model, method, keep=64, ...)`: an engine that serves so; one lives at a time."""
    from serving_engine import Engines

    made = Engines()
    yield made
    made.stop()
