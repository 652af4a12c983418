"""A pruned model beside the benchmark's oracle."""

from __future__ import annotations

import torch

from vlmprune.eval.bench.oracle import Oracle, PlainRun

STEPS = 4


def compare(work, handle):
    """Largest difference of logits, at the first token and at STEPS decoded ones."""
    pruned = PlainRun(work)
    with torch.no_grad():
        token = first = pruned.prefill()
        logits, tokens = [pruned.logits], []
        for number in range(STEPS):
            token = pruned.step(token, pruned.place(number))
            tokens.append(token)
            logits.append(pruned.logits)
        trace = handle.trace
        handle.unpatch()
        oracle = Oracle(work, trace)
        assert oracle.prefill().shape == first.shape
        others = [oracle.logits]
        for number, token in enumerate([first, *tokens[:-1]]):
            oracle.step(token, oracle.place(number))
            others.append(oracle.logits)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(logits, others, strict=True)), oracle
