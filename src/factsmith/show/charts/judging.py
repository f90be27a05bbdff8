"""Judged edits as a chart.

share_chart(evaluation)        every share with its interval, by editor
"""

from __future__ import annotations

from ...judge.evaluation import Evaluation
from .axes import SHARES, amount, in_order, legend, tooltip
from .chart import Chart

MEASURES = (
    "prompt exact",
    "prompt success",
    "paraphrase exact",
    "paraphrase success",
    "neighbour stayed",
    "neighbour success",
    "multihop exact",
    "score",
    "score exact",
)
"""The measures that are drawn where they were asked, in this order."""

_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def share_chart(evaluation: Evaluation) -> Chart:
    """Chart the shares of an evaluation with their 95 % intervals, by measure and editor.

    Each editor has a colour and a shape.
    """
    rows = [
        {
            "measure": name,
            "editor": editor,
            "share": share.value,
            "low": share.low,
            "high": share.high,
            "questions": share.n,
        }
        for name in MEASURES
        for editor, summary in evaluation.summaries.items()
        if (share := summary.get(name)) is not None
    ]
    offset = {"field": "editor", "type": "nominal", "sort": None}
    colour = legend("editor")
    return Chart(
        name="shares",
        title=f"Shares with 95 % intervals, {evaluation.pace}",
        description=(
            f"Points with intervals by measure, for {', '.join(evaluation.editors)} of "
            f"{evaluation.model}."
        ),
        spec={
            "width": "container",
            "height": {"step": 14},
            "encoding": {
                "y": in_order("measure"),
                "yOffset": offset,
                "tooltip": tooltip(
                    "measure",
                    "editor",
                    ("share", ".3f"),
                    ("low", ".3f"),
                    ("high", ".3f"),
                    ("questions", ","),
                ),
            },
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {
                        "x": {**amount("low", "share", SHARES), "axis": {"format": "%"}},
                        "x2": {"field": "high"},
                        "color": colour,
                    },
                },
                {
                    "mark": {"type": "point", "size": 60, "filled": True},
                    "encoding": {
                        "x": amount("share", "share", SHARES),
                        "color": colour,
                        "shape": legend("editor", range=_SHAPES),
                    },
                },
            ],
        },
        rows=rows,
    )
