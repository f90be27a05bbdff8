"""How much of what is stored in a layer reaches new keys, and how many directions keys take up.

    met = interference(new_keys, stored_keys, moment)
    met.explained, met.closest
    directions(keys, moment)

Both are measured in the metric of the second moment C = L Lᵀ, on the whitened keys L⁻¹ k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_number
from ..core.errors import InputError
from ..core.settled import settled
from ..corpus.factors import whitened
from ..corpus.moments import SecondMoment
from ..edit import solve

RIDGE = 10.0
"""λ of `directions`: how many tokens of ordinary text stand against a key. The editors' own λ gives
a fact as many (SpreadConfig).
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Interference:
    """What stored facts do to new keys in one layer.

    Attributes:
        explained: (n,) share of each new key, in the metric of C, that lies in the span of the
            stored keys. So much of what was written for them reaches it.
        closest: (n,) int64, the most similar stored key that has another target; −1 where there is
            none.
        cosine: (n,) the cosine of the two under C⁻¹; −1 where there is none.
        chance: The share that a key without any likeness to the stored ones has.
    """

    explained: Tensor
    closest: Tensor
    cosine: Tensor
    chance: float


def directions(keys: Tensor, moment: SecondMoment, ridge: float = RIDGE) -> float:
    """Compute the effective number of directions that keys take up, between 0 and min(n, d_ff).

    It is the trace of the ridge's hat matrix: with the keys as columns of K and the singular values
    s of the whitened keys,

        tr Kᵀ (K Kᵀ + λ C)⁻¹ K = Σ s² / (s² + λ)

    A fact with a key of its own takes up one direction. Two facts with nearly the same key take up
    hardly more than one. When all are taken, a further key is a combination of stored ones, and
    nothing can be written for it alone.

    Args:
        keys: (n, d_ff).
        moment: The layer's second moment.
        ridge: λ, above 0, in tokens of ordinary text.

    Raises:
        InputError: The ridge is not above 0, or the keys are not as wide as the moment.
    """
    keys = check_keys(keys, moment, "keys")
    check_number(ridge, "ridge", above=0)
    if not len(keys):
        return 0.0
    white = whitened(keys, moment.factor)
    gram = white @ white.T if len(white) <= white.shape[1] else white.T @ white
    squares: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0)  # s²
    return float((squares / (squares + ridge)).sum())


@settled()
def interference(
    new_keys: Tensor,
    stored_keys: Tensor,
    moment: SecondMoment,
    *,
    targets: Sequence[str | None] | None = None,
    stored_targets: Sequence[str | None] | None = None,
) -> Interference:
    """Compute how much of each new key the stored keys explain, and which of these is the closest.

    Args:
        new_keys: (n, d_ff).
        stored_keys: (m, d_ff).
        moment: The layer's second moment.
        targets: What each new key is to answer: only facts with another target disturb one another.
            None: all count.
        stored_targets: What each stored key answers.

    Raises:
        InputError: Keys are not as wide as the second moment, or there is not one target a key.
    """
    new = check_keys(new_keys, moment, "new keys")
    stored = check_keys(stored_keys, moment, "stored keys")
    alike = _alike(len(new), len(stored), targets, stored_targets)
    nobody = torch.full((len(new),), -1.0, dtype=torch.float64)
    if not len(stored) or not len(new):
        return Interference(
            explained=torch.zeros_like(nobody), closest=nobody.long(), cosine=nobody, chance=0.0
        )
    factor = moment.factor
    cosines = _unit(whitened(new, factor)) @ _unit(whitened(stored, factor)).T  # (n, m)
    if alike is not None:
        cosines = cosines.masked_fill(alike.to(cosines.device), -1.0)
    best = cosines.max(dim=1)
    return Interference(
        explained=solve.explained(new, stored, factor).cpu(),
        closest=best.indices.masked_fill(best.values == -1.0, -1).cpu(),
        cosine=best.values.cpu(),
        chance=min(1.0, len(stored) / moment.d_ff),
    )


def check_keys(keys: Tensor, moment: SecondMoment, name: str) -> Tensor:
    """Return the keys; raise InputError unless they are (n, d_ff) finite numbers."""
    if not isinstance(keys, Tensor) or keys.ndim != 2 or keys.shape[1] != moment.d_ff:
        got = tuple(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
        raise InputError(
            f"{name} are {got}; expected (n, {moment.d_ff}), as wide as the second moment"
        )
    if not torch.isfinite(keys).all():
        raise InputError(f"{name} hold NaN or infinity; expected finite numbers")
    return keys


def _unit(rows: Tensor) -> Tensor:
    tiny = torch.finfo(rows.dtype).tiny
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=tiny)
    return unit


def _alike(
    n_new: int,
    n_stored: int,
    targets: Sequence[str | None] | None,
    stored_targets: Sequence[str | None] | None,
) -> Tensor | None:
    """(n, m) bool, whether two facts have the same target; None where nobody gave targets."""
    if targets is None and stored_targets is None:
        return None
    if targets is None or stored_targets is None:
        raise InputError("only one of targets and stored_targets was given; give both, or neither")
    if (len(targets), len(stored_targets)) != (n_new, n_stored):
        raise InputError(
            f"{len(targets)} and {len(stored_targets)} targets do not fit {n_new} new and "
            f"{n_stored} stored keys; give one target a key"
        )
    pairs = [[one == other for other in stored_targets] for one in targets]
    return torch.tensor(pairs, dtype=torch.bool).view(n_new, n_stored)
