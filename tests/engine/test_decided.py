"""A method's decision that does not fit is refused with the name of the method, the place and the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch

import vlmprune
from vlmprune import Cut, Decoder, Merge, Method
from vlmprune.parts import Clusters, Hidden, Pick, PixelCut, ProjectorCut, TowerCut, Vision, keep_patches

PLACES = {"decoder": "decoder layer 1", "tower": "tower layer 1", "projector": "in front of the projector"}
PLACES |= {"pixels": "the cut of pixels"}


@dataclass(frozen=True)
class Author(Method):
    """Decides what it is told to."""

    kind: str = "decoder"
    spoil: Callable[[Any], Any] = lambda decided: decided

    def cuts(self, facts):
        match self.kind:
            case "decoder":
                return [Cut(Decoder(1), (), self.reduction)]
            case "tower":
                return [TowerCut(Vision(1), (Hidden(),), self.clusters)]
            case "projector":
                return [ProjectorCut((Hidden(),), self.pick)]
        return [PixelCut(self.spoil)]

    def reduction(self, seen, layout):
        right = keep_patches(layout.patches & (layout.col % 2 == 0), layout, None, "all")
        entries = torch.arange(layout.width).expand(layout.alive.shape)
        anchors = entries - layout.col % 2
        right = replace(right, merge=Merge(anchors, torch.ones(layout.alive.shape)), scores=torch.rand(anchors.shape))
        return self.spoil(right)

    def clusters(self, seen, sizes):
        views, tokens = sizes.shape
        return self.spoil(Clusters((torch.arange(tokens) // 2).expand(views, -1), (tokens + 1) // 2))

    def pick(self, seen, views):
        shape = seen[Hidden()].shape[:2]
        entries = torch.arange(shape[1]).expand(shape)
        return self.spoil(Pick(torch.ones(shape[0], shape[1] - 1, dtype=torch.bool), Merge(entries, torch.ones(shape))))


def run(kind: str, spoil: Callable[[Any], Any]) -> torch.Tensor:
    model = tiny.shared(family="llava")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    with vlmprune.patch(model, Author(kind, spoil)), torch.no_grad():
        return model(**prompt).logits


def told(**changed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Spoils fields of a decision."""
    return lambda decided: replace(decided, **{name: how(getattr(decided, name)) for name, how in changed.items()})


def flowing(**changed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return told(merge=told(**changed))


def put(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda numbers: numbers.clone().fill_(number)


@pytest.mark.parametrize("kind", PLACES)
def test_what_fits_runs(kind):
    assert run(kind, lambda decided: decided).isfinite().all()


@pytest.mark.parametrize("kind", PLACES)
def test_something_else_is_named(kind):
    with pytest.raises(TypeError, match=f"^Author, .*{PLACES[kind]}: reduce returned .*NoneType"):
        run(kind, lambda decided: None)


WRONG = {
    ("decoder", "keep of shape"): told(keep=lambda keep: keep[:, :-1]),
    ("decoder", "keep of shape .1, 1."): told(keep=lambda keep: keep[:, :1]),  # would be broadcast
    ("decoder", "keep of torch.int64, and bools"): told(keep=lambda keep: keep.long()),
    ("decoder", "keep=list"): told(keep=lambda keep: keep.tolist()),
    ("decoder", "keep on meta"): told(keep=lambda keep: keep.to("meta")),
    ("decoder", "scores of shape"): told(scores=lambda scores: scores[0]),
    ("decoder", "scores of torch.int64, and floats"): told(scores=lambda scores: scores.long()),
    ("decoder", "soft of shape"): told(soft=lambda _: torch.ones(3)),
    ("decoder", "counts=7"): told(counts=lambda _: 7),
    ("decoder", "counts=.2.5."): told(counts=lambda _: [2.5]),
    ("decoder", "counts=.900., and the images have"): told(counts=lambda _: [900]),
    ("decoder", "counts=.2, 2., and the images have"): told(counts=lambda _: [2, 2]),
    ("decoder", "promised .2. kept tokens"): told(counts=lambda _: [2]),
    ("decoder", "promised .1. kept patches"): lambda it: replace(it, counts=[int(it.keep.sum())], patches=[1]),
    ("decoder", "merge=Tensor"): told(merge=lambda merge: merge.into),
    ("decoder", "merge.into of torch.int32, and longs"): flowing(into=lambda into: into.int()),
    ("decoder", "merge.weight of shape"): flowing(weight=lambda weight: weight[:, 1:]),
    ("decoder", "merge.source of shape"): flowing(source=lambda _: torch.zeros(1, 2, dtype=torch.long)),
    ("decoder", "merge.into with numbers of tokens outside 0"): flowing(into=put(-1)),
    ("decoder", "merge.source with numbers"): lambda it: flowing(source=lambda _: it.merge.into + 99)(it),
    ("tower", "into of shape"): told(into=lambda into: into[:, 1:]),
    ("tower", "into of torch.float32, and longs"): told(into=lambda into: into.float()),
    ("tower", "into with numbers of clusters outside 0"): told(into=put(99)),
    ("tower", "count=True, which is not one of 1"): told(count=lambda _: True),
    ("tower", "count=99, which is not one of 1"): told(count=lambda _: 99),
    ("tower", "clusters without a token"): told(count=lambda count: count + 1),
    ("projector", "keep of shape"): told(keep=lambda keep: keep[:, 1:]),
    ("projector", "merge.weight of torch.int64, and floats"): flowing(weight=lambda weight: weight.long()),
    ("projector", "merge.into with numbers of tokens outside 0"): flowing(into=put(99)),
    ("pixels", "pixels of shape"): lambda pixels: pixels[..., 1:],
    ("pixels", "pixels of torch.float16, and they were"): lambda pixels: pixels.half(),
}


@pytest.mark.parametrize(("kind", "what"), WRONG)
def test_what_does_not_fit_is_named(kind, what):
    promise = what.startswith("promised")
    with pytest.raises((TypeError, ValueError, RuntimeError), match=what) as caught:
        run(kind, WRONG[kind, what])
    assert promise or f"Author, the cut {'in front' if kind == 'projector' else ''}" in str(caught.value)
    assert promise or PLACES[kind] in str(caught.value)
