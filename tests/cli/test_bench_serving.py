"""`vlmprune bench --engine vllm`: its flags; what it measures runs in tests/serving."""

from __future__ import annotations

import pytest

from vlmprune.serving import settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--engine", "vllm", "--csv", "x.csv"], "--engine serves requests: --csv would have no effect"),
        (["--engine", "vllm", "--batch", "2"], "--batch would have no effect"),
        (["--concurrency", "8"], "--concurrency is of --engine vllm"),
        (["--engine", "vllm", "--concurrency", "0"], "--concurrency '0' is not a whole number of at least 1"),
        (["--engine", "vllm", "--keep", "x"], "neither a count"),
        (["--engine", "vllm", "--method", "fopro"], "Did you mean 'fopru'"),
        (["--engine", "vllm"], "and found none"),
        (["--engine", "other"], "other"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(cli, monkeypatch, given, words):
    monkeypatch.setattr(settings, "installed", lambda name: None)
    code, out, err = cli("bench", *given)
    assert (code, out) == (2, "")
    assert words in err
