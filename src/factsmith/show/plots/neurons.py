"""The neurons that carry one fact, as a figure.

neurons = fs.knowledge_neurons(lm, prompts, "Paris")
neuron_chart(neurons, n=12, path="neurons.svg")
"""

from __future__ import annotations

import os

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...core.checks import check_count
from ...locate.neurons import KnowledgeNeurons
from ...model.address import Neuron
from .drawing import (
    COLUMN_WIDTH,
    LONGEST_LABEL,
    SMALL,
    Picture,
    check_record,
    cut,
    filling,
    finish,
    headline,
    layer_numbers,
    thin_frame,
    token_label,
)


def neuron_chart(
    found: KnowledgeNeurons,  # house: the promised name of the parameter
    *,
    n: int = 12,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the strongest neurons of one fact as bars, and below them each layer's part.

    A bar is a neuron's attribution, averaged over the prompts; a dot is one prompt. Refined
    neurons are solid and the others hatched. The lower panel sums the positive averages of each
    layer; the part of the refined neurons is solid.

    Args:
        found: The neurons of a fact.
        n: The most bars to draw.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: when n < 1, or for another record.
    """
    check_record(found, KnowledgeNeurons, "neuron_chart")
    n = check_count(n, "n", "the number of neurons to draw")
    top = found.top(n)
    height = 0.145 * len(top)
    figure = Picture(figsize=(COLUMN_WIDTH, 2.1 + height), dpi=300, layout="constrained")
    bars, layers = figure.subplots(2, 1, height_ratios=(height + 0.45, 1.0))
    _draw_neurons(bars, found, top)
    _draw_layers(layers, found)
    headline(figure, "Knowledge neurons")
    for axes in (bars, layers):
        thin_frame(axes)
    return finish(figure, path)


def _draw_neurons(axes: Axes, neurons: KnowledgeNeurons, top: list[tuple[Neuron, float]]) -> None:
    """Draw a bar for each neuron, and a dot for each prompt."""
    refined = set(neurons.refined)
    for row, (neuron, average) in enumerate(top):
        axes.barh(row, average, height=0.72, **filling(neuron in refined))
        scores = neurons.of(neuron).tolist()
        axes.plot(
            scores,
            [row] * len(scores),
            linestyle="",
            marker="o",
            markersize=2.2,
            color="black",
            alpha=0.45,
            markeredgewidth=0,
        )
    axes.set_yticks(range(len(top)), labels=[_neuron_label(neuron) for neuron, _ in top])
    axes.set_ylim(len(top) - 0.4, -0.6)  # the first on top, and no empty bands
    axes.axvline(0, color="black", linewidth=0.5)
    n_prompts = len(neurons.prompts)
    prompts = f"mean of {n_prompts} prompts" if n_prompts > 1 else "one prompt"
    target = cut(token_label(neurons.target), LONGEST_LABEL)
    axes.set_xlabel(f"attribution to p({target}), {prompts}", fontsize=SMALL, parse_math=False)


def _draw_layers(axes: Axes, neurons: KnowledgeNeurons) -> None:
    """Draw the positive attribution of each layer, and the refined neurons' part."""
    total = neurons.scores.mean(0).clamp_min(0).sum(1)  # (n_layers,)
    solid = torch.zeros_like(total)
    for neuron in neurons.refined:
        solid[neuron[0]] += neurons.of(neuron).mean().clamp_min(0)
    layers = range(len(total))
    axes.bar(layers, solid.tolist(), width=0.72, label="refined neurons", **filling(True))
    axes.bar(
        layers,
        (total - solid).tolist(),
        bottom=solid.tolist(),
        width=0.72,
        label="other neurons",
        **filling(False),
    )
    axes.set_xlabel("layer", fontsize=SMALL)
    axes.set_ylabel("positive sum", fontsize=SMALL)
    layer_numbers(axes)
    axes.legend(fontsize=6.5, frameon=False, handlelength=1.4)


def _neuron_label(neuron: Neuron) -> str:
    layer, *expert, index = neuron
    return f"L{layer} · " + "".join(f"E{e} · " for e in expert) + str(index)
