"""One loop over a corpus: read coefficients batch by batch, accumulate them, and keep checkpoints.

    corpus = Corpus(texts, max_tokens=100_000, batch_tokens=2048)
    sums = MomentSums({3: 3072, 4: 3072})                      # an Accumulator
    swept = sweep(lm, corpus, [3, 4], [sums], checkpoint=Checkpoint(path, made_from))
    estimates = sums.result(swept)

One pass of the model serves every layer and every accumulator. The order of batches depends on the
corpus alone. A killed run resumes from its last checkpoint and ends with the same numbers.

Where the executor in use cuts work into parts (`core.executor`), a part is a run of batches. Each
part is summed up by itself, and the sums are merged in the order of the parts. So the numbers do
not depend on who did which part, and each part counts once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.artefact import Checkpoint, believing, stated_count
from ..core.checks import check_count, check_limit
from ..core.executor import executor_in_use
from ..model.language_model import LanguageModel
from .accumulator import Accumulator, Enough, State, Swept, TextBatch
from .passes import Pass, Reader, Unit, in_one_piece, in_parts
from .text import Piece, batches, check_texts, pieces, windows


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


def sweep(
    lm: LanguageModel,
    corpus: Corpus,
    layers: Sequence[int],
    accumulators: Sequence[Accumulator],
    *,
    checkpoint: Checkpoint | None = None,
    unit: Unit = "batch",
    until: Enough | None = None,
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
        until: Asked after windows of pieces. The sweep ends there if it is enough.
        progress: Called with the number of tokens read, after every batch and after a restart.

    Raises:
        InputError: The texts have no token, or the checkpoint is of other texts or settings.
        FingerprintError: The checkpoint is of another model.
        DamagedError: The checkpoint cannot be read.
        WorkspaceError: The checkpoint cannot be written.
    """
    done, digest = _restore(accumulators, checkpoint, unit)
    reader = Reader(corpus.batches(lm), unit, done, digest, checkpoint)
    run = Pass(lm, tuple(layers), corpus.dtype, tuple(each.maker() for each in accumulators))
    way = in_parts if executor_in_use().cuts else in_one_piece
    for place in way(run, reader, accumulators, until, progress):
        if checkpoint is not None and place.complete and place.at > done:
            position = {unit: str(place.at), "digest": place.digest}
            checkpoint.save(partial(_state, accumulators, position))
    return reader.swept()


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
