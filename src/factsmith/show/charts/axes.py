"""What the charts share: labels of tokens, encodings and forms.

A specification names fields, scales and titles. Colours are left to the theme: "heatmap" and "ramp"
are the scales that the theme fills for strong and for pale cells, "category" is the one for groups.
Groups differ in shape or filling, too, so that no meaning depends on colour alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.tables import visible

LONGEST_LABEL = 24
"""The most characters of a token that a label shows."""

_MARKS = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})

ROW = {"step": 22}
"""The height of a row of cells or of a bar, in pixels."""

SHARES = [0, 1]
"""The range of an axis of shares or probabilities."""

# ── labels ────────────────────────────────────────────────────────────────────────────────────────


def token_label(token: str) -> str:
    """Return a token in one line: no outer spaces, marks for line breaks, "␣" for spaces alone."""
    return visible(token.strip(" ").translate(_MARKS)) or "␣"


def short(text: str, width: int = LONGEST_LABEL) -> str:
    """Return the text in one line, cut with an ellipsis if it is longer than `width` characters."""
    text = visible(text.translate(_MARKS))
    return text if len(text) <= width else text[: width - 1] + "…"


def tail(text: str, width: int = 40) -> str:
    """Return the end of a text in one line, after an ellipsis if the text is longer."""
    text = visible(text.translate(_MARKS))
    return text if len(text) <= width else "…" + text[1 - width :]


def distinct(labels: Sequence[str]) -> list[str]:
    """Return the labels, each different: the second "a" becomes "a (2)".

    Marks with equal labels would share one place on an axis.
    """
    seen: Counter[str] = Counter()
    made: list[str] = []
    for label in labels:
        seen[label] += 1
        made.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return made


def column_labels(tokens: Sequence[str], span: tuple[int, int] = (0, 0)) -> list[str]:
    """Return a label for each token: its column, its text, and a * where it is in the span.

    The column makes equal tokens different, so that each has a place of its own on an axis.
    """
    start, stop = span
    return [
        f"{column} {short(token_label(token))}{'*' if start <= column < stop else ''}"
        for column, token in enumerate(tokens)
    ]


def neuron_label(neuron: Sequence[int]) -> str:
    """Return the name of a neuron on an axis: "L5 · 992", or "L5 · E2 · 992" with experts."""
    layer, *expert, index = neuron
    return f"L{layer} · " + "".join(f"E{each} · " for each in expert) + str(index)


# ── encodings ─────────────────────────────────────────────────────────────────────────────────────


def in_order(field: str, title: str | None = None, **axis: Any) -> dict[str, Any]:
    """Return an encoding of texts in the order of the rows."""
    return {
        "field": field,
        "type": "nominal",
        "sort": None,
        "title": title,
        "axis": {"ticks": False, "domain": False, **axis},
    }


def layers(title: str = "layer", field: str = "layer") -> dict[str, Any]:
    """Return an encoding of layer numbers with labels that never overlap."""
    return {
        "field": field,
        "type": "ordinal",
        "title": title,
        "axis": {"labelAngle": 0, "labelOverlap": "greedy", "ticks": False, "domain": False},
    }


def amount(field: str, title: str | None, domain: Sequence[float] = ()) -> dict[str, Any]:
    """Return an encoding of a number along an axis, over a domain or over all numbers."""
    encoding = {"field": field, "type": "quantitative", "title": title}
    return {**encoding, "scale": {"domain": list(domain)}} if domain else encoding


def legend(field: str, title: str | None = None, **scale: Any) -> dict[str, Any]:
    """Return an encoding of groups with a legend above the chart."""
    encoding = {
        "field": field,
        "type": "nominal",
        "sort": None,
        "title": title,
        "legend": {"orient": "top"},
    }
    return {**encoding, "scale": scale} if scale else encoding


def solid(field: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the encodings of two groups: the first has solid marks, and the second pale ones."""
    group = {"field": field, "type": "nominal", "sort": None}
    return {
        "color": legend(field, domain=list(names)),
        "fillOpacity": {
            **group,
            "scale": {"domain": list(names), "range": [1, 0.4]},
            "legend": None,
        },
    }


def tooltip(*fields: str | tuple[str, str]) -> list[dict[str, Any]]:
    """Return the lines of a tooltip: texts by name, and numbers as (name, format)."""
    lines: list[dict[str, Any]] = []
    for field in fields:
        name, form = field if isinstance(field, tuple) else (field, "")
        kind = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
        lines.append({"field": name, "title": name.replace("_", " "), **kind})
    return lines


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────


def cells(along: str, colour: Mapping[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a specification of coloured cells by label and layer.

    Args:
        along: The title of the axis of layers.
        colour: The field, its title and its scale.
        lines: The tooltip.
    """
    return {
        "width": "container",
        "height": ROW,
        "mark": {"type": "rect"},
        "encoding": {
            "x": layers(along),
            "y": in_order("label"),
            "color": {
                "type": "quantitative",
                "legend": {"orient": "top", "gradientLength": 160, "format": ".2~g"},
                **colour,
            },
            "tooltip": lines,
        },
    }


def bars(
    rows: Sequence[Mapping[str, Any]],
    value: str,
    title: str,
    lines: list[dict[str, Any]],
    *,
    shares: bool = False,
    form: str = ".3~g",
) -> dict[str, Any]:
    """Return a specification of horizontal bars by label, with their numbers at their ends.

    Args:
        rows: The rows of the chart; the axis leaves room for the numbers of the longest bars.
        value: The field that the bars show.
        title: The title of the axis.
        lines: The tooltip.
        shares: Whether the axis goes from 0 to 1 whatever the values are.
        form: The format of the numbers.
    """
    ends = {"text": {"field": value, "type": "quantitative", "format": form}}
    after, before = (
        {
            "transform": [{"filter": f"datum[{value!r}] {sign} 0"}],
            "mark": {"type": "text", "align": align, "dx": shift},
            "encoding": ends,
        }
        for sign, align, shift in ((">=", "left", 4), ("<", "right", -4))
    )
    values = [0.0, *(row[value] for row in rows)]
    low, high = (0.0, 1.0) if shares else (min(values), max(values))
    room = 0.2 * (high - low)
    along = amount(value, title, [low - room * (low < 0), high + room * (high > 0)])
    if shares:
        shown = "~%" if form.endswith("%") else "~g"
        along["axis"] = {"values": [0, 0.25, 0.5, 0.75, 1], "format": shown}
    return {
        "width": "container",
        "height": ROW,
        "encoding": {"y": in_order("label"), "x": along, "tooltip": lines},
        "layer": [{"mark": {"type": "bar", "height": {"band": 0.7}}}, after, before],
    }


def from_to(
    value: str, title: str, lines: list[dict[str, Any]], domain: Sequence[float] = SHARES
) -> dict[str, Any]:
    """Return a specification of two points for each label, joined by a line.

    The field "when" names the two. The first is an open circle, and the second a solid one.
    """
    return {
        "width": "container",
        "height": ROW,
        "encoding": {
            "y": in_order("label"),
            "x": amount(value, title, domain),
            "tooltip": lines,
        },
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2, "opacity": 0.5},
                "encoding": {"detail": {"field": "label", "type": "nominal"}},
            },
            {
                "mark": {"type": "point", "size": 90, "filled": True},
                "encoding": {
                    "shape": legend("when", range=["circle", "diamond"]),
                    "fillOpacity": {
                        "field": "when",
                        "type": "nominal",
                        "sort": None,
                        "scale": {"range": [0.15, 1]},
                        "legend": None,
                    },
                    "stroke": {"datum": "all", "legend": None},
                },
            },
        ],
    }
