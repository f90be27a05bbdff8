"""An index of what a model's memory matches and promotes: one folder, searched without the model and without a server.

    index = build_index(lm, texts, "index")         # one pass over the texts, every value read, the texts in SQLite's full-text search
    index = Index.open("index")                     # later
    index.promoting("Paris")                        # neurons whose values promote it
    index.triggered_by("capital of France")         # neurons that fire behind these words

The folder holds triggers.safetensors, values.safetensors and texts.sqlite.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import check_count, check_text
from ..errors import DamagedError, InputError, WorkspaceError
from ..files import write_file
from ..model.ffn import Neuron
from ..model.load import LanguageModel, check_model
from ..model.sample import own_text
from ..model.scan import Bank
from ..progress import Progress, tell
from .triggers import Sign, Trigger, Triggers, find_triggers
from .values import Promotion, ValueTokens, value_tokens

_TEXTS = "texts.sqlite"


@dataclass(frozen=True)
class Firing:
    """A neuron that fires behind some words: the share of its triggers that do, and the strongest of these."""

    neuron: Neuron
    share: float
    trigger: Trigger


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Triggers and value tokens of one model, and the folder they are in."""

    folder: Path
    triggers: Triggers
    values: ValueTokens

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, {self.triggers!r}, {self.values!r})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], lm: LanguageModel | None = None) -> Index:
        """Open what `build_index` wrote. Raises DamagedError when a part is missing or altered, FingerprintError when it is not of `lm`."""
        folder = Path(folder)
        triggers, values = Triggers.load(folder, lm), ValueTokens.load(folder)
        if triggers.fingerprint != values.fingerprint or not (folder / _TEXTS).is_file():
            raise DamagedError(f"{folder} holds parts of different indices; build it again")
        return cls(folder, triggers, values)

    def promoting(self, word: str, k: int = 20, *, demoted: bool = False) -> list[Promotion]:
        """Neurons whose values have a word among the tokens they promote (or demote) most, by rank, then score; at most k.

        The word is compared without surrounding spaces and case. Raises InputError when it is empty.
        """
        wanted = _asked(word)
        k = check_count(k, "k", "how many neurons to find")
        ids = [i for i, text in self.values.words.items() if text.strip().casefold() == wanted]
        tokens, scores = (self.values.bottom_ids, self.values.bottom_scores) if demoted else (self.values.top_ids, self.values.top_scores)
        found = []
        for bank, own in tokens.items():
            rows, ranks = torch.isin(own, torch.tensor(ids, dtype=torch.int64)).nonzero(as_tuple=True)
            found += [
                Promotion(_neuron(bank, i), self.values.words[int(own[i, rank])], rank, float(scores[bank][i, rank]))
                for i, rank in zip(rows.tolist(), ranks.tolist(), strict=True)
            ]
        return sorted(found, key=lambda p: (p.rank, -abs(p.score), p.neuron))[:k]

    def triggered_by(self, words: str, k: int = 20, *, sign: Sign = "top") -> list[Firing]:
        """Neurons that fire behind some words (a phrase, whole words, any case), those with the largest share of such triggers first.

        Raises InputError when nothing is asked for.
        """
        wanted = _asked(words)
        k = check_count(k, "k", "how many neurons to find")
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
                    found.append(Firing(_neuron(bank, i), float(share[i]), self.triggers.of(_neuron(bank, i), sign=sign)[column]))
        return sorted(found, key=lambda f: (-f.share, -abs(f.trigger.coefficient), f.neuron))[:k]

    def _first_positions(self, wanted: str) -> dict[int, int]:
        """For every text with these words the first token that ends behind them: {text: position}."""
        phrase = wanted.replace('"', '""')
        try:
            with closing(sqlite3.connect(f"file:{self.folder / _TEXTS}?mode=ro", uri=True)) as base:
                rows = base.execute("SELECT rowid, text FROM texts WHERE texts MATCH ?", (f'"{phrase}"',)).fetchall()
        except sqlite3.DatabaseError as error:
            raise DamagedError(f"cannot search {self.folder / _TEXTS}: {error}; build the index again") from None
        found = {}
        for number, text in rows:
            at = text.casefold().find(wanted)
            position = self.triggers.position(number, at + len(wanted)) if at >= 0 else None
            if position is not None:
                found[number] = position
        return found


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
    """
    values = value_tokens(lm, top=tokens, norm=norm, progress=progress)
    triggers = find_triggers(lm, texts, top=top, max_tokens=max_tokens, dtype=dtype, folder=folder, progress=progress)
    values.save(folder)
    path = Path(folder) / _TEXTS

    def write(temporary: Path) -> None:
        with closing(sqlite3.connect(temporary)) as base, base:
            base.execute("CREATE VIRTUAL TABLE texts USING fts5(text)")
            base.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", enumerate(triggers.texts))

    try:
        write_file(path, write)
    except (OSError, sqlite3.Error) as error:
        raise WorkspaceError(f"cannot write {path}: {error}; choose a folder that can be written") from None
    return Index(Path(folder), triggers, values)


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
    """The model's index in a folder (None: the user's cache), built first where there is none, or where texts are given.

    texts       what to scan; None: what is there, else text that the model writes itself, from `seed`
    max_tokens  how much of it; None: all of the texts, or 100,000 tokens of the model's own

    Raises FingerprintError for another model's index in the folder, and what `Index.open` and `build_index` raise.
    """
    check_model(lm)
    place = _cache() / lm.fingerprint[:16] if folder is None else Path(folder)
    if texts is None and (place / _TEXTS).is_file():
        return Index.open(place, lm)
    if texts is None:
        wanted = _TOKENS if max_tokens is None else check_count(max_tokens, "max_tokens", "how many tokens to scan")
        texts = own_text(lm, wanted, seed=seed, progress=lambda done: tell(progress, "sampling text", done, wanted))
    return build_index(lm, texts, place, max_tokens=float("inf") if max_tokens is None else max_tokens, progress=progress)


def _cache() -> Path:
    """Where indices are kept when nobody says: $FACTSMITH_CACHE, $XDG_CACHE_HOME/factsmith, or ~/.cache/factsmith."""
    if own := os.environ.get("FACTSMITH_CACHE"):
        return Path(own) / "index"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factsmith" / "index"


def _asked(words: str) -> str:
    wanted = check_text(words, "what to look for").strip().casefold()
    if not wanted:
        raise InputError("there is nothing to look for; give a word")
    return wanted


def _neuron(bank: Bank, i: int) -> Neuron:
    return (*bank, i)
