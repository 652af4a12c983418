"""Who takes part in `vlmprune bench --engine vllm`; what is measured runs in tests/serving."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmprune.eval.bench import shapes
from vlmprune.eval.bench.serving import rival_size
from vlmprune.parts.packing import Layouts
from vlmprune.patches import FAMILIES


def served(name):
    """As much of a served model as tells how many tokens a picture has."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        inner = AutoModelForImageTextToText.from_config(shapes.find_shape(name).config()).model
    family, layouts = FAMILIES[inner.config.model_type], Layouts()
    return SimpleNamespace(
        family=family, grid=lambda size: layouts.find(size, lambda: family.packing(inner, "image", size))
    )


@pytest.mark.parametrize("kept", [10, 300, 700])
def test_the_rival_has_fewer_tokens_and_the_most_pixels_that_make_so_many(kept):
    model = served("small-half-next")
    size = rival_size(model, (192, 192), kept)
    assert model.grid((192, 192)).tokens == 744
    # two crops, without the half of them that is padding, and the thumbnail: a square cannot have another number
    assert size == (96, 96)
    assert model.grid(size).tokens == 300


@pytest.mark.parametrize("name", ["small-next", "small-half"])
def test_there_is_no_rival_where_a_smaller_picture_has_as_many_tokens(name):
    assert rival_size(served(name), (384, 384), 64) is None
