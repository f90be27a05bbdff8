"""Text cut into pieces that fit the model, and pieces put together into batches.

    for window in windows(pieces(lm, texts)):       # some hundred pieces at a time
        for rows in batches(window, 2048):          # of similar length, at most 2,048 padded tokens
            [piece.ids for piece in rows]

A corpus may be endless, and a text may be of any length: both are read as they are needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ..core.checks import check_text
from ..core.errors import InputError
from ..core.executor import Local, executor_in_use
from ..model.language_model import LanguageModel
from ..model.tokens import encode
from .text_files import TextFiles

WINDOW = 512
"""Pieces that are tokenized ahead of the model and sorted by length together.

These are enough for batches with little padding, and few enough to stream a corpus."""

LONGEST = 1024
"""Tokens of a piece at most.

A pass holds every layer's coefficients at all of them. Models with many more positions would run
out of memory."""

ADDED = (-1, -1)
"""The span of a token that the tokenizer added in front (BOS) or at the end."""

_PART = 50_000
"""Characters of a long text that are tokenized together."""

_MARGIN = 500
"""Characters on either side of a part that the tokenizer sees as well."""


@dataclass(frozen=True)
class Piece:
    """A text, or as much of a longer one as goes through the model at a time.

    Attributes:
        number: Its place among all pieces of the corpus, from 0.
        text: The characters of its tokens.
        ids: Its tokens.
        spans: For each token the characters [start, stop) of `text`, or ADDED.
    """

    number: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def check_texts(texts: str | Iterable[str]) -> None:
    """Check that something can be a corpus. Each text is checked when it is read.

    Raises:
        InputError: It is not a text, nor an iterable.
    """
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise InputError(
            f"the texts are {texts!r:.60}; give a text, or a list of texts", argument="texts"
        )


def pieces(
    lm: LanguageModel, texts: str | Iterable[str], limit: float = math.inf
) -> Iterator[Piece]:
    """Yield the pieces of a corpus in order.

    A text is cut where the model's context ends, at LONGEST tokens at most. Long texts are
    tokenized part by part, so that memory does not grow with them.

    Args:
        lm: The model.
        texts: One text, or texts one after another.
        limit: Stop after this many tokens; the last piece is cut.

    Raises:
        InputError: Something is not a text.
    """
    check_texts(texts)
    longest = min(lm.max_tokens or LONGEST, LONGEST)
    cut = partial(_cut, lm.tokenizer, longest)
    if isinstance(texts, TextFiles):
        executor = executor_in_use() if texts.is_shared else Local()
        rows = executor.stream(partial(_cut_all, cut), texts.units)
    else:
        rows = itertools.chain.from_iterable(map(cut, [texts] if isinstance(texts, str) else texts))
    for number, (text, ids, spans) in enumerate(rows):
        if len(ids) > limit:
            text, ids, spans = _shortened(text, ids, spans, int(limit))
        yield Piece(number, text, ids, spans)
        limit -= len(ids)
        if limit < 1:
            return


Row: TypeAlias = tuple[str, list[int], list[tuple[int, int]]]
"""The text, ids and spans of a piece, before it has a number."""


def _cut_all(cut: Callable[[object], Iterator[Row]], texts: Iterable[str]) -> Iterator[Row]:
    """Yield the pieces of texts."""
    for text in texts:
        yield from cut(text)


def _cut(tokenizer: Any, longest: int, text: object) -> Iterator[Row]:
    """Yield a text in pieces of at most `longest` tokens."""
    whole = check_text(text, "a text of the corpus")
    tokens = _tokens(tokenizer, whole)
    while taken := list(itertools.islice(tokens, longest)):
        yield _row(whole, taken)


def _row(text: str, taken: Sequence[tuple[int, tuple[int, int]]]) -> Row:
    """Return some tokens of a text as a piece: its spans count from its own first character."""
    written = [span for _, span in taken if span != ADDED]
    first = min((start for start, _ in written), default=0)
    last = max((stop for _, stop in written), default=0)
    spans = [ADDED if span == ADDED else (span[0] - first, span[1] - first) for _, span in taken]
    return text[first:last], [token for token, _ in taken], spans


def _shortened(text: str, ids: list[int], spans: list[tuple[int, int]], n: int) -> Row:
    """Return the first n tokens of a piece."""
    return _row(text, list(zip(ids[:n], spans[:n], strict=True)))


def _tokens(tokenizer: Any, text: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the tokens of a text and their characters.

    They are those of `encode`, except that a token of white space that the tokenizer trims off has
    its characters back. A long text is cut at white space. The tokenizer sees some characters
    beyond the cut, so the tokens are those of the whole text unless one reaches further than that.
    """
    special = set(tokenizer.all_special_ids)
    for start, stop in _parts(text):
        begin = max(start - _MARGIN, 0)
        ids, spans = encode(tokenizer, text[begin : stop + _MARGIN])
        added = [token in special and a == b for token, (a, b) in zip(ids, spans, strict=True)]
        front = next((i for i, is_added in enumerate(added) if not is_added), len(ids))
        at_end = next((i for i, is_added in enumerate(reversed(added)) if not is_added), 0)
        before = begin  # where the token before ended
        for i, (token, (a, b)) in enumerate(zip(ids, spans, strict=True)):
            if not front <= i < len(ids) - at_end:
                if start == 0 if i < front else stop == len(text):
                    yield token, ADDED
                continue
            # For trimmed white space the tokenizer gives the end alone.
            a, b = (begin + a, begin + b) if b > a else (before, max(before, begin + b))
            before = b
            if (a >= start or start == 0) and (a < stop or stop == len(text)):
                yield token, (a, b)


def _parts(text: str) -> Iterator[tuple[int, int]]:
    """Yield a text as [start, stop), cut at white space into parts of at most _PART characters."""
    start = 0
    while len(text) - start > _PART:
        space = max(text.rfind(c, start + 1, start + _PART) for c in " \n\t")
        stop = space if space > start else start + _PART
        yield start, stop
        start = stop
    yield start, len(text)


def windows(stream: Iterator[Piece], size: int | None = None) -> Iterator[list[Piece]]:
    """Yield as many pieces at a time as are sorted by length together: `size`, or WINDOW."""
    while window := list(itertools.islice(stream, size or WINDOW)):
        yield window


def batches(window: Iterable[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Yield pieces of similar length, shortest first, whose padded size stays within the budget.

    A batch has at least one piece.
    """
    rows: list[Piece] = []
    for piece in sorted(window, key=lambda piece: len(piece.ids)):
        if rows and len(piece.ids) * (len(rows) + 1) > batch_tokens:
            yield rows
            rows = []
        rows.append(piece)
    if rows:
        yield rows
