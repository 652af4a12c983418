"""Workloads on tiny models."""

from __future__ import annotations

import pytest

from vlmprune.eval.bench.workload import make_workload


@pytest.fixture
def work(tiny_model):
    """`work(batch, **options of tiny.model)`: a workload with 7 text tokens per prompt."""

    def make(batch=1, **options):
        return make_workload(tiny_model(**options), batch, 7)

    return make
