"""patch.complete."""

from __future__ import annotations

import random

from .. import atlas
from ..core.fact import Probe
from ..model.language_model import LanguageModel

MADE = 5
"""Paraphrases and neighbours that are made for a fact that has none, so that gates have something to ask."""


def known_of(lm: LanguageModel, relation: str | None, seed: int) -> list[Probe]:
    """Bundled facts of a relation, or of any, that the model says."""
    facts = list(atlas.facts(relation if relation in atlas.relations() else None))
    drawn = random.Random(seed).sample(facts, min(len(facts), 8 * MADE))
    probes = [
        Probe(atlas.phrasings(fact.relation).trained[0].replace("{}", fact.subject), fact.object)
        for fact in drawn
    ]
    said = lm.says([probe.prompt for probe in probes], [str(probe.expected) for probe in probes])
    return [probe for probe, right in zip(probes, said, strict=True) if right]
