"""What is summed up over a corpus, batch by batch.

    for batch in batches:
        accumulator.add(batch, scan(lm, rows, layers))
    accumulator.merge(another)                 # of the texts that follow
    accumulator.result(swept)

`sweep` reads the corpus. Second moments and triggers are accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

from torch import Tensor

from .scan import Bank, Coefficients, Site
from .text import Piece

State: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""What a checkpoint holds: tensors by name, and text fields by name."""


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Pieces of text that go through the model together.

    Attributes:
        pieces: The rows of the batch.
        number: Which batch of the corpus it is, counted from 1.
        window: Which window of the corpus it is from, counted from 1.
        ends_window: Whether it is the last batch of its window.
        half: Which half of the corpus it is from, 0 or 1. Always 0 if the corpus is not halved.
        digest: sha256 (hex) of all token ids up to the end of its window.
    """

    pieces: list[Piece]
    number: int
    window: int
    ends_window: bool
    half: int
    digest: str

    @property
    def n_tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(len(piece.ids) for piece in self.pieces)


@dataclass(frozen=True)
class Swept:
    """What a sweep has read.

    Attributes:
        n_texts: Number of pieces.
        n_tokens: Number of tokens, without padding.
        digest: sha256 (hex) of their token ids.
    """

    n_texts: int
    n_tokens: int
    digest: str


class Accumulator(Protocol):
    """Something that is summed up over a corpus.

    Names in `state` must differ between the accumulators of one sweep.

    Attributes:
        site: What it takes in: coefficients, or inputs.
        least_part: Tokens of a part at least, so that sending its sums costs little next to it.
    """

    site: Site
    least_part: int

    def maker(self) -> Callable[[], Self]:
        """Return a function that makes an empty one of the same kind. It is small when pickled."""

    def add(self, batch: TextBatch, coefficients: Mapping[Bank, Coefficients]) -> None:
        """Take in one batch: the coefficients of every bank that had a token."""

    def merge(self, other: Self) -> None:
        """Take in what another accumulator of the same kind collected from other texts."""

    def state(self) -> State:
        """Return everything that `restore` needs. "digest", "batch" and "window" are taken."""

    def restore(self, tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
        """Take up a state. The mappings hold the states of all accumulators of the sweep."""

    def result(self, swept: Swept) -> Any:
        """Return the result for all that was swept. May be called once."""


class Enough(Protocol):
    """Says when enough was read."""

    def is_enough(self) -> bool:
        """Return whether it is enough. Asked at the end of a window."""

    def asked_at(self) -> int:
        """Return the number of tokens before which it is not worth asking."""
