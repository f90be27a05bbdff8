"""How new facts relate to the facts in effect and to one another: contradictions, and crowded keys.
Nothing is solved.

for place in compare_facts(lm, new, [("0a8b3c83c6 has", fact) for fact in old], layers, moments):
    place.standing, place.because, place.crowding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .. import atlas
from ..core.fact import Fact
from ..core.forms import canonical
from ..corpus.moments import SecondMoment
from ..edit.inputs import SHARED_KEY
from ..edit.keys import read_keys
from ..edit.solve import closest
from ..model.language_model import LanguageModel
from .interference import interference

Standing = Literal["new", "known", "changed", "conflict"]

_THIS_FILE = "this file has"

SAME_KEY = 0.9999
"""Cosine from which two keys count as one where no second moment is at hand. All keys have much in
common; only the metric of the second moment removes that."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """How one new fact relates to the others.

    Attributes:
        standing: "new". "known": the model already says it. "changed": a fact in effect has another
            target for the same prompt, and gives way. "conflict": another fact gives another target
            for the same question about the subject in other words, or for the same prompt in the
            same file; or another fact with another target has nearly the same key, so that what is
            written for one would also reach the other.
        because: For a change or a conflict, the other fact. A fact that the model already says is
            in conflict where another target is asked for in its place, but not for its key: it
            already holds next to the other.
        crowding: Share of its key that the keys of the facts in effect explain, in the metric of
            the second moment, in the layer where it is largest. None: not measured.
    """

    standing: Standing
    because: str = ""
    crowding: float | None = None


def compare_facts(
    lm: LanguageModel,
    facts: Sequence[Fact],
    in_effect: Sequence[tuple[str, Fact]],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    known: Sequence[bool],
) -> list[Place]:
    """Return the place of each new fact.

    Args:
        lm: The model, with its base weights.
        facts: The new facts.
        in_effect: The facts in effect, each after words that say who has it.
        layers: Where keys are compared; () compares words only.
        moments: Second moments of these layers. Where one is missing, keys are compared without a
            metric, which finds equal keys only.
        known: For each new fact, whether the model already says it.
    """
    every = [*facts, *(fact for _, fact in in_effect)]
    owners = [*([_THIS_FILE] * len(facts)), *(owner for owner, _ in in_effect)]
    places = _by_words(facts, every, owners, known)
    unwritten = [*known, *([False] * len(in_effect))]
    keys = _Keys(lm, every, len(facts), [i for i, says in enumerate(unwritten) if not says])
    for layer in layers:
        keys.compare(layer, moments.get(layer))
    return [
        _by_key(place, keys.shared.get(i), owners, every, keys.crowding[i])
        for i, place in enumerate(places)
    ]


def relations(facts: Sequence[Fact]) -> list[str | None]:
    """Return each fact's relation: its own, or that of the bundled phrasing that its prompt is;
    None where there is no single one.
    """
    return [fact.relation or phrased for fact, phrased in zip(facts, _phrased(facts), strict=True)]


def _by_words(
    facts: Sequence[Fact], every: Sequence[Fact], owners: Sequence[str], known: Sequence[bool]
) -> list[Place]:
    """The places by prompts, subjects and relations alone."""
    phrased = _phrased(every)
    related: dict[str, list[int]] = {}
    for i, fact in enumerate(every):
        for name in {_subject(fact), fact.asked}:
            related.setdefault(name, []).append(i)
    places = []
    for i, fact in enumerate(facts):
        place = Place(standing="known" if known[i] else "new")
        for j in dict.fromkeys([*related[_subject(fact)], *related[fact.asked]]):
            other, because = every[j], f"{owners[j]} {every[j]}"
            if other.wanted == fact.wanted:
                continue
            if other.asked == fact.asked and owners[j] != _THIS_FILE:
                place = (
                    Place(standing="known")
                    if known[i]
                    else Place(standing="changed", because=because)
                )
            elif other.asked == fact.asked or _same_question(fact, other, (phrased[i], phrased[j])):
                place = Place(standing="conflict", because=because)
                break
        places.append(place)
    return places


def _by_key(
    place: Place,
    shared: tuple[float, int] | None,
    owners: Sequence[str],
    every: Sequence[Fact],
    crowding: float | None,
) -> Place:
    """The place with what its key says: a new fact whose key another target nearly has is in
    conflict.
    """
    if place.standing != "new" or shared is None:
        return Place(standing=place.standing, because=place.because, crowding=crowding)
    cosine, j = shared
    because = f"{owners[j]} {every[j]}, with nearly the same key (cosine {cosine:z.3f})"
    return Place(standing="conflict", because=because, crowding=crowding)


class _Keys:
    """Keys compared layer by layer.

    Attributes:
        crowding: For each new fact, the largest share of its key that the keys of the facts in
            effect explain.
        shared: {i: (cosine, j)} where fact j has another target and nearly the key of new fact i.
    """

    def __init__(
        self, lm: LanguageModel, every: Sequence[Fact], n_new: int, unwritten: list[int]
    ) -> None:
        """unwritten: the facts whose keys may clash, less those that the model already says."""
        self.lm, self.every, self.n_new, self.unwritten = lm, every, n_new, unwritten
        self.crowding: list[float | None] = [None] * n_new
        self.shared: dict[int, tuple[float, int]] = {}
        targets = [fact.wanted for fact in every]
        numbers = {target: i for i, target in enumerate(dict.fromkeys(targets))}
        self.groups = torch.tensor([numbers[target] for target in targets])

    def compare(self, layer: int, moment: SecondMoment | None) -> None:
        """Take one more layer into account."""
        keys = read_keys(self.lm, self.every, layer, ["{}"])[:, 0].cpu()
        if moment is not None and len(self.every) > self.n_new:
            explained = interference(keys[: self.n_new], keys[self.n_new :], moment).explained
            self.crowding = [
                share if largest is None else max(largest, share)
                for largest, share in zip(self.crowding, explained.tolist(), strict=True)
            ]
        if len(self.unwritten) < 2:
            return
        identity = torch.eye(keys.shape[1], dtype=torch.float64)
        factor = identity if moment is None else moment.factor
        others, cosines = closest(keys[self.unwritten], factor, self.groups[self.unwritten])
        least = SAME_KEY if moment is None else SHARED_KEY
        for i, other, cosine in zip(self.unwritten, others.tolist(), cosines.tolist(), strict=True):
            if i < self.n_new and cosine >= least:
                self.shared[i] = max(self.shared.get(i, (0.0, 0)), (cosine, self.unwritten[other]))


def _subject(fact: Fact) -> str:
    return canonical(fact.subject.strip())


def _phrased(facts: Sequence[Fact]) -> list[str | None]:
    """The relation whose bundled phrasing a fact's prompt is; None where no single one is."""
    relations_of: dict[str, set[str]] = {}
    for relation in atlas.relations():
        for template in atlas.phrasings(relation).every:
            relations_of.setdefault(canonical(template), set()).add(relation)
    every = [relations_of.get(canonical(fact.template), set()) for fact in facts]
    return [next(iter(names)) if len(names) == 1 else None for names in every]


def _same_question(one: Fact, other: Fact, phrased: tuple[str | None, str | None]) -> bool:
    """Whether two facts about a subject answer one question: by relation, by bundled phrasing, or
    by their paraphrases.
    """
    if _subject(one) != _subject(other):
        return False
    same_relation = one.relation is not None and one.relation == other.relation
    same_phrasing = phrased[0] is not None and phrased[0] == phrased[1]
    return same_relation or same_phrasing or _paraphrases(one, other) or _paraphrases(other, one)


def _paraphrases(one: Fact, other: Fact) -> bool:
    """Whether a fact's prompt is among the paraphrases of another one."""
    return one.asked in map(canonical, other.paraphrase_texts)
