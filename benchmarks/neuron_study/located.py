"""Locate every fact's neurons, and draw the sets to compare them with."""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from factsmith.locate.neurons import knowledge_neurons, refine_relation
from factsmith.model.language_model import LanguageModel

from .facts import StudiedFact
from .interventions import anywhere, ranked, same_layers
from .numbers import rounded


def locate(
    lm: LanguageModel, asked: list[StudiedFact], given: argparse.Namespace
) -> dict[str, Any]:
    """Locate the neurons of every fact, and draw as many for each control.

    Returns how many neurons the sets have, and how many two facts share.
    """
    draw = random.Random(given.seed)
    for a in asked:
        a.located = knowledge_neurons(lm, a.own_prompts, a.fact.object)
    for relation in sorted({a.fact.relation for a in asked}):
        alike = [a for a in asked if a.fact.relation == relation]
        for a, adjusted in zip(alike, refine_relation([a.record for a in alike]), strict=True):
            activation = a.record.activations.mean(0)
            for name, record in (("share 0.7", a.record), ("relation share", adjusted)):
                a.neurons[name] = list(record.refined)
                a.neurons[f"{name}: activation baseline"] = list(record.baseline)
                a.neurons[f"{name}: as many, most active"] = ranked(activation, len(record.refined))
    for a in asked:
        for name in ("share 0.7", "relation share"):
            a.neurons[f"{name}: random"] = anywhere(lm, len(a.neurons[name]), draw)
            a.neurons[f"{name}: random, same layers"] = same_layers(lm, a.neurons[name], draw)
    for relation in sorted({a.fact.relation for a in asked}):
        alike = [a for a in asked if a.fact.relation == relation]
        for a in alike:
            # Neurons of more than a tenth of the relation's other facts belong to the relation. As
            # in the authors' code, they are not edited.
            shared = Counter(n for b in alike if b is not a for n in b.neurons["share 0.7"])
            a.neurons["of the fact alone"] = [
                n for n in a.neurons["share 0.7"] if shared[n] <= 0.1 * (len(alike) - 1)
            ]
    layers = Counter(n[0] for a in asked for n in a.neurons["share 0.7"])
    return {
        "coarse": rounded(statistics.mean(len(c) for a in asked for c in a.record.coarse)),
        "sets": {
            name: {
                "neurons": rounded(statistics.mean(len(a.neurons[name]) for a in asked)),
                "median": statistics.median(len(a.neurons[name]) for a in asked),
                "none": rounded(statistics.mean(not a.neurons[name] for a in asked)),
                **overlap(asked, name),
            }
            for name in (
                "share 0.7",
                "relation share",
                "share 0.7: activation baseline",
                "relation share: activation baseline",
                "of the fact alone",
            )
        },
        "by_layer": [
            rounded(layers[layer] / max(1, sum(layers.values()))) for layer in range(lm.n_layers)
        ],
    }


def overlap(asked: Sequence[StudiedFact], name: str) -> dict[str, float]:
    """Return how many neurons two facts share, on average, within a relation and across them."""
    shared: dict[bool, list[int]] = {True: [], False: []}
    for a, b in combinations(asked, 2):
        shared[a.fact.relation == b.fact.relation].append(
            len(set(a.neurons[name]) & set(b.neurons[name]))
        )
    return {
        name: rounded(statistics.mean(shared[same] or [0]))
        for name, same in (("shared_within", True), ("shared_across", False))
    }
