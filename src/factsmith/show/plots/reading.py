"""What the layers of a model hold: what their neurons fire at, what they write, and their size.

    profile_lines(fs.profile(triggers), path="profile.svg")          what triggers share, by layer
    profile_bars(profile, "relation", n=6, path="relations.svg")     which relation, by layer
    agreement_chart(fs.agreement(triggers, values), path="agreement.svg")
    census_chart({"small": fs.census(lm), "large": fs.census(other)}, path="census.svg")

Each chart takes one record, or several by title. Several are drawn side by side.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ...core.checks import check_count
from ...core.errors import InputError
from ...read.agreement import Agreement
from ...read.census import Census
from ...read.profile import Profile
from .drawing import (
    FILLINGS,
    LINES,
    SMALL,
    by_title,
    cut,
    filling,
    finish,
    headline,
    layer_axes,
    legend_below,
    panel_title,
    shared_heights,
    side_by_side,
    thin_frame,
)

# ── profiles ──────────────────────────────────────────────────────────────────────────────────────


def profile_lines(
    found: Profile | Mapping[str, Profile],  # house: the promised name of the parameter
    features: Sequence[str | tuple[str, ...]] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the share of a layer's neurons that are selective for each feature.

    The grey area reaches up to the largest share that chance gives for one of the features.

    Args:
        found: One profile, or several by title.
        features: The features to draw, in this order. ("relation", "token") counts the neurons that
            are selective for the first and for none of the others. None: all features, or the eight
            with the largest shares.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: for an unknown feature, for more features than there are lines that a reader
            can tell apart, or for another record.
    """
    profiles = by_title(found, Profile, "profile_lines")
    features = tuple(
        features if features is not None else _commonest(next(iter(profiles.values())), len(LINES))
    )
    if not 1 <= len(features) <= len(LINES):
        raise InputError(
            f"got {len(features)} features to draw; expected 1 to {len(LINES)}: "
            "choose some with features=[...]"
        )
    figure, panels = side_by_side(len(profiles), 2.9)
    for axes, (title, profile) in zip(panels, profiles.items(), strict=True):
        chance = torch.zeros(len(profile.layers), dtype=torch.float64)
        shares: dict[str, Tensor] = {}
        for feature in features:
            name, *without = (feature,) if isinstance(feature, str) else feature
            label = name + (f", not {' or '.join(without)}" if without else "")
            shares[label] = profile.share_of(name, without=without)
            by_chance = profile.chance[:, profile.features.index(name)]
            chance = torch.maximum(chance, by_chance.double().nan_to_num())
        _draw_by_layer(axes, title, profile.layers, shares)
        axes.fill_between(
            profile.layers, 0, chance.tolist(), color="0.6", linewidth=0, label="by chance"
        )
    shared_heights(panels, "share of neurons")
    legend_below(figure, panels[0])
    headline(figure, "Selective neurons")
    return finish(figure, path)


def _draw_by_layer(
    axes: Axes, title: str, layers: Sequence[int], lines: Mapping[str, Tensor]
) -> None:
    """Draw lines (layers,) by their labels in one panel."""
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
    panel_title(axes, title)
    layer_axes(axes)


def _commonest(profile: Profile, n: int) -> list[str]:
    """Return the n features with the largest share in some layer, in the profile's order."""
    largest = {
        feature: float(profile.share[:, i].nan_to_num().max())
        for i, feature in enumerate(profile.features)
    }
    kept = set(sorted(largest, key=lambda feature: -largest[feature])[:n])
    return [feature for feature in profile.features if feature in kept]


def profile_bars(
    found: Profile | Mapping[str, Profile],  # house: the promised name of the parameter
    feature: str,
    *,
    n: int = 6,
    values: Sequence[Hashable] | None = None,
    names: Mapping[Hashable, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the share of a layer's neurons that are selective for each value of a feature.

    Some values have a bar of their own; the others are one bar. A value looks the same in every
    panel.

    Args:
        found: One profile, or several by title.
        feature: The feature, such as "relation".
        n: How many values have a bar of their own, if `values` is None: the commonest ones.
        values: The values that have one, from the bottom up.
        names: What the legend calls the values. A value without a name is written as it is.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: for an unknown feature, for n < 1, for more values than there are bars that a
            reader can tell apart, or for another record.
    """
    profiles = by_title(found, Profile, "profile_bars")
    n = check_count(n, "n", "the number of values to tell apart")
    tallies = {
        title: [profile.tally(feature, layer) for layer in profile.layers]
        for title, profile in profiles.items()
    }
    totals: Counter[Hashable] = Counter()
    for layers in tallies.values():
        for tally in layers:
            totals.update(tally)
    values = [value for value, _ in totals.most_common(n)] if values is None else list(values)
    if len(values) > len(FILLINGS):
        raise InputError(
            f"got {len(values)} values to draw; expected at most {len(FILLINGS)}: "
            "leave some out, and they are drawn together"
        )
    looks = [
        (cut((names or {}).get(value, str(value)), 28), look)
        for value, look in zip(values, FILLINGS, strict=False)
    ]
    figure, panels = side_by_side(len(profiles), 2.9)
    for axes, (title, profile) in zip(panels, profiles.items(), strict=True):
        heights = [[tally.get(value, 0) for tally in tallies[title]] for value in values]
        if set(totals) - set(values):
            drawn = [sum(each) for each in zip(*heights, strict=True)]
            counts = [sum(tally.values()) for tally in tallies[title]]
            heights.append([n - some for n, some in zip(counts, drawn, strict=True)])
        _stack(axes, profile, heights, [*looks, ("others", {"facecolor": "white"})])
        panel_title(axes, title)
        layer_axes(axes)
    shared_heights(panels, "share of neurons")
    legend_below(figure, panels[0])
    headline(figure, f"Selective neurons, by {feature}")
    return finish(figure, path)


def _stack(
    axes: Axes,
    profile: Profile,
    heights: Sequence[Sequence[int]],
    looks: Sequence[tuple[str, Mapping[str, Any]]],
) -> None:
    """Stack numbers of neurons (bars, layers), as shares of each layer's neurons."""
    n_neurons = [
        sum(len(purity) for bank, purity in profile.neurons.items() if bank[0] == layer)
        for layer in profile.layers
    ]
    bottom = np.zeros(len(n_neurons))
    for height, (label, look) in zip(heights, looks, strict=False):
        shares = np.array(height) / n_neurons
        axes.bar(
            profile.layers,
            shares,
            bottom=bottom,
            width=0.72,
            label=label,
            edgecolor="black",
            linewidth=0.4,
            **look,
        )
        bottom += shares


# ── keys and values ───────────────────────────────────────────────────────────────────────────────


def agreement_chart(
    found: Agreement | Mapping[str, Agreement],  # house: the promised name of the parameter
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how often a value promotes the token that follows its key's strongest trigger.

    The lines are the share of values that promote it most, the share that has it among the first
    tokens, and the first share by chance.

    Args:
        found: One record, or several by title.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: for another record.
    """
    records = by_title(found, Agreement, "agreement_chart")
    figure, panels = side_by_side(len(records), 2.4)
    for axes, (title, record) in zip(panels, records.items(), strict=True):
        lines = {
            "as their first token": record.share,
            "among their first tokens": record.within,
            "first token, by chance": record.chance,
        }
        _draw_by_layer(axes, title, record.layers, lines)
    shared_heights(panels, "share of neurons")
    legend_below(figure, panels[0])
    headline(figure, "Values that promote the token after the strongest trigger")
    return finish(figure, path)


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────


def census_chart(
    found: Census | Mapping[str, Census],  # house: the promised name of the parameter
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the size of a model's parts by layer: FFN solid, attention hatched, embeddings grey.

    If the census has effective ranks, a second row draws them as shares of the layer's neurons:
    how many of the directions that the coefficients could take the text uses.

    Args:
        found: One census, or several by title.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: for another record.
    """
    records = by_title(found, Census, "census_chart")
    n = len(records)
    ranked = any(
        layer.effective_rank is not None for record in records.values() for layer in record.layers
    )
    figure, panels = side_by_side(n, 3.6 if ranked else 2.2, rows=1 + ranked)
    for axes, (title, record) in zip(panels, records.items(), strict=False):
        _draw_parameters(axes, title, record)
    if ranked:
        for above, below, record in zip(panels[:n], panels[n:], records.values(), strict=True):
            _draw_ranks(below, record)
            below.set_xlim(above.get_xlim())
        shared_heights(panels[n:], "effective rank / neurons")
    shared_heights(panels[:n], "parameters, millions")
    return finish(figure, path)


def _draw_parameters(axes: Axes, title: str, record: Census) -> None:
    layers = [layer.layer for layer in record.layers]
    memory = [layer.ffn / 1e6 for layer in record.layers]
    attention = [layer.attention / 1e6 for layer in record.layers]

    def label(name: str, parameters: int) -> str:
        return f"{name} {parameters / record.parameters:.0%}"

    axes.bar(layers, memory, width=0.72, label=label("FFN", record.ffn), **filling(True))
    axes.bar(
        layers,
        attention,
        bottom=memory,
        width=0.72,
        label=label("attention", record.attention),
        **filling(False),
    )
    axes.bar(
        [-1.3],
        [record.embeddings / 1e6],
        width=0.72,
        label=label("embeddings", record.embeddings),
        facecolor="0.75",
        edgecolor="0.4",
        linewidth=0.5,
    )
    axes.legend(fontsize=6.5, frameon=False, handlelength=1.4, loc="upper right")
    panel_title(axes, f"{title}: {record.parameters / 1e6:,.1f} million parameters")
    ticks = _ticks(record)
    axes.set_xticks([-1.3, *ticks], labels=["emb.", *map(str, ticks)])
    thin_frame(axes)


def _draw_ranks(axes: Axes, record: Census) -> None:
    """Draw the effective rank of each layer's coefficients, as a share of its neurons."""
    shares = [
        math.nan if layer.effective_rank is None else layer.effective_rank / layer.neurons
        for layer in record.layers
    ]
    axes.bar([layer.layer for layer in record.layers], shares, width=0.72, **filling(True))
    axes.set_xticks(list(_ticks(record)))
    axes.set_xlabel("layer", fontsize=SMALL)
    thin_frame(axes)


def _ticks(record: Census) -> range:
    """Return at most eight layers, evenly spaced."""
    n_layers = len(record.layers)
    return range(0, n_layers, math.ceil(n_layers / 8))
