"""How full edited layers are, and what more facts will cost the rest of what the model knows: plain
tensors and deltas in, numbers out.

    found = capacity(deltas, weights, moments, next_facts=100)
    found                                   # a table: layers, loss now, loss with 100 more, the
    breaking point found.warning                           # what to say before those 100 are
    written; None when there is room warning([*deltas, delta], weights, moments)             # the
    same for a change that is solved for, without what takes longer interference(new_keys,
    stored_keys, moment)             # how much of what is stored arrives at new keys

Three things are measured for a layer with the keys it stores and the update it carries:

- `directions` that keys take up, of d_ff: the trace of the ridge's hat matrix, with the keys as
columns of K and C the second moment,

      tr Kᵀ (K Kᵀ + λ C)⁻¹ K = Σ s² / (s² + λ),      s the singular values of the whitened keys L⁻¹
      K, C = L Lᵀ

  A fact with a key of its own takes up one direction, two facts with nearly the same key hardly
  more than one. When all are taken, a further key is a combination of stored ones, and nothing can
  be written for it alone.
- `norm`, ‖Δ‖ / ‖W‖ of all updates together.
- `disturbance`, how much they change what the layer puts out on ordinary text
(`solve.disturbance`).

What is lost of everything else is predicted from the disturbance x (mean over the edited layers)
and the load ℓ = facts / (edited layers · d_ff), and the disturbance of n facts from that of those
there are, which grows a little slower than the square root of their number:

    lost share of unrelated facts = 1 − exp(−(x / X)^a ℓ^b),      x(n) = x(n₀) · (n / n₀)^p

The constants (`FITTED`) are from `benchmarks/capacity.py`: facts written into both bundled models,
until a quarter of the rest was lost. docs/capacity.md says how far they carry. Beyond what was
measured nothing is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.errors import InputError, LayerError
from ..core.tables import Shown, Table, counted
from ..corpus.factors import whitened
from ..corpus.moments import SecondMoment
from ..edit import solve
from ..edit.delta import Delta

LIMIT = 10.0
"""Per cent of unrelated facts answered otherwise from which a model is called broken, unless the
caller says otherwise.
"""

RIDGE = 10.0
"""λ of `directions`: how many tokens of ordinary text stand against a key, as many as the editors'
own λ gives a fact (SpreadConfig).
"""

_FEW = 10
"""Facts from which those that are stored say how fast the disturbance grows; fewer count in
proportion, beside what is usual.
"""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The constants of the two formulas above, where they were fitted, and how far off they are on
    a model that they were not fitted on.

    scale, power, crowding  X, a and b of the loss
    usual, growth           the disturbance of n facts where none is stored: usual · ℓ^p; p
    disturbance, load       the largest that was measured
    error                   root mean square error of a predicted loss, in points, fitted on one
    model and tested on the other
    """

    scale: float
    power: float
    crowding: float
    usual: float
    growth: float
    disturbance: float
    load: float
    error: float

    def loss(self, disturbance: float, load: float) -> float:
        """Per cent of unrelated facts that are answered otherwise."""
        return -100 * math.expm1(
            -math.pow(disturbance / self.scale, self.power) * math.pow(load, self.crowding)
        )

    def disturbance_at(
        self, load: float, now: tuple[float, float] | None = None, share: float = 1.0
    ) -> float:
        """The disturbance that a load will bring; `now`: the load there is and the disturbance it
        brought, trusted to `share`.
        """
        expected = self.usual * math.pow(load, self.growth)
        if now is None:
            return expected
        found = expected * math.pow(now[1] / (self.usual * math.pow(now[0], self.growth)), share)
        return max(found, now[1]) if load > now[0] else min(found, now[1])

    def covers(self, disturbance: float, load: float) -> bool:
        """Whether this was measured."""
        return disturbance <= self.disturbance and load <= self.load


FITTED = Fit(
    scale=0.5187,
    power=1.792,
    crowding=0.4723,
    usual=0.9622,
    growth=0.4411,
    disturbance=0.4754,
    load=0.1628,
    error=2.2,
)
"""From benchmarks/results/capacity.json ("fit")."""

WARNED_FROM = 0.5
"""Share of the limit from which a predicted loss is warned of. Near the limit predictions came out
too low by up to a factor of 1.7; from half of it on, the warning came before the limit in all seven
series that reached it ("breaking" in the same file; in six of seven by constants fitted on the
other model alone)."""


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How much of a layer is taken up.

    layer        its number
    d_ff         neurons
    facts        keys it stores
    directions   that these take up, of d_ff
    norm         ‖Δ‖ / ‖W‖ of all updates together
    disturbance  relative change of its output on ordinary text, root mean square: 0.05 is 5 %
    """

    layer: int
    d_ff: int
    facts: int
    directions: float
    norm: float
    disturbance: float

    @property
    def full(self) -> float:
        """Share of the directions that are taken up, in [0, 1]."""
        return self.directions / self.d_ff


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Capacity(Shown):
    """How full the edited layers are, and what is to be expected.

    layers       each edited layer, or each that would be
    facts        stored in them
    limit        per cent of unrelated facts answered otherwise that count as broken
    next_facts   how many more were asked for
    loss         per cent of unrelated facts that are predicted to be answered otherwise now; None
    outside of what was measured loss_next    the same with the next facts breaking     how many
    facts in all take the loss to the limit; None when that is outside of what was measured asked,
    kept  stored facts that were asked of the model, and how many of them it still says; None when
    it was not asked
    """

    layers: tuple[LayerUse, ...]
    facts: int
    limit: float
    next_facts: int
    loss: float | None
    loss_next: float | None
    breaking: int | None
    asked: int | None = None
    kept: int | None = None

    @property
    def full(self) -> float:
        """Share of the edited layers' directions that stored keys take up, in [0, 1]."""
        return sum(use.directions for use in self.layers) / sum(use.d_ff for use in self.layers)

    @property
    def load(self) -> float:
        """Stored facts / (edited layers · d_ff)."""
        return self.facts / sum(use.d_ff for use in self.layers)

    @property
    def disturbance(self) -> float:
        """Mean over the edited layers."""
        return sum(use.disturbance for use in self.layers) / len(self.layers)

    @property
    def retention(self) -> float | None:
        """Share of the stored facts that the model still says; None when it was not asked, or there
        is none.
        """
        return None if not self.asked or self.kept is None else self.kept / self.asked

    @property
    def warning(self) -> str | None:
        """What to say before the next facts are written (or, with none, about those there are);
        None when there is room.
        """
        loss = self.loss_next if self.next_facts else self.loss
        return _warning(self.facts, self.next_facts, loss, self.limit, self.breaking)

    def tables(self) -> list[Table]:
        """What is predicted, and what it rests on, layer by layer."""
        named = [
            (
                "full",
                f"{self.full:.1%}",
                f"of the directions of {counted(len(self.layers), 'layer')}; "
                f"{counted(self.facts, 'fact')} stored",
            ),
            ("load", f"{self.load:.4f}", "facts / (layers x neurons)"),
        ]
        if self.retention is not None:
            named.append(
                (
                    "retention",
                    f"{self.retention:.1%}",
                    f"{self.kept:,} of {self.asked:,} stored facts are still said",
                )
            )
        named.append(
            ("loss now", _percent(self.loss), "of unrelated facts answered otherwise, predicted")
        )
        if self.next_facts:
            named.append(
                (
                    f"with {self.next_facts:,} more",
                    _percent(self.loss_next),
                    f"the same with {self.facts + self.next_facts:,} facts",
                )
            )
        at = _OUTSIDE if self.breaking is None else f"{self.breaking:,} facts"
        named.append(("breaking point", at, f"in all, where {self.limit:g} % is reached"))
        note = (
            f"predictions: off by {FITTED.error:.1f} points (root mean square) where they were "
            "checked, on two small models up to a load "
            f"of {FITTED.load:.2f}; beyond that nothing is predicted"
        )
        rows = [
            (
                str(u.layer),
                f"{u.facts:,}",
                f"{u.directions:,.1f} of {u.d_ff:,}",
                f"{u.full:.1%}",
                f"{u.norm:.3f}",
                f"{u.disturbance:.1%}",
            )
            for u in self.layers
        ]
        columns = {
            "layer": ">",
            "facts": ">",
            "directions": ">",
            "full": ">",
            "|Δ| / |W|": ">",
            "disturbance": ">",
        }
        found = [
            Table("capacity", {"": "<", "value": ">", " ": "<"}, named, note),
            Table("by layer", columns, rows),
        ]
        return found if self.warning is None else [*found, Table(f"warning: {self.warning}", {})]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields, the derived ones included."""
        derived = {
            name: getattr(self, name)
            for name in ("full", "load", "disturbance", "retention", "warning")
        }
        return {
            **vars(self),
            **derived,
            "layers": [{**vars(use), "full": use.full} for use in self.layers],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Interference:
    """What stored facts do to new keys in one layer.

    explained  (n,) share of each new key, in the metric of C, that lies in the span of the stored
    ones: so much of it gets what was
               written for them. `chance` is what a key without any likeness to them has
    closest    (n,) int64, the stored key most like it that has another target; −1 where there is
    none cosine     (n,) their cosine under C⁻¹; −1 where there is none
    """

    explained: Tensor
    closest: Tensor
    cosine: Tensor
    chance: float


def directions(keys: Tensor, moment: SecondMoment, ridge: float = RIDGE) -> float:
    """Effective number of directions that keys (n, d_ff) take up: tr Kᵀ (K Kᵀ + λ C)⁻¹ K, between 0
    and min(n, d_ff).

    ridge is λ, above 0, in tokens of ordinary text. Raises InputError when it is not, or when the
    keys are not as wide as the moment.
    """
    keys = _checked(keys, moment, "keys")
    check_number(ridge, "ridge", above=0)
    if not len(keys):
        return 0.0
    white = whitened(keys, moment.factor)
    gram = white @ white.T if len(white) <= white.shape[1] else white.T @ white
    squares: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0)  # s²
    return float((squares / (squares + ridge)).sum())


def interference(
    new_keys: Tensor,
    stored_keys: Tensor,
    moment: SecondMoment,
    *,
    targets: Sequence[str | None] | None = None,
    stored_targets: Sequence[str | None] | None = None,
) -> Interference:
    """How much of each new key (n, d_ff) is explained by the stored ones (m, d_ff), and which of
    these is the closest.

    targets, stored_targets  what each is to answer: only facts with another target disturb one
    another. None: all count

    Raises InputError when keys are not as wide as the second moment, or targets are not one a key.
    """
    new, stored = (
        _checked(new_keys, moment, "new keys"),
        _checked(stored_keys, moment, "stored keys"),
    )
    if (targets is None) != (stored_targets is None):
        raise InputError("give targets and stored_targets, or neither")
    ours, theirs = list(targets or [None] * len(new)), list(stored_targets or [None] * len(stored))
    if (len(ours), len(theirs)) != (len(new), len(stored)):
        raise InputError(
            f"{len(ours)} and {len(theirs)} targets do not fit {len(new)} new and {len(stored)} "
            "stored keys; expected one a key"
        )
    nobody = torch.full((len(new),), -1.0, dtype=torch.float64)
    if not len(stored) or not len(new):
        return Interference(
            explained=torch.zeros_like(nobody), closest=nobody.long(), cosine=nobody, chance=0.0
        )
    factor = moment.factor
    white = [
        x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        for x in (whitened(k, factor) for k in (new, stored))
    ]
    cosines = white[0] @ white[1].T  # (n, m)
    if targets is not None:
        alike = torch.tensor([[a == b for b in theirs] for a in ours], device=cosines.device)
        cosines = cosines.masked_fill(alike, -1.0)
    best = cosines.max(dim=1)
    return Interference(
        explained=solve.explained(new, stored, factor).cpu(),
        closest=best.indices.masked_fill(best.values == -1.0, -1).cpu(),
        cosine=best.values.cpu(),
        chance=min(1.0, len(stored) / moment.d_ff),
    )


def capacity(
    deltas: Iterable[Delta],
    weights: Mapping[int, Tensor],
    moments: Mapping[int, SecondMoment],
    *,
    layers: Mapping[int, int] | None = None,
    next_facts: int = 0,
    limit: float = LIMIT,
    asked: int | None = None,
    kept: int | None = None,
) -> Capacity:
    """How full the layers are that some deltas edit, all of them together, and what `next_facts`
    more will cost.

    weights      {l: (d_model, d_ff)} down-projections without the deltas
    moments      {l: SecondMoment} of the same layers
    layers       {l: d_ff} where the next facts will go; None: where the stored ones are. Needed
    when there is no delta limit        per cent of unrelated facts answered otherwise that count as
    broken asked, kept  what was asked of the model about stored facts, for `retention`

    Raises InputError when a number is out of range, or there are neither deltas nor layers;
    LayerError when weights or a second moment of an edited layer are missing.
    """
    deltas = list(deltas)
    next_facts = check_count(next_facts, "next_facts", "the number of facts to come", least=0)
    limit = _checked_limit(limit)
    changes = _changes(deltas, weights, moments)
    uses = [
        LayerUse(
            layer=layer,
            d_ff=change.keys.shape[1],
            facts=len(change.keys),
            directions=directions(change.keys, moments[layer]),
            norm=float((change.left @ change.right).norm()) / float(weights[layer].float().norm()),
            disturbance=change.disturbance,
        )
        for layer, change in changes.items()
    ]
    missing = {} if uses else dict(layers or {})  # more facts go where the stored ones are
    uses += [
        LayerUse(layer=x, d_ff=d_ff, facts=0, directions=0.0, norm=0.0, disturbance=0.0)
        for x, d_ff in sorted(missing.items())
    ]
    if not uses:
        raise InputError(
            "no delta and no layers were given; say where facts would go: layers={layer: d_ff}"
        )
    facts, forecast = (
        _stored(deltas),
        _Forecast.of(deltas, changes, {use.layer: use.d_ff for use in uses}),
    )
    return Capacity(
        layers=tuple(uses),
        facts=facts,
        limit=limit,
        next_facts=next_facts,
        loss=forecast.loss(facts),
        loss_next=forecast.loss(facts + next_facts),
        breaking=forecast.breaking(limit),
        asked=asked,
        kept=kept,
    )


def warning(
    deltas: Iterable[Delta],
    weights: Mapping[int, Tensor],
    moments: Mapping[int, SecondMoment],
    *,
    next_facts: int = 0,
    limit: float = LIMIT,
) -> str | None:
    """What to say about some deltas together, and about `next_facts` more: that the predicted loss
    nears the limit; None if it does not.

    For a change that is solved for and not yet kept, give it last among the deltas. Warned is from
    half of the limit on (WARNED_FROM). Arguments and errors as of `capacity`; `directions`, which
    take longer, are not computed here.
    """
    deltas = list(deltas)
    next_facts = check_count(next_facts, "next_facts", "the number of facts to come", least=0)
    limit = _checked_limit(limit)
    if not deltas:
        return None
    changes = _changes(deltas, weights, moments)
    facts, forecast = (
        _stored(deltas),
        _Forecast.of(
            deltas, changes, {layer: change.keys.shape[1] for layer, change in changes.items()}
        ),
    )
    return _warning(
        facts, next_facts, forecast.loss(facts + next_facts), limit, forecast.breaking(limit)
    )


# ---- inside
# ---------------------------------------------------------------------------------------------------------------------------

_OUTSIDE = "outside of what was measured"


@dataclass(frozen=True)
class _Change:
    """All updates of a layer together: factors (d_model, r) and (r, d_ff), the keys they store (n,
    d_ff), and what they disturb.
    """

    left: Tensor
    right: Tensor
    keys: Tensor
    disturbance: float


@dataclass(frozen=True)
class _Forecast:
    """The loss as a function of the number of facts: neurons of all edited layers, stored facts,
    and the disturbance they bring.
    """

    neurons: int
    facts: int
    disturbance: float

    @classmethod
    def of(
        cls, deltas: Sequence[Delta], changes: Mapping[int, _Change], widths: Mapping[int, int]
    ) -> _Forecast:
        mean = sum(change.disturbance for change in changes.values()) / max(1, len(changes))
        return cls(sum(widths.values()), _stored(deltas), mean)

    def disturbance_of(self, facts: int) -> float:
        if not self.facts or not self.disturbance:
            return FITTED.disturbance_at(facts / self.neurons)
        if facts == self.facts:
            return self.disturbance
        now = (self.facts / self.neurons, self.disturbance)
        return FITTED.disturbance_at(facts / self.neurons, now, min(1.0, self.facts / _FEW))

    def loss(self, facts: int) -> float | None:
        """Per cent; None outside of what was measured."""
        if not facts:
            return 0.0
        load, disturbance = facts / self.neurons, self.disturbance_of(facts)
        return FITTED.loss(disturbance, load) if FITTED.covers(disturbance, load) else None

    def breaking(self, limit: float) -> int | None:
        """The smallest number of facts whose loss is above the limit; None when that was not
        measured.
        """
        most = math.floor(FITTED.load * self.neurons)
        low, high = 0, most + 1  # the loss grows with the number of facts: halve the interval
        while high - low > 1:
            middle = (low + high) // 2
            found = FITTED.loss(self.disturbance_of(middle), middle / self.neurons)
            low, high = (low, middle) if found > limit else (middle, high)
        return (
            high
            if high <= most and FITTED.covers(self.disturbance_of(high), high / self.neurons)
            else None
        )


def _stored(deltas: Sequence[Delta]) -> int:
    return sum(len(delta.facts) for delta in deltas)


def _changes(
    deltas: Sequence[Delta], weights: Mapping[int, Tensor], moments: Mapping[int, SecondMoment]
) -> dict[int, _Change]:
    """All updates of each layer together; raises LayerError when its weights or its second moment
    are missing.
    """
    found = {}
    for layer in sorted({layer for delta in deltas for layer in delta.layers}):
        for name, given in (("weights", weights), ("second moment", moments)):
            if layer not in given:
                raise LayerError(
                    f"no {name} of layer {layer}, which the deltas edit; got {sorted(given)}"
                )
        own = [delta for delta in deltas if layer in delta.layers]
        left = torch.cat([delta.layers[layer][0] for delta in own], dim=1)
        right = torch.cat([delta.layers[layer][1] for delta in own])
        left, right = solve.compact(left, right)
        moment, weight = moments[layer], weights[layer]
        keys = _checked(
            torch.cat([delta.k_star[layer] for delta in own]), moment, f"keys of layer {layer}"
        )
        found[layer] = _Change(
            left, right, keys, solve.disturbance(left, right, weight, moment.matrix)
        )
    return found


def _warning(
    facts: int, more: int, loss: float | None, limit: float, breaking: int | None
) -> str | None:
    if not facts + more or (loss is not None and loss < WARNED_FROM * limit):
        return None
    whose = (
        f"{counted(more, 'more fact')}, {facts + more:,} in all"
        if more and facts
        else counted(facts + more, "fact")
    )
    if loss is None:
        return (
            f"{whose}: more than was ever measured (a load of {FITTED.load:.2f}, a disturbance of "
            f"{FITTED.disturbance:.0%}), where a "
            "quarter of what the model knows besides was lost: measure it with `factsmith drift`, "
            "or spread the facts over more layers"
        )
    at = "" if breaking is None else f", which about {breaking:,} reach"
    return (
        f"{whose}: about {loss:.0f} % of unrelated facts are predicted to be answered otherwise; "
        f"the limit is {limit:g} %{at}: measure it "
        "with `factsmith drift`, write fewer, or spread them over more layers"
    )


def _percent(loss: float | None) -> str:
    return _OUTSIDE if loss is None else f"{loss:.1f} %"


def _checked_limit(limit: object) -> float:
    return check_number(
        limit, "limit", "the per cent of unrelated facts that may be lost", above=0, below=100
    )


def _checked(keys: Tensor, moment: SecondMoment, name: str) -> Tensor:
    if not isinstance(keys, Tensor) or keys.ndim != 2 or keys.shape[1] != moment.d_ff:
        got = tuple(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
        raise InputError(
            f"{name} are {got}; expected (n, {moment.d_ff}), as wide as the second moment"
        )
    if not torch.isfinite(keys).all():
        raise InputError(f"{name} hold NaN or infinity; expected finite numbers")
    return keys
