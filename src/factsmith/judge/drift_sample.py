"""The text and the facts on which drift is measured."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from .. import atlas
from ..core.checks import check_count, check_items, check_seed, check_text
from ..core.errors import InputError
from ..corpus.own import is_own
from ..corpus.text import pieces
from ..model.language_model import LanguageModel, check_model
from ..model.sample import own_text

BATCH_TOKENS = 512
"""Tokens whose distributions are held at a time, before and after."""


class DriftSample(NamedTuple):
    """The text and the facts on which drift is measured."""

    rows: list[list[int]]
    """Token ids of the text, in rows that the model reads at once."""
    facts: list[tuple[str, str]]
    """(prompt, answer) of facts that the model says and that were not edited."""


def drift_sample(
    lm: LanguageModel,
    *,
    texts: Iterable[str] | None = None,
    without: Iterable[str] = (),
    max_tokens: int = 500,
    n_facts: int = 100,
    seed: int = 0,
) -> DriftSample:
    """Return the text and the facts on which the drift of a model is measured.

    Arguments and errors are those of `drift`.
    """
    rows = text_rows(lm, texts, max_tokens, check_seed(seed))
    return DriftSample(rows, known_facts(lm, None, without, n_facts, seed))


def text_rows(
    lm: LanguageModel, texts: Iterable[str] | None, max_tokens: int, seed: int
) -> list[list[int]]:
    """Return the token ids of the text, cut into rows that the model reads at once.

    A row of one token is left out, because nothing follows it.

    Raises:
        InputError: when no row is left.
    """
    check_model(lm)
    max_tokens = check_count(max_tokens, "max_tokens", "the number of tokens of text")
    if texts is None or is_own(texts):
        texts = own_text(lm, max_tokens, seed=seed)
    else:
        listed = check_items(texts, "texts", "texts", also="None")
        texts = [check_text(text, "a text") for text in listed]
    rows: list[list[int]] = []
    left, longest = max_tokens, min(BATCH_TOKENS, lm.max_tokens or BATCH_TOKENS)
    for piece in pieces(lm, (text for text in texts if text.strip())):
        for start in range(0, len(piece.ids), longest):
            row = piece.ids[start : start + longest][: left + 1]
            if len(row) > 1 and left > 0:
                rows.append(row)
                left -= len(row) - 1
        if left <= 0:
            break
    if not rows:
        raise InputError(
            "there is no text of two tokens or more to compare on; give longer texts",
            argument="texts",
        )
    return rows


def known_facts(
    lm: LanguageModel,
    facts: Iterable[tuple[str, str]] | None,
    without: Iterable[str],
    n_facts: int,
    seed: int,
) -> list[tuple[str, str]]:
    """Return (prompt, answer) of facts that the model says and that were not edited.

    The arguments are those of `drift`.
    """
    n_facts = check_count(n_facts, "n_facts", "the number of unrelated facts", least=0)
    subjects = [
        subject
        for subject in check_items(without, "without", "subjects")
        if check_text(subject, "a subject").strip()
    ]
    pairs = [
        (prompt, answer)
        for prompt, answer in _candidate_facts(facts, 2 * n_facts, seed)
        if not any(subject in prompt for subject in subjects)
    ]
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    says = lm.says(prompts, answers) if pairs else []
    return [pair for pair, is_said in zip(pairs, says, strict=True) if is_said][:n_facts]


def _candidate_facts(
    facts: Iterable[tuple[str, str]] | None, n_drawn: int, seed: int
) -> list[tuple[str, str]]:
    """Return the given (prompt, answer) pairs, or that many drawn from the bundled facts."""
    if facts is None:
        bundled = atlas.facts()
        drawn = random.Random(seed).sample(bundled, min(n_drawn, len(bundled)))
        return [
            (atlas.phrasings(fact.relation).trained[0].replace("{}", fact.subject), fact.object)
            for fact in drawn
        ]
    pairs = check_items(facts, "facts", "pairs of a prompt and its answer", also="None")
    if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise InputError(
            "facts holds an item that is no pair; give pairs of a prompt and its answer",
            argument="facts",
        )
    return pairs
