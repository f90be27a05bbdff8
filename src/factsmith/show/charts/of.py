"""A chart of any record: the same picture in a notebook as in studio.

chart(causal_trace(lm, prompt, subject))      # a heat map
chart(outcome.verification)                   # the proof, before and after
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.errors import InputError
from ...judge.evaluation import Evaluation
from ...locate.average import AverageTrace
from ...locate.neurons import KnowledgeNeurons
from ...locate.records import CausalTrace
from ...patch.capacity import Capacity
from ...patch.verification import Verification
from ...read.cards import Card
from ...read.composition import Composition
from ...read.intervention import ScaledAnswer
from ...read.lens import Lens
from ...read.token_neurons import TokenNeurons
from .chart import Chart
from .judging import share_chart
from .keeping import proof_chart, use_bars
from .neurons import neuron_bars, promoted_bars, share_bars
from .predictions import lens_map, part_bars, scaled_chart
from .traces import class_map, heat_map

_CHARTS: tuple[tuple[type[Any], Callable[[Any], Chart]], ...] = (
    (CausalTrace, heat_map),
    (AverageTrace, class_map),
    (KnowledgeNeurons, neuron_bars),
    (TokenNeurons, share_bars),
    (Card, promoted_bars),
    (Lens, lens_map),
    (Composition, part_bars),
    (ScaledAnswer, scaled_chart),
    (Verification, proof_chart),
    (Capacity, use_bars),
    (Evaluation, share_chart),
)
"""(a kind of record, what draws it)."""


def chart(record: Any) -> Chart:
    """Return the chart of a record, which a notebook draws and studio shows.

    Args:
        record: A causal trace or an average of traces, knowledge neurons, neurons at a token, a
            neuron's card, a lens, a composition, a scaled answer, a verification, a capacity, or an
            evaluation.

    Returns:
        A Vega-Lite specification with its rows: `to_dict` gives it whole, and `to_csv` the rows.

    Raises:
        InputError: when there is no chart of such a record.
    """
    for kind, draw in _CHARTS:
        if isinstance(record, kind):
            return draw(record)
    kinds = ", ".join(kind.__name__ for kind, _ in _CHARTS)
    raise InputError(
        f"there is no chart of a {type(record).__name__}; give one of {kinds}", argument="record"
    )
