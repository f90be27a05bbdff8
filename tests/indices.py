"""A corpus for indices of a tiny model, and a search in an index by regular expressions."""

from __future__ import annotations

import re

from conftest import TEXTS
from factsmith.read.index import Index

CORPUS = [
    *TEXTS,
    *[" ".join(text.split()[n:]) for n in range(1, 7) for text in TEXTS],
    'He said "Zürich" and NOT Paris OR *',
]


def shares_by_pattern(index: Index, pattern: str) -> dict[tuple[int, int], float]:
    """Return for each neuron the share of its triggers that end after a pattern in their text."""
    expected = {}
    for layer in range(3):
        for i in range(128):
            triggers = index.triggers.of((layer, i))
            first = [re.search(pattern, trigger.text, re.IGNORECASE) for trigger in triggers]
            hits = [
                place is not None and trigger.stop >= place.end()
                for place, trigger in zip(first, triggers, strict=True)
            ]
            if any(hits):
                expected[layer, i] = sum(hits) / len(hits)
    return expected
