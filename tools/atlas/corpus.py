"""The training text of the atlas: every fact once an epoch, each time in another sentence, between pieces of prose.

    groups = Corpus(tokenizer, facts(), prose, seed=0).epoch(3, chosen)

A row is a run of whole sentences: facts in random order, prose in between, sometimes a separator. What is to be predicted
is chosen token by token: the object and what follows it always, prose always, the rest of a fact's sentence (names
cannot be guessed, templates are soon known) only now and then, which saves the unembedding's work.
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

_LENGTHS = (
    64,
    64,
    64,
    224,
)  # mostly short rows, where attention is cheap; long ones teach the later positions

_REST = 0.08  # share of a fact's other tokens that are predicted

_SEPARATED = 0.2  # share of sentences that begin a new document

_PROSE_CHARACTERS = (40, 160)  # a snippet in a short row; a long row takes four times as much


@dataclass(frozen=True)
class Row:
    """One training row of T tokens.

    ids      (T,) int64
    predict  (T,) which of them the loss counts
    owner    (T,) number of the fact whose object the token belongs to, or -1
    """

    ids: NDArray[np.int64]
    predict: NDArray[np.bool_]
    owner: NDArray[np.int64]


class Corpus:
    """Facts and prose as token rows; the same seed and epoch give the same rows.

    prose_share is the share of tokens that are prose. The tokenizer's bos token, where it has one of its own, opens every row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        facts: Sequence[AtlasFact],
        prose: Sequence[str],
        *,
        seed: int,
        prose_share: float = 0.13,
    ) -> None:
        self.tokenizer, self.facts, self.seed, self.prose_share = (
            tokenizer,
            facts,
            seed,
            prose_share,
        )
        self.prose = prose
        self.separator: int = tokenizer.eos_token_id
        self.opening = (
            [tokenizer.bos_token_id] if tokenizer.bos_token_id != tokenizer.eos_token_id else []
        )

    def _tell(self, chosen: NDArray[np.int64], wide: bool, draw: np.random.Generator) -> list[Row]:
        """One sentence for each chosen fact, in a phrasing that its subject may be told in."""
        texts, spans = [], []
        for number in chosen:
            fact = self.facts[number]
            told = phrasings(fact.relation)
            choices = told.trained if is_held_out(fact.subject) else told.trained + told.held_out
            if wide:
                choices += told.wide
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
        """Runs of whole prose sentences of at least so many characters, from random places."""
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
        """Rows in groups of one length and about 4,096 tokens, until every chosen fact (n,) is told once; `wide`: in more words."""
        draw = np.random.default_rng((self.seed, number))
        sentences = self._tell(draw.permutation(chosen), wide, draw)
        sentences.reverse()
        owed = 0.0  # prose tokens that the share asks for and that have not been written yet
        while sentences:
            length = _LENGTHS[draw.integers(len(_LENGTHS))]
            scale = 1 if length == min(_LENGTHS) else 4
            snippets = self._snippets(draw, int(draw.integers(*_PROSE_CHARACTERS)) * scale)
            group: list[Row] = []
            while len(group) < 4096 // length and sentences:
                parts = [self._plain(self.opening, predict=False)]
                room = length - len(self.opening)
                while sentences:
                    if (owed > 0 and room > 2 * length // 3) or len(
                        sentences[-1].ids
                    ) >= room:  # the end of a row is filled with prose
                        prose = self.tokenizer.backend_tokenizer.encode(
                            next(snippets), add_special_tokens=False
                        ).ids[:room]
                        parts.append(self._plain(prose))
                        owed -= len(prose)
                        room -= len(prose)
                        if len(sentences[-1].ids) >= room:
                            break
                    if draw.random() < _SEPARATED:
                        parts.append(self._plain([self.separator]))
                        room -= 1
                    parts.append(sentences.pop())
                    room -= len(parts[-1].ids)
                    owed += len(parts[-1].ids) * self.prose_share / (1 - self.prose_share)
                parts.append(self._plain([self.separator] * room, predict=False))
                group.append(
                    Row(
                        *(
                            np.concatenate([getattr(part, field) for part in parts])
                            for field in ("ids", "predict", "owner")
                        )
                    )
                )
            if (
                len(group) == 4096 // length
            ):  # an epoch's last, partial group is left out: its facts come in the next one
                yield group

    @staticmethod
    def _plain(ids: Sequence[int], predict: bool = True) -> Row:
        return Row(np.array(ids, dtype=np.int64), np.full(len(ids), predict), np.full(len(ids), -1))
