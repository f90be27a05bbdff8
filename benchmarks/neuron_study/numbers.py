"""Means and changes over facts, with 95 % intervals of a bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .facts import StudiedFact

ROUNDS = 2000
"""Rounds of the bootstrap."""


def rounded(x: float) -> float:
    """Return a number with five significant digits."""
    return float(f"{x:.5g}")


class Bootstrap:
    """95 % intervals by drawing the facts of each relation again.

    Each result is [value, low, high].
    """

    def __init__(self, asked: Sequence[StudiedFact], seed: int = 0) -> None:
        names = [a.fact.relation for a in asked]
        self.names = sorted(set(names))
        # (n_facts, n_relations) whether a fact is of a relation
        self.groups = np.array([[n == name for name in self.names] for n in names], dtype=float)
        draw = np.random.default_rng(seed)
        # How often each fact is drawn; in the first row, once.
        self.weights = np.ones((ROUNDS + 1, len(asked)))
        for group in self.groups.T.astype(bool):
            self.weights[1:, group] = draw.multinomial(
                group.sum(), np.full(group.sum(), 1 / group.sum()), size=ROUNDS
            )

    def change(self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> list[float]:
        """Return the authors' aggregate of the change.

        It is the mean over relations of (mean after / mean before - 1).
        """
        return self._interval(
            (
                (self.weights * after) @ self.groups / ((self.weights * before) @ self.groups) - 1
            ).mean(1)
        )

    def by_relation(
        self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]
    ) -> dict[str, float]:
        """Return the same change for each relation."""
        return {
            n: rounded(float(x))
            for n, x in zip(
                self.names, after @ self.groups / (before @ self.groups) - 1, strict=True
            )
        }

    def mean(
        self, values: np.ndarray[Any, Any], of: np.ndarray[Any, Any] | float = 1.0
    ) -> list[float]:
        """Return the mean over facts, or the sum over facts as a share of another sum."""
        return self._interval(
            self.weights @ values / (self.weights @ np.broadcast_to(of, values.shape))
        )

    def _interval(self, drawn: np.ndarray[Any, Any]) -> list[float]:
        """The value, and its interval over the rounds."""
        return [rounded(float(x)) for x in (drawn[0], *np.quantile(drawn[1:], [0.025, 0.975]))]


def change(
    boot: Bootstrap, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return the changes of p, given log p before and after, (n_facts, n_prompts)."""
    p, q = np.exp(before), np.exp(after)
    odds = (after - np.log1p(-np.minimum(q, 1 - 1e-12))) - (
        before - np.log1p(-np.minimum(p, 1 - 1e-12))
    )
    p_mean, q_mean = p.mean(1), q.mean(1)
    return {
        "change": boot.change(p_mean, q_mean),
        "by_relation": boot.by_relation(p_mean, q_mean),
        "mean_of_ratios": rounded(float((q_mean / p_mean).mean() - 1)),
        "log_odds": boot.mean(odds.mean(1)),
        "share_of_room": boot.mean(q_mean - p_mean, of=1 - p_mean),
        "p_before": rounded(float(p_mean.mean())),
        "p_after": rounded(float(q_mean.mean())),
    }


def spread(counts: Sequence[float]) -> dict[str, Any]:
    """Return the distribution of counts: median, quartiles, and the share below a dozen.

    An infinite count is beyond what was tried. It becomes None, and `beyond` is the share of them.
    """
    finite = np.array(counts, dtype=float)
    low, middle, high = (
        None if isinf(q) else float(q)
        for q in np.quantile(finite, [0.25, 0.5, 0.75], method="higher")
    )
    return {
        "median": middle,
        "quartiles": [low, high],
        "below_12": rounded(float((finite < 12).mean())),
        "beyond": rounded(float(np.isinf(finite).mean())),
    }


def side_effects(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    """Return the mean p, its change, and the growth of the right object's perplexity."""
    old, new = torch.cat(list(before)), torch.cat(list(after))
    return {
        "p_before": rounded(float(old.exp().mean())),
        "p_change": rounded(float(new.exp().mean() / old.exp().mean() - 1)),
        "perplexity_growth": rounded(float((old.mean() - new.mean()).exp() - 1)),
    }
