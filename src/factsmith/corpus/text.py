"""corpus.text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.checks import check_text
from ..core.errors import InputError
from ..model.language_model import LanguageModel
from ..model.tokens import encode

WINDOW = 512
"""Pieces tokenized ahead of the model and sorted by length: enough that a batch has little padding, few enough to stream a corpus."""


LONGEST = 1024
"""Tokens of a piece at most: a pass holds every layer's coefficients at all of them, and models with many more positions would run out."""

ADDED = (-1, -1)
"""The span of a token that stands for no place in the text: one that the tokenizer puts in front (BOS) or behind."""

_PART, _MARGIN = 50_000, 500
"""Characters of a long text that are tokenized together, and those on either side that the tokenizer sees as well."""


@dataclass(frozen=True)
class Piece:
    """A text, or as much of a longer one as goes through the model at a time.

    number  its place among all pieces of the corpus
    text    the characters it stands for
    ids     its tokens
    spans   for each token the characters [start, stop) of `text`; `ADDED` for one the tokenizer added
    """

    number: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def check_texts(texts: str | Iterable[str]) -> None:
    """Raises InputError for what can be no corpus; each text is looked at when it is read."""
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise InputError(
            f"the texts are {texts!r:.60}; expected a text, or texts one after another"
        )


def pieces(
    lm: LanguageModel, texts: str | Iterable[str], limit: float = math.inf
) -> Iterator[Piece]:
    """The pieces of a corpus in order, up to `limit` tokens; the last is cut. Raises InputError for what is no text.

    A text is cut where the model's context ends, at `LONGEST` tokens at most. Texts are tokenized as they are asked for, long ones part by
    part: what is held does not grow with them.
    """
    check_texts(texts)
    longest = min(lm.max_tokens or LONGEST, LONGEST)
    number = itertools.count()
    for text in [texts] if isinstance(texts, str) else texts:
        tokens = _tokens(lm.tokenizer, check_text(text, "a text of the corpus"))
        while own := list(itertools.islice(tokens, int(min(longest, limit)))):
            written = [span for _, span in own if span != ADDED]
            first, last = (
                min((a for a, _ in written), default=0),
                max((b for _, b in written), default=0),
            )
            spans = [
                ADDED if span == ADDED else (span[0] - first, span[1] - first) for _, span in own
            ]
            yield Piece(next(number), text[first:last], [token for token, _ in own], spans)
            limit -= len(own)
            if limit < 1:
                return


def _tokens(tokenizer: Any, text: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """The tokens of a text and their characters, as `encode` finds them, but with those of white space that tokenizers trim off.

    A long text is cut at white space. The tokenizer sees some characters beyond the cut, so that tokens are those of the whole text unless
    one of them reaches further than that.
    """
    special = set(tokenizer.all_special_ids)
    for start, stop in _parts(text):
        begin = max(start - _MARGIN, 0)
        ids, spans = encode(tokenizer, text[begin : stop + _MARGIN])
        added = [token in special and a == b for token, (a, b) in zip(ids, spans, strict=True)]
        front = next((i for i, own in enumerate(added) if not own), len(ids))
        back = len(ids) - next((i for i, own in enumerate(reversed(added)) if not own), 0)
        behind = begin  # where the token before ended
        for i, (token, (a, b)) in enumerate(zip(ids, spans, strict=True)):
            if not front <= i < back:
                if start == 0 if i < front else stop == len(text):
                    yield token, ADDED
                continue
            # Of trimmed white space only its end is told.
            a, b = (begin + a, begin + b) if b > a else (behind, max(behind, begin + b))
            behind = b
            if (a >= start or start == 0) and (a < stop or stop == len(text)):
                yield token, (a, b)


def _parts(text: str) -> Iterator[tuple[int, int]]:
    """A text as [start, stop), cut at white space into parts of `_PART` characters at most."""
    start = 0
    while len(text) - start > _PART:
        space = max(text.rfind(c, start + 1, start + _PART) for c in " \n\t")
        stop = space if space > start else start + _PART
        yield start, stop
        start = stop
    yield start, len(text)


def windows(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    """So many pieces at a time as are sorted by length together."""
    while window := list(itertools.islice(found, WINDOW)):
        yield window


def batches(window: Iterable[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces of like length whose padded size stays within the budget, shortest first (at least one piece each)."""
    rows: list[Piece] = []
    for piece in sorted(window, key=lambda piece: len(piece.ids)):
        if rows and len(piece.ids) * (len(rows) + 1) > batch_tokens:
            yield rows
            rows = []
        rows.append(piece)
    if rows:
        yield rows
