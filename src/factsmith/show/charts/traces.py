"""Causal traces and their averages as charts.

    heat_map(trace)        tokens by layers, for one prompt
    class_map(average)     kinds of token by layers, for many facts

Both show the same numbers as the figures of these names in `plots/traces.py`.
"""

from __future__ import annotations

from typing import Any

from ...locate.average import AverageTrace
from ...locate.records import CausalTrace
from .axes import cells, column_labels, token_label, tooltip
from .chart import Chart

_WHAT = {"state": "hidden state", "mlp": "FFN outputs", "attention": "attention outputs"}


def heat_map(trace: CausalTrace) -> Chart:
    """Chart p(answer) after restoring each token and layer (Meng et al. 2022, Figure 1).

    A row of cells is a token, a column a layer. The lightest or darkest colour, by theme, starts at
    the probability of the corrupted run. A * marks the tokens of the subject. A row of the chart
    holds the column of its token and its layer, for links. See arXiv 2202.05262.
    """
    labels = column_labels(trace.tokens, trace.subject_span)
    rows = [{"label": labels[row["column"]], **row} for row in trace.rows()]
    answer = f"p({token_label(trace.answer)})"
    estimated = "estimated " if trace.is_estimate else ""
    token, layer = trace.peak
    top = max(float(trace.scores.max()), trace.corrupted + 1e-6)
    return Chart(
        name="trace",
        title=_title(trace),
        description=(
            f"Heat map of {answer} by token and layer. It is {trace.clean:z.3f} in the clean run "
            f"and {trace.corrupted:z.3f} with the subject corrupted. The largest value, "
            f"{float(trace.scores.max()):z.3f}, is at token {labels[token]}, layer {layer}."
        ),
        spec=cells(
            _layer_title(trace),
            _colour("score", estimated + answer, [trace.corrupted, top]),
            tooltip("token", "column", "layer", ("score", ".4f"), ("effect", "+.4f")),
        ),
        rows=rows,
    )


def class_map(average: AverageTrace, name: str | None = None) -> Chart:
    """Chart average indirect effects by kind of token and layer (Meng et al. 2022, Figure 2).

    Args:
        average: The average to draw.
        name: One of its maps, such as "state". None: the first.
    """
    name = next(iter(average.effects)) if name is None else name
    effects, low, high = (
        table[name].tolist() for table in (average.effects, average.low, average.high)
    )
    rows = [
        {
            "label": kind,
            "layer": layer,
            "effect": effects[row][layer],
            "low": low[row][layer],
            "high": high[row][layer],
            "facts": average.counts[row],
        }
        for row, kind in enumerate(average.classes)
        if average.counts[row]
        for layer in range(len(effects[row]))
    ]
    top = max([row["effect"] for row in rows] + [1e-6])
    return Chart(
        name="average-trace",
        title=f"Average indirect effect of {name}, {average.n_facts} facts",
        description="Heat map of average indirect effects by kind of token and layer.",
        spec=cells(
            "restored layer, or their centre",
            _colour("effect", "average indirect effect", [0, top]),
            tooltip("label", "layer", ("effect", "+.4f"), ("low", "+.4f"), ("high", "+.4f")),
        ),
        rows=rows,
    )


def _colour(field: str, title: str, domain: list[float]) -> dict[str, Any]:
    return {
        "field": field,
        "title": title,
        "scale": {"range": "heatmap", "domain": domain, "clamp": True},
    }


def _title(trace: CausalTrace) -> str:
    restored = _WHAT[trace.kind]
    together = "" if trace.kind == "state" else f"{trace.window} "
    severed = "" if trace.sever is None else f", {_WHAT[trace.sever]} severed"
    estimated = "Estimated by gradients: " if trace.is_estimate else ""
    return f"{estimated}{together}{restored} restored after the subject was corrupted{severed}"


def _layer_title(trace: CausalTrace) -> str:
    if trace.kind == "state":
        return "restored layer"
    return f"centre of the {trace.window} restored layers"
