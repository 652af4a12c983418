"""The trained part of ATP: modules that turn attention scores into thresholds, and what they were trained for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from vlmprune import embedded
from vlmprune.parts.budget import check_keep
from vlmprune.parts.cuts import schedule_layers
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.options import Must, checked, hints, is_number, is_whole

__all__ = ["TRAIN", "AtpConfig", "Norm", "Threshold", "Thresholds", "load", "pool_scores", "save"]

CONFIG, WEIGHTS = "atp_config.json", "atp.safetensors"
FORMAT = 1
TRAIN = "python scripts/train_atp.py --model MODEL --data QUESTIONS.jsonl --average 0.25 --out FOLDER"

Norm = Literal["minmax", "none", "logits"]
POSITIVE = Must("a whole number of at least 1", partial(is_whole, least=1))


def pool_scores(scores: torch.Tensor, among: torch.Tensor, bins: int) -> torch.Tensor:
    """Adaptive average pool of the `among` entries of every row, in order: `(rows, tokens)` -> `(rows, bins)`."""
    n = among.sum(-1, keepdim=True)
    order = (~among).to(torch.uint8).sort(dim=-1, stable=True).indices
    total = nn.functional.pad(torch.where(among, scores, 0).gather(-1, order).cumsum(-1), (1, 0))
    edge = torch.arange(bins, device=scores.device)
    start, end = edge * n // bins, ((edge + 1) * n + bins - 1) // bins
    return (total.gather(-1, end) - total.gather(-1, start)) / (end - start).clamp(min=1)


@dataclass(frozen=True)
class AtpConfig:
    """What modules were trained for; written beside their weights.

    Attributes:
        model: facts of the model (`ModelFacts`), which must be those of the model that is patched.
        average: visual tokens per image (int) or their fraction that training aimed at, as a mean over `mean_over`.
        layers: the 1-based decoder layers of this model after which tokens go.
        form: how scores become thresholds, "pooled" or "means".
        hidden: width of a module.
        pool: P of the pooled form.
        score_norm: "minmax" (per image over the tokens left), "none" (attention), "logits" (self before the softmax).
        strides, lambda_sample: the spatial score.
        mean_over: "layers" or "modules".
    """

    model: dict[str, Any]
    average: int | float
    layers: tuple[int, ...]
    form: Literal["pooled", "means"] = "pooled"
    hidden: Annotated[int, POSITIVE] = 256
    pool: Annotated[int, POSITIVE] = 64
    score_norm: Norm = "minmax"
    strides: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 24)
    lambda_sample: Annotated[float, Must("a number", lambda x: is_number(x, -math.inf, math.inf))] = 3.0
    mean_over: Literal["layers", "modules"] = "layers"

    def __post_init__(self) -> None:
        for name in ("layers", "strides"):
            given = getattr(self, name)
            if not isinstance(given, tuple | list) or not all(is_whole(x, -math.inf) for x in given):
                raise ValueError(f"{name}={given!r} must be whole numbers.")
        object.__setattr__(self, "average", check_keep(self.average, "average"))
        if not isinstance(self.model, dict) or not is_whole(self.model.get("decoder_layers")):
            raise ValueError(f"model={self.model!r} must be the facts of a model, decoder_layers among them.")
        for name, hint in hints(AtpConfig).items():
            object.__setattr__(self, name, checked(name, hint, getattr(self, name)))
        facts = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in self.model.items()}
        object.__setattr__(self, "model", facts)  # JSON has no tuples
        self.check_places()

    def check_places(self) -> None:
        """Refuse layers that the model has not, and strides that are none."""
        depth = self.model["decoder_layers"]
        if not self.layers or list(self.layers) != sorted({*self.layers}) or self.layers[0] < 1:
            raise ValueError(f"layers={self.layers} must be ascending layer numbers from 1.")
        if self.layers[-1] >= depth:
            raise ValueError(f"layers={self.layers}: a model of {depth} layers allows 1..{depth - 1}.")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides={self.strides} must be positive numbers of patches.")

    @classmethod
    def of(
        cls, facts: ModelFacts, average: int | float, layers: tuple[int, ...] = (4, 14, 24), **options: Any
    ) -> AtpConfig:
        """A configuration for a model; `layers` are those of a 32-layer decoder and scale with depth."""
        return cls(asdict(facts), average, tuple(schedule_layers(tuple(layers), facts.decoder_layers)), **options)

    @property
    def spans(self) -> tuple[int, ...]:
        """Number of layers that run on what each cut leaves."""
        return tuple(b - a for a, b in pairwise([*self.layers, self.model["decoder_layers"]]))

    def target(self, tokens: int) -> float:
        """The share of an image's `tokens` that training aims at.

        Raises:
            ValueError: the layers before the first cut alone are more than that.
        """
        share = min(1.0, self.average / tokens) if isinstance(self.average, int) else self.average
        depth = self.model["decoder_layers"]
        if self.mean_over == "layers" and share <= self.layers[0] / depth:
            raise ValueError(
                f"average={self.average} cannot be met: the first {self.layers[0]} of {depth} layers see all {tokens} "
                f"tokens, which is an average of {self.layers[0] / depth:.3f} already."
            )
        return share

    def mean(self, shares: torch.Tensor) -> torch.Tensor:
        """`(images,)` mean share over layers (or modules) of `(images, cuts)` shares left."""
        if self.mean_over == "modules":
            return shares.mean(1)
        return (self.layers[0] + (shares * shares.new_tensor(self.spans)).sum(1)) / self.model["decoder_layers"]


class Threshold(nn.Module):
    """One module: `(images, tokens)` self and cross scores of the tokens left -> two thresholds in (0, 1) per image."""

    def __init__(self, config: AtpConfig):
        super().__init__()
        self.pool = config.pool if config.form == "pooled" else None
        self.z = nn.Linear(2 * (self.pool or 1), config.hidden)
        self.r, self.s = nn.Linear(config.hidden, 1), nn.Linear(config.hidden, 1)

    def forward(self, own: torch.Tensor, cross: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (x.to(self.z.weight.dtype) for x in (own, cross))
        z = self.z(torch.cat([pool_scores(x, among, self.pool or 1) for x in scores], -1))
        z = z.relu() if self.pool else z
        return self.r(z).squeeze(-1).sigmoid(), self.s(z).squeeze(-1).sigmoid()


class Thresholds(nn.Module):
    """The modules of all cuts. While `training`, cuts weaken tokens by soft masks instead of removing them."""

    def __init__(self, config: AtpConfig):
        super().__init__()
        self.config, self.temperature = config, 10.0
        self.cuts = nn.ModuleList(Threshold(config) for _ in config.layers)


def save(thresholds: Thresholds, folder: str | Path) -> Path:
    """Write weights and configuration into a folder that `weights=` takes."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in thresholds.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"format": FORMAT} | asdict(thresholds.config), indent=2) + "\n")
    return folder


def load(weights: str | Path) -> Thresholds:
    """Read modules from a folder or the Hugging Face hub.

    Raises:
        FileNotFoundError: neither has them.
        ValueError: they are not what they say they are; names the file.
    """
    if not isinstance(weights, str | Path):
        raise ValueError(f"weights={weights!r} must be a folder or a hub id, not {type(weights).__name__}.")
    config, tensors = files_of(weights)
    thresholds = Thresholds(read_config(config))
    state, wanted = read_state(tensors), thresholds.state_dict()
    for name in sorted({*state, *wanted}):
        have, want = (tuple(x[name].shape) if name in x else None for x in (state, wanted))
        if have != want:
            raise ValueError(f"{tensors}: {name} has shape {have}, and {CONFIG} describes {want}.")
    thresholds.load_state_dict(state)
    return thresholds.requires_grad_(False).eval()


def files_of(weights: str | Path) -> list[Path]:
    """The configuration and the weights of modules: in a folder, of an embedded model, or from the hub."""
    folder = next(filter(Path.is_dir, (Path(weights), embedded.folder() / weights)), None)
    if folder is None:
        return from_hub(str(weights))
    found = [folder / name for name in (CONFIG, WEIGHTS)]
    if missing := [path.name for path in found if not path.exists()]:
        raise FileNotFoundError(f"{weights} has no {missing[0]}: not a folder that scripts/train_atp.py wrote.")
    return found


def from_hub(name: str) -> list[Path]:
    """The files of modules from the Hugging Face hub."""
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(name, file)) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # the hub raises a dozen kinds, from a bad name to no network
        raise FileNotFoundError(
            f"weights={name!r} is no folder, and the hub did not give {CONFIG} and {WEIGHTS} under that "
            f"id ({type(error).__name__}). Train modules with: {TRAIN}"
        ) from error


def read_config(path: Path) -> AtpConfig:
    """Read what `save` wrote beside the weights.

    Raises:
        ValueError: anything else; names the file.
    """
    try:
        given = json.loads(path.read_text())
        if not isinstance(given, dict):
            raise ValueError(f"it holds a JSON {type(given).__name__} instead of an object.")
        if (number := given.pop("format", None)) != FORMAT:
            raise ValueError(f"its format is {number!r}, and this version of vlmprune reads format {FORMAT}.")
        known = [f.name for f in fields(AtpConfig)]
        if unknown := sorted({*given} - {*known}):
            raise ValueError(f"{unknown[0]!r} is none of its entries, which are {', '.join(known)}.")
        return AtpConfig(**given)
    except (TypeError, ValueError) as error:  # of which bad JSON and bad UTF-8 are kinds
        raise ValueError(f"{path} is not a configuration of ATP modules: {error}") from error


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: it is none; names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or not a whole one: {error}") from error
