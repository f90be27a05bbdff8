"""The bundled corpus of ordinary text, from which second moments are computed without a text.

    texts = ordinary_texts()
    next(iter(texts))            a passage of about 400 characters
    DIGEST                       what a second moment records as its corpus

It serves any model that reads English. Statements of the bundled facts are mixed with sentences of
public-domain books, about as many characters of each. Two statements, one sentence of prose, and so
on make passages of PASSAGE characters or a little more. All orders are random, so any beginning of
the corpus has both kinds in proportion. Passages are faster than single sentences: there is less
padding. They also have fewer first tokens, where the coefficients of many models are unusual.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache

from .. import atlas
from ..atlas.texts import bundled_prose, sentences

NAME = "ordinary1"
"""The name of the corpus. A corpus of other texts gets another one."""

DIGEST = f"{NAME}-a05d7296be96ad55aef4a6bc07aeefc4b1645eaf21d44baf5fe451d350e4cd91"
"""The name of the corpus and the sha256 (hex) of its passages, which a test checks.

A second moment of any beginning of the corpus records it."""

PASSAGE = 400
"""Characters of a passage, at least: about 100 tokens."""

STATEMENTS = 2
"""Statements for each sentence of prose. They are about half as long."""


class OrdinaryTexts:
    """The passages of the bundled corpus. It can be iterated any number of times."""

    def __iter__(self) -> Iterator[str]:
        """Yield the passages, always in the same order."""
        return iter(_passages())

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(_passages())

    def __repr__(self) -> str:
        return f"<{NAME}: {len(self):,} passages of bundled facts and public-domain prose>"


@cache
def ordinary_texts() -> OrdinaryTexts:
    """Return the bundled corpus: about 300,000 tokens of ordinary English."""
    return OrdinaryTexts()


@cache
def _passages() -> tuple[str, ...]:
    prose = bundled_prose()
    facts = random.Random(0).sample(atlas.facts(), math.ceil(len(prose) * STATEMENTS / 2))
    statements = iter(sentences(facts))  # two for each fact
    passages, passage = [], ""
    for line in prose:
        for sentence in (
            *(next(statements) for _ in range(STATEMENTS - 1)),
            line,
            next(statements),
        ):
            passage = f"{passage} {sentence}".lstrip()
            if len(passage) >= PASSAGE:
                passages.append(passage)
                passage = ""
    return tuple(passages)
