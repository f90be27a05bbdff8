"""Neurons by a word: those whose values promote it, and those that fire after it.

    result = search_word(lm, "Paris")              # with the model's index, made if there is none
    result.promoting, result.firing

Values are searched in the model, so any word can be found. Triggers are searched in an index.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.checks import check_count
from ..core.progress import Progress
from ..core.tables import Shown, Table, counted, ending
from ..model.language_model import LanguageModel, check_model
from .index import Firing, Index
from .index_store import find_index, kept_index
from .phrase import folded
from .promoters import Promotion, promoters


@dataclass(frozen=True, kw_only=True, repr=False)
class WordNeurons(Shown):
    """The neurons of a word.

    Attributes:
        word: The word or phrase.
        promoting: Neurons whose values promote it.
        firing: Neurons that fire after it. None: there is no index.
        n_texts: Number of texts that the index was made from. None: there is no index.
        n_tokens: Number of their tokens. None: there is no index.
        index: The folder of the index. None: there is none.
        model: The name that the model was loaded by.
    """

    word: str
    promoting: tuple[Promotion, ...]
    firing: tuple[Firing, ...] | None
    n_texts: int | None
    n_tokens: int | None
    index: str | None
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        return {
            "word": self.word,
            "promoted_by": [
                {"neuron": list(p.neuron), "token": p.token, "rank": p.rank, "score": p.score}
                for p in self.promoting
            ],
            "triggers": None
            if self.firing is None
            else [
                {
                    "neuron": list(f.neuron),
                    "share": f.share,
                    "coefficient": f.trigger.coefficient,
                    "prefix": f.trigger.prefix,
                }
                for f in self.firing
            ],
            "n_texts": self.n_texts,
            "n_tokens": self.n_tokens,
            "index": self.index,
            "model": self.model,
        }

    def tables(self) -> list[Table]:
        """Return the neurons that promote the word, those that fire after it, and the texts."""
        if self.firing is None or self.n_texts is None or self.n_tokens is None:
            return [self._promoting_table()]
        texts = f"{counted(self.n_texts, 'text')}, {counted(self.n_tokens, 'token')}"
        return [
            self._promoting_table(),
            self._firing_table(self.firing),
            Table(f"from {texts}, in {self.index}", {}),
        ]

    def _promoting_table(self) -> Table:
        title = f"values that promote {self.word!r}"
        if not self.promoting:
            return Table(f"{title}: none", {})
        word = folded(self.word.strip())
        if all(folded(p.token.strip()) != word for p in self.promoting):
            title += ", by the first of its tokens"
        return Table(
            title,
            {"neuron": "<", "token": "<", "rank": ">", "score": ">"},
            [
                (" ".join(map(str, p.neuron)), repr(p.token), f"{p.rank + 1:,}", f"{p.score:z.2f}")
                for p in self.promoting
            ],
        )

    def _firing_table(self, firing: tuple[Firing, ...]) -> Table:
        title = f"neurons that fire after {self.word!r}"
        if not firing:
            return Table(f"{title}: none, in the texts that were scanned", {})
        return Table(
            title,
            {"neuron": "<", "share": ">", "strongest such trigger": "<"},
            [
                (" ".join(map(str, f.neuron)), f"{f.share:z.0%}", ending(f.trigger.prefix))
                for f in firing
            ],
        )


def search_word(
    lm: LanguageModel,
    word: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    max_tokens: float | None = None,
    k: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> WordNeurons:
    """Return the neurons that promote a word, and those that fire after it.

    Args:
        lm: The model.
        word: A word or a phrase. If it is several tokens, values are searched for the first.
        folder: As `find_index`.
        texts: As `find_index`.
        max_tokens: As `find_index`.
        k: At most so many neurons of either kind.
        seed: As `find_index`.
        progress: Gets how far the index is.

    Raises:
        InputError: when the word is empty.
        FactsmithError: as `promoters` and `find_index`.
    """
    check_model(lm)
    k = check_count(k, "k", "the number of neurons to find")
    promoting = promoters(lm, word, k)
    index = find_index(lm, folder, texts=texts, max_tokens=max_tokens, seed=seed, progress=progress)
    return _word_neurons(lm, word, promoting, index, k)


def search_kept(
    lm: LanguageModel,
    word: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    k: int = 20,
    progress: Progress | None = None,
) -> WordNeurons:
    """Return what `search_word` returns, without building an index.

    Where there is none, only values are searched.

    Args:
        lm: The model.
        word: As `search_word`.
        folder: As `find_index`.
        k: At most so many neurons of either kind.
        progress: Gets how far the missing parts of an index are.

    Raises:
        InputError: when the word is empty.
        FactsmithError: as `promoters` and `kept_index`.
    """
    check_model(lm)
    k = check_count(k, "k", "the number of neurons to find")
    promoting = promoters(lm, word, k)
    return _word_neurons(lm, word, promoting, kept_index(lm, folder, progress=progress), k)


def _word_neurons(
    lm: LanguageModel, word: str, promoting: list[Promotion], index: Index | None, k: int
) -> WordNeurons:
    """Return the neurons of a word; None instead of those that fire where there is no index."""
    return WordNeurons(
        word=word,
        promoting=tuple(promoting),
        firing=None if index is None else tuple(index.triggered_by(word, k)),
        n_texts=None if index is None else index.triggers.n_texts,
        n_tokens=None if index is None else index.triggers.n_tokens,
        index=None if index is None else str(index.folder),
        model=lm.name,
    )
