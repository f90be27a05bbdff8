"""What stored facts cost everything else, as a function of their number.

The share of unrelated facts that are answered otherwise is predicted from the disturbance x (mean
over the edited layers) and the load ℓ = facts / (edited layers · d_ff). The disturbance of n facts
follows from that of the n₀ stored ones; it grows a little slower than the square root:

    lost share = 1 − exp(−(x / X)^a ℓ^b),      x(n) = x(n₀) · (n / n₀)^p

The constants (`FITTED`) are from `benchmarks/capacity.py`: facts were written into both bundled
models until a quarter of the rest was lost. docs/capacity.md says how far they carry. Nothing is
predicted beyond what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..edit.delta import Delta

_FEW = 10
"""From so many stored facts on, they alone say how fast the disturbance grows. Fewer count in
proportion, next to what is usual.
"""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The constants of the two formulas, where they were fitted, and how far off they are.

    Attributes:
        scale: X of the loss.
        power: a of the loss.
        crowding: b of the loss.
        usual: The disturbance at load ℓ where nothing is stored yet is usual · ℓ^p.
        growth: p.
        disturbance: The largest disturbance that was measured.
        load: The largest load that was measured.
        error: Root mean square error of a predicted loss, in points: fitted on one model and tested
            on the other.
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
        """Predict the per cent of unrelated facts that are answered otherwise."""
        exponent = math.pow(disturbance / self.scale, self.power) * math.pow(load, self.crowding)
        return -100 * math.expm1(-exponent)

    def disturbance_at(
        self, load: float, now: tuple[float, float] | None = None, share: float = 1.0
    ) -> float:
        """Predict the disturbance that a load will bring.

        Args:
            load: The load.
            now: The load that there is and the disturbance it brought. None: nothing is stored.
            share: How far `now` is trusted, in [0, 1].
        """
        usual = self.usual * math.pow(load, self.growth)
        if now is None:
            return usual
        usual_now = self.usual * math.pow(now[0], self.growth)
        predicted = usual * math.pow(now[1] / usual_now, share)
        return max(predicted, now[1]) if load > now[0] else min(predicted, now[1])

    def covers(self, disturbance: float, load: float) -> bool:
        """Return whether this was measured."""
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


@dataclass(frozen=True)
class Forecast:
    """The loss as a function of the number of facts.

    Attributes:
        neurons: Of all edited layers together.
        facts: Stored now.
        disturbance: That they bring, mean over the edited layers.
    """

    neurons: int
    facts: int
    disturbance: float

    @classmethod
    def of(
        cls,
        deltas: Sequence[Delta],
        disturbances: Mapping[int, float],
        widths: Mapping[int, int],
    ) -> Forecast:
        """Return the forecast of some deltas, given {layer: disturbance} and {layer: d_ff}."""
        mean = sum(disturbances.values()) / max(1, len(disturbances))
        return cls(sum(widths.values()), sum(len(delta.facts) for delta in deltas), mean)

    def disturbance_of(self, facts: int) -> float:
        """Predict the disturbance that so many facts bring."""
        if not self.facts or not self.disturbance:
            return FITTED.disturbance_at(facts / self.neurons)
        if facts == self.facts:
            return self.disturbance
        now = (self.facts / self.neurons, self.disturbance)
        return FITTED.disturbance_at(facts / self.neurons, now, min(1.0, self.facts / _FEW))

    def loss(self, facts: int) -> float | None:
        """Predict the loss of so many facts, in per cent; None outside what was measured."""
        if not facts:
            return 0.0
        load, disturbance = facts / self.neurons, self.disturbance_of(facts)
        return FITTED.loss(disturbance, load) if FITTED.covers(disturbance, load) else None

    def breaking(self, limit: float) -> int | None:
        """Find the smallest number of facts whose loss is above the limit, in per cent.

        None when that was not measured.
        """
        most = math.floor(FITTED.load * self.neurons)
        low, high = 0, most + 1  # the loss grows with the number of facts: halve the interval
        while high - low > 1:
            middle = (low + high) // 2
            loss = FITTED.loss(self.disturbance_of(middle), middle / self.neurons)
            low, high = (low, middle) if loss > limit else (middle, high)
        if high > most or not FITTED.covers(self.disturbance_of(high), high / self.neurons):
            return None
        return high
