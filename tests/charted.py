"""Every chart with the record that it draws: of the bundled model, or made up.

The made-up texts try to act as HTML, as templates and as direction marks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from factsmith.locate.average import CLASSES, AverageTrace
from factsmith.locate.causal import causal_trace
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.capacity import Capacity, LayerUse
from factsmith.patch.verification import Check, Verification
from factsmith.read.cards import Card, FactUse
from factsmith.read.composition import compose
from factsmith.read.intervention import ask_scaled
from factsmith.read.lens import lens
from factsmith.read.token_neurons import token_neurons
from factsmith.read.triggers import Trigger
from factsmith.show.charts import judging, keeping, neurons, predictions, traces
from factsmith.show.charts.chart import Chart
from show.runs import evaluation

PROMPT = "The currency of Bulgaria is the"

HOSTILE = "<img src=x onerror=alert(1)></script>{{7*7}}\u202eb"

MANY = 3200
"""Marks of a chart that is drawn on a canvas."""


@functools.cache
def model() -> LanguageModel:
    """Return the bundled model."""
    return load("atlas")


def card() -> Card:
    """Return a card whose texts try to act."""
    return Card(
        neuron=(2, 1, 5),
        model="atlas",
        fingerprint="ab" * 32,
        corpus="cd" * 32,
        n_texts=6,
        n_tokens=1234,
        promotes=((" <u>", 1.5), ("'\"", 1.2), (HOSTILE, 1.1), ("  ", 0.5), (" \n", 0.25)),
        demotes=((" Paris", -3.0), ("Paris", -2.0)),
        triggers=tuple(Trigger(2.5 - i, "x" * 60 + HOSTILE, 3, 99, 7, None, 1) for i in range(4)),
        bottom=(),
        fired=0.25,
        edges=torch.linspace(-1, 2, 31),
        counts=torch.arange(30),
        facts=(FactUse("<i>The tower is in", "Paris", 1.25, 0.875, 0.5),) * 2,
        n_asked=17,
    )


def proof() -> Verification:
    """Return a proof with a question that failed, one without a probability, and a hostile one."""

    def check(role: Any, prompt: str, p_before: float | None, p_after: float, held: bool) -> Check:
        return Check(
            role=role,
            prompt=prompt,
            wanted=" euro",
            before=" lev",
            after=" euro",
            p_before=p_before,
            p_after=p_after,
            held=held,
        )

    return Verification(
        checks=(
            check("prompt", PROMPT, 0.01, 0.97, True),
            check("paraphrase", HOSTILE, 0.02, 0.4, False),
            check("neighbour", "The capital of Bulgaria is", 0.99, 0.98, True),
            check("telling", "Tell me about Bulgaria.", None, 0.5, True),
        )
    )


def capacity() -> Capacity:
    """Return two layers in use."""
    uses = tuple(
        LayerUse(layer=layer, d_ff=100, facts=3, directions=20.0 * layer, norm=0.1, disturbance=0.2)
        for layer in (1, 2)
    )
    return Capacity(
        layers=uses, facts=6, limit=1.0, next_facts=0, loss=None, loss_next=None, breaking=None
    )


def average() -> AverageTrace:
    """Return an average in which no fact has one kind of token."""
    effects = torch.linspace(-0.1, 0.9, len(CLASSES) * 4).reshape(len(CLASSES), 4)
    return AverageTrace(
        effects={"state": effects},
        low={"state": effects - 0.05},
        high={"state": effects + 0.05},
        counts=(5, 0, 9, 9, 3, 9),
        total_effect=0.5,
        total_low=0.4,
        total_high=0.6,
        clean=0.9,
        corrupted=0.4,
        n_facts=9,
        n_skipped=1,
        each={},
        noise=0.1,
        window=10,
        corruption="noise",
        samples=10,
        seed=1,
    )


def many() -> Chart:
    """Return a chart with more marks than are drawn as SVG."""
    return Chart(
        name="many",
        title=f"Many marks {HOSTILE}",
        spec={"mark": "point", "encoding": {"x": {"field": "x", "type": "quantitative"}}},
        rows=[{"x": number} for number in range(MANY)],
    )


@functools.cache
def charts() -> dict[str, Chart]:
    """Return {function: its chart} of every chart function."""
    lm = model()
    located = knowledge_neurons(lm, [PROMPT, "Bulgaria's currency is the"], "lev", steps=4)
    read = lens(lm, PROMPT)
    likely = lm.next_tokens(PROMPT, 8)
    strongest = located.top(2)
    return {
        "heat_map": traces.heat_map(causal_trace(lm, PROMPT, "Bulgaria", samples=2)),
        "class_map": traces.class_map(average()),
        "next_tokens": predictions.next_tokens({"base": likely}, PROMPT),
        "next_tokens of two": predictions.next_tokens(
            {"base": likely, "latest": [(HOSTILE, 0.5), *likely[:2]]}
        ),
        "lens_map": predictions.lens_map(read),
        "answer_line": predictions.answer_line(read),
        "part_bars": predictions.part_bars(compose(lm, PROMPT)),
        "scaled_chart": predictions.scaled_chart(
            ask_scaled(lm, PROMPT, [neuron for neuron, _ in strongest])
        ),
        "neuron_bars": neurons.neuron_bars(located),
        "layer_bars": neurons.layer_bars(located),
        "share_bars": neurons.share_bars(token_neurons(lm, PROMPT, 2)),
        "promoted_bars": neurons.promoted_bars(card()),
        "trigger_bars": neurons.trigger_bars(card()),
        "histogram": neurons.histogram(card()),
        "fact_chart": neurons.fact_chart(card()),
        "proof_chart": keeping.proof_chart(proof()),
        "norm_bars": keeping.norm_bars({3: 0.01, 1: 0.02}),
        "use_bars": keeping.use_bars(capacity()),
        "share_chart": judging.share_chart(evaluation(2)),
    }
