"""Neurons as pages: one file each, which a browser shows without a network, a server or the model.

    card_page(card(lm, index, (5, 992)), "card.html")    one neuron
    layer_page(index, 5, "layer-5.html")                 all neurons of a layer; needs no model
    write_pages(index, "pages", adds=fact_adds(lm))      every layer, with the facts it adds to

`write_pages` also writes pages/index.html, which links the layers and searches them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...core.checks import check_items, whole_number
from ...core.errors import FingerprintError, InputError, LayerError, WorkspaceError
from ...core.identity import same_model
from ...core.progress import Progress, tell
from ...core.tables import counted
from ...read.cards import Card
from ...read.fact_adds import FactAdds
from ...read.index import Index
from .layers import AROUND, index_html, layer_html, pages_of
from .page import check_folder, check_page, excerpt, printable, render, signed, write_page

# ── a card ────────────────────────────────────────────────────────────────────────────────────────


def card_page(
    found: Card,  # house: the promised name of the parameter
    path: str | os.PathLike[str] | None = None,
) -> str:
    """Return the card of a neuron as one HTML page, and write it if there is a path.

    Args:
        found: The card.
        path: The file to write, in one step; its name ends in .html.

    Raises:
        InputError: for another suffix, or if the file exists and factsmith did not write it.
        WorkspaceError: when the file cannot be written.
    """
    if not isinstance(found, Card):
        raise InputError(
            f"card_page shows a Card; got a {type(found).__name__}: "
            "make one with card(lm, index, neuron)"
        )
    if path is not None:
        check_page(path)
    layer, *expert, i = found.neuron
    before, after = (5 * n for n in AROUND)  # a card has few texts, so it shows more of them
    scores = [abs(score) for _, score in (*found.promotes, *found.demotes)]
    html = render(
        "card.html",
        found,
        title=f"Neuron {' '.join(map(str, found.neuron))} of {printable(found.model)}",
        card=found,
        place=f"layer {layer}, {f'expert {expert[0]}, ' if expert else ''}neuron {i}",
        most=max(scores, default=0) or 1,
        low=float(found.edges[0]),
        high=float(found.edges[-1]),
        chart=_histogram(found.edges.tolist(), found.counts.tolist()),
        top=[(t.coefficient, excerpt(t, before, after)) for t in found.triggers],
        bottom=[(t.coefficient, excerpt(t, before, after)) for t in found.bottom],
    )
    return write_page(html, path)


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """Return the bars of a histogram in a square of 100, with logarithmic heights.

    "zero" is where the coefficient 0 is. It is None near the ends, where its label would collide.
    """
    low, high, most = edges[0], edges[-1], math.log1p(max(counts)) or 1

    def across(x: float) -> float:
        return round(100 * (x - low) / (high - low), 3)

    bars = []
    for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True):
        height = round(100 * math.log1p(n) / most, 2)
        bars.append(
            {
                "x": across(a),
                "y": round(100 - height, 2),
                "width": round(0.94 * (across(b) - across(a)), 3),
                "height": height,
                "kind": "down" if a + b < 0 else "up",
                "label": f"{signed(a)} to {signed(b)}: {counted(n, 'token')}",
            }
        )
    return {"bars": bars, "zero": across(0) if 8 < across(0) < 92 else None, "total": sum(counts)}


# ── layers ────────────────────────────────────────────────────────────────────────────────────────


def layer_page(
    index: Index,
    layer: int,
    path: str | os.PathLike[str] | None = None,
    *,
    adds: FactAdds | None = None,
) -> str:
    """Return all neurons of a layer as one HTML page, and write it if there is a path.

    The page can be searched and sorted. Links can name a neuron (#n17), an expert's neuron (#e3n17)
    or a search (#q=Paris). Its data has at most 8 MB: the more neurons, the less of each, down to
    one trigger and three tokens.

    Args:
        index: The index; no model is needed.
        layer: A layer of the index.
        path: The file to write, as for `card_page`.
        adds: What neurons add to facts, from `fact_adds`. None: the page names no facts.

    Raises:
        LayerError: when the index does not hold the layer.
        FingerprintError: when `adds` is of another model.
        InputError: as for `card_page`.
        WorkspaceError: as for `card_page`.
    """
    (layer,) = _check_layers(index, [layer], "layer")
    _check_adds(index, adds)
    if path is not None:
        check_page(path)
    return write_page(layer_html(index, layer, adds, ()), path)


def write_pages(
    index: Index,
    folder: str | os.PathLike[str],
    layers: Iterable[int] | None = None,
    *,
    adds: FactAdds | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a page for each layer, and index.html, which links and searches them.

    index.html also lists the pages of this model that were in the folder before.

    Args:
        index: The index; no model is needed.
        folder: The folder to write into; it is made if it does not exist.
        layers: The layers. None: all layers of the index.
        adds: What neurons add to facts, from `fact_adds`. None: the pages name no facts.
        progress: Called after each page.

    Returns:
        The files, index.html first.

    Raises:
        FactsmithError: what `layer_page` raises, before any page is written.
    """
    numbers = _check_layers(index, layers, "layers")
    _check_adds(index, adds)
    folder = Path(folder)
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkspaceError(
            f"cannot make the folder {folder}: {error.strerror}; choose one that can be written"
        ) from None
    files = {layer: folder / f"layer-{layer}.html" for layer in numbers}
    first = folder / "index.html"
    for path in (first, *files.values()):
        check_page(path)
    present = pages_of(index.triggers.fingerprint, folder) | files
    for at, (layer, path) in enumerate(files.items()):
        lower = [near for near in present if near < layer]
        higher = [near for near in present if near > layer]
        nav = [("all layers", first.name)]
        nav += [(f"← layer {near}", present[near].name) for near in sorted(lower)[-1:]]
        nav += [(f"layer {near} →", present[near].name) for near in sorted(higher)[:1]]
        write_page(layer_html(index, layer, adds, nav), path)
        tell(progress, "pages", at + 1, len(files))
    write_page(index_html(index, present), first)
    return [first, *files.values()]


def _check_layers(index: Index, layers: Iterable[int] | None, argument: str) -> list[int]:
    """Return layers of the index, each once and ascending; all of them for None."""
    if not isinstance(index, Index):
        raise InputError(
            f"pages are made from an Index; got a {type(index).__name__}: "
            "open one with Index.open(folder)"
        )
    present = sorted({bank[0] for bank in index.triggers.banks})
    if layers is None:
        return present
    items = check_items(layers, "layers", "layer numbers", also="None for all")
    if not items:
        raise InputError(
            "layers is empty; give at least one layer, or None for all", argument=argument
        )
    numbers = [whole_number(layer) for layer in items]
    if absent := [layer for layer in numbers if layer not in present]:
        raise LayerError(
            f"the index does not hold layer {absent[0]}; it holds {', '.join(map(str, present))}",
            argument=argument,
        )
    return sorted({layer for layer in numbers if layer is not None})


def _check_adds(index: Index, adds: FactAdds | None) -> None:
    if adds is not None and not same_model(adds.fingerprint, index.triggers.fingerprint):
        raise FingerprintError(
            "the facts were tried on another model than the index: the fingerprints are "
            f"{adds.fingerprint[:12]} and {index.triggers.fingerprint[:12]}; "
            "call fact_adds with the model of the index"
        )
