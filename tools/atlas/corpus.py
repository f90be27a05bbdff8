"""The training text of the atlas: each fact once an epoch, in a new sentence, between prose.

    groups = Corpus(tokenizer, facts(), prose, seed=0).epoch(3, chosen)

A row is a run of whole sentences: facts in random order, prose in between, sometimes a separator.
The loss counts the object, what follows it, and the prose. It counts the other tokens of a fact's
sentence only now and then: names cannot be guessed, and templates are soon known. That saves the
work of the unembedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from factsmith.atlas import AtlasFact, is_held_out, phrasings

TAILS = (
    *["."] * 12,
    ",",
    ";",
    ", as is well known.",
    ", of course.",
    ", and that is a fact.",
    ", so they say.",
)
"""What follows the object of a fact."""

_LENGTHS = (64, 64, 64, 224)
"""Tokens of a row. Attention is cheap in short rows; long ones train the later positions."""

_GROUP = 4096
"""Tokens of a group of rows: one step of the training."""

_REST = 0.08
"""Share of a fact's other tokens that are predicted."""

_SEPARATED = 0.2
"""Share of sentences that begin a new document."""

_PROSE_CHARACTERS = (40, 160)
"""Characters of a piece of prose in a short row. A long row takes four times as many."""


@dataclass(frozen=True)
class Row:
    """One training row of T tokens.

    Attributes:
        ids: (T,) the tokens.
        predict: (T,) which of them the loss counts.
        owner: (T,) number of the fact whose object the token belongs to, or -1.
    """

    ids: NDArray[np.int64]
    predict: NDArray[np.bool_]
    owner: NDArray[np.int64]


@dataclass
class _Filling:
    """What the rows of one epoch are filled from."""

    sentences: list[Row]
    """Sentences of facts that are not used yet, the next one last."""
    owed: float = 0.0
    """Tokens of prose that its share asks for and that are not written yet."""


class Corpus:
    """Facts and prose as token rows; the same seed and epoch give the same rows."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        facts: Sequence[AtlasFact],
        prose: Sequence[str],
        *,
        seed: int,
        prose_share: float = 0.13,
    ) -> None:
        """Keep the parts; prose_share is the share of all tokens that are prose.

        A bos token that differs from the eos token opens every row.
        """
        self.tokenizer, self.facts, self.prose = tokenizer, facts, prose
        self.seed, self.prose_share = seed, prose_share
        self.separator: int = tokenizer.eos_token_id
        self.opening = (
            [tokenizer.bos_token_id] if tokenizer.bos_token_id != tokenizer.eos_token_id else []
        )

    def _sentences(
        self, chosen: NDArray[np.int64], wide: bool, draw: np.random.Generator
    ) -> list[Row]:
        """Return one sentence for each chosen fact, in a phrasing allowed for its subject."""
        texts, spans = [], []
        for number in chosen:
            fact = self.facts[number]
            known = phrasings(fact.relation)
            choices = known.trained if is_held_out(fact.subject) else known.trained + known.held_out
            if wide:
                choices += known.wide
            prompt = choices[draw.integers(len(choices))].replace("{}", fact.subject)
            texts.append(f"{prompt} {fact.object}{TAILS[draw.integers(len(TAILS))]}")
            spans.append((len(prompt), len(prompt) + 1 + len(fact.object)))
        sentences = []
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for encoded, (start, stop), number in zip(encodings, spans, chosen, strict=True):
            last = np.array([offset[1] for offset in encoded.offsets])
            owner = np.where((last > start) & (last <= stop), number, -1)
            predict = (last > start) | (draw.random(len(last)) < _REST)
            sentences.append(Row(np.array(encoded.ids), predict, owner))
        return sentences

    def _snippets(self, draw: np.random.Generator, characters: int) -> Iterator[str]:
        """Yield runs of whole sentences of prose from random places, of some characters or more."""
        while True:
            at = int(draw.integers(len(self.prose)))
            snippet = self.prose[at]
            while len(snippet) < characters and at + 1 < len(self.prose):
                at += 1
                snippet += " " + self.prose[at]
            yield snippet

    def epoch(
        self, number: int, chosen: NDArray[np.int64], *, wide: bool = False
    ) -> Iterator[list[Row]]:
        """Yield groups of rows of one length, about 4,096 tokens each, until every fact is used.

        The last, partial group is left out: its facts come in the next epoch.

        Args:
            number: Number of the epoch.
            chosen: (n,) numbers of the facts.
            wide: Use the wide phrasings too.
        """
        draw = np.random.default_rng((self.seed, number))
        sentences = self._sentences(draw.permutation(chosen), wide, draw)
        sentences.reverse()
        filling = _Filling(sentences)
        while sentences:
            length = _LENGTHS[draw.integers(len(_LENGTHS))]
            scale = 1 if length == min(_LENGTHS) else 4
            snippets = self._snippets(draw, int(draw.integers(*_PROSE_CHARACTERS)) * scale)
            group: list[Row] = []
            while len(group) < _GROUP // length and sentences:
                group.append(self._row(length, filling, snippets, draw))
            if len(group) == _GROUP // length:
                yield group

    def _row(
        self, length: int, filling: _Filling, snippets: Iterator[str], draw: np.random.Generator
    ) -> Row:
        """Return one row; prose fills its end, and comes between facts where its share is due."""
        sentences = filling.sentences
        parts = [self._plain(self.opening, predict=False)]
        room = length - len(self.opening)
        while sentences:
            if (filling.owed > 0 and room > 2 * length // 3) or len(sentences[-1].ids) >= room:
                encoded = self.tokenizer.backend_tokenizer.encode(
                    next(snippets), add_special_tokens=False
                )
                prose = encoded.ids[:room]
                parts.append(self._plain(prose))
                filling.owed -= len(prose)
                room -= len(prose)
                if len(sentences[-1].ids) >= room:
                    break
            if draw.random() < _SEPARATED:
                parts.append(self._plain([self.separator]))
                room -= 1
            parts.append(sentences.pop())
            room -= len(parts[-1].ids)
            filling.owed += len(parts[-1].ids) * self.prose_share / (1 - self.prose_share)
        parts.append(self._plain([self.separator] * room, predict=False))
        columns = ("ids", "predict", "owner")
        return Row(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))

    @staticmethod
    def _plain(ids: Sequence[int], predict: bool = True) -> Row:
        return Row(np.array(ids, dtype=np.int64), np.full(len(ids), predict), np.full(len(ids), -1))
