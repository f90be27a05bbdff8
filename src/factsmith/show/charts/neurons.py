"""Neurons and their cards as charts.

neuron_bars(fs.knowledge_neurons(...))    the neurons that carry a fact
layer_bars(neurons)                       how much of it each layer carries
share_bars(token_neurons)                 the neurons at one token and layer
promoted_bars(card)                       the tokens that a neuron promotes and demotes
trigger_bars(card)                        where it fires most
histogram(card)                           its coefficient over a corpus
fact_chart(card)                          the facts that it takes part in, with and without it
"""

from __future__ import annotations

from ...locate.neurons import KnowledgeNeurons
from ...read.cards import Card, ValueCard
from ...read.token_neurons import TokenNeurons
from .axes import (
    amount,
    bars,
    distinct,
    from_to,
    layers,
    neuron_label,
    short,
    solid,
    tail,
    token_label,
    tooltip,
)
from .chart import Chart


def neuron_bars(neurons: KnowledgeNeurons, n: int = 20) -> Chart:
    """Chart the n neurons with the largest attribution to the answer.

    Bars of refined neurons are solid, the others pale. A row holds layer, expert and neuron.
    """
    refined = set(neurons.refined)
    rows = [
        {
            "label": neuron_label(neuron),
            "layer": neuron[0],
            "expert": neuron[1] if len(neuron) == 3 else None,
            "neuron": neuron[-1],
            "attribution": score,
            "prompts": neurons.count_strong(neuron),
            "refined": "refined" if neuron in refined else "other",
        }
        for neuron, score in neurons.top(n)
    ]
    spec = bars(
        rows,
        "attribution",
        f"attribution to p({short(token_label(neurons.target), 16)})",
        tooltip("label", ("attribution", ".4f"), "prompts", "refined"),
    )
    spec["layer"][0]["encoding"] = solid("refined", ("refined", "other"))
    count = len(neurons.prompts)
    return Chart(
        name="neurons",
        title=f"Neurons that carry {token_label(neurons.target)}, "
        + ("one prompt" if count == 1 else f"mean of {count} prompts"),
        description=f"Bars of attributions. {len(refined)} neurons are refined."
        + (f" The largest is {rows[0]['label']}." if rows else ""),
        spec=spec,
        rows=rows,
    )


def layer_bars(neurons: KnowledgeNeurons) -> Chart:
    """Chart the positive attribution of each layer: of the refined neurons and of the others."""
    total = neurons.scores.mean(0).clamp_min(0).sum(1).tolist()
    refined = [0.0] * len(total)
    for neuron in neurons.refined:
        refined[neuron[0]] += float(neurons.of(neuron).mean().clamp_min(0))
    rows = [
        {"layer": layer, "neurons": name, "attribution": value}
        for layer, (whole, part) in enumerate(zip(total, refined, strict=True))
        for name, value in (("refined", part), ("other", whole - part))
    ]
    return Chart(
        name="neuron-layers",
        title="Positive attribution by layer",
        description="Stacked bars by layer: refined neurons and others.",
        spec={
            "width": "container",
            "height": 150,
            "mark": {"type": "bar"},
            "encoding": {
                "x": layers(),
                "y": amount("attribution", "positive sum"),
                **solid("neurons", ("refined", "other")),
                "order": {"field": "neurons", "sort": "descending"},
                "tooltip": tooltip("layer", "neurons", ("attribution", ".4f")),
            },
        },
        rows=rows,
    )


def share_bars(neurons: TokenNeurons) -> Chart:
    """Chart the strongest neurons at one token: their shares of what the layer adds there."""
    rows = [
        {"label": neuron_label(each.neuron), **row}
        for each, row in zip(neurons.strongest, neurons.rows(), strict=True)
    ]
    token = token_label(neurons.tokens[neurons.position])
    return Chart(
        name="token-neurons",
        title=f"Strongest neurons of layer {neurons.layer} at {short(token)!r}",
        description=f"Bars of shares of what layer {neurons.layer} adds at token {token}.",
        spec=bars(
            rows,
            "share",
            "share of what the layer adds",
            tooltip("label", ("share", "+.3f"), ("coefficient", "+.3f"), ("size", ".3f"), "writes"),
        ),
        rows=rows,
    )


def promoted_bars(card: Card | ValueCard) -> Chart:
    """Chart the tokens that a neuron's value promotes and demotes, with their scores."""
    both = [*card.promotes, *card.demotes]
    labels = distinct([short(token_label(token)) for token, _ in both])
    rows = [
        {"label": label, "token": token, "score": score}
        for label, (token, score) in zip(labels, both, strict=True)
    ]
    return Chart(
        name="promoted",
        title=f"Tokens that {neuron_label(card.neuron)} promotes and demotes",
        description="Bars of scores. It promotes most "
        + ", ".join(token_label(token) for token, _ in card.promotes[:3])
        + ".",
        spec=bars(rows, "score", "score", tooltip("token", ("score", "+.4f"))),
        rows=rows,
    )


def trigger_bars(card: Card) -> Chart:
    """Chart the coefficients of a neuron where it fires most."""
    labels = distinct([tail(trigger.prefix) for trigger in card.triggers])
    rows = [
        {"label": label, "text": tail(trigger.prefix, 200), "coefficient": trigger.coefficient}
        for label, trigger in zip(labels, card.triggers, strict=True)
    ]
    spec = bars(rows, "coefficient", "coefficient", tooltip("text", ("coefficient", "+.3f")))
    return Chart(
        name="triggers",
        title=f"Where {neuron_label(card.neuron)} fires most",
        description="Bars of coefficients, one for each text.",
        spec=spec,
        rows=rows,
    )


def histogram(card: Card) -> Chart:
    """Chart how often a neuron's coefficient has each size over a corpus."""
    edges, counts = card.edges.tolist(), card.counts.tolist()
    rows = [
        {"from": low, "to": high, "tokens": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return Chart(
        name="coefficients",
        title=f"Coefficient of {neuron_label(card.neuron)} over {sum(map(int, counts)):,} tokens",
        description=f"Histogram. It is above zero at {card.fired:z.1%} of the tokens.",
        spec={
            "width": "container",
            "height": 130,
            "mark": {"type": "bar"},
            "encoding": {
                "x": {**amount("from", "coefficient"), "bin": {"binned": True}},
                "x2": {"field": "to"},
                "y": {**amount("tokens", "tokens"), "scale": {"type": "symlog"}},
                "tooltip": tooltip(("from", ".3f"), ("to", ".3f"), ("tokens", ",")),
            },
        },
        rows=rows,
    )


def fact_chart(card: Card | ValueCard) -> Chart:
    """Chart the probability of the facts that a neuron takes part in, with it and without it."""
    labels = distinct([tail(f"{fact.prompt} {fact.answer}") for fact in card.facts])
    rows = [
        {"label": label, "fact": f"{fact.prompt} {fact.answer}", "when": when, "p": p}
        for label, fact in zip(labels, card.facts, strict=True)
        for when, p in (("with it", fact.p), ("silenced", fact.p_silenced))
    ]
    return Chart(
        name="facts",
        title=f"Facts that {neuron_label(card.neuron)} takes part in",
        description="Two points for each fact: p(answer) with the neuron, and with it silenced.",
        spec=from_to("p", "p(answer)", tooltip("fact", "when", ("p", ".4f"))),
        rows=rows,
    )
