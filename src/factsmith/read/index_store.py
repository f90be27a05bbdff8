"""The index of a model, from where it is kept: opened if it exists, otherwise made first.

    index = find_index(lm)                           # in the user's cache, of text for any model
    index = find_index(lm, "index", texts=texts)     # in a folder, of these texts

In the cache each corpus has an index of its own. In a folder that the caller names, an index is
completed, and never replaced.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from ..core.cache import cache_folders, cached
from ..core.checks import check_count, check_limit, check_text
from ..core.errors import DamagedError, InputError
from ..core.files import folder_path
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..corpus.ordinary import ordinary_texts
from ..corpus.own import is_own
from ..corpus.sweep import corpus_digest
from ..model.language_model import LanguageModel, check_model
from ..model.sample import own_text
from .index import Index, build_index, check_place, complete_index
from .text_search import TEXTS
from .triggers import TRIGGERS, Triggers, holds_triggers

_TOKENS = 100_000
"""Tokens that are scanned without a text: about a minute for the bundled models."""

_SMALL = 50_000_000
"""Parameters of the layers up to which a model writes the text itself.

Own words fire the neurons of a small model that knows little ordinary English. A larger one would
take longer to write them than to read them, and ordinary text suits it as well."""


def find_index(
    lm: LanguageModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    max_tokens: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Return the model's index. It is built first if there is none.

    Triggers without values or without texts.sqlite are completed.

    Args:
        lm: The model.
        folder: Where the index is kept. An index in a named folder is never replaced. None: the
            user's cache, where each corpus has an index of its own, and the model's own words
            another one. That one is made again for another number of tokens.
        texts: What the index is of. "own": text that the model writes itself. None: what it is of
            already; otherwise the same as "own" for a small model, and the bundled corpus for one
            of more than 50 million parameters.
        max_tokens: How much of the texts. None: as much as the index has, otherwise all of the
            texts that are given, or 100,000 tokens.
        seed: Seed of the model's own text.
        progress: Gets how far each step is.

    Raises:
        InputError: when the folder holds an index of other texts, or of another number of tokens.
        FingerprintError: when the folder is another model's.
        WorkspaceError: when the folder cannot be written. Raised before anything is read.
        FactsmithError: as `Index.open` and `build_index`.
    """
    check_model(lm)
    if texts is None and not _writes_its_own(lm, folder):
        texts = ordinary_texts()
        max_tokens = _TOKENS if max_tokens is None else max_tokens
    texts = None if is_own(texts) else texts
    limit = float("inf") if max_tokens is None else check_limit(max_tokens, "max_tokens")
    if texts is None and max_tokens is not None:
        limit = check_count(max_tokens, "max_tokens", "the number of tokens to scan")
    if folder is None and isinstance(texts, Iterator):
        # The texts are read twice: to find their index, and to scan them.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            return find_index(
                lm, texts=_Again(texts, file), max_tokens=max_tokens, progress=progress
            )
    place = _cached(lm, texts, limit) if folder is None else folder_path(folder)
    if holds_triggers(place, lm):
        triggers = Triggers.load(place, lm)
        if folder is not None:
            _check_corpus(lm, place, triggers, texts, max_tokens)
        if texts is not None or max_tokens in (None, triggers.n_tokens):
            return complete_index(lm, place, progress)
    elif texts is None and (place / TEXTS).is_file():
        raise DamagedError(
            f"{place} holds {TEXTS}, a part of an index, without its triggers. "
            "Give its texts again, or delete it.",
            argument="index",
        )
    check_place(lm, place)
    if texts is None:
        limit = _TOKENS if max_tokens is None else limit
        texts = _own_words(lm, int(limit), seed, progress)
    return build_index(lm, texts, place, max_tokens=limit, progress=progress)


def kept_index(
    lm: LanguageModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> Index | None:
    """Return the index that `find_index` would open, or None where it would build one first.

    Args:
        lm: The model.
        folder: As `find_index`.
        progress: Gets how far the missing parts of an index are.

    Raises:
        FingerprintError: when the folder is another model's.
        FactsmithError: as `Index.open`.
    """
    check_model(lm)
    texts, limit = (None, 0) if _writes_its_own(lm, folder) else (ordinary_texts(), _TOKENS)
    place = _cached(lm, texts, limit) if folder is None else folder_path(folder)
    return complete_index(lm, place, progress) if holds_triggers(place, lm) else None


def kept_indices() -> tuple[tuple[str, int], ...]:
    """Return the name of each index in the caches, and when its triggers were written."""
    files = (path for folder in cache_folders() for path in folder.glob(f"index/*/{TRIGGERS}"))
    return tuple(sorted((path.parent.name, path.stat().st_mtime_ns) for path in files))


def _writes_its_own(lm: LanguageModel, folder: str | os.PathLike[str] | None) -> bool:
    """Return whether an index without texts is of the model's own words, or is there already."""
    place = _cached(lm, None, 0) if folder is None else folder_path(folder)
    if holds_triggers(place, lm) or (place / TEXTS).is_file():
        return True
    return sum(p.numel() for layer in lm.layers for p in layer.parameters()) <= _SMALL


def _check_corpus(
    lm: LanguageModel,
    place: Path,
    triggers: Triggers,
    texts: str | Iterable[str] | None,
    max_tokens: float | None,
) -> None:
    """Check that the index in a folder is of the texts and the number of tokens asked for."""
    if texts is None:
        if max_tokens in (None, triggers.n_tokens):
            return
        difference, left_out = f"not of {max_tokens:,} tokens", "max_tokens"
    else:
        limit = float("inf") if max_tokens is None else max_tokens
        if corpus_digest(lm, texts, limit) == triggers.corpus:
            return
        difference, left_out = "other than the texts given", "the texts"
    raise InputError(
        f"{place} holds an index of {counted(triggers.n_texts, 'text')}, "
        f"{counted(triggers.n_tokens, 'token')}, {difference}. Leave out {left_out} to use it, "
        "choose another folder, or delete it.",
        argument="index",
    )


def _cached(lm: LanguageModel, texts: str | Iterable[str] | None, limit: float) -> Path:
    """Return where the user's cache keeps the index of some texts."""
    name = lm.fingerprint[:16]
    if texts is not None:
        name += f"-{corpus_digest(lm, texts, limit)[:16]}"
    return cached(Path("index", name))


def _own_words(
    lm: LanguageModel, n_tokens: int, seed: int, progress: Progress | None
) -> Iterator[str]:
    """Yield text that the model writes itself, enough for a number of tokens.

    Text may have fewer tokens when it is read than were sampled, so there is three times as much.
    """
    n_texts = 0
    for _ in range(3):
        texts = own_text(
            lm,
            n_tokens,
            seed=seed + n_texts,
            progress=lambda done: tell(progress, "sampling text", done, n_tokens),
        )
        n_texts += len(texts)
        yield from texts


class _Again:
    """Texts that can be read once, kept in a file as they are read, so that they can be again."""

    def __init__(self, texts: Iterator[str], file: IO[str]) -> None:
        self._texts: Iterator[str] | None = texts
        self._file = file

    def __iter__(self) -> Iterator[str]:
        texts, self._texts = self._texts, None
        if texts is None:
            self._file.seek(0)
            yield from map(json.loads, self._file)
            return
        for text in texts:
            self._file.write(json.dumps(check_text(text, "a text of the corpus")) + "\n")
            yield text
