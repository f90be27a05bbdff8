"""show.plots.reading."""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, ScalarFormatter
from torch import Tensor

from ...core.checks import check_count
from ...core.errors import InputError
from ...read.agreement import Agreement
from ...read.census import Census
from ...read.composition import Composition
from ...read.profile import Profile
from ...read.refinement import Refinement
from .drawing import (
    BLUE,
    COLUMN_WIDTH,
    FILLINGS,
    LINES,
    Picture,
    by_title,
    check_record,
    draw_lines,
    filling,
    finished,
    layer_axes,
    legend_below,
    quiet,
    shared_heights,
    side_by_side,
    visible,
)
from .traces import fit


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    mark_x: float | None = None,
    mark_y: float | None = None,
    log_x: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Lines with bands: {label: (x, y, low, high)}, told apart by colour, dash and marker; thin lines at `mark_x` and `mark_y`.

    `path` as for `heat_map`. Raises InputError for series whose four parts differ in length, or without any.
    """
    if not series or any(len({len(part) for part in parts}) != 1 for parts in series.values()):
        raise InputError(
            f"series {list(series)} cannot be drawn; expected at least one, each with as many x as y, low and high"
        )
    figure = Picture(figsize=(COLUMN_WIDTH, 2.4), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    draw_lines(axes, series, itertools.cycle(LINES))
    for position, line in ((mark_x, axes.axvline), (mark_y, axes.axhline)):
        if position is not None:
            line(position, color="black", linewidth=0.5, linestyle=":")
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(x_label, fontsize=7.5)
    axes.set_ylabel(y_label, fontsize=7.5)
    axes.legend(fontsize=6.5, frameon=False, handlelength=2.6)
    figure.suptitle(title, fontsize=8, x=0.02, ha="left")
    quiet(axes)
    return finished(figure, path)


def prediction_chart(found: Composition, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw one prediction on its way up: the answer's probability and rank behind each part, and below what each part adds to its logit.

    Parts stand from left to right: the embedding, then attention (hatched, open marks) and memory (solid) of every layer; last the final
    norm's shift with the unembedding's bias, where it adds anything. `path` as for `heat_map`. Raises InputError for another record.
    """
    check_record(found, Composition, "prediction_chart")
    n_layers = len(found.ranks) // 2
    figure = Picture(figsize=(COLUMN_WIDTH, 3.6), dpi=300, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.3))
    at = _up_the_layers(n_layers)
    _draw_way_up(panels[0], at, found.probabilities.tolist(), "behind FFN", "behind attention")
    _draw_way_up(panels[1], at, (found.ranks + 1).tolist())
    panels[0].set_ylim(-0.05, 1.05)
    panels[0].set_ylabel("probability", fontsize=7.5)
    panels[0].legend(
        fontsize=6.5,
        frameon=False,
        handlelength=1.4,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1.02, 0.97),
        borderpad=0,
    )
    _rank_axis(panels[1])
    bars = panels[2]
    logits = [part.logit for part in found.parts]
    for kind, places, solid in (
        ("embedding", at[:1], True),
        ("attention", at[1::2], False),
        ("FFN", at[2::2], True),
    ):
        own = [
            logit
            for part, logit in zip(found.parts, logits, strict=True)
            if part.kind == kind.lower()
        ]
        label = None if kind == "embedding" else kind
        bars.bar(places, own, width=0.36, label=label, **filling(solid))
    shown = [*at, n_layers] if abs(logits[-1]) > 0.01 * max(map(abs, logits)) else at
    if len(shown) > len(at):
        bars.bar(
            [n_layers],
            logits[-1:],
            width=0.36,
            facecolor="0.6",
            edgecolor="0.6",
            linewidth=0.5,
            label="shift and bias",
        )
    bars.axhline(0, color="black", linewidth=0.5)
    bars.set_ylabel(
        "added to logit" if found.contrast is None else "added to the lead", fontsize=7.5
    )
    bars.legend(
        fontsize=6.5,
        frameon=False,
        handlelength=1.4,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.32),
    )
    _layer_ticks(bars, n_layers)
    bars.set_xlim(-1.5, shown[-1] + 0.5)
    against = "" if found.contrast is None else f", not {visible(found.contrast).strip()}"
    title = f"{textwrap.shorten(visible(found.prompt), 52, placeholder=' …')}\n→ {fit(visible(found.target) + against, 40).rstrip()}"
    figure.suptitle(title, fontsize=8, x=0.02, ha="left", parse_math=False)
    for axes in panels:
        quiet(axes)
    return finished(figure, path)


def refinement_chart(found: Refinement, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw many predictions by layer, in four panels: whether a layer says what one of its memories says, beside chance (dotted); whose
    prediction the stream's then is; how often the answer is the likeliest already, with its mean probability; and its rank, with quartiles.

    `path` as for `heat_map`. Raises InputError for another record.
    """
    check_record(found, Refinement, "refinement_chart")
    n_layers = len(found.says)
    figure = Picture(figsize=(COLUMN_WIDTH, 6.3), dpi=300, layout="constrained")
    alone, whose, first, rank = figure.subplots(4, 1, sharex=True)
    for share, composed, chance, (colour, _, marker) in zip(
        found.among, found.composed, found.chance, LINES, strict=False
    ):
        label = "all" if share == 1 else f"strongest {share:.0%}" if share else "strongest"
        alone.plot(
            range(n_layers),
            composed.tolist(),
            color=colour,
            marker=marker,
            markersize=2.6,
            linewidth=1.0,
            label=label,
        )
        alone.plot(range(n_layers), chance.tolist(), color=colour, linestyle=":", linewidth=0.8)
    alone.plot([], [], color="black", linestyle=":", linewidth=0.8, label="chance")
    alone.set_title(
        "layer's prediction is that of none of its memories", fontsize=7.5, loc="left", pad=13
    )
    bottom = np.zeros(n_layers)
    fillings = (
        ("residual", "white", ""),
        ("agreement", "0.8", ""),
        ("composition", "white", "////"),
        ("ffn", BLUE, ""),
    )
    for case, colour, hatch in fillings:
        heights = np.array(found.cases[case].tolist())
        look = {"facecolor": colour, "hatch": hatch, "edgecolor": BLUE, "linewidth": 0.5}
        whose.bar(
            range(n_layers),
            heights,
            bottom=bottom,
            width=0.72,
            label="FFN" if case == "ffn" else case,
            **look,
        )
        bottom += heights
    whose.set_title(
        "stream's prediction behind the FFN is that of", fontsize=7.5, loc="left", pad=13
    )
    at = _up_the_layers(n_layers)
    _draw_way_up(first, at, found.first.tolist(), "the likeliest")
    colour, dash, _ = LINES[1]
    first.plot(
        at,
        found.probabilities.double().mean(0).tolist(),
        color=colour,
        linestyle=dash,
        linewidth=1.0,
        label="mean probability",
    )
    first.set_title("answer is", fontsize=7.5, loc="left", pad=3)
    low, median, high = (found.quantiles(0.25, 0.5, 0.75) + 1).tolist()
    _draw_way_up(rank, at, median, "median, quartiles")
    rank.fill_between(at, low, high, color=BLUE, alpha=0.18, linewidth=0)
    _rank_axis(rank)
    rank.set_title("answer's rank", fontsize=7.5, loc="left", pad=3)
    rank.set_ylabel("")
    for axes in (alone, whose, first):
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("share", fontsize=7.5)
    for axes in (alone, whose, first, rank):
        side, x = ("left", -0.02) if axes in (alone, whose) else ("right", 1.02)
        legend = {
            "loc": f"lower {side}",
            "bbox_to_anchor": (x, 0.97),
            "ncols": 6,
            "columnspacing": 1.0,
            "borderpad": 0,
        }
        axes.legend(fontsize=6, frameon=False, handlelength=1.6, **legend).set_in_layout(False)
        quiet(axes)
    _layer_ticks(rank, n_layers)
    rank.set_xlim(-1.5, n_layers - 0.5)
    figure.suptitle(
        f"{len(found.answers):,} predictions of {found.model}",
        fontsize=8,
        x=0.02,
        ha="left",
        parse_math=False,
    )
    return finished(figure, path)


def _up_the_layers(n_layers: int) -> list[float]:
    """Where the embedding and each layer's attention and memory stand on an axis of layers."""
    return [-1.0, *(layer + side for layer in range(n_layers) for side in (-0.2, 0.2))]


def _draw_way_up(
    axes: Axes, at: Sequence[float], values: Sequence[float], label: str = "", attention: str = ""
) -> None:
    """A line through the states behind each part: open marks behind attention, solid ones behind the memory and the embedding."""
    size = 3.2 if len(at) < 30 else 1.6
    axes.plot(
        at,
        values,
        color=BLUE,
        linewidth=1.0,
        marker="o",
        markersize=size,
        markevery=[0, *range(2, len(at), 2)],
        label=label,
    )
    behind = {
        "marker": "o",
        "markersize": size,
        "markerfacecolor": "white",
        "markeredgecolor": BLUE,
        "markeredgewidth": 0.7,
    }
    axes.plot(at[1::2], values[1::2], linestyle="", label=attention, **behind)  # type: ignore[arg-type]


def _rank_axis(axes: Axes) -> None:
    """Ranks from 1, the likeliest, on top."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(max(high, 2), min(low, 0.8))
    axes.set_ylabel("rank", fontsize=7.5)


def _layer_ticks(axes: Axes, n_layers: int) -> None:
    """Layer numbers, evenly spaced, and before them the embedding."""
    step = math.ceil(n_layers / 8)
    layers = range(0, n_layers, step)
    axes.set_xticks([-1, *layers], labels=["emb.", *map(str, layers)])
    axes.set_xlabel("layer", fontsize=7.5)


def profile_lines(
    found: Profile | Mapping[str, Profile],
    features: Sequence[str | tuple[str, ...]] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw by layer which share of the neurons is selective for each feature, with what chance allows: grey, up to the largest of them.

    found     one profile, or several by title, side by side
    features  which, in this order; None: all, or the eight that most neurons go by. ("relation", "token") counts the neurons selective
              for the first and for none of the others

    `path` as for `heat_map`. Raises InputError for features that are not there, more than can be told apart, or another record.
    """
    panels = by_title(found, Profile, "profile_lines")
    features = tuple(
        features if features is not None else _commonest(next(iter(panels.values())), len(LINES))
    )
    if not 1 <= len(features) <= len(LINES):
        raise InputError(
            f"got {len(features)} features to draw; expected 1 to {len(LINES)}: choose some with features=[...]"
        )
    figure, grid = side_by_side(len(panels), 2.9)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        chance = torch.zeros(len(own.layers), dtype=torch.float64)
        lines: dict[str, Tensor] = {}
        for feature in features:
            name, *without = (feature,) if isinstance(feature, str) else feature
            lines[name + (f", not {' or '.join(without)}" if without else "")] = own.share_of(
                name, without=without
            )
            chance = torch.maximum(
                chance, own.chance[:, own.features.index(name)].double().nan_to_num()
            )
        _draw_by_layer(axes, title, own.layers, lines)
        axes.fill_between(
            own.layers, 0, chance.tolist(), color="0.6", linewidth=0, label="by chance"
        )
    shared_heights(grid, "share of neurons")
    legend_below(figure, grid[0])
    figure.suptitle("Selective neurons", fontsize=8, x=0.02, ha="left")
    return finished(figure, path)


def _draw_by_layer(
    axes: Axes, title: str, layers: Sequence[int], lines: Mapping[str, Tensor]
) -> None:
    """Lines (layers,) by their labels in one panel, each told from the others."""
    for (label, heights), (colour, dash, marker) in zip(lines.items(), LINES, strict=False):
        axes.plot(
            layers,
            heights.tolist(),
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=2.6,
            linewidth=1.0,
            label=label,
        )
    axes.set_title(title, fontsize=7.5, loc="left", pad=3)
    layer_axes(axes)


def _commonest(found: Profile, n: int) -> list[str]:
    """The n features that the largest share of some layer's neurons is selective for, in their order."""
    most = {
        feature: float(found.share[:, i].nan_to_num().max())
        for i, feature in enumerate(found.features)
    }
    kept = set(sorted(most, key=lambda feature: -most[feature])[:n])
    return [feature for feature in found.features if feature in kept]


def profile_bars(
    found: Profile | Mapping[str, Profile],
    feature: str,
    *,
    n: int = 6,
    values: Sequence[Hashable] | None = None,
    names: Mapping[Hashable, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw by layer how many neurons are selective for which value of a feature: some values, and the others together.

    found   one profile, or several by title, side by side; a value has the same filling in all
    values  which to tell apart, from below; None: the n commonest
    names   how values are called; a value that is not there is called as it is written

    `path` as for `heat_map`. Raises InputError for a feature that is not there, n < 1, too many values to tell apart, or another record.
    """
    panels = by_title(found, Profile, "profile_bars")
    n = check_count(n, "n", "the number of values to tell apart")
    tallies = {
        title: [own.tally(feature, layer) for layer in own.layers] for title, own in panels.items()
    }
    totals: Counter[Hashable] = Counter()
    for layers in tallies.values():
        for tally in layers:
            totals.update(tally)
    values = [value for value, _ in totals.most_common(n)] if values is None else list(values)
    if len(values) > len(FILLINGS):
        raise InputError(
            f"got {len(values)} values to draw; expected at most {len(FILLINGS)}: the others are drawn together"
        )
    figure, grid = side_by_side(len(panels), 2.9)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        neurons = [
            sum(len(each) for bank, each in own.neurons.items() if bank[0] == layer)
            for layer in own.layers
        ]
        heights = [[tally.get(value, 0) for tally in tallies[title]] for value in values]
        labels = [fit((names or {}).get(value, str(value)), 28).rstrip() for value in values]
        if set(totals) - set(values):
            heights.append(
                [
                    sum(tally.values()) - sum(own)
                    for tally, own in zip(tallies[title], zip(*heights, strict=True), strict=True)
                ]
            )
            labels.append("others")
        bottom = np.zeros(len(neurons))
        for row, (height, label) in enumerate(zip(heights, labels, strict=True)):
            shares = np.array(height) / neurons
            look: dict[str, Any] = FILLINGS[row] if row < len(values) else {"facecolor": "white"}
            axes.bar(
                own.layers,
                shares,
                bottom=bottom,
                width=0.72,
                label=label,
                edgecolor="black",
                linewidth=0.4,
                **look,
            )
            bottom += shares
        axes.set_title(title, fontsize=7.5, loc="left", pad=3)
        layer_axes(axes)
    shared_heights(grid, "share of neurons")
    legend_below(figure, grid[0])
    figure.suptitle(
        f"Selective neurons, by {feature}", fontsize=8, x=0.02, ha="left", parse_math=False
    )
    return finished(figure, path)


def agreement_chart(
    found: Agreement | Mapping[str, Agreement], *, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw by layer how often a value promotes what follows its key's strongest trigger, as its first token or among the first, and chance.

    found  one record, or several by title, side by side

    `path` as for `heat_map`. Raises InputError for another record.
    """
    panels = by_title(found, Agreement, "agreement_chart")
    figure, grid = side_by_side(len(panels), 2.4)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        lines = {
            "first token": own.share,
            "among the first": own.within,
            "first, by chance": own.chance,
        }
        _draw_by_layer(axes, title, own.layers, lines)
    shared_heights(grid, "share of neurons")
    legend_below(figure, grid[0])
    figure.suptitle(
        "Values that promote the token behind the strongest trigger", fontsize=8, x=0.02, ha="left"
    )
    return finished(figure, path)


def census_chart(
    found: Census | Mapping[str, Census], *, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw what a model is made of: parameters by layer, memory solid and attention hatched, beside the embeddings; below, where second
    moments were given, the share of the coefficients' directions that the text uses: the effective rank in a hundred neurons.

    found  one census, or several by title, side by side

    `path` as for `heat_map`. Raises InputError for another record.
    """
    panels = by_title(found, Census, "census_chart")
    ranked = any(
        layer.effective_rank is not None for own in panels.values() for layer in own.layers
    )
    figure, grid = side_by_side(len(panels), 3.6 if ranked else 2.2, rows=1 + ranked)
    for place, (title, own) in enumerate(panels.items()):
        axes, layers = grid[place], [layer.layer for layer in own.layers]
        memory, attention = (
            [getattr(layer, part) / 1e6 for layer in own.layers] for part in ("ffn", "attention")
        )
        axes.bar(
            layers,
            memory,
            width=0.72,
            label=f"memory {own.ffn / own.parameters:.0%}",
            **filling(True),
        )
        axes.bar(
            layers,
            attention,
            bottom=memory,
            width=0.72,
            label=f"attention {own.attention / own.parameters:.0%}",
            **filling(False),
        )
        look: dict[str, Any] = {"facecolor": "0.75", "edgecolor": "0.4", "linewidth": 0.5}
        axes.bar(
            [-1.3],
            [own.embeddings / 1e6],
            width=0.72,
            label=f"embeddings {own.embeddings / own.parameters:.0%}",
            **look,
        )
        axes.legend(fontsize=6.5, frameon=False, handlelength=1.4, loc="upper right")
        axes.set_title(
            f"{title}: {own.parameters / 1e6:,.1f} million parameters",
            fontsize=7.5,
            loc="left",
            pad=3,
            parse_math=False,
        )
        ticks = range(0, len(layers), math.ceil(len(layers) / 8))
        axes.set_xticks([-1.3, *ticks], labels=["emb.", *map(str, ticks)])
        quiet(axes)
        if ranked:
            below = grid[len(panels) + place]
            shares = [
                math.nan if x.effective_rank is None else x.effective_rank / x.neurons
                for x in own.layers
            ]
            below.bar(layers, shares, width=0.72, **filling(True))
            below.set_xlim(axes.get_xlim())
            below.set_xticks(list(ticks))
            below.set_xlabel("layer", fontsize=7.5)
            quiet(below)
    shared_heights(grid[: len(panels)], "parameters, millions")
    if ranked:
        shared_heights(grid[len(panels) :], "effective rank / neurons")
    return finished(figure, path)
