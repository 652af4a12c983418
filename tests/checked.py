"""Tiny models for the tests of `vlmprune.check`, and what a pass looks like."""

from __future__ import annotations

from functools import cache

import tiny
import torch

from vlmprune.verify import CHECKS, Subject

FAMILIES = {
    "llava": {},
    "llava-siglip-qwen2": {"tower": "siglip", "text": "qwen2"},
    "next": {"family": "llava_next"},
    "next-mistral": {"family": "llava_next", "text": "mistral", "sliding_window": 24},
    "vip": {"family": "vipllava"},
    "onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
    "next-video": {"family": "llava_next_video"},
    "mixed": {"text": "qwen2", "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 12},
}

# methods that ask to see nothing that eager attention has
BLIND = {"dart", "flowcut", "m3", "showui", "vflowopt", "zero_tprune", "random", "grid", "pool", "downsample", "pitome"}
BLIND |= {"pixelprune", "prumerge", "prumerge_plus"}  # their attention is that of no heads


def unseen(method):
    """The lines that say nothing of such a method."""
    return ("taps",) if {*method.split("+")} <= BLIND else ()


@cache
def subject(kind, dtype=torch.float32):
    return Subject(tiny.shared(dtype=dtype, **FAMILIES[kind]))


def passes(report, but=()):
    """Everything that a CPU can check passed, but for `but`."""
    expected = {name: "-" if name in ("syncs", *unseen(report.method), *but) else "pass" for name in CHECKS}
    assert {line.check: line.outcome for line in report.lines} == expected, str(report)
    assert report.passed
    assert report.failed == []
