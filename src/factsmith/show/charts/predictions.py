"""How predictions form, as charts.

next_tokens({"base": lm.next_tokens(prompt)})      the likeliest next tokens, of one or several
lens_map(fs.lens(lm, prompt))                      what each layer would say, at each token
answer_line(read)                                  the answer's probability, layer by layer
part_bars(fs.compose(lm, prompt))                  what attention and FFN of each layer add
scaled_chart(scaled)                               next tokens with some neurons scaled
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...read.composition import Composition
from ...read.intervention import ScaledAnswer
from ...read.lens import Lens
from .axes import (
    SHARES,
    amount,
    bars,
    column_labels,
    distinct,
    from_to,
    in_order,
    legend,
    short,
    token_label,
    tooltip,
)
from .chart import Chart

EMBEDDING = "emb."
"""The name of the state before the first layer, on an axis of layers."""


def next_tokens(answers: Mapping[str, Sequence[tuple[str, float]]], prompt: str = "") -> Chart:
    """Chart the likeliest next tokens with their probabilities.

    Args:
        answers: {source: its (token, probability), likeliest first}. With several sources a token
            has a bar for each source that has it among its likeliest. The token with the largest
            probability in any source comes first.
        prompt: The text that they follow.
    """
    best: dict[str, float] = {}
    for token, p in (pair for likely in answers.values() for pair in likely):
        best[token] = max(p, best.get(token, 0.0))
    tokens = sorted(best, key=lambda token: -best[token])
    names = distinct([short(token_label(token)) for token in tokens])
    rows = [
        {"label": label, "token": token, "source": source, "p": p}
        for token, label in zip(tokens, names, strict=True)
        for source, likely in answers.items()
        for other, p in likely
        if other == token
    ]
    lines = tooltip("token", "source", ("p", ".4f"))
    spec = bars(rows, "p", "probability", lines, shares=True)
    if len(answers) > 1:
        group = {"field": "source", "type": "nominal", "sort": list(answers)}
        for layer in spec["layer"]:
            layer.setdefault("encoding", {})["yOffset"] = group
        spec["layer"][0]["encoding"]["color"] = legend("source", domain=list(answers))
        spec["layer"][1]["encoding"]["text"] = {"field": "end"}
        rows = [{**row, "end": f"{row['p']:.3g}  {row['source']}"} for row in rows]
        spec["height"] = {"step": 15}
        spec["encoding"]["x"]["scale"] = {"domain": [0, 1.5]}  # room for the sources' names
    top = "; ".join(
        f"{source}: {token_label(likely[0][0])} {likely[0][1]:z.3f}"
        for source, likely in answers.items()
        if likely
    )
    return Chart(
        name="next-tokens",
        title="Next token" + (f" after {short(prompt, 60)!r}" if prompt else ""),
        description=f"Bars of the likeliest next tokens. {top}.",
        spec=spec,
        rows=rows,
    )


def lens_map(read: Lens) -> Chart:
    """Chart what the model would say after each layer, at each token of the prompt.

    A row of cells is a state, the last layer on top. A cell has the likeliest token, and its colour
    is that token's probability. It is bold where it stays the likeliest token up to the last
    layer. A row of the chart holds column and layer, for links; the embedding's layer is None.
    """
    labels = column_labels(read.tokens)
    rows = [
        _lens_cell(read, state, column, label)
        for state in reversed(range(read.n_layers + 1))
        for column, label in enumerate(labels)
    ]
    answer = token_label(read.target)
    return Chart(
        name="lens",
        title=f"What each layer would say after {short(read.prompt, 60)!r}",
        description=(
            f"Map of the likeliest token by layer and token of the prompt. At the last token the "
            f"model says {token_label(read.says[-1][-1])}, the same from state "
            f"{int(read.settled[-1])} of {read.n_layers} on. The token followed is {answer}."
        ),
        spec={
            "width": "container",
            "usermeta": {"columns": len(labels), "step": 60},
            "height": {"step": 24},
            "encoding": {
                "x": in_order("label", "token of the prompt", labelAngle=-30, orient="bottom"),
                "y": in_order("state", "after layer"),
                "tooltip": tooltip(
                    "label",
                    "state",
                    "says",
                    ("p", ".4f"),
                    "runners_up",
                    ("p_target", ".4f"),
                    "rank_of_target",
                    "stays",
                ),
            },
            "layer": [
                {
                    "mark": {"type": "rect"},
                    "encoding": {
                        "color": {
                            "field": "p",
                            "type": "quantitative",
                            "title": "p of the token in the cell",
                            "scale": {"range": "ramp", "domain": SHARES},
                            "legend": {"orient": "top", "gradientLength": 160},
                        }
                    },
                },
                *(
                    {
                        "transform": [{"filter": test}],
                        "mark": {
                            "type": "text",
                            "fontSize": 11,
                            "limit": 90,
                            "fontWeight": weight,
                        },
                        "encoding": {"text": {"field": "says"}},
                    }
                    for test, weight in (("datum.stays", "bold"), ("!datum.stays", "normal"))
                ),
            ],
        },
        rows=rows,
    )


def _lens_cell(read: Lens, state: int, column: int, label: str) -> dict[str, Any]:
    """Return the row of one cell of `lens_map`."""
    (says, p), *others = read.likeliest(state, column)
    return {
        "state": str(state - 1) if state else EMBEDDING,
        "label": label,
        "column": column,
        "layer": state - 1 if state else None,
        "says": short(token_label(says), 12),
        "p": p,
        "runners_up": ", ".join(f"{token_label(token)} {q:.2f}" for token, q in others),
        "p_target": float(read.probabilities[state, column]),
        "rank_of_target": int(read.ranks[state, column]) + 1,
        "stays": state >= int(read.settled[column]),
    }


def answer_line(read: Lens, position: int = -1) -> Chart:
    """Chart the probability of the followed token after each layer, at one token of the prompt."""
    column = range(len(read.tokens))[position]
    rows = [
        {
            "state": str(state - 1) if state else EMBEDDING,
            "layer": state - 1 if state else None,
            "p": float(read.probabilities[state, column]),
            "rank": int(read.ranks[state, column]) + 1,
            "says": token_label(read.says[state][column]),
        }
        for state in range(read.n_layers + 1)
    ]
    answer = token_label(read.target)
    return Chart(
        name="answer",
        title=f"p({answer}) after each layer, at {token_label(read.tokens[column])!r}",
        description=f"Line of p({answer}) by layer; it ends at {rows[-1]['p']:z.3f}.",
        spec={
            "width": "container",
            "height": 180,
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": in_order("state", "after layer", labelAngle=0, labelOverlap="greedy"),
                "y": amount("p", f"p({short(answer, 16)})", SHARES),
                "tooltip": tooltip("state", ("p", ".4f"), "rank", "says"),
            },
        },
        rows=rows,
    )


def part_bars(composition: Composition) -> Chart:
    """Chart what attention and FFN of each layer add to the logit of the answer.

    Bars of attention are pale, those of the FFN solid. The embedding and the final norm's shift
    have bars of their own at the ends.
    """
    names = {"ffn": "FFN", "shift": "shift and bias"}
    ends = {"embedding": EMBEDDING, "shift": "shift"}
    rows = [
        {
            "place": ends.get(row["part"], str(row["layer"])),
            "part": names.get(row["part"], row["part"]),
            **{name: row[name] for name in ("layer", "logit", "rank", "probability")},
        }
        for row in composition.rows()
    ]
    against = (
        ""
        if composition.contrast is None
        else f", above that of {token_label(composition.contrast)}"
    )
    largest = max(rows, key=lambda row: row["logit"])
    part: dict[str, Any] = {"field": "part", "type": "nominal", "sort": None}
    return Chart(
        name="parts",
        title=f"What each part adds to the logit of {token_label(composition.target)}{against}",
        description=(
            f"Bars of what each layer's attention and FFN add. The largest is {largest['part']} at "
            f"{largest['place']} with {largest['logit']:+z.2f}."
        ),
        spec={
            "width": "container",
            "height": 220,
            "mark": {"type": "bar", "strokeWidth": 1},
            "encoding": {
                "x": in_order("place", "layer", labelAngle=0, labelOverlap="greedy"),
                "xOffset": part,
                "y": amount("logit", "added to the logit"),
                "color": legend("part"),
                "stroke": {**part, "legend": None},
                "fillOpacity": {
                    **part,
                    "legend": None,
                    "scale": {
                        "domain": ["embedding", "attention", "FFN", "shift and bias"],
                        "range": [0.7, 0.25, 1, 0.7],
                    },
                },
                "tooltip": tooltip("place", "part", ("logit", "+.3f"), "rank", "probability"),
            },
        },
        rows=rows,
    )


def scaled_chart(scaled: ScaledAnswer) -> Chart:
    """Chart the next tokens' probabilities with and without a change of some neurons."""
    labels = distinct([short(token_label(token)) for token in scaled.tokens])
    after = "silenced" if scaled.scale == 0 else f"times {scaled.scale:g}"
    rows = [
        {"label": label, "token": row["token"], "when": when, "p": row[name]}
        for label, row in zip(labels, scaled.rows(), strict=True)
        for when, name in (("unchanged", "before"), (after, "after"))
    ]
    count = len(scaled.neurons)
    return Chart(
        name="scaled",
        title=f"Next tokens with {count} {'neuron' if count == 1 else 'neurons'} {after}",
        description=f"Two points for each token: unchanged, and {after}.",
        spec=from_to("p", "probability", tooltip("token", "when", ("p", ".4f"))),
        rows=rows,
    )
