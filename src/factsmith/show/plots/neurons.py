"""show.plots.neurons."""

from __future__ import annotations

import os

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...core.checks import check_count
from ...locate.neurons import KnowledgeNeurons
from ...model.address import Neuron
from .drawing import COLUMN_WIDTH, Picture, check_record, filling, finished, quiet, visible
from .traces import LONGEST_LABEL, fit


def neuron_chart(
    found: KnowledgeNeurons, *, n: int = 12, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the neurons that carry one fact: the `n` strongest as bars, and below them how the layers share the attribution.

    A bar is the attribution averaged over the prompts, with a dot for each prompt; refined neurons are solid, others hatched. The lower
    panel sums each layer's positive averages, the refined neurons' part solid. `path` as for `heat_map`. Raises InputError when n < 1, or
    for another record.
    """
    check_record(found, KnowledgeNeurons, "neuron_chart")
    n = check_count(n, "n", "the number of neurons to draw")
    top, refined = found.top(n), set(found.refined)
    figure = Picture(figsize=(COLUMN_WIDTH, 2.1 + 0.145 * len(top)), dpi=300, layout="constrained")
    bars, layers = figure.subplots(2, 1, height_ratios=(0.145 * len(top) + 0.45, 1.0))
    for row, (neuron, average) in enumerate(top):
        bars.barh(row, average, height=0.72, **filling(neuron in refined))
        each = found.of(neuron).tolist()
        bars.plot(
            each,
            [row] * len(each),
            linestyle="",
            marker="o",
            markersize=2.2,
            color="black",
            alpha=0.45,
            markeredgewidth=0,
        )
    bars.set_yticks(range(len(top)), labels=[_neuron_label(neuron) for neuron, _ in top])
    bars.set_ylim(
        len(top) - 0.4, -0.6
    )  # the first on top, and no empty bands, however many there are
    bars.axvline(0, color="black", linewidth=0.5)
    prompts = f"mean of {len(found.prompts)} prompts" if len(found.prompts) > 1 else "one prompt"
    bars.set_xlabel(
        f"attribution to p({fit(visible(found.target), LONGEST_LABEL).rstrip()}), {prompts}",
        fontsize=7.5,
        parse_math=False,
    )

    total = found.scores.mean(0).clamp_min(0).sum(1)
    solid = torch.zeros_like(total)
    for neuron in refined:
        solid[neuron[0]] += found.of(neuron).mean().clamp_min(0)
    layers.bar(
        range(len(total)), solid.tolist(), width=0.72, label="refined neurons", **filling(True)
    )
    layers.bar(
        range(len(total)),
        (total - solid).tolist(),
        bottom=solid.tolist(),
        width=0.72,
        label="all others",
        **filling(False),
    )
    layers.set_xlabel("layer", fontsize=7.5)
    layers.set_ylabel("positive sum", fontsize=7.5)
    layers.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    layers.legend(fontsize=6.5, frameon=False, handlelength=1.4)
    figure.suptitle("Knowledge neurons", fontsize=8, x=0.02, ha="left")
    for axes in (bars, layers):
        quiet(axes)
    return finished(figure, path)


def _neuron_label(neuron: Neuron) -> str:
    layer, *expert, index = neuron
    return f"L{layer} · " + "".join(f"E{e} · " for e in expert) + str(index)
