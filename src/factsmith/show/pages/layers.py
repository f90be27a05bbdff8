"""The page of a layer with all its neurons, and the index page of several layers.

    layer_html(index, 5, adds, nav=())
    index_html(index, {5: Path("pages/layer-5.html")})

Both pages hold their data as JSON, and a script shows it: `layer.js` and `index.js`, which describe
the form of the data. A page names each token, text and fact once; neurons refer to them by number.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...corpus.scan import Bank
from ...read.fact_adds import FactAdds
from ...read.index import Index
from ...read.triggers import Trigger
from .page import excerpt, printable, render, script_block, script_json

LARGEST = 8_000_000
"""The most characters of a layer's data. A layer that needs more shows less of each neuron."""

SEARCHED = 500_000
"""The most tokens that the index page searches."""

AROUND = (160, 60)
"""About how many characters of a long text a layer's page keeps before and after a token."""


class Details(NamedTuple):
    """How much a layer's page shows of each neuron."""

    top: int
    """Places where its coefficient is highest."""
    bottom: int
    """Places where its coefficient is lowest."""
    tokens: int
    """Tokens that its value promotes, and as many that it demotes."""

    def least_characters(self, n_neurons: int) -> int:
        """Return how many characters the data has at least, whatever the texts."""
        return n_neurons * (20 * (self.top + self.bottom) + 16 * self.tokens)


DETAILS = (
    Details(10, 3, 10),
    Details(5, 2, 10),
    Details(3, 1, 5),
    Details(1, 1, 5),
    Details(1, 0, 3),
)
"""What a layer's page shows, from most to least."""


class Numbered:
    """Texts that are kept once, numbered in the order in which they first came."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Return the number of a text."""
        return self._numbers.setdefault(text, len(self._numbers))

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)


def banks_of(index: Index, layer: int) -> list[Bank]:
    """Return the banks of a layer: one, or one for each expert."""
    return sorted(bank for bank in index.triggers.banks if bank[0] == layer)


# ── a layer ───────────────────────────────────────────────────────────────────────────────────────


def layer_html(
    index: Index, layer: int, adds: FactAdds | None, nav: Sequence[tuple[str, str]]
) -> str:
    """Return the page of a layer.

    Args:
        index: An index that holds the layer.
        layer: The layer.
        adds: What neurons add to facts. None, or without this layer: the page names no facts.
        nav: (text, file) of the links at the top.
    """
    banks = banks_of(index, layer)
    adds = adds if adds is not None and all(bank in adds.facts for bank in banks) else None
    sizes = [len(index.triggers.banks[bank].fired) for bank in banks]
    heads = [
        {"expert": expert_of(bank), "neurons": size}
        for bank, size in zip(banks, sizes, strict=True)
    ]
    for details in DETAILS:
        if details.least_characters(sum(sizes)) > LARGEST and details != DETAILS[-1]:
            continue
        content = _LayerData(index, banks, adds, details).content()
        data = script_json(
            {
                "layer": layer,
                "command": f"factsmith neuron {shlex.quote(index.triggers.model)}",
                "banks": heads,
                **content,
            }
        )
        if len(data) <= LARGEST:
            break
    words = content["words"]
    return render(
        "layer.html",
        index.triggers,
        title=f"Layer {layer} of {printable(index.triggers.model)}",
        layer=layer,
        n=sum(sizes),
        banks=heads,
        n_facts=0 if adds is None else len(adds.known),
        nav=nav,
        plain=[
            (
                " ".join(map(str, (*banks[at][1:], i))),
                f"{fired:.1%}",
                " ".join(words[word] for word in up[:10:2]),
            )
            for at, i, fired, up, *_ in content["neurons"]
        ],
        data=data,
        script=script_block("layer.js"),
    )


def expert_of(bank: Bank) -> int | None:
    """Return the expert that a bank belongs to. None: the layer has no experts."""
    return bank[1] if len(bank) > 1 else None


class _LayerData:
    """The data of a layer's page, as `layer.js` describes it."""

    def __init__(
        self, index: Index, banks: Sequence[Bank], adds: FactAdds | None, details: Details
    ) -> None:
        self.index, self.banks, self.adds, self.details = index, banks, adds, details
        self.words, self.texts = Numbered(), Numbered()

    def content(self) -> dict[str, Any]:
        """Return the neurons, and the words, texts and facts that they refer to by number."""
        neurons = [
            [at, i, brief(fired), *self._neuron(bank, i)]
            for at, bank in enumerate(self.banks)
            for i, fired in enumerate(self.index.triggers.banks[bank].fired.tolist())
        ]
        known = self.adds.known if self.adds is not None else ()
        return {
            "neurons": neurons,
            "words": list(self.words),
            "texts": list(self.texts),
            "facts": [[printable(prompt), printable(answer)] for prompt, answer in known],
        }

    def _neuron(self, bank: Bank, i: int) -> list[list[float]]:
        """Return the tokens, places and facts of a neuron."""
        triggers, values, details = self.index.triggers, self.index.values, self.details
        neuron = (*bank, i)
        bottom = triggers.of(neuron, sign="bottom", k=details.bottom) if details.bottom else []
        return [
            self._tokens(values.of(neuron)[: details.tokens]),
            self._tokens(values.of(neuron, bottom=True)[: details.tokens]),
            self._places(triggers.of(neuron, k=details.top)),
            self._places(bottom),
            self._facts(bank, i),
        ]

    def _tokens(self, scores: Iterable[tuple[str, float]]) -> list[float]:
        return [
            x
            for token, score in scores
            for x in (self.words.number(printable(token)), brief(score))
        ]

    def _places(self, triggers: Iterable[Trigger]) -> list[float]:
        numbers: list[float] = []
        for trigger in triggers:
            before, token, after = excerpt(trigger, *AROUND)
            start = browser_length(before)
            numbers += [
                brief(trigger.coefficient),
                self.texts.number(before + token + after),
                start,
                start + browser_length(token),
            ]
        return numbers

    def _facts(self, bank: Bank, i: int) -> list[float]:
        if self.adds is None:
            return []
        parts = (self.adds.facts, self.adds.coefficients, self.adds.adds)
        return [
            x
            for fact, coefficient, added in zip(
                *(part[bank][i].tolist() for part in parts), strict=True
            )
            if added > 0
            for x in (fact, brief(coefficient), brief(added))
        ]


def browser_length(text: str) -> int:
    """Return the length of a text as a browser counts it, in UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)


def brief(number: float) -> float:
    """Return a number rounded to four digits, which is all that a page shows."""
    rounded = float(f"{number:.4g}")
    return int(rounded) if rounded.is_integer() else rounded


# ── the index of the layers ───────────────────────────────────────────────────────────────────────


def pages_of(fingerprint: str, folder: Path) -> dict[int, Path]:
    """Return {layer: its page} for the pages of a model in a folder."""
    pages = {}
    for path in folder.glob("layer-*.html"):
        number = path.stem.removeprefix("layer-")
        if number.isdecimal() and f"<dd>{fingerprint}</dd>".encode() in path.read_bytes():
            pages[int(number)] = path
    return pages


def index_html(index: Index, pages: Mapping[int, Path]) -> str:
    """Return the page that links and searches the pages of layers.

    Args:
        index: The index. Pages of layers that it does not hold are linked, but not searched.
        pages: {layer: its page}, which must exist.
    """
    files = dict(sorted(pages.items()))
    banks = {layer: each for layer in files if (each := banks_of(index, layer))}
    shares = {
        layer: sorted(share for bank in each for share in index.triggers.banks[bank].fired.tolist())
        for layer, each in banks.items()
    }
    n_neurons = sum(map(len, shares.values()))
    values = index.values
    shortest = min(values.top_ids[bank].shape[1] for each in banks.values() for bank in each)
    width = min(shortest, SEARCHED // n_neurons)
    words = Numbered()

    def tokens(bank: Bank) -> list[int]:
        return [
            words.number(printable(values.words[token]))
            for token in values.top_ids[bank][:, :width].flatten().tolist()
        ]

    layers = [
        {
            "layer": layer,
            "file": files[layer].name,
            "banks": [[expert_of(bank), tokens(bank)] for bank in each],
        }
        for layer, each in banks.items()
    ]
    rows = []
    for layer, path in files.items():
        fired = shares.get(layer, [])
        row = {"layer": layer, "file": path.name, "size": path.stat().st_size}
        numbers = (
            (f"{len(fired):,}", str(fired.count(0)), f"{fired[len(fired) // 2]:.1%}")
            if fired
            else ("–",) * 3
        )
        rows.append(row | dict(zip(("neurons", "never", "fired"), numbers, strict=True)))
    return render(
        "index.html",
        index.triggers,
        title=f"Neurons of {printable(index.triggers.model)}",
        n=n_neurons,
        pages=rows,
        data=script_json({"layers": layers, "words": list(words), "width": width}),
        script=script_block("index.js"),
    )
