"""An index of what keys match and values promote: one folder, searched without model or server.

    index = build_index(lm, texts, "index")         # one pass over the texts, and all values
    index = Index.open("index")                     # later
    index.promoting("Paris")                        # neurons whose values promote it
    index.triggered_by("capital of France")         # neurons that fire after these words

The folder holds triggers.safetensors, values.safetensors and texts.sqlite, written in this order.
The triggers identify the index. texts.sqlite only makes the search of their texts faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.artefact import read_metadata
from ..core.checks import check_count, check_text
from ..core.errors import FingerprintError, InputError
from ..core.files import check_writable, folder_path
from ..core.identity import same_model
from ..core.progress import Progress
from ..core.tables import Shown, Table
from ..corpus.scan import Bank
from ..corpus.text import check_texts
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .phrase import folded, phrase_end
from .promoters import Promotion
from .text_search import TEXTS, searches, texts_with, write_texts
from .trigger_scan import find_triggers
from .triggers import Sign, Trigger, Triggers, check_sign, holds_triggers
from .values import FILE as VALUES
from .values import ValueTokens, value_tokens


@dataclass(frozen=True)
class Firing:
    """A neuron that fires after some words.

    Attributes:
        neuron: (layer, i) or (layer, expert, i).
        share: The share of its triggers that come after the words.
        trigger: The strongest of these.
    """

    neuron: Neuron
    share: float
    trigger: Trigger


@dataclass(frozen=True, eq=False, repr=False)
class Index(Shown):
    """The triggers and value tokens of one model, searched by word.

    Attributes:
        folder: The folder that holds them.
        triggers: The triggers.
        values: The tokens of the values.
    """

    folder: Path
    triggers: Triggers
    values: ValueTokens

    def tables(self) -> list[Table]:
        """Return what was scanned, what was read, and where the index is."""
        return [
            *self.triggers.tables(),
            *self.values.tables(),
            Table(f"searched in {self.folder}", {}),
        ]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], lm: LanguageModel | None = None) -> Index:
        """Open what `build_index` wrote.

        texts.sqlite is made again where it is missing or belongs to other triggers.

        Args:
            folder: The folder.
            lm: The model that the index must belong to. None: any.

        Raises:
            DamagedError: when another part is missing or was altered.
            FingerprintError: when a part belongs to another model.
            WorkspaceError: when texts.sqlite cannot be written.
        """
        place = folder_path(folder)
        triggers, values = Triggers.load(place, lm), ValueTokens.load(place)
        _check_values(values.model, values.fingerprint, place, triggers.fingerprint)
        if not searches(place / TEXTS, triggers):
            write_texts(place / TEXTS, triggers)
        return cls(place, triggers, values)

    def promoting(self, word: str, k: int = 20, *, demoted: bool = False) -> list[Promotion]:
        """Return neurons whose values have a word among the tokens that were read.

        They are ordered by the word's rank among the tokens, then by score.

        Args:
            word: The word. Surrounding spaces and case do not count.
            k: At most so many.
            demoted: Search the tokens that values demote.

        Raises:
            InputError: when the word is empty.
        """
        wanted = _asked(word)
        k = check_count(k, "k", "the number of neurons to find")
        ids = [i for i, text in self.values.words.items() if folded(text.strip()) == wanted]
        tokens, scores = (
            (self.values.bottom_ids, self.values.bottom_scores)
            if demoted
            else (self.values.top_ids, self.values.top_scores)
        )
        promotions: list[Promotion] = []
        for bank, each in tokens.items():
            rows, ranks = torch.isin(each, torch.tensor(ids, dtype=torch.int64)).nonzero(
                as_tuple=True
            )
            promotions += [
                Promotion(
                    _neuron(bank, i),
                    self.values.words[int(each[i, rank])],
                    rank,
                    float(scores[bank][i, rank]),
                )
                for i, rank in zip(rows.tolist(), ranks.tolist(), strict=True)
            ]
        return sorted(promotions, key=lambda p: (p.rank, -abs(p.score), p.neuron))[:k]

    def triggered_by(self, words: str, k: int = 20, *, sign: Sign = "top") -> list[Firing]:
        """Return neurons that fire after some words, the largest share of such triggers first.

        Args:
            words: A phrase of whole words, in any case. In scripts without spaces between words
                (Chinese, Thai ...) it may match anywhere.
            k: At most so many.
            sign: "top" for the largest coefficients, "bottom" for the smallest.

        Raises:
            InputError: when the phrase is empty.
            DamagedError: when texts.sqlite cannot be searched.
        """
        wanted = _asked(words)
        check_sign(sign)
        k = check_count(k, "k", "the number of neurons to find")
        begins = self._first_positions(wanted)
        if begins is None:
            return []
        firings: list[Firing] = []
        for bank, triggers in self.triggers.banks.items():
            filled = triggers.coefficients[sign] != 0
            hits = filled & (triggers.positions[sign] >= begins[triggers.texts[sign]])
            share = hits.sum(1) / filled.sum(1).clamp(min=1)
            for i in share.topk(min(k, len(share))).indices.tolist():
                if share[i] > 0:
                    column = int(hits[i].nonzero()[0])
                    neuron = _neuron(bank, i)
                    trigger = self.triggers.of(neuron, sign=sign)[column]
                    firings.append(Firing(neuron, float(share[i]), trigger))
        return sorted(firings, key=lambda f: (-f.share, -abs(f.trigger.coefficient), f.neuron))[:k]

    def _first_positions(self, phrase: str) -> Tensor | None:
        """Return for every text the first token that ends after a phrase, given `folded`.

        (texts,) int64, with the largest number for a text without the phrase. None if no text has
        it.
        """
        first: dict[int, int] = {}
        for number in texts_with(self.folder / TEXTS, self.triggers, phrase):
            end = phrase_end(self.triggers.texts[number], phrase)
            position = None if end is None else self.triggers.position(number, end)
            if position is not None:
                first[number] = position
        if not first:
            return None
        begins = torch.full((len(self.triggers.texts),), torch.iinfo(torch.int64).max)
        begins[torch.tensor(list(first))] = torch.tensor(list(first.values()))
        return begins


@asking()
def build_index(  # house: a promised public signature
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
    """Scan texts, read all values, and write both into a folder that can be searched.

    An index of this model in the folder is replaced. A scan that was killed continues.

    Args:
        lm: The model.
        texts: The corpus: one text, or texts one after another.
        folder: The folder.
        top: Number of triggers for each neuron.
        tokens: Number of tokens for each value.
        max_tokens: As `find_triggers`.
        norm: As `value_tokens`.
        dtype: As `find_triggers`.
        progress: Gets the number of banks and of tokens read.

    Raises:
        FingerprintError: when the folder holds an index of another model.
        FactsmithError: as `find_triggers` and `value_tokens`.
    """
    check_model(lm)
    check_texts(texts)
    place = check_place(lm, folder)
    values = value_tokens(lm, top=tokens, norm=norm, progress=progress)
    triggers = find_triggers(
        lm, texts, top=top, max_tokens=max_tokens, dtype=dtype, folder=place, progress=progress
    )
    values.save(place)
    write_texts(place / TEXTS, triggers)
    return Index(place, triggers, values)


def complete_index(lm: LanguageModel, folder: Path, progress: Progress | None = None) -> Index:
    """Open an index whose folder holds at least the triggers, and make what it lacks.

    Raises:
        FactsmithError: as `Index.open` and `value_tokens`.
    """
    if not (folder / VALUES).is_file():
        check_place(lm, folder)
        value_tokens(lm, progress=progress).save(folder)
    return Index.open(folder, lm)


def check_place(lm: LanguageModel, folder: str | os.PathLike[str]) -> Path:
    """Return a folder's path if an index of a model can be written there.

    Raises:
        InputError: when it is not a path.
        WorkspaceError: when it cannot be written.
        FingerprintError: when it holds parts of another model's index.
    """
    place = check_writable(folder)
    holds_triggers(place, lm)
    metadata = read_metadata(place / VALUES)
    _check_values(
        metadata.get("model", ""),
        metadata.get("fingerprint", lm.fingerprint),
        place,
        lm.fingerprint,
    )
    return place


def _check_values(model: str, fingerprint: str, place: Path, wanted: str) -> None:
    """Check that the values in a folder have the fingerprint wanted."""
    if not same_model(fingerprint, wanted):
        raise FingerprintError(
            f"the values in {place} are of {model}, fingerprint {fingerprint[:12]}; the model has "
            f"fingerprint {wanted[:12]}. Choose another folder, or delete them.",
            argument="index",
        )


def _asked(words: str) -> str:
    """Return words as they are compared: without case and surrounding spaces."""
    wanted = folded(check_text(words, "the words to look for").strip())
    if not wanted:
        raise InputError("the words to look for are empty. Give at least one word.")
    return wanted


def _neuron(bank: Bank, i: int) -> Neuron:
    return (*bank, i)
