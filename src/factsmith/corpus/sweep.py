"""One loop over a corpus: read coefficients batch by batch, accumulate them, and keep checkpoints.

    corpus = Corpus(texts, max_tokens=100_000, batch_tokens=2048)
    sums = MomentSums({3: 3072, 4: 3072})                      # an Accumulator
    swept = sweep(lm, corpus, [3, 4], [sums], checkpoint=Checkpoint(path, made_from))
    estimates = sums.result(swept)

One pass of the model serves every layer and every accumulator. The order of batches depends on the
corpus alone. A killed run resumes from its last checkpoint and ends with the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from ..core.artefact import Checkpoint, believing, stated_count
from ..core.checks import check_count, check_limit
from ..core.errors import InputError
from ..model.language_model import LanguageModel
from .scan import Bank, Coefficients, Site, scan
from .text import Piece, batches, check_texts, pieces, windows

State: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""What a checkpoint holds: tensors by name, and text fields by name."""

Unit: TypeAlias = Literal["batch", "window"]
"""After what a checkpoint may be written: after each batch, or after each window of pieces."""


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


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts, and how they are cut and batched for a pass.

    Attributes:
        texts: One text, or texts one after another. They are read as they are needed.
        max_tokens: Stop after this many tokens; the last text is cut.
        batch_tokens: Padded tokens in one forward pass.
        dtype: `torch.bfloat16` runs the pass in it. None: the model's own dtype.
        halves: Whether a batch takes its pieces from one half of the corpus. The digest of a
            piece decides on its half, so copies of a text stay together.
        window: Pieces that are sorted by length together. A sweep may end after each window. None:
            `text.WINDOW`.

    Raises:
        InputError: The texts are not texts, or a number is below 1.
    """

    texts: str | Iterable[str]
    max_tokens: float = math.inf
    batch_tokens: int = 2048
    dtype: torch.dtype | None = None
    halves: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        check_texts(self.texts)
        size = check_count(
            self.batch_tokens, "batch_tokens", "the number of padded tokens in one forward pass"
        )
        object.__setattr__(self, "batch_tokens", size)
        object.__setattr__(self, "max_tokens", check_limit(self.max_tokens, "max_tokens"))

    def settings(self) -> dict[str, str]:
        """Return what decides on the batches, apart from the texts, for a checkpoint's record."""
        return {
            "max_tokens": str(self.max_tokens),
            "batch_tokens": str(self.batch_tokens),
            "dtype": str(self.dtype),
            **({} if self.window is None else {"window": str(self.window)}),
        }

    def batches(self, lm: LanguageModel) -> Iterator[TextBatch]:
        """Yield the batches in order. The same texts and settings give the same batches."""
        digest = hashlib.sha256()
        number = 0
        for at, window in enumerate(
            windows(pieces(lm, self.texts, self.max_tokens), self.window), 1
        ):
            halves: tuple[list[Piece], list[Piece]] = ([], [])
            for piece in window:
                text = repr(piece.ids).encode()
                digest.update(text)
                half = hashlib.sha256(text).digest()[0] & 1 if self.halves else 0
                halves[half].append(piece)
            groups = [
                (half, rows)
                for half, members in enumerate(halves)
                for rows in batches(members, self.batch_tokens)
            ]
            for left, (half, rows) in zip(reversed(range(len(groups))), groups, strict=True):
                number += 1
                yield TextBatch(rows, number, at, not left, half, digest.hexdigest())


def corpus_digest(
    lm: LanguageModel, texts: str | Iterable[str], max_tokens: float = math.inf
) -> str:
    """Return the `digest` that a sweep of these texts would report. No model runs.

    Raises:
        InputError: The texts are not texts, or max_tokens is below 1.
    """
    digest = hashlib.sha256()
    for piece in pieces(lm, texts, check_limit(max_tokens, "max_tokens")):
        digest.update(repr(piece.ids).encode())
    return digest.hexdigest()


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
    """

    site: Site

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


def sweep(
    lm: LanguageModel,
    corpus: Corpus,
    layers: Sequence[int],
    accumulators: Sequence[Accumulator],
    *,
    checkpoint: Checkpoint | None = None,
    unit: Unit = "batch",
    until: Callable[[], bool] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Swept:
    """Read a corpus once and give every batch's coefficients to the accumulators.

    Args:
        lm: The model. Nothing above the last of `layers` runs.
        corpus: The texts, and how they are batched.
        layers: The layers whose coefficients are read.
        accumulators: What is summed up. They are changed in place.
        checkpoint: Where their state is kept now and then. If it holds a state, the sweep goes on
            from there. The caller removes it when the result is safe.
        unit: After what a checkpoint may be written.
        until: Asked after each window of pieces. The sweep ends there if it returns True.
        progress: Called with the number of tokens read, after every batch and after a restart.

    Raises:
        InputError: The texts have no token, or the checkpoint is of other texts or settings.
        FingerprintError: The checkpoint is of another model.
        DamagedError: The checkpoint cannot be read.
        WorkspaceError: The checkpoint cannot be written.
    """
    done, digest = _restore(accumulators, checkpoint, unit)
    at = n_texts = n_tokens = 0
    batch: TextBatch | None = None
    for batch in corpus.batches(lm):
        at = batch.number if unit == "batch" else batch.window
        complete = unit == "batch" or batch.ends_window
        n_texts += len(batch.pieces)
        n_tokens += batch.n_tokens
        if at > done:
            rows = [piece.ids for piece in batch.pieces]
            for site in sorted({accumulator.site for accumulator in accumulators}):
                read = scan(lm, rows, layers, corpus.dtype, site)
                for accumulator in accumulators:
                    if accumulator.site == site:
                        accumulator.add(batch, read)
                del read  # the next pass needs the memory
            if checkpoint is not None and complete:
                position = {unit: str(at), "digest": batch.digest}
                checkpoint.save(partial(_state, accumulators, position))
        elif at < done or not complete:
            continue
        elif batch.digest != digest:
            raise _other_texts(checkpoint)
        if progress is not None:
            progress(n_tokens)
        if until is not None and batch.ends_window and until():
            break
    if at < done:
        raise _other_texts(checkpoint)
    if batch is None:
        raise InputError(
            "The corpus has no text; give strings with at least one token", argument="texts"
        )
    return Swept(n_texts, n_tokens, batch.digest)


def _restore(
    accumulators: Sequence[Accumulator], checkpoint: Checkpoint | None, unit: Unit
) -> tuple[int, str]:
    """Restore the accumulators; return how many units are done, and the digest up to there."""
    kept = None if checkpoint is None else checkpoint.load()
    if kept is None:
        return 0, ""
    tensors, fields = kept
    assert checkpoint is not None
    with believing(checkpoint.path, "an unfinished run", "delete it and begin again"):
        for accumulator in accumulators:
            accumulator.restore(tensors, fields)
        return stated_count(fields, unit), fields["digest"]


def _state(accumulators: Sequence[Accumulator], position: Mapping[str, str]) -> State:
    tensors: dict[str, Tensor] = {}
    fields = dict(position)
    for accumulator in accumulators:
        more_tensors, more_fields = accumulator.state()
        tensors.update(more_tensors)
        fields.update(more_fields)
    return tensors, fields


def _other_texts(checkpoint: Checkpoint | None) -> InputError:
    path = None if checkpoint is None else checkpoint.path
    return InputError(
        f"{path} holds an unfinished run over other texts; give the same texts again, choose "
        "another place, or delete the file"
    )
