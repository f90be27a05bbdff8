"""How far a server's numbers may be from the workspace's, by the dtype it computes in.

A server adds W x and B A x and rounds each; a workspace rounds W + B A once. So two likeliest
tokens that are nearly equally likely may change places. How nearly is measured in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import InputError


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same in a dtype.

    Attributes:
        dtype: The dtype, or "quantised".
        tie: Two tokens are near ties if their log-probabilities differ by this much (nats).
        difference: How far the log-probabilities of the texts may be from the workspace's in the
            median (nats).
        share: The share of paraphrases and neighbours that may fail where the server gives no
            log-probabilities, so that nobody can say whether they are near ties.
    """

    dtype: str
    tie: float
    difference: float
    share: float


TOLERANCES: Mapping[str, Tolerance] = {
    each.dtype: each
    for each in (
        Tolerance("float32", 0.02, 0.02, 0.0),
        Tolerance("float16", 0.05, 0.05, 0.05),
        Tolerance("bfloat16", 0.3, 0.3, 0.1),
        Tolerance("quantised", 0.5, 0.6, 0.1),
    )
}
"""The tolerance of each dtype."""


def tolerance_of(dtype: str) -> Tolerance:
    """Return the tolerance of a dtype.

    Raises:
        InputError: when there is none for it.
    """
    if dtype not in TOLERANCES:
        raise InputError(
            f"dtype is {dtype!r:.40}. Give the one that the server computes in: "
            f"{', '.join(TOLERANCES)}.",
            argument="dtype",
        )
    return TOLERANCES[dtype]
