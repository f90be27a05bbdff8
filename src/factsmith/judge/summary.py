"""The measures of some rows, each a mean with its 95 % bootstrap interval over records.

    shares = summarise(rows, continuations)
    shares["paraphrase exact"]        # Share(value=0.93, low=0.88, high=0.97, n=120)

A measure is named by the kind of its questions and by the way they are counted. "score" and "score
exact" join three kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .metrics import bootstrap_interval, harmonic_mean
from .rows import Continuation, Row, Share

MEASURES: Mapping[str, Callable[[Row], float | None]] = {
    "success": lambda row: row.success,
    "exact": lambda row: row.exact,
    "stayed": lambda row: row.stayed,
    "magnitude": lambda row: row.magnitude,
    "tokens": lambda row: row.tokens,
}
"""The ways to count a question, by name. None: the question cannot be counted in this way."""

_TEXT_MEASURES: Mapping[str, Callable[[Continuation], float | None]] = {
    "entropy": lambda continuation: continuation.entropy,
    "consistency": lambda continuation: continuation.consistency,
}

_SCORES = {"score": "success", "score exact": "exact"}

_SCORED_KINDS = ("prompt", "paraphrase", "neighbour")

_RESAMPLES = 2000


def summarise(
    rows: Sequence[Row], continuations: Sequence[Continuation] = (), *, seed: int = 0
) -> dict[str, Share]:
    """Return every measure that the rows allow, by name.

    Questions that ask the same thing in several ways count once, as right if any of them is right:
    MQuAKE asks each multi-hop case in three ways (Zhong et al. 2023, arXiv 2305.14795, section
    4.1). "score" and "score exact" are the harmonic means over prompt, paraphrase and neighbour
    questions, if all three kinds were asked.

    Args:
        rows: Rows of one editor.
        continuations: Continuations of the same editor.
        seed: Seed of the bootstrap.
    """
    shares: dict[str, Share] = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        for name, measure in MEASURES.items():
            values, records = _cases(of_kind, measure)
            if values:
                shares[f"{kind} {name}"] = _share(values, records, seed)
    for name, measure_text in _TEXT_MEASURES.items():
        measured = [(measure_text(one), one.record) for one in continuations]
        texts = [(value, record) for value, record in measured if value is not None]
        if texts:
            values, records = [value for value, _ in texts], [record for _, record in texts]
            shares[f"text {name}"] = _share(values, records, seed)
    for name, measure_name in _SCORES.items():
        if (score := score_of(rows, MEASURES[measure_name], seed)) is not None:
            shares[name] = score
    return shares


def _cases(
    rows: Sequence[Row], measure: Callable[[Row], float | None]
) -> tuple[list[float], list[str]]:
    """Return the value and the record of each case: a question by itself, or a group of them."""
    cases: dict[tuple[str, int], list[float]] = {}
    for at, row in enumerate(rows):
        if (value := measure(row)) is not None:
            case = at if row.group is None else -1 - row.group
            cases.setdefault((row.record, case), []).append(float(value))
    return [max(values) for values in cases.values()], [record for record, _ in cases]


def _share(values: Sequence[float], records: Sequence[str], seed: int) -> Share:
    """Return the mean of values, with its interval over records."""
    low, high = bootstrap_interval(values, groups=records, seed=seed)
    return Share(sum(values) / len(values), low, high, len(values), len(set(records)))


def score_of(
    rows: Sequence[Row], measure: Callable[[Row], float | None], seed: int
) -> Share | None:
    """Return the harmonic mean of a measure's means over prompt, paraphrase and neighbour
    questions.

    Args:
        rows: Rows of one editor.
        measure: The value of a row.
        seed: Seed of the bootstrap, which draws whole records.

    Returns:
        The score, of as many records as there are. None unless all three kinds were measured.
    """
    column = {kind: i for i, kind in enumerate(_SCORED_KINDS)}
    number: dict[str, int] = {}
    measured = [
        (number.setdefault(row.record, len(number)), column[row.kind], measure(row))
        for row in rows
        if row.kind in column
    ]
    n = len(number)
    sums, sizes = np.zeros((n, 3)), np.zeros((n, 3))  # (records, kinds)
    for record, kind, value in measured:
        if value is not None:
            sums[record, kind] += value
            sizes[record, kind] += 1
    if not n or not sizes.sum(0).all():
        return None
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (draws @ sums) / (draws @ sizes)  # (resamples, kinds)
        scores = 3 / (1 / means).sum(1)  # 0 where a mean is 0
    low, high = np.nanquantile(scores, [0.025, 0.975])
    value = harmonic_mean((sums.sum(0) / sizes.sum(0)).tolist())
    return Share(value, float(low), float(high), n, n)
