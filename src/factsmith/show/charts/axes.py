"""What the charts share: labels of tokens, encodings and sizes.

A specification names fields, scales and titles. Colours are left to the theme: "heatmap" and "ramp"
are the scales that the theme fills for strong and for pale cells, "category" is the one for groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.tables import visible

LONGEST_LABEL = 24
"""The most characters of a label on an axis."""

_MARKS = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})

ROW = {"step": 22}
"""The height of a row of cells or of a bar, in pixels."""


def token_label(token: str) -> str:
    """Return a token in one line: no outer spaces, marks for line breaks, "␣" for spaces alone."""
    return visible(token.strip(" ").translate(_MARKS)) or "␣"


def short(text: str, width: int = LONGEST_LABEL) -> str:
    """Return the text, cut with an ellipsis if it is longer than `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def column_labels(tokens: Sequence[str], span: tuple[int, int] = (0, 0)) -> list[str]:
    """Return a label for each token: its column, its text, and a * where it is in the span.

    The column makes equal tokens different, so that each has a place of its own on an axis.
    """
    start, stop = span
    return [
        f"{column}  {short(token_label(token))}{'*' if start <= column < stop else ''}"
        for column, token in enumerate(tokens)
    ]


def in_order(field: str, title: str | None, **axis: Any) -> dict[str, Any]:
    """Return an encoding of texts in the order of the rows."""
    return {
        "field": field,
        "type": "nominal",
        "sort": None,
        "title": title,
        "axis": {"labelLimit": 260, "ticks": False, "domain": False, **axis},
    }


def layers(title: str = "layer", field: str = "layer") -> dict[str, Any]:
    """Return an encoding of layer numbers with labels that never overlap."""
    return {
        "field": field,
        "type": "ordinal",
        "title": title,
        "axis": {"labelAngle": 0, "labelOverlap": "greedy", "ticks": False, "domain": False},
    }


def amount(field: str, title: str | None, **scale: Any) -> dict[str, Any]:
    """Return an encoding of a number along an axis."""
    encoding = {"field": field, "type": "quantitative", "title": title}
    return {**encoding, "scale": scale} if scale else encoding


def tooltip(*fields: str | tuple[str, str]) -> list[dict[str, Any]]:
    """Return the lines of a tooltip: texts by name, and numbers as (name, format)."""
    lines: list[dict[str, Any]] = []
    for field in fields:
        name, form = field if isinstance(field, tuple) else (field, "")
        kind = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
        lines.append({"field": name, "title": name, **kind})
    return lines


def bars(label: str, value: str, title: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a specification of horizontal bars with their numbers next to them."""
    return {
        "width": "container",
        "height": ROW,
        "encoding": {"y": in_order(label, None), "x": amount(value, title), "tooltip": lines},
        "layer": [
            {"mark": {"type": "bar", "height": {"band": 0.7}}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4},
                "encoding": {"text": {"field": value, "type": "quantitative", "format": ".3~g"}},
            },
        ],
    }
