"""What a family beyond LLaVA is to its tests: how a tiny model of it is built, and prompts for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import tiny
import torch
from scenes import FALLBACK, MOVING, OPTIONS, REPEATS
from tiny import IMAGE, PAD, VIDEO, VOCAB
from torch import nn

FORCED = [9, 33, 21, 50]


@dataclass(frozen=True)
class Prompt:
    """The arguments of one call for one row, and the columns of every picture, images before videos."""

    inputs: dict
    items: list[list[int]]

    @property
    def ids(self) -> torch.Tensor:
        return self.inputs["input_ids"]

    def without(self) -> dict:
        """The text alone, as a later turn brings it."""
        return {name: self.inputs[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Kin:
    """A family: how a tiny model of it is built, and what is special about it.

    Attributes:
        build: makes the model.
        pictures: makes the pixel arguments of pictures, one number each: seeds.
        tokens: placeholders of every part of a picture, by its number; text stands between the parts.
        whole: whether a picture is one item, and not every part of it.
        shows: what a scene and what three rows consist of.
        prefix: whether the prompt up to the answer is one block that sees itself.
        blocks: whether every picture sees itself.
        origin: position of the first token.
        join: arguments of several prompts as one batch's; pixels are concatenated by default.
        tolerance: of logits, in float64; PaliGemma is as near by hand unpruned (float32 inside its norms).
        has_cls: whether the tower has a [CLS] token.
        refused: methods that cannot be had, by words of the error.
    """

    name: str
    build: Callable[..., nn.Module]
    pictures: Callable[..., dict]
    tokens: Callable[[int], list[int]]
    whole: bool = False
    prefix: bool = False
    blocks: bool = False
    origin: int = 0
    join: Callable[[list[dict]], dict] | None = None
    tolerance: float = 1e-9
    has_cls: bool = False
    shows: list | None = None
    refused: dict = field(default_factory=dict)

    def refusal(self, name: str) -> str | None:
        """Words of the error by which a method cannot be had, or not with what the scene shows; None if it can."""
        still = self.shows is not FILMS and "a still picture has none"
        whole = "reads pictures whole" if name in REPEATS else None
        return self.refused.get(name) or whole or (still if name in MOVING else None) or None

    def windowed(self) -> bool:
        """Whether a layer of the language model sees a window alone."""
        text = self.model().config.get_text_config()
        return "sliding_attention" in (getattr(text, "layer_types", None) or [])

    def model(self, **options) -> nn.Module:
        return shared(self.build, **options)

    def prompt(self, parts: list, seed: int = 0) -> Prompt:
        """A prompt of `parts`: numbers of text tokens, and ("image", number) or ("video", number)."""
        model, generator = self.model(), torch.Generator().manual_seed(seed + 100)
        ids, items, shown = [], {"image": [], "video": []}, {"image": [], "video": []}
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(6, VOCAB, (part,), generator=generator).tolist()
                continue
            kind, number = part
            shown[kind].append(number)
            pieces, found = self.tokens(number) if kind == "image" else [2 * 17], []
            for at, piece in enumerate(pieces):
                ids += [7] if at else []
                found.append(list(range(len(ids), len(ids) + piece)))
                ids += [IMAGE if kind == "image" else VIDEO] * piece
            items[kind] += [list(chain(*found))] if self.whole else found
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if self.blocks or self.prefix:
            inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long() * int(self.blocks)
        if any(shown.values()):
            given = self.pictures(model, shown["image"], shown["video"], seed)
            kind = next(model.parameters()).dtype
            inputs |= {name: value.to(kind) if value.is_floating_point() else value for name, value in given.items()}
        return Prompt(inputs, items["image"] + items["video"])

    def batch(self, prompts: list[Prompt], side: str = "left") -> dict:
        """Single prompts padded into one batch."""
        width, rows = max(p.ids.shape[1] for p in prompts), {}
        fills = {"input_ids": PAD, "attention_mask": 0, "token_type_ids": 0}
        for name, fill in fills.items():
            if name in prompts[0].inputs:
                padded = []
                for p in prompts:
                    value = p.inputs[name]
                    more = value.new_full((1, width - value.shape[1]), fill)
                    padded.append(torch.cat((more, value) if side == "left" else (value, more), 1))
                rows[name] = torch.cat(padded)
        shown = [{n: v for n, v in p.inputs.items() if n not in fills} for p in prompts]
        return rows | (self.join(shown) if self.join else joined(shown))

    def scene(self, seed: int = 0) -> Prompt:
        """Several pictures with text around them."""
        return self.prompt((self.shows or TEXTS)[0], seed)

    def rows(self) -> list[Prompt]:
        """Prompts that differ in all they can: one picture, none, two of them and nothing in front."""
        return [self.prompt(each, seed) for seed, each in enumerate((self.shows or TEXTS)[1:])]


def joined(shown: list[dict]) -> dict:
    """The pixel arguments of several prompts side by side."""
    names = dict.fromkeys(name for each in shown for name in each)
    return {name: torch.cat([each[name] for each in shown if name in each]) for name in names}


def lively(model: nn.Module) -> nn.Module:
    """Weights that make the outputs depend strongly on all that goes in; the default init hardly reacts to anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            elif weight.ndim > 1:
                weight.mul_(4.0 if "embed" not in name else 12.0)
            elif "lambda" in name:
                weight.fill_(1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


@lru_cache
def shared(build: Callable[..., nn.Module], **options) -> nn.Module:
    """A model that a family builds, once a process; what a test leaves on it is taken off (tests/conftest.py)."""
    torch.manual_seed(0)
    model = lively(build(**options)).to(torch.float64)
    tiny.SHARED.append(model)
    return model


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def options(kin: Kin, name: str) -> dict:
    """Options of a method that make a difference, with its documented fallback where there is no [CLS] token."""
    given = OPTIONS[name](kin.model()) if name in OPTIONS else {"keep": 0.4}
    return given if kin.has_cls else given | FALLBACK.get(name, {})


TEXTS = [[4, ("image", 1), 3, ("image", 0), 5], [3, ("image", 0), 4], [6], [("image", 1), 2, ("image", 2), 9]]
BOTH = [
    [4, ("video", 1), 3, ("image", 0), 2, ("video", 0), 5],
    [3, ("video", 0), 4],
    [6],
    [("image", 1), 2, ("video", 2), 9],
]
FILMS = [[4, ("video", 1), 3, ("video", 0), 5], [3, ("video", 0), 4], [6], [("video", 1), 2, ("video", 2), 9]]
