"""The charts of a report page: bars, and lines in a box of 100 x 60."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ...judge.evaluation import Evaluation
from ...judge.rows import BASE, Share
from .record import Report
from .tables import DRIFTS, PAIRS, cell

Dots: TypeAlias = "Mapping[str, Sequence[tuple[int, float, str]]]"
"""The lines of a chart: {editor: [(x, y, what the dot says)]}."""

_LEFT = 10
"""The width of the column left of a chart, where its values are written, of 100."""


class Axes(NamedTuple):
    """The axes of a chart."""

    unit: str
    """What x counts."""
    logarithmic: bool = False
    """Whether x is logarithmic."""
    top: float | None = None
    """The largest y, which is 100 %. None: y reaches up to the largest value and has no unit."""


_SIZES = Axes("records per edit", logarithmic=True)

_ROUNDS = Axes("rounds")


def bars(summaries: Mapping[str, Mapping[str, Share]]) -> list[dict[str, Any]]:
    """Return success by comparison and exact match, for each kind of question and editor."""
    names = [name for summary in summaries.values() for name in summary]
    return [
        {
            "editor": editor,
            "kind": kind,
            "success": summary[f"{kind} success"],
            "exact": summary[f"{kind} exact"],
        }
        for kind in dict.fromkeys(name.rpartition(" ")[0] for name in names)
        for editor, summary in summaries.items()
        if kind and {f"{kind} success", f"{kind} exact"} <= set(summary)
    ]


def report_charts(report: Report) -> list[dict[str, Any]]:
    """Return the charts of a report: by the size of edits, and by the rounds of sequences."""
    charts = []
    if len({run.size for run in report.runs if not run.sequence}) > 1:
        charts += _size_charts(report)
    for run in report.runs:
        if run.sequence:
            charts += _round_charts(run)
    return [chart for chart in charts if chart["lines"]]


def _size_charts(report: Report) -> list[dict[str, Any]]:
    """Return quality and drift by the number of records per edit."""
    apart = [run for run in report.runs if not run.sequence]
    charts = []
    for kind, measure in PAIRS:
        name = f"{kind} {measure}"
        dots = {}
        for editor in report.editors:
            shares = [(run.size, run.summaries.get(editor, {}).get(name)) for run in apart]
            dots[editor] = [(size, share.value, cell(share)) for size, share in shares if share]
        charts.append(line_chart(f"{name} by records per edit", dots, _SIZES._replace(top=1.0)))
    drifts = {
        editor: [(run.size, run.drift(editor)) for run in apart]
        for editor in report.editors
        if editor != BASE
    }
    return charts + [_drift_chart(name, "by records per edit", drifts, _SIZES) for name in DRIFTS]


def _round_charts(run: Evaluation) -> list[dict[str, Any]]:
    """Return what is left of a sequence, and its drift, by round."""
    left = {editor: run.remaining(editor) for editor in run.editors if editor != BASE}
    charts = []
    for at, which in enumerate(("the first round", "all rounds so far")):
        dots = {
            editor: [(k + 1, share[at], f"{100 * share[at]:z.0f} %") for k, share in shares.items()]
            for editor, shares in left.items()
        }
        title = f"prompts of {which} answered right, {run.pace}"
        charts.append(line_chart(title, dots, _ROUNDS._replace(top=1.0)))
    drifts = {
        editor: [(k + 1, run.drift(editor, k)) for name, k in run.notes if name == editor]
        for editor in left
    }
    return charts + [_drift_chart(name, run.pace, drifts, _ROUNDS) for name in DRIFTS]


def _drift_chart(
    name: str,
    how: str,
    drifts: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]],
    axes: Axes,
) -> dict[str, Any]:
    """Return the chart of one number of the drift."""
    dots = {
        editor: [(x, drift[name], f"{drift[name]:z.3g}") for x, drift in each if name in drift]
        for editor, each in drifts.items()
    }
    top = 1.0 if name == "changed_share" else None
    return line_chart(f"{DRIFTS[name]}, {how}", dots, axes._replace(top=top))


def line_chart(title: str, lines: Dots, axes: Axes) -> dict[str, Any]:
    """Return the lines of a chart and its grid, with all places in a box of 100 x 60.

    Args:
        title: The title.
        lines: The dots of each editor; an editor without dots has no line.
        axes: What x and y are.
    """
    xs = [x for dots in lines.values() for x, *_ in dots]
    ys = [y for dots in lines.values() for _, y, _ in dots]
    top = axes.top or max(ys, default=1.0) or 1.0

    def scale(x: float) -> float:
        return math.log(x) if axes.logarithmic else x

    low, high = (scale(min(xs)), scale(max(xs))) if xs else (0.0, 1.0)

    def across(x: float) -> float:
        share = (scale(x) - low) / max(high - low, 1e-9)
        return round(_LEFT + 2 + (96 - _LEFT) * share, 2)

    drawn = []
    for editor, dots in lines.items():
        places = [
            (across(x), _height(y / top), f"{editor}: {text} ({axes.unit}: {x:,})")
            for x, y, text in sorted(dots)
        ]
        if places:
            points = " ".join(f"{x},{y}" for x, y, _ in places)
            drawn.append({"editor": editor, "dots": places, "points": points})
    return {
        "title": title,
        "lines": drawn,
        "grid": [(_height(y / top), _value(y, axes)) for y in _round_values(top)],
        "left": _LEFT,
        "first": f"{min(xs):,}" if xs else "",
        "last": f"{max(xs):,}" if xs else "",
        "unit": axes.unit,
        "top": _value(top, axes),
    }


def _value(y: float, axes: Axes) -> str:
    """Return a value of y as the grid writes it."""
    return f"{100 * y:z.0f} %" if axes.top else f"{y:z.3g}"


def _round_values(top: float) -> list[float]:
    """Return three to six round numbers, evenly spaced from 0 up to `top` or just below it."""
    power = 10.0 ** math.floor(math.log10(top / 2))
    step = next(n * power for n in (1, 2, 5, 10) if top / (n * power) <= 5)
    return [k * step for k in range(math.floor(top / step * (1 + 1e-9)) + 1)]


def _height(share: float) -> float:
    """Return where a share of the largest y is drawn, from the top of the box."""
    return round(58 - 56 * share, 2)
