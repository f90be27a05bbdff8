"""An index of what a model's memory matches and promotes: one folder, searched without the model and without a server.

    index = build_index(lm, texts, "index")         # one pass over the texts, every value read, the texts in SQLite's full-text search
    index = Index.open("index")                     # later
    index.promoting("Paris")                        # neurons whose values promote it
    index.triggered_by("capital of France")         # neurons that fire behind these words

The folder holds triggers.safetensors, values.safetensors and texts.sqlite, written in this order. The triggers say what the index is of;
texts.sqlite only finds their texts faster, and is made again from them where it is missing or of other triggers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from ..core.artefact import read_metadata
from ..core.checks import check_count, check_limit, check_text
from ..core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from ..core.files import check_writable, folder_path, write_file
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table, counted
from ..corpus.scan import Bank
from ..corpus.text import check_texts
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from ..model.sample import own_text
from .phrase import folded, phrase_end
from .trigger_scan import corpus_digest, find_triggers
from .triggers import Sign, Trigger, Triggers, check_sign, holds_triggers
from .values import FILE as _VALUES
from .values import Promotion, ValueTokens, value_tokens

_TEXTS = "texts.sqlite"

_TEXTS_FORMAT = "texts 1"


@dataclass(frozen=True)
class Firing:
    """A neuron that fires behind some words: the share of its triggers that do, and the strongest of these."""

    neuron: Neuron
    share: float
    trigger: Trigger


@dataclass(frozen=True, eq=False, repr=False)
class Index(Shown):
    """Triggers and value tokens of one model, and the folder they are in."""

    folder: Path
    triggers: Triggers
    values: ValueTokens

    def tables(self) -> list[Table]:
        """What it is an index of."""
        return [
            *self.triggers.tables(),
            *self.values.tables(),
            Table(f"searched in {self.folder}", {}),
        ]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], lm: LanguageModel | None = None) -> Index:
        """Open what `build_index` wrote; texts.sqlite is made again where it is missing or not of these triggers.

        Raises DamagedError when another part is missing or altered, FingerprintError when it, or a part of it, is not of `lm`,
        WorkspaceError when texts.sqlite cannot be written.
        """
        place = folder_path(folder)
        triggers, values = Triggers.load(place, lm), ValueTokens.load(place)
        _check_fingerprint(values.model, values.fingerprint, place, triggers.fingerprint)
        if not _finds(place / _TEXTS, triggers):
            _write_texts(place / _TEXTS, triggers)
        return cls(place, triggers, values)

    def promoting(self, word: str, k: int = 20, *, demoted: bool = False) -> list[Promotion]:
        """Neurons whose values have a word among the tokens they promote (or demote) most, by rank, then score; at most k.

        The word is compared without surrounding spaces and case. Raises InputError when it is empty.
        """
        wanted = _asked(word)
        k = check_count(k, "k", "the number of neurons to find")
        ids = [i for i, text in self.values.words.items() if text.strip().casefold() == wanted]
        tokens, scores = (
            (self.values.bottom_ids, self.values.bottom_scores)
            if demoted
            else (self.values.top_ids, self.values.top_scores)
        )
        found = []
        for bank, own in tokens.items():
            rows, ranks = torch.isin(own, torch.tensor(ids, dtype=torch.int64)).nonzero(
                as_tuple=True
            )
            found += [
                Promotion(
                    _neuron(bank, i),
                    self.values.words[int(own[i, rank])],
                    rank,
                    float(scores[bank][i, rank]),
                )
                for i, rank in zip(rows.tolist(), ranks.tolist(), strict=True)
            ]
        return sorted(found, key=lambda p: (p.rank, -abs(p.score), p.neuron))[:k]

    def triggered_by(self, words: str, k: int = 20, *, sign: Sign = "top") -> list[Firing]:
        """Neurons that fire behind some words, those with the largest share of such triggers first.

        The words are a phrase in any case, of whole words; in scripts without spaces (Chinese, Thai ...) it may stand anywhere. Raises
        InputError when nothing is asked for, DamagedError when texts.sqlite cannot be searched.
        """
        wanted = _asked(words)
        check_sign(sign)
        k = check_count(k, "k", "the number of neurons to find")
        first = self._first_positions(wanted)
        if not first:
            return []
        begins = torch.full((len(self.triggers.texts),), torch.iinfo(torch.int64).max)
        begins[torch.tensor(list(first))] = torch.tensor(list(first.values()))
        found = []
        for bank, own in self.triggers.banks.items():
            there = own.coefficients[sign] != 0
            hits = there & (own.positions[sign] >= begins[own.texts[sign]])
            share = hits.sum(1) / there.sum(1).clamp(min=1)
            for i in share.topk(min(k, len(share))).indices.tolist():
                if share[i] > 0:
                    column = int(hits[i].nonzero()[0])
                    found.append(
                        Firing(
                            _neuron(bank, i),
                            float(share[i]),
                            self.triggers.of(_neuron(bank, i), sign=sign)[column],
                        )
                    )
        return sorted(found, key=lambda f: (-f.share, -abs(f.trigger.coefficient), f.neuron))[:k]

    def _first_positions(self, wanted: str) -> dict[int, int]:
        """For every text with these words the first token that ends behind them: {text: position}."""
        found = {}
        for number in self._holding(wanted):
            end = phrase_end(self.triggers.texts[number], wanted)
            position = None if end is None else self.triggers.position(number, end)
            if position is not None:
                found[number] = position
        return found

    def _holding(self, wanted: str) -> Iterable[int]:
        """The texts that may have these words: full-text search goes by three characters, fewer may be in any."""
        if len(wanted) < 3:
            return range(len(self.triggers.texts))
        phrase = _searchable(wanted).replace('"', '""')
        try:
            with closing(_read(self.folder / _TEXTS)) as base:
                rows = base.execute(
                    "SELECT rowid FROM texts WHERE texts MATCH ?", (f'"{phrase}"',)
                ).fetchall()
        except sqlite3.DatabaseError as error:
            raise DamagedError(
                f"cannot search {self.folder / _TEXTS}: {error}; delete it, and it is made again"
            ) from None
        return [number for (number,) in rows]


def build_index(
    lm: LanguageModel,
    texts: str | Iterable[str],
    folder: str | os.PathLike[str],
    *,
    top: int = 25,
    tokens: int = 10,
    max_tokens: float = float("inf"),
    norm: bool = True,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Index:
    """Scan texts, read all values, and write both into a folder that can be searched. Resumes a scan that was killed.

    top: triggers a neuron. tokens: tokens a value. The others are those of `find_triggers` and `value_tokens`, which raise what they raise.
    An index of this model in the folder is replaced; FingerprintError is raised for another model's.
    """
    check_model(lm)
    check_texts(texts)
    place = _own_place(lm, folder)
    values = value_tokens(lm, top=tokens, norm=norm, progress=progress)
    triggers = find_triggers(
        lm, texts, top=top, max_tokens=max_tokens, dtype=dtype, folder=place, progress=progress
    )
    values.save(place)
    _write_texts(place / _TEXTS, triggers)
    return Index(place, triggers, values)


_TOKENS = 100_000
"""Tokens scanned when nobody gives a text: about a minute for the bundled models on one thread."""


def find_index(
    lm: LanguageModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    max_tokens: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Index:
    """The model's index in a folder (None: the user's cache), built first where there is none.

    texts       what it is to be of; None: what is there, else text that the model writes itself, from `seed`
    max_tokens  how much of it; None: what is there, else all of the texts, or 100,000 tokens of the model's own

    An index that is there is never replaced in a folder that was named: triggers without values or texts.sqlite are completed, and an
    InputError is raised when they are of other texts, or of another number of tokens, than is asked for. In the cache every corpus has an
    index of its own, and so has the model's own text, which is scanned again for another number of tokens.

    Raises FingerprintError for another model's folder, WorkspaceError before anything is read when it cannot be written, and what
    `Index.open` and `build_index` raise.
    """
    check_model(lm)
    limit = float("inf") if max_tokens is None else check_limit(max_tokens, "max_tokens")
    if texts is None and max_tokens is not None:
        limit = check_count(max_tokens, "max_tokens", "the number of tokens to scan")
    if folder is None:
        place = _cache() / lm.fingerprint[:16]
        if isinstance(
            texts, Iterator
        ):  # they are gone through twice: to tell which they are, and to be scanned
            with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
                return find_index(
                    lm, texts=_Again(texts, file), max_tokens=max_tokens, progress=progress
                )
        if texts is not None:
            place = place.with_name(f"{place.name}-{corpus_digest(lm, texts, limit)[:16]}")
    else:
        place = folder_path(folder)
    if holds_triggers(place, lm):
        triggers = Triggers.load(place, lm)
        held = f"{place} holds an index of {counted(triggers.n_texts, 'text')}, {counted(triggers.n_tokens, 'token')}"
        advice = "leave that out to use it, choose another folder (--index), or delete it"
        if texts is None and max_tokens not in (None, triggers.n_tokens):
            if folder is not None:
                raise InputError(f"{held}, not of {max_tokens:,} tokens; {advice}")
        elif (
            folder is not None
            and texts is not None
            and corpus_digest(lm, texts, limit) != triggers.corpus
        ):
            raise InputError(f"{held}, other than the texts given; {advice}")
        else:
            return _completed(lm, place, progress)
    elif texts is None and (place / _TEXTS).is_file():
        raise DamagedError(
            f"{place} holds a part of an index, {_TEXTS}, without its triggers; give its texts again, or delete it"
        )
    _own_place(lm, place)
    if texts is None:
        limit = _TOKENS if max_tokens is None else limit
        texts = _own_words(lm, int(limit), seed, progress)
    return build_index(lm, texts, place, max_tokens=limit, progress=progress)


def _own_place(lm: LanguageModel, folder: str | os.PathLike[str]) -> Path:
    """A folder that can be written, and holds no other model's parts."""
    place = check_writable(folder)
    holds_triggers(place, lm)
    metadata = read_metadata(place / _VALUES)
    _check_fingerprint(
        metadata.get("model", ""),
        metadata.get("fingerprint", lm.fingerprint),
        place,
        lm.fingerprint,
    )
    return place


def _completed(lm: LanguageModel, place: Path, progress: Progress | None) -> Index:
    """The index of the triggers in a folder, its values read if they are not there."""
    if not (place / _VALUES).is_file():
        _own_place(lm, place)
        value_tokens(lm, progress=progress).save(place)
    return Index.open(place, lm)


def _check_fingerprint(model: str, fingerprint: str, place: Path, wanted: str) -> None:
    if fingerprint != wanted:
        raise FingerprintError(
            f"the values in {place} are of {model} with fingerprint {fingerprint[:12]}, not of the model with {wanted[:12]}; "
            "choose another folder, or delete them"
        )


def _own_words(
    lm: LanguageModel, n_tokens: int, seed: int, progress: Progress | None
) -> Iterator[str]:
    """Text that the model writes itself, enough for so many tokens even where what is written is read as fewer than were sampled."""
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
    """Texts that can be gone through once, kept on disk as they are read, to be gone through again as far."""

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


# ── texts.sqlite ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _identity(triggers: Triggers) -> str:
    """What texts.sqlite is of: a sha256 over the model, the corpus and the texts kept of it."""
    digest = hashlib.sha256(f"{_TEXTS_FORMAT} {triggers.fingerprint} {triggers.corpus}".encode())
    for text in triggers.texts:
        own = text.encode()
        digest.update(len(own).to_bytes(8, "little") + own)
    return digest.hexdigest()


def _finds(path: Path, triggers: Triggers) -> bool:
    """Whether the file is there and of these triggers."""
    if not path.is_file():
        return False
    try:
        with closing(_read(path)) as base:
            rows = base.execute("SELECT identity FROM made_from").fetchall()
    except sqlite3.DatabaseError:
        return False
    return bool(rows == [(_identity(triggers),)])


def _read(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _write_texts(path: Path, triggers: Triggers) -> None:
    """Folded texts in SQLite's full-text search, which finds any three characters and more in them; and whose texts they are."""

    def write(temporary: Path) -> None:
        with closing(sqlite3.connect(temporary)) as base, base:
            base.execute(
                "CREATE VIRTUAL TABLE texts USING fts5(text, content='', tokenize='trigram case_sensitive 1')"
            )
            base.executemany(
                "INSERT INTO texts (rowid, text) VALUES (?, ?)",
                ((i, _searchable(folded(text))) for i, text in enumerate(triggers.texts)),
            )
            base.execute("CREATE TABLE made_from (identity TEXT)")
            base.execute("INSERT INTO made_from VALUES (?)", (_identity(triggers),))

    try:
        write_file(path, write)
    except (OSError, sqlite3.Error) as error:
        raise WorkspaceError(
            f"cannot write {path}: {error}; choose a folder that can be written"
        ) from None


def _searchable(text: str) -> str:
    """Without zeros, at which SQLite would stop."""
    return text.replace("\0", "\ufffd")


def _cache() -> Path:
    """Where indices are kept when nobody says: $FACTSMITH_CACHE, $XDG_CACHE_HOME/factsmith, or ~/.cache/factsmith."""
    if own := os.environ.get("FACTSMITH_CACHE"):
        return Path(own) / "index"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factsmith" / "index"


def _asked(words: str) -> str:
    wanted = folded(check_text(words, "what to look for").strip())
    if not wanted:
        raise InputError("there is nothing to look for; give a word")
    return wanted


def _neuron(bank: Bank, i: int) -> Neuron:
    return (*bank, i)
