"""How a corpus goes through a model: batch after batch in one piece, or cut into parts.

reader = Reader(corpus.batches(lm), "batch", 0, "", None)
for place in in_parts(run, reader, accumulators, None, None):
    place.n_tokens                                  # merged up to there
reader.swept()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch

from ..core.artefact import Checkpoint
from ..core.errors import InputError
from ..core.executor import executor_in_use, report_done
from ..model.language_model import LanguageModel
from .accumulator import Accumulator, Enough, Swept, TextBatch
from .scan import scan

PART_TOKENS = 8192
"""Tokens of a part at least, if nothing else is asked for."""

Unit: TypeAlias = Literal["batch", "window"]
"""After what a checkpoint may be written: after each batch, or after each window of pieces."""


@dataclass(frozen=True)
class Place:
    """A place in a corpus, after a batch.

    Attributes:
        at: How many units are read up to there: batches, or windows.
        complete: Whether a checkpoint may be written there.
        ends_window: Whether a window ends there.
        n_texts: Number of pieces up to there.
        n_tokens: Number of tokens up to there, without padding.
        digest: sha256 (hex) of all token ids up to the end of the window.
    """

    at: int
    complete: bool
    ends_window: bool
    n_texts: int
    n_tokens: int
    digest: str


class Reader:
    """The batches of a corpus, without those that a checkpoint holds already.

    Attributes:
        unit: After what a checkpoint may be written.
        done: How many units the checkpoint holds.
        merged: The place up to which everything is merged. None: nothing is.
    """

    def __init__(
        self,
        batches: Iterator[TextBatch],
        unit: Unit,
        done: int,
        digest: str,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Take the batches, and what the checkpoint holds.

        Args:
            batches: All batches of the corpus.
            unit: After what a checkpoint may be written.
            done: How many units the checkpoint holds.
            digest: The digest of the texts up to there.
            checkpoint: The checkpoint, for errors.
        """
        self.unit, self.done = unit, done
        self.merged: Place | None = None
        self._batches, self._digest, self._checkpoint = batches, digest, checkpoint

    def __iter__(self) -> Iterator[tuple[TextBatch, Place]]:
        """Yield each unread batch with the place after it, and first the last one that was read.

        Raises:
            InputError: The checkpoint is of other texts.
        """
        n_texts = n_tokens = 0
        for batch in self._batches:
            at = batch.number if self.unit == "batch" else batch.window
            complete = self.unit == "batch" or batch.ends_window
            n_texts += len(batch.pieces)
            n_tokens += batch.n_tokens
            if at < self.done or (at == self.done and not complete):
                continue
            if at == self.done and batch.digest != self._digest:
                raise self._other_texts()
            yield batch, Place(at, complete, batch.ends_window, n_texts, n_tokens, batch.digest)

    def swept(self) -> Swept:
        """Return what was merged.

        Raises:
            InputError: The texts have no token, or fewer than the checkpoint.
        """
        if self.merged is not None:
            return Swept(self.merged.n_texts, self.merged.n_tokens, self.merged.digest)
        if self.done:
            raise self._other_texts()
        raise InputError(
            "The corpus has no text; give strings with at least one token", argument="texts"
        )

    def _other_texts(self) -> InputError:
        path = None if self._checkpoint is None else self._checkpoint.path
        return InputError(
            f"{path} holds an unfinished run over other texts; give the same texts again, choose "
            "another place, or delete the file"
        )


@dataclass(frozen=True, eq=False)
class Pass:
    """The task of a sweep: batches go through the model, and their sums come out.

    Attributes:
        lm: The model.
        layers: The layers that are read.
        dtype: The dtype of the pass. None: the model's own.
        makers: Make the empty accumulators.
    """

    lm: LanguageModel
    layers: tuple[int, ...]
    dtype: torch.dtype | None
    makers: tuple[Callable[[], Accumulator], ...]

    def __call__(self, part: Sequence[TextBatch]) -> list[Accumulator]:
        """Return the sums of one part."""
        sums = [make() for make in self.makers]
        n_tokens = 0
        for batch in part:
            self.add(batch, sums)
            n_tokens += batch.n_tokens
            report_done(n_tokens)
        return sums

    def add(self, batch: TextBatch, accumulators: Sequence[Accumulator]) -> None:
        """Read one batch and add it to accumulators."""
        rows = [piece.ids for piece in batch.pieces]
        for site in sorted({accumulator.site for accumulator in accumulators}):
            read = scan(self.lm, rows, self.layers, self.dtype, site)
            for accumulator in accumulators:
                if accumulator.site == site:
                    accumulator.add(batch, read)
            del read  # the next pass needs the memory


def in_one_piece(
    run: Pass,
    reader: Reader,
    accumulators: Sequence[Accumulator],
    until: Enough | None,
    progress: Callable[[int], object] | None,
) -> Iterator[Place]:
    """Add batch after batch, and yield the place after each."""
    for batch, place in reader:
        if place.at > reader.done:
            run.add(batch, accumulators)
        reader.merged = place
        yield place
        if progress is not None:
            progress(place.n_tokens)
        if until is not None and place.ends_window and until.is_enough():
            return


def in_parts(
    run: Pass,
    reader: Reader,
    accumulators: Sequence[Accumulator],
    until: Enough | None,
    progress: Callable[[int], object] | None,
) -> Iterator[Place]:
    """Have parts summed up by the executor in use, merge the sums, and yield the place after each.

    All parts before a place where `until` is asked are merged first, so the sweep ends at the same
    batch as in one piece.
    """
    executor = executor_in_use()
    least = executor.part_tokens or max(
        [PART_TOKENS, *(accumulator.least_part for accumulator in accumulators)]
    )
    parts = _Parts(reader, least, until)
    while not parts.ended:
        report = None if progress is None else partial(parts.report, progress)
        for sums in executor.map(run, parts, progress=report):
            for accumulator, more in zip(accumulators, sums, strict=True):
                accumulator.merge(more)
            reader.merged = parts.places.popleft()
            yield reader.merged
        if parts.asks and until is not None and until.is_enough():
            return


class _Parts:
    """The parts of a corpus, up to the next place where it is asked whether it is enough.

    Attributes:
        places: The places after the parts that are handed out and not merged.
        asks: Whether the last batch was at a place where it is asked.
        ended: Whether the corpus is read to its end.
        before: Number of tokens before the first part.
    """

    def __init__(self, reader: Reader, least: int, until: Enough | None) -> None:
        """Take the batches, and how many tokens a part has at least."""
        self.places: deque[Place] = deque()
        self.asks = self.ended = False
        self.before = 0
        self._reader, self._least, self._until = reader, least, until
        self._batches = iter(reader)

    def __iter__(self) -> Iterator[list[TextBatch]]:
        """Yield the batches of each part."""
        self.before = 0 if self._reader.merged is None else self._reader.merged.n_tokens
        part: list[TextBatch] = []
        place: Place | None = None
        n_tokens = 0
        for batch, place in self._batches:
            if place.at > self._reader.done:
                part.append(batch)
                n_tokens += batch.n_tokens
            else:
                self._reader.merged, self.before = place, place.n_tokens
            self.asks = self._is_asked(place)
            if part and (self.asks or (n_tokens >= self._least and place.complete)):
                self.places.append(place)
                yield self._numbered(part)
                part, n_tokens = [], 0
            if self.asks:
                return
        self.ended = True
        if part and place is not None:
            self.places.append(place)
            yield self._numbered(part)

    def report(self, progress: Callable[[int], object], done: int) -> None:
        """Report how many tokens are read, of which these are in the parts handed out."""
        progress(self.before + done)

    def _is_asked(self, place: Place) -> bool:
        is_due = self._until is not None and place.n_tokens >= self._until.asked_at()
        return is_due and place.ends_window

    def _numbered(self, part: list[TextBatch]) -> list[TextBatch]:
        """Return a part with its pieces numbered from 0, if it consists of whole windows."""
        if self._reader.unit == "batch":
            return part
        first = min(piece.number for batch in part for piece in batch.pieces)
        return [
            replace(
                batch,
                pieces=[replace(piece, number=piece.number - first) for piece in batch.pieces],
            )
            for batch in part
        ]
