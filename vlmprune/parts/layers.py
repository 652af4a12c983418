"""What a tap may ask of a layer, and of what is left of a prompt where it measures: hosts and engine answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from vlmprune.parts.layout import Layout
    from vlmprune.parts.taps import Tap

__all__ = ["DecoderLayer", "Projections", "Remaining", "Scene", "TowerLayer"]


class TowerLayer(Protocol):
    """A layer of a vision tower, as far as taps ask: what attention is computed from, by the layer's own modules."""

    scale: float

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the layer's input `(views, tokens, dim)`."""

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """`(views, heads, rows, head dim)` of normed rows `(views, rows, dim)`."""

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        """`(views, key heads, rows, head dim)` of normed rows `(views, rows, dim)`."""


@dataclass
class Projections:
    """What the projections of a tower layer made as it ran, each `(views, heads, tokens, head dim)`.

    `scale` is what products of queries and keys are multiplied with.
    """

    scale: float
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None


class DecoderLayer(Protocol):
    """A layer of a language model, as far as taps ask.

    `window` is its sliding window in tokens, or None; `far_sighted` are the model's layers without one, where it has
    layers of both kinds and attention in windows says little.
    """

    index: int
    scale: float
    window: int | None
    far_sighted: tuple[int, ...]

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the layer's input `(batch, length, dim)`."""

    def queries(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(batch, heads, rows, head dim)` of normed rows and their rotary embedding `(batch, rows, head dim)`."""

    def keys(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(batch, key heads, rows, head dim)`, as the cache holds them."""

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """`(batch, key heads, rows, head dim)` of normed rows."""


class Remaining(Protocol):
    """What is left of a prompt batch where a tap measures; `bias` `(batch, length)` is of soft masks, or None.

    `lengths` are the real entries of every row; `blocks` says which entries see each other whatever their order;
    `columns` `(batch, length)` is the prompt column of every entry, of `prompt` columns.
    """

    prompt: int
    columns: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    lengths: list[int]
    blocks: torch.Tensor | None
    bias: torch.Tensor | None

    def asked(self) -> torch.Tensor:
        """`(batch, length)` bool of the entries that methods may look at."""

    def reach(self, at: torch.Tensor) -> torch.Tensor:
        """The last entry that each of some entries `(batch, rows)` sees."""

    def index_of(self, layout: Layout) -> torch.Tensor:
        """`(images, tokens)` entry of every visual token."""


class Scene(Protocol):
    """What a decoder tap may look at while it measures: the current sequence and where its visual tokens are.

    `text_after` counts the tokens after the last visual token of every batch row, and says how many are the most;
    `text_before` is the most that any row has in front of its first one, and `text_between` whether there may be any
    between visual ones. `seen` has what taps before have measured. `ids` `(batch, length)` are those of the call, whose
    columns a sequence has that was not cut yet.
    """

    sequence: Remaining
    layout: Layout
    text_after: tuple[torch.Tensor, int]
    text_before: int
    ids: torch.Tensor
    text_between: bool
    seen: dict[Tap, torch.Tensor]

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The language model's own last norm of `(batch, length, dim)`."""

    def past_keys(self, layer: DecoderLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The keys that a decoder layer holds in front of the sequence, or None, and which keys of both are real."""

    def flat_index(self) -> torch.Tensor:
        """`(images, tokens)` index of every visual token into the flattened `(batch * length)` sequence."""
