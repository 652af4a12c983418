"""Run folders as `vlmprune eval` leaves them, with made-up answers: what reports are tested on."""

from __future__ import annotations

import numpy as np

from vlmprune.eval.lmms import store

VERSIONS = {"vlmprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "lmms-eval": "0.7.3"}
#: How much of the picture a method misses at keep 0.25; it misses more at smaller budgets.
METHODS = {"fopru": 0.02, "vtc_cls": 0.03, "random": 0.3, "grid": 0.15, "pool": 0.35}
CONTROLS = ("none", "random", "grid", "pool", "downsample")


def cell(
    method="fopru", keep=0.25, task="pope", seed=None, *, model="scene-llava", label=None, samples=60, scale=1.0,
    missed=None, per_sample=True, metric="accuracy", higher=True, error=None, word="keep", per_picture=3, **more,
):  # fmt: skip
    """One cell file's contents; the same (task, seed of the made-up model) gives the same questions."""
    full = method == "none"
    missed = METHODS.get(method, 0.1) * 0.25 / (keep or 1) if missed is None and not full else (missed or 0.0)
    questions = np.random.default_rng(sum(map(ord, task)))
    hard, which = questions.random(samples), np.random.default_rng(abs(hash_of(method, label, keep, seed)))
    right = ((hard < 0.9) & (which.random(samples) >= missed)).astype(float)
    scores = right if higher else 1 - right
    total, after = 256, 256 if full or method == "fastv" else round(256 * keep) if keep <= 1 else keep
    average = after if method != "fastv" else (2 * 256 + 4 * 256 * keep) / 6
    label = label or method
    name = "--".join(
        [model, label, "full" if full else f"{word}-{keep}", task, *([] if seed is None else [f"seed-{seed}"])]
    )
    about = {
        "id": name, "model": model, "method": method, "label": label, "options": {}, "seed": seed, "task": task,
        "budget": None if full else {word: keep}, "control": method in CONTROLS,
    }  # fmt: skip
    made = {"format": 1, "cell": about, "key": name, "depends": {"versions": VERSIONS, "device": "cpu"} | more}
    if error is not None:
        return made | {"error": error, "elapsed_s": 1.0}
    rows = [
        {
            "doc": i, "cluster": f"picture-{i // per_picture}" if per_picture > 1 else str(i),
            "answer": "yes" if s else "no", "target": "yes", "score": float(s) if per_sample else None,
            "tokens_before": total, "tokens_after": after,
            "layer_average": average, "ttft_s": 0.01 + 1e-4 * average, "output_tokens": 1, "decode_tokens_per_s": None,
        }
        for i, s in enumerate(scores)
    ]  # fmt: skip
    summary = {
        "tokens_before": total, "tokens_after": after, "layer_average": average, "ttft_s": 0.01 + 1e-4 * average,
        "decode_tokens_per_s": None, "peak_memory_bytes": None,
    }  # fmt: skip
    value = scale * float(scores.mean())
    metrics = {metric: {"value": value, "higher_is_better": higher}, "other": {"value": 0.5, "higher_is_better": True}}
    made |= {"metrics": metrics, "metric": metric, "samples": rows, "summary": summary, "elapsed_s": 2.0, "error": None}
    return made


def hash_of(*parts):
    """A number that is the same in every process, unlike `hash`."""
    return sum((i + 1) * ord(c) for i, c in enumerate(repr(parts)))


def grid_of(methods=("none", "fopru", "random"), keeps=(0.25, 0.1), tasks=("pope",), seeds=(0, 1, 2), **more):
    """The cells of a whole run."""
    return [
        cell(method, keep, task, seed, **more)
        for method in methods
        for keep in ((None,) if method == "none" else keeps)
        for seed in (seeds if method == "random" else (None,))
        for task in tasks
    ]


def write(folder, cells, missing=(), **info):
    """Write the files of a run; `missing` names planned cells that have no file."""
    for one in cells:
        store.write_cell(folder, one)
    ids = [one["cell"]["id"] for one in cells] + list(missing)
    about = {
        "format": 1, "config": {"model": "scene-llava"},
        "config_text": "model: scene-llava\nkeep: [0.25, 0.1]  # two\n",
        "command": ["vlmprune", "eval", "my config.yaml"], "versions": VERSIONS, "commit": "abc1234", "device": "cpu",
        "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:10:00+00:00", "cells": ids,
        "keys": {name: name for name in ids}, "published": [],
    }  # fmt: skip
    store.write_run(folder, about | info)
    return folder
