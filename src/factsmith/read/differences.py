"""How the answers of several models, or of several revisions of one, differ, in words.

difference([("base", "lev."), ("latest", "euro.")])    # "base says 'lev'; latest says 'euro'."
"""

from __future__ import annotations

from collections.abc import Iterable

from ..model.matching import first_phrase


def difference(answers: Iterable[tuple[str, str]]) -> str:
    """Return how answers differ, in one sentence; "" for a single one.

    Answers are equal if their first phrases are.

    Args:
        answers: (source, its answer) of each source.
    """
    by_phrase: dict[str, list[str]] = {}
    for source, answer in answers:
        by_phrase.setdefault(first_phrase(answer) or answer, []).append(source)
    n_sources = sum(map(len, by_phrase.values()))
    if n_sources < 2:
        return ""
    if len(by_phrase) == 1:
        (phrase,) = by_phrase
        return f"{'Both' if n_sources == 2 else 'All'} say {phrase!r}."
    sayings = (
        f"{' and '.join(sources)} {'says' if len(sources) == 1 else 'say'} {phrase!r}"
        for phrase, sources in by_phrase.items()
    )
    return "; ".join(sayings) + "."
