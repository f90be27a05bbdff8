"""How predictions form, layer by layer: one prediction, or many.

    prediction_chart(fs.compose(lm, "The currency of Bulgaria is the"), path="prediction.svg")
    refinement_chart(fs.refinement(lm, prompts), path="refinement.svg")

Both charts have one x axis: the embedding comes first, then attention and FFN of every layer.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ...read.composition import Composition
from ...read.refinement import Refinement
from .drawing import (
    BLUE,
    COLUMN_WIDTH,
    LINES,
    SMALL,
    Picture,
    check_record,
    cut,
    filling,
    finish,
    headline,
    panel_title,
    thin_frame,
    token_label,
)

# ── one prediction ────────────────────────────────────────────────────────────────────────────────


def prediction_chart(
    found: Composition,  # house: the promised name of the parameter
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how one prediction forms: its probability, its rank, and what each part adds.

    The upper panels show the answer's probability and rank after each part of the model. The
    lowest panel shows what the part adds to the answer's logit. From left to right the parts are
    the embedding, and attention (hatched, open marks) and FFN (solid) of every layer. A last bar
    is the shift of the final norm with the bias of the unembedding, if they add anything.

    Args:
        found: The prediction to draw.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: for another record.
    """
    check_record(found, Composition, "prediction_chart")
    n_layers = len(found.ranks) // 2
    figure = Picture(figsize=(COLUMN_WIDTH, 3.6), dpi=300, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.3))
    probability, rank, bars = panels
    places = _places(n_layers)
    _draw_way_up(probability, places, found.probabilities.tolist(), "after FFN", "after attention")
    _draw_way_up(rank, places, (found.ranks + 1).tolist())
    probability.set_ylim(-0.05, 1.05)
    probability.set_ylabel("probability", fontsize=SMALL)
    probability.legend(
        fontsize=6.5,
        frameon=False,
        handlelength=1.4,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1.02, 0.97),
        borderpad=0,
    )
    _rank_axis(rank)
    rightmost = _draw_parts(bars, found, places)
    _layer_ticks(bars, n_layers)
    bars.set_xlim(-1.5, rightmost + 0.5)
    prompt = textwrap.shorten(token_label(found.prompt), 52, placeholder=" …")
    against = "" if found.contrast is None else f", not {token_label(found.contrast).strip()}"
    headline(figure, f"{prompt}\n→ {cut(token_label(found.target) + against, 40)}")
    for axes in panels:
        thin_frame(axes)
    return finish(figure, path)


def _draw_parts(axes: Axes, prediction: Composition, places: Sequence[float]) -> float:
    """Draw what each part adds to the logit. Return the place of the rightmost bar."""
    logits = [part.logit for part in prediction.parts]
    for kind, label, at, solid in (
        ("embedding", None, places[:1], True),
        ("attention", "attention", places[1::2], False),
        ("ffn", "FFN", places[2::2], True),
    ):
        heights = [part.logit for part in prediction.parts if part.kind == kind]
        axes.bar(at, heights, width=0.36, label=label, **filling(solid))
    rightmost = places[-1]
    if abs(logits[-1]) > 0.01 * max(map(abs, logits)):
        rightmost = len(places) // 2
        axes.bar(
            [rightmost],
            logits[-1:],
            width=0.36,
            facecolor="0.6",
            edgecolor="0.6",
            linewidth=0.5,
            label="shift and bias",
        )
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_ylabel(
        "added to logit" if prediction.contrast is None else "added to logit\ndifference",
        fontsize=SMALL,
    )
    axes.legend(
        fontsize=6.5,
        frameon=False,
        handlelength=1.4,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.32),
    )
    return rightmost


# ── many predictions ──────────────────────────────────────────────────────────────────────────────


def refinement_chart(
    found: Refinement,  # house: the promised name of the parameter
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how many predictions form, in four panels by layer.

    1. How often no single neuron of a layer predicts what the layer predicts; dotted: by chance.
    2. What the stream predicts after the FFN: what it predicted before (residual), what the FFN
       predicts, both when they agree, or another token (composition).
    3. How often the answer is already the likeliest token, and its mean probability.
    4. The answer's rank: the median, and a band from the lower to the upper quartile.

    Args:
        found: The predictions to draw.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: for another record.
    """
    check_record(found, Refinement, "refinement_chart")
    figure = Picture(figsize=(COLUMN_WIDTH, 6.3), dpi=300, layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    alone, cases, first, rank = panels
    _draw_composed(alone, found)
    _draw_cases(cases, found)
    _draw_answers(first, rank, found)
    for axes in (alone, cases, first):
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("share", fontsize=SMALL)
    for axes, side, x in zip(
        panels, ("left", "left", "right", "right"), (-0.02, -0.02, 1.02, 1.02), strict=True
    ):
        axes.legend(
            fontsize=6,
            frameon=False,
            handlelength=1.6,
            loc=f"lower {side}",
            bbox_to_anchor=(x, 0.97),
            ncols=6,
            columnspacing=1.0,
            borderpad=0,
        ).set_in_layout(False)
        thin_frame(axes)
    n_layers = len(found.says)
    _layer_ticks(rank, n_layers)
    rank.set_xlim(-1.5, n_layers - 0.5)
    headline(figure, f"{len(found.answers):,} predictions of {found.model}")
    return finish(figure, path)


def _draw_composed(axes: Axes, predictions: Refinement) -> None:
    """Draw how often no neuron predicts what its layer does, among all or the strongest ones."""
    layers = range(len(predictions.says))
    for share, composed, chance, (colour, _, marker) in zip(
        predictions.among, predictions.composed, predictions.chance, LINES, strict=False
    ):
        label = "all" if share == 1 else f"strongest {share:z.0%}" if share else "strongest"
        axes.plot(
            layers,
            composed.tolist(),
            color=colour,
            marker=marker,
            markersize=2.6,
            linewidth=1.0,
            label=label,
        )
        axes.plot(layers, chance.tolist(), color=colour, linestyle=":", linewidth=0.8)
    axes.plot([], [], color="black", linestyle=":", linewidth=0.8, label="chance")
    panel_title(axes, "no single neuron predicts what its layer predicts", pad=13)


def _draw_cases(axes: Axes, predictions: Refinement) -> None:
    """Stack the shares of what the stream predicts after the FFN."""
    n_layers = len(predictions.says)
    bottom = np.zeros(n_layers)
    for case, label, colour, hatch in (
        ("residual", "residual", "white", ""),
        ("agreement", "agreement", "0.8", ""),
        ("composition", "composition", "white", "////"),
        ("ffn", "FFN", BLUE, ""),
    ):
        heights = np.array(predictions.cases[case].tolist())
        axes.bar(
            range(n_layers),
            heights,
            bottom=bottom,
            width=0.72,
            label=label,
            facecolor=colour,
            hatch=hatch,
            edgecolor=BLUE,
            linewidth=0.5,
        )
        bottom += heights
    panel_title(axes, "the stream's prediction after the FFN", pad=13)


def _draw_answers(first: Axes, rank: Axes, predictions: Refinement) -> None:
    """Draw how often the answer is the likeliest token, and its rank."""
    places = _places(len(predictions.says))
    _draw_way_up(first, places, predictions.first.tolist(), "is the likeliest token")
    colour, dash, _ = LINES[1]
    first.plot(
        places,
        predictions.probabilities.double().mean(0).tolist(),
        color=colour,
        linestyle=dash,
        linewidth=1.0,
        label="mean probability",
    )
    panel_title(first, "the answer")
    low, median, high = (predictions.quantiles(0.25, 0.5, 0.75) + 1).tolist()
    _draw_way_up(rank, places, median, "median and quartiles")
    rank.fill_between(places, low, high, color=BLUE, alpha=0.18, linewidth=0)
    _rank_axis(rank)
    panel_title(rank, "the answer's rank")
    rank.set_ylabel("")


# ── the axis of layers ────────────────────────────────────────────────────────────────────────────


def _places(n_layers: int) -> list[float]:
    """Return where the embedding and each layer's attention and FFN are on the axis of layers."""
    return [-1.0, *(layer + side for layer in range(n_layers) for side in (-0.2, 0.2))]


def _draw_way_up(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float],
    label: str = "",
    attention: str = "",
) -> None:
    """Draw a line through the values after each part: attention has open marks, the others solid.

    Args:
        axes: The panel.
        places: Where the parts are, as `_places` gives them.
        values: One for each part.
        label: What the legend calls the line.
        attention: What it calls the open marks.
    """
    size = 3.2 if len(places) < 30 else 1.6
    axes.plot(
        places,
        values,
        color=BLUE,
        linewidth=1.0,
        marker="o",
        markersize=size,
        markevery=[0, *range(2, len(places), 2)],
        label=label,
    )
    axes.plot(
        places[1::2],
        values[1::2],
        linestyle="",
        label=attention,
        marker="o",
        markersize=size,
        markerfacecolor="white",
        markeredgecolor=BLUE,
        markeredgewidth=0.7,
    )


def _rank_axis(axes: Axes) -> None:
    """Draw ranks on a logarithmic axis with 1, the likeliest token, on top."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:z,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(max(high, 2), min(low, 0.8))
    axes.set_ylabel("rank", fontsize=SMALL)


def _layer_ticks(axes: Axes, n_layers: int) -> None:
    """Write evenly spaced layer numbers, and the embedding before them."""
    layers = range(0, n_layers, math.ceil(n_layers / 8))
    axes.set_xticks([-1, *layers], labels=["emb.", *map(str, layers)])
    axes.set_xlabel("layer", fontsize=SMALL)
