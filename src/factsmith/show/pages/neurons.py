"""Cards and whole layers as pages: one file each, that a browser shows without a network, a server or the model.

    card_page(card(lm, index, (5, 992)), "card.html")
    layer_page(index, 5, "layer-5.html")                        # the index is enough: no model is loaded
    write_pages(index, "pages", adds=fact_adds(lm))             # every layer, linked by pages/index.html; with the facts that go with it

Tokens and texts come from models and corpora, so no page trusts them: templates escape, data lie in a JSON block without a `<`, scripts put
them into text nodes only, and a content security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.checks import check_items, whole_number
from ...core.errors import FingerprintError, InputError, LayerError, WorkspaceError
from ...core.progress import Progress, tell
from ...corpus.scan import Bank
from ...read.cards import Card, FactAdds
from ...read.index import Index
from ...read.triggers import Trigger
from .page import (
    FITS,
    LARGEST,
    check_folder,
    check_page,
    keep_page,
    render,
    script_block,
    script_json,
    shown,
    signed,
)

_SEARCHED = 500_000
"""Tokens that the index page searches."""

_AROUND = (160, 60)
"""Characters kept before and behind a token of a longer text on a layer's page; on a card, of which there are few, five times these."""


def card_page(found: Card, path: str | os.PathLike[str] | None = None) -> str:
    """A neuron's card as one HTML page; written to `path` (.html) if given, in one step.

    Raises InputError for another suffix, or a file there that is none of ours, WorkspaceError for a folder that cannot be written.
    """
    if not isinstance(found, Card):
        raise InputError(
            f"card_page shows a Card; got a {type(found).__name__}: make one with card(lm, index, neuron)"
        )
    if path is not None:
        check_page(path)
    layer, *expert, i = found.neuron
    around = tuple(5 * n for n in _AROUND)
    html = render(
        "card.html",
        found,
        title=f"Neuron {' '.join(map(str, found.neuron))} of {shown(found.model)}",
        card=found,
        place=f"layer {layer}, {f'expert {expert[0]}, ' if expert else ''}neuron {i}",
        most=max((abs(score) for _, score in (*found.promotes, *found.demotes)), default=0) or 1,
        low=float(found.edges[0]),
        high=float(found.edges[-1]),
        chart=_chart(found.edges.tolist(), found.counts.tolist()),
        top=[(t.coefficient, _excerpt(t, *around)) for t in found.triggers],
        bottom=[(t.coefficient, _excerpt(t, *around)) for t in found.bottom],
    )
    return keep_page(html, path)


def layer_page(
    index: Index,
    layer: int,
    path: str | os.PathLike[str] | None = None,
    *,
    adds: FactAdds | None = None,
) -> str:
    """All neurons of a layer as one HTML page, to search, to sort and to link into: #n17, #e3n17 (an expert's), #q=Paris.

    path  where to write it, as `card_page` does
    adds  what the neurons add to facts, of `fact_adds`, which needs the model; without it the page names no facts

    Its data are 8 MB at most, if that is enough for one trigger and three tokens a neuron: the more neurons, the less of each.
    Raises LayerError for a layer that the index does not hold, FingerprintError for `adds` of another model, and what `card_page` raises.
    """
    (layer,) = _layers(index, [layer])
    _check_adds(index, adds)
    if path is not None:
        check_page(path)
    return keep_page(_layer(index, layer, adds, ()), path)


def write_pages(
    index: Index,
    folder: str | os.PathLike[str],
    layers: Iterable[int] | None = None,
    *,
    adds: FactAdds | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """A page for each of some layers (None: all of the index) and index.html, which links and searches them, in one folder.

    Returns the files, index.html first. Raises what `layer_page` raises, before anything is written.
    """
    wanted = _layers(index, layers)
    _check_adds(index, adds)
    folder = Path(folder)
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkspaceError(
            f"cannot make the folder {folder}: {error.strerror}; choose one that can be written"
        ) from None
    files = {layer: folder / f"layer-{layer}.html" for layer in wanted}
    first = folder / "index.html"
    for path in (first, *files.values()):
        check_page(path)
    for done, (layer, path) in enumerate(files.items(), 1):
        at = wanted.index(layer)
        near = [(f"← layer {x}", files[x].name) for x in wanted[max(at - 1, 0) : at]]
        near += [(f"layer {x} →", files[x].name) for x in wanted[at + 1 : at + 2]]
        keep_page(_layer(index, layer, adds, (("all layers", first.name), *near)), path)
        tell(progress, "pages", done, len(files))
    keep_page(_front(index, files), first)
    return [first, *files.values()]


def _layers(index: Index, layers: Iterable[int] | None) -> list[int]:
    """Some layers' numbers, each once and ascending; all of the index for None."""
    if not isinstance(index, Index):
        raise InputError(
            f"pages are made from an Index; got a {type(index).__name__}: open one with Index.open(folder)"
        )
    held = sorted({bank[0] for bank in index.triggers.banks})
    asked = (
        held
        if layers is None
        else [
            whole_number(layer)
            for layer in check_items(layers, "layers", "layer numbers", also="None for all")
        ]
    )
    if not asked:
        raise InputError("no layer was asked for; expected at least one, or None for all")
    if absent := [layer for layer in asked if layer not in held]:
        raise LayerError(
            f"the index does not hold layer {absent[0]}; there are {', '.join(map(str, held))}"
        )
    return sorted({layer for layer in asked if layer is not None})


def _check_adds(index: Index, adds: FactAdds | None) -> None:
    if adds is not None and adds.fingerprint != index.triggers.fingerprint:
        raise FingerprintError(
            f"the facts were tried on a model with fingerprint {adds.fingerprint[:12]}; the index is of one with "
            f"{index.triggers.fingerprint[:12]}: call fact_adds with that model"
        )


# ── a layer ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _layer(index: Index, layer: int, adds: FactAdds | None, nav: Sequence[tuple[str, str]]) -> str:
    own = sorted(bank for bank in index.triggers.banks if bank[0] == layer)
    adds = adds if adds is not None and all(bank in adds.facts for bank in own) else None
    banks = [
        {
            "expert": bank[1] if len(bank) > 1 else None,
            "neurons": len(index.triggers.banks[bank].fired),
        }
        for bank in own
    ]
    n = sum(bank["neurons"] or 0 for bank in banks)
    for fit in FITS:
        least = n * (20 * (fit[0] + fit[1]) + 16 * fit[2])  # characters, were no text long
        if least > LARGEST and fit != FITS[-1]:
            continue
        parts = _neurons(index, own, adds, *fit)
        data = script_json(
            {
                "layer": layer,
                "command": f"factsmith neuron {shlex.quote(index.triggers.model)}",
                "banks": banks,
                **parts,
            }
        )
        if len(data) <= LARGEST:
            break
    words = parts["words"]
    return render(
        "layer.html",
        index.triggers,
        title=f"Layer {layer} of {shown(index.triggers.model)}",
        layer=layer,
        n=n,
        banks=banks,
        n_facts=0 if adds is None else len(adds.known),
        nav=nav,
        plain=[
            (
                " ".join(map(str, (*own[at][1:], i))),
                f"{fired:.1%}",
                " ".join(words[word] for word in up[:10:2]),
            )
            for at, i, fired, up, *_ in parts["neurons"]
        ],
        data=data,
        script=script_block("layer.js"),
    )


def _neurons(
    index: Index,
    banks: Sequence[Bank],
    adds: FactAdds | None,
    n_top: int,
    n_bottom: int,
    n_tokens: int,
) -> dict[str, Any]:
    """What layer.js shows, as it describes it: the neurons, and the words, texts and facts that they refer to by number."""
    words, texts = _Numbered(), _Numbered()
    neurons = []

    def tokens(pairs: Iterable[tuple[str, float]]) -> list[float]:
        return [x for token, score in pairs for x in (words.number(shown(token)), _brief(score))]

    def places(triggers: Iterable[Trigger]) -> list[float]:
        found: list[float] = []
        for trigger in triggers:
            before, token, behind = _excerpt(trigger, *_AROUND)
            start = _units(before)
            found += [
                _brief(trigger.coefficient),
                texts.number(before + token + behind),
                start,
                start + _units(token),
            ]
        return found

    for at, bank in enumerate(banks):
        for i, fired in enumerate(index.triggers.banks[bank].fired.tolist()):
            own = (*bank, i)
            facts: list[float] = []
            if adds is not None:
                facts = [
                    x
                    for t, m, added in zip(
                        *(
                            part[bank][i].tolist()
                            for part in (adds.facts, adds.coefficients, adds.adds)
                        ),
                        strict=True,
                    )
                    if added > 0
                    for x in (t, _brief(m), _brief(added))
                ]
            neurons.append(
                [
                    at,
                    i,
                    _brief(fired),
                    tokens(index.values.of(own)[:n_tokens]),
                    tokens(index.values.of(own, bottom=True)[:n_tokens]),
                    places(index.triggers.of(own, k=n_top)),
                    places(index.triggers.of(own, sign="bottom", k=n_bottom)) if n_bottom else [],
                    facts,
                ]
            )
    known = (
        [] if adds is None else [[shown(prompt), shown(answer)] for prompt, answer in adds.known]
    )
    return {
        "neurons": neurons,
        "words": list(words.seen),
        "texts": list(texts.seen),
        "facts": known,
    }


class _Numbered:
    """Texts, each kept once, by the order in which they came."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.seen.setdefault(text, len(self.seen))


def _front(index: Index, files: Mapping[int, Path]) -> str:
    own = {
        layer: sorted(bank for bank in index.triggers.banks if bank[0] == layer) for layer in files
    }
    sizes = {
        layer: sum(len(index.triggers.banks[bank].fired) for bank in banks)
        for layer, banks in own.items()
    }
    held = min(index.values.top_ids[bank].shape[1] for banks in own.values() for bank in banks)
    width = min(held, _SEARCHED // sum(sizes.values()))
    words = _Numbered()

    def tokens(bank: Bank) -> list[int]:
        return [
            words.number(shown(index.values.words[token]))
            for token in index.values.top_ids[bank][:, :width].flatten().tolist()
        ]

    layers = [
        {
            "layer": layer,
            "file": files[layer].name,
            "banks": [[bank[1] if len(bank) > 1 else None, tokens(bank)] for bank in banks],
        }
        for layer, banks in own.items()
    ]
    pages = []
    for layer, banks in own.items():
        fired = sorted(
            share for bank in banks for share in index.triggers.banks[bank].fired.tolist()
        )
        never = sum(share == 0 for share in fired)
        size = files[layer].stat().st_size
        pages.append(
            {
                "layer": layer,
                "file": files[layer].name,
                "neurons": sizes[layer],
                "never": never,
                "fired": fired[len(fired) // 2],
                "size": size,
            }
        )
    return render(
        "index.html",
        index.triggers,
        title=f"Neurons of {shown(index.triggers.model)}",
        n=sum(sizes.values()),
        pages=pages,
        data=script_json({"layers": layers, "words": list(words.seen), "width": width}),
        script=script_block("index.js"),
    )


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _excerpt(trigger: Trigger, before: int, behind: int) -> tuple[str, str, str]:
    """What of a trigger's text is shown: before the token, the token, behind it; a long text is cut at a space, if there is one."""
    text, start, stop = trigger.text, trigger.start, trigger.stop
    first, last = 0, len(text)
    if len(text) > 1.5 * (before + behind):
        first, last = max(0, start - before), min(len(text), stop + behind)
        if first and (space := text.find(" ", first, start)) >= 0:
            first = space
        if last < len(text) and (space := text.rfind(" ", stop, last)) >= 0:
            last = space
    parts = (
        "…" + text[first:start] if first else text[:start].lstrip(" "),
        text[start:stop],
        text[stop:last] + ("…" if last < len(text) else ""),
    )
    return tuple(map(shown, parts))  # type: ignore[return-value]


def _units(text: str) -> int:
    """The length of a text as a browser counts it, in UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)


def _brief(number: float) -> float:
    """Four digits: what a page shows, and not more."""
    brief = float(f"{number:.4g}")
    return int(brief) if brief.is_integer() else brief


def _chart(edges: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """A histogram's bars in a square of 100, heights by logarithm; zero: where 0 lies in it, if not at an end."""
    low, high, most = edges[0], edges[-1], math.log1p(max(counts)) or 1

    def across(x: float) -> float:
        return round(100 * (x - low) / (high - low), 3)

    bars = []
    for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True):
        height = round(100 * math.log1p(n) / most, 2)
        label = f"{signed(a)} to {signed(b)}: {n:,} tokens"
        place = {
            "x": across(a),
            "y": round(100 - height, 2),
            "width": round(0.94 * (across(b) - across(a)), 3),
            "height": height,
        }
        bars.append({**place, "kind": "down" if a + b < 0 else "up", "label": label})
    return {"bars": bars, "zero": across(0) if 8 < across(0) < 92 else None, "total": sum(counts)}
