"""How full edited layers are, and what more facts will cost the rest of what the model knows.

    full = capacity(deltas, weights, moments, next_facts=100)
    full               # a table: layers, loss now, loss with 100 more, the breaking point
    full.warning       # what to say before those 100 are written; None when there is room
    warning([*deltas, delta], weights, moments)      # the same for a change that is not kept yet

Three things are measured for a layer that facts update: the `directions` that its stored keys take
up, of d_ff; the `norm` ‖Δ‖ / ‖W‖ of all updates together; and the `disturbance`, by what share they
change the layer's output on ordinary text (`solve.disturbance`). `forecast` predicts what they
cost.

Appended neurons share nothing, so none of this applies to them. They have a budget of false firing:
the share of ordinary tokens on which any of them fires (`firing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.errors import InputError, LayerError
from ..core.settled import settled
from ..core.tables import Shown, Table, counted
from ..corpus.moments import SecondMoment
from ..edit import solve
from ..edit.delta import Delta
from .firing import BUDGET, AppendedUse
from .forecast import FITTED, Forecast
from .interference import check_keys, directions

LIMIT = 10.0
"""Per cent of unrelated facts. A model that answers so many otherwise counts as broken, unless the
caller says otherwise.
"""

WARNED_FROM = 0.5
"""Share of the limit from which a predicted loss is warned of. Near the limit, predictions came out
too low by up to a factor of 1.7. From half of it on, the warning came before the limit in all seven
series that reached it ("breaking" in the same file); by constants fitted on the other model alone,
in six of seven.
"""


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How much of a layer is taken up.

    Attributes:
        layer: Its number.
        d_ff: Its neurons.
        facts: The keys that it stores.
        directions: How many directions, of d_ff, these take up.
        norm: ‖Δ‖ / ‖W‖ of all updates together.
        disturbance: Relative change of its output on ordinary text, root mean square: 0.05 is 5 %.
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
    """How full the edited layers are, and what to expect.

    Attributes:
        layers: Each edited layer, or each that would be edited.
        facts: How many facts they store.
        limit: Per cent of unrelated facts answered otherwise that count as broken.
        next_facts: How many more facts the caller asked about.
        loss: Predicted per cent of unrelated facts that are answered otherwise now. None: outside
            what was measured.
        loss_next: The same with the next facts.
        breaking: How many facts in all take the loss to the limit. None: outside what was measured.
        asked: How many stored facts the model was asked for. None: it was not asked.
        kept: How many of them it still says. None: it was not asked.
        appended: Each layer with appended neurons.
        budget: Share of ordinary tokens on which appended neurons may fire.
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
    appended: tuple[AppendedUse, ...] = ()
    budget: float = BUDGET

    @property
    def firing(self) -> float | None:
        """Share of ordinary tokens on which any appended neuron fires, all layers together.

        None: nothing is appended, or it is not known.
        """
        return _together(self.appended, 0)

    @property
    def firing_next(self) -> float | None:
        """The same with the next facts, if these are appended and fire as often as the others."""
        return _together(self.appended, self.next_facts)

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
        """Share of the stored facts that the model still says. None: there are none, or it was not
        asked.
        """
        return None if not self.asked or self.kept is None else self.kept / self.asked

    @property
    def warning(self) -> str | None:
        """What to say before the next facts are written, or about the stored ones if there are no
        next facts. None when there is room.
        """
        loss = self.loss_next if self.next_facts else self.loss
        parts = (
            None
            if self.appended and not self.facts
            else _warning(self.facts, self.next_facts, loss, self.limit, self.breaking),
            firing_warning(self.appended, self.next_facts, self.budget),
        )
        return "; ".join(part for part in parts if part) or None

    def tables(self) -> list[Table]:
        """What is predicted, and what it rests on, layer by layer."""
        note = (
            f"predictions: off by {FITTED.error:z.1f} points (root mean square) where they were "
            f"checked, on two small models up to a load of {FITTED.load:z.2f}; beyond that nothing "
            "is predicted"
        )
        summary = Table("capacity", {"": "<", "value": ">", " ": "<"}, self._summary(), note)
        names = ("layer", "facts", "directions", "full", "|Δ| / |W|", "disturbance")
        layers = Table("by layer", dict.fromkeys(names, ">"), [_row(use) for use in self.layers])
        warned = [] if self.warning is None else [Table(f"warning: {self.warning}", {})]
        updated = [summary, layers] if self.facts or not self.appended else []
        return [*updated, *self._firing_tables(), *warned]

    def _firing_tables(self) -> list[Table]:
        """The appended neurons, layer by layer, and what fires most."""
        if not self.appended:
            return []
        tokens = max(use.tokens for use in self.appended)
        note = "firing is unknown where a patch does not record what enters the layer"
        if tokens:
            note = (
                f"firing: share of {tokens:,} tokens of ordinary text on which a fact's neurons "
                "write more than a tenth of what they write at its own subject, where that subject "
                f"does not stand; the budget is {self.budget:z.1%}"
            )
        more = [] if not self.next_facts else [f"with {self.next_facts:,} more"]
        names = ("layer", "neurons", "facts", "patches", "firing", *more, "other subjects")
        rows = [_firing_row(use, self.next_facts) for use in self.appended]
        tables = [Table("appended neurons", dict.fromkeys(names, ">"), rows, note)]
        worst = [(text, f"{share:z.3%}") for use in self.appended for text, share in use.most]
        worst += [
            (text, f"fires at {other!r}") for use in self.appended for text, other in use.crossed
        ]
        if worst:
            tables.append(Table("what fires elsewhere", {"fact": "<", "firing": "<"}, worst))
        return tables

    def _summary(self) -> list[tuple[str, str, str]]:
        n_layers, n_facts = counted(len(self.layers), "layer"), counted(self.facts, "fact")
        rows = [
            ("full", f"{self.full:z.1%}", f"of the directions of {n_layers}; {n_facts} stored"),
            ("load", f"{self.load:z.4f}", "facts / (layers x neurons)"),
        ]
        if self.retention is not None:
            still = f"{self.kept:,} of {self.asked:,} stored facts are still said"
            rows.append(("retention", f"{self.retention:z.1%}", still))
        what = "of unrelated facts answered otherwise, predicted"
        rows.append(("loss now", _percent(self.loss), what))
        if self.next_facts:
            then = f"the same with {self.facts + self.next_facts:,} facts"
            rows.append((f"with {self.next_facts:,} more", _percent(self.loss_next), then))
        breaking = _OUTSIDE if self.breaking is None else f"{self.breaking:,} facts"
        rows.append(("breaking point", breaking, f"in all, where {self.limit:zg} % is reached"))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the derived ones included."""
        names = ("full", "load", "disturbance", "retention", "warning", "firing", "firing_next")
        derived = {name: getattr(self, name) for name in names}
        layers = [{**vars(use), "full": use.full} for use in self.layers]
        appended = [_plain(use) for use in self.appended]
        return {**vars(self), **derived, "layers": layers, "appended": appended}


@settled()
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
    """Measure how full the layers are that some deltas edit together, and what more facts cost.

    Appended neurons take no room. Their figures are those of `firing_of`, for `Capacity.appended`.

    Args:
        deltas: The deltas.
        weights: {layer: (d_model, d_ff)} down-projections without the deltas.
        moments: {layer: SecondMoment} of the same layers.
        layers: {layer: d_ff} where the next facts will go. None: where the stored ones are. Needed
            when there is no delta.
        next_facts: How many more facts are to come.
        limit: Per cent of unrelated facts answered otherwise that count as broken.
        asked: How many stored facts the model was asked for, for `retention`.
        kept: How many of them it still says.

    Raises:
        InputError: A number is out of range, or there are neither deltas nor layers.
        LayerError: Weights or a second moment of an edited layer are missing.
    """
    deltas = [delta for delta in deltas if delta.layers]
    next_facts = check_count(next_facts, "next_facts", "the number of facts to come", least=0)
    limit = _checked_limit(limit)
    changes = _changes(deltas, weights, moments)
    uses = [_use(layer, change, weights, moments) for layer, change in changes.items()]
    if not uses:  # otherwise more facts go where the stored ones are
        uses = [
            LayerUse(layer=layer, d_ff=d_ff, facts=0, directions=0.0, norm=0.0, disturbance=0.0)
            for layer, d_ff in sorted((layers or {}).items())
        ]
    if not uses:
        raise InputError(
            "no delta and no layers were given; say where facts would go: layers={layer: d_ff}"
        )
    widths = {use.layer: use.d_ff for use in uses}
    forecast = Forecast.of(deltas, _disturbances(changes), widths)
    return Capacity(
        layers=tuple(uses),
        facts=forecast.facts,
        limit=limit,
        next_facts=next_facts,
        loss=forecast.loss(forecast.facts),
        loss_next=forecast.loss(forecast.facts + next_facts),
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
    """Say when the predicted loss of some deltas, or of `next_facts` more, nears the limit.

    For a change that is solved for and not yet kept, give it last among the deltas. Warnings begin
    at half of the limit (WARNED_FROM). Arguments and errors are those of `capacity`; `directions`,
    which take longer, are not computed here. None: there is room.
    """
    deltas = [delta for delta in deltas if delta.layers]
    next_facts = check_count(next_facts, "next_facts", "the number of facts to come", least=0)
    limit = _checked_limit(limit)
    if not deltas:
        return None
    changes = _changes(deltas, weights, moments)
    widths = {layer: change.keys.shape[1] for layer, change in changes.items()}
    forecast = Forecast.of(deltas, _disturbances(changes), widths)
    loss = forecast.loss(forecast.facts + next_facts)
    return _warning(forecast.facts, next_facts, loss, limit, forecast.breaking(limit))


def firing_warning(
    appended: Sequence[AppendedUse], next_facts: int = 0, budget: float = BUDGET
) -> str | None:
    """Say when appended neurons, or these with the next facts, fire on too many ordinary tokens.

    None: they keep to the budget, or it is not known how often they fire.
    """
    share = _together(appended, next_facts)
    if share is None or share <= budget:
        return None
    n_facts = sum(use.facts for use in appended) + next_facts
    most = max((use.most[0] for use in appended if use.most), key=lambda pair: pair[1])
    return (
        f"the appended neurons of {counted(n_facts, 'fact')} fire on {share:z.1%} of ordinary "
        f"tokens, and the budget is {budget:z.1%}; {most[0]!r} fires most, on {most[1]:z.2%}. "
        "Measure it with `factsmith drift`, or revert the facts that fire most"
    )


def _together(appended: Sequence[AppendedUse], more: int) -> float | None:
    """The share of tokens on which any neuron of any layer fires; None where it is not known."""
    shares = [use.share_with(more) for use in appended]
    if not shares or any(share is None for share in shares):
        return None
    return min(1.0, sum(share for share in shares if share is not None))


def _firing_row(use: AppendedUse, more: int) -> tuple[str, ...]:
    shares = [use.share, *([use.share_with(more)] if more else [])]
    cells = ["unknown" if share is None else f"{share:z.3%}" for share in shares]
    crossed = "" if use.share is None else f"{use.n_crossed:,}"
    return (
        str(use.layer),
        f"{use.neurons:,}",
        f"{use.facts:,}",
        f"{len(use.patches) or '':}",
        *cells,
        crossed,
    )


def _plain(use: AppendedUse) -> dict[str, Any]:
    return {
        **vars(use),
        "patches": list(use.patches),
        "most": [list(pair) for pair in use.most],
        "crossed": [list(pair) for pair in use.crossed],
    }


_OUTSIDE = "outside of what was measured"


@dataclass(frozen=True)
class _Change:
    """All updates of a layer together.

    Attributes:
        left: (d_model, r).
        right: (r, d_ff).
        keys: (n, d_ff), the keys that they store.
        disturbance: By what share they change the layer's output on ordinary text.
    """

    left: Tensor
    right: Tensor
    keys: Tensor
    disturbance: float


def _changes(
    deltas: Sequence[Delta], weights: Mapping[int, Tensor], moments: Mapping[int, SecondMoment]
) -> dict[int, _Change]:
    """All updates of each layer; raises LayerError where weights or moments are missing."""
    changes = {}
    for layer in sorted({layer for delta in deltas for layer in delta.layers}):
        for name, given in (("weights", weights), ("second moment", moments)):
            if layer not in given:
                raise LayerError(
                    f"no {name} of layer {layer}, which the deltas edit; got {sorted(given)}"
                )
        editing = [delta for delta in deltas if layer in delta.layers]
        left, right = solve.compact(
            torch.cat([delta.layers[layer][0] for delta in editing], dim=1),
            torch.cat([delta.layers[layer][1] for delta in editing]),
        )
        stored = torch.cat([delta.k_star[layer] for delta in editing])
        keys = check_keys(stored, moments[layer], f"keys of layer {layer}")
        disturbance = solve.disturbance(left, right, weights[layer], moments[layer].matrix)
        changes[layer] = _Change(left, right, keys, disturbance)
    return changes


def _disturbances(changes: Mapping[int, _Change]) -> dict[int, float]:
    return {layer: change.disturbance for layer, change in changes.items()}


def _use(
    layer: int,
    change: _Change,
    weights: Mapping[int, Tensor],
    moments: Mapping[int, SecondMoment],
) -> LayerUse:
    return LayerUse(
        layer=layer,
        d_ff=change.keys.shape[1],
        facts=len(change.keys),
        directions=directions(change.keys, moments[layer]),
        norm=float((change.left @ change.right).norm()) / float(weights[layer].float().norm()),
        disturbance=change.disturbance,
    )


def _row(use: LayerUse) -> tuple[str, ...]:
    return (
        str(use.layer),
        f"{use.facts:,}",
        f"{use.directions:z,.1f} of {use.d_ff:,}",
        f"{use.full:z.1%}",
        f"{use.norm:z.3f}",
        f"{use.disturbance:z.1%}",
    )


def _warning(
    facts: int, more: int, loss: float | None, limit: float, breaking: int | None
) -> str | None:
    if not facts + more or (loss is not None and loss < WARNED_FROM * limit):
        return None
    if more and facts:
        whose = f"{counted(more, 'more fact')}, {facts + more:,} in all"
    else:
        whose = counted(facts + more, "fact")
    if loss is None:
        return (
            f"{whose}: more than was ever measured (a load of {FITTED.load:z.2f}, a disturbance of "
            f"{FITTED.disturbance:z.0%}), where a quarter of the model's other knowledge was lost. "
            "Measure it with `factsmith drift`, or spread the facts over more layers"
        )
    reach = "" if breaking is None else f", which about {breaking:,} reach"
    return (
        f"{whose}: about {loss:z.0f} % of unrelated facts are predicted to be answered otherwise; "
        f"the limit is {limit:zg} %{reach}. Measure it with `factsmith drift`, write fewer facts, "
        "or spread them over more layers"
    )


def _percent(loss: float | None) -> str:
    return _OUTSIDE if loss is None else f"{loss:z.1f} %"


def _checked_limit(limit: object) -> float:
    meaning = "the per cent of unrelated facts that may be lost"
    return check_number(limit, "limit", meaning, above=0, below=100)
