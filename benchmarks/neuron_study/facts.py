"""The facts of the study, with their prompts.

known(lm, given)       # facts that the model answers right
unsure(lm, given)      # facts whose mean p lies in given.room
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from factsmith import atlas
from factsmith.locate.neurons import KnowledgeNeurons
from factsmith.model.address import Neuron
from factsmith.model.language_model import LanguageModel
from factsmith.model.tokens import target_ids

OWN = 10
"""Phrasings that locate a fact's neurons. Every relation has ten trained phrasings at least."""

SOME = [*range(0, OWN, 2), *range(OWN, OWN + 4)]
"""Prompts for costly measurements: half of the own prompts, and all held-out ones."""

N_SOME = OWN // 2
"""The own prompts among `SOME`."""


@dataclass
class StudiedFact:
    """One fact, its prompts, and its neurons.

    Attributes:
        fact: The fact.
        own_prompts: Prompts that locate its neurons.
        held_out: Other prompts, that only test them.
        neurons: Sets of neurons by name.
        located: The record of the located neurons.
    """

    fact: atlas.AtlasFact
    own_prompts: list[str]
    held_out: list[str]
    neurons: dict[str, list[Neuron]] = field(default_factory=dict)
    located: KnowledgeNeurons | None = None

    @property
    def record(self) -> KnowledgeNeurons:
        """The record, once the neurons are located."""
        assert self.located is not None
        return self.located

    @property
    def prompts(self) -> list[str]:
        """All prompts, the own ones first."""
        return self.own_prompts + self.held_out


def texts(fact: atlas.AtlasFact, templates: Iterable[str]) -> list[str]:
    """Return templates with the fact's subject in their slots."""
    return [t.replace("{}", fact.subject) for t in templates]


def probabilities(
    lm: LanguageModel, facts: Sequence[atlas.AtlasFact], columns: Sequence[int]
) -> np.ndarray[Any, Any]:
    """Return p(object) of each fact after some trained phrasings: (n, len(columns))."""
    p = np.zeros((len(facts), len(columns)))
    for place, column in enumerate(columns):
        for at in range(0, len(facts), 2000):
            some = facts[at : at + 2000]
            prompts = [
                atlas.phrasings(f.relation).trained[column].replace("{}", f.subject) for f in some
            ]
            p[at : at + len(some), place] = (
                lm.log_prob(prompts, [f.object for f in some]).double().exp().numpy()
            )
    return p


def scan(lm: LanguageModel, cache: Path) -> dict[atlas.AtlasFact, float]:
    """Return the mean p of the bundled facts over their own phrasings.

    It is kept on disk under the model's fingerprint. Facts that two phrasings show to be well known
    (0.93) keep the mean of these two. They are nine in ten, and the study uses none of them.
    """
    file = cache / f"factsmith-scan-{lm.fingerprint[:16]}.npy"
    if not file.is_file():
        mean = probabilities(lm, atlas.facts(), (0, 6)).mean(1)
        near = np.nonzero(mean < 0.93)[0]
        mean[near] = probabilities(lm, [atlas.facts()[i] for i in near], range(OWN)).mean(1)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, mean)
    return dict(zip(atlas.facts(), np.load(file).tolist(), strict=True))


def prepared(
    lm: LanguageModel, by_relation: Mapping[str, Sequence[atlas.AtlasFact]], count: int
) -> list[StudiedFact]:
    """Return `count` facts with their prompts, as evenly over the relations as there are facts.

    The object has the same tokens in all prompts of a fact.
    """
    chosen: list[StudiedFact] = []
    for turn in range(count):
        for relation, facts in by_relation.items():
            if turn < len(facts) and len(chosen) < count:
                fact, p = facts[turn], atlas.phrasings(relation)
                held_out = [*p.held_out, *random.Random(relation).sample(p.wide, 2)]
                studied = StudiedFact(fact, texts(fact, p.trained[:OWN]), texts(fact, held_out))
                tokens = {
                    tuple(target_ids(lm.tokenizer, prompt, fact.object))
                    for prompt in studied.prompts
                }
                if len(tokens) == 1:
                    chosen.append(studied)
    return sorted(chosen, key=lambda a: (a.fact.relation, a.fact.subject))


def known(lm: LanguageModel, given: argparse.Namespace) -> list[StudiedFact]:
    """Return facts of some relations that the model answers right.

    It gives the whole object after at least seven of their ten own phrasings.
    """
    draw = random.Random(given.seed)
    by_relation = {}
    for relation in sorted(draw.sample(atlas.relations(), given.relations)):
        every = atlas.facts(relation)
        some = draw.sample(every, min(len(every), 10 + 2 * given.facts // given.relations))
        asked = [(f, p) for f in some for p in texts(f, atlas.phrasings(relation).trained[:OWN])]
        right = lm.says([p for _, p in asked], [f.object for f, _ in asked])
        count = Counter(f for (f, _), ok in zip(asked, right, strict=True) if ok)
        by_relation[relation] = [f for f in some if count[f] >= 0.7 * OWN]
    return prepared(lm, by_relation, given.facts)


def unsure(lm: LanguageModel, given: argparse.Namespace) -> list[StudiedFact]:
    """Return facts whose mean p over their ten own phrasings lies in `--room`.

    They are of all relations that have two such facts or more.
    """
    p = scan(lm, given.cache)
    facts = [f for f in atlas.facts() if given.room[0] <= p[f] <= given.room[1]]
    random.Random(given.seed).shuffle(facts)
    by_relation: dict[str, list[atlas.AtlasFact]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    return prepared(
        lm, {r: some for r, some in sorted(by_relation.items()) if len(some) > 1}, given.facts
    )
