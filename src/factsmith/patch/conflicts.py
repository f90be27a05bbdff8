"""How new facts stand to others: which contradict one another, and how crowded their keys are. Nothing is solved for.

for place in standing(lm, new, [("0a8b3c83c6 has", fact) for fact in old], moments):
    place.standing, place.because, place.crowding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .. import atlas
from ..core.fact import Fact
from ..corpus.moments import SecondMoment
from ..edit.inputs import SHARED_KEY
from ..edit.keys import read_keys
from ..edit.solve import closest
from ..model.language_model import LanguageModel
from .capacity import interference

Standing = Literal["new", "known", "changed", "conflict"]

_HERE = "this file has"

SAME_KEY = 0.9999
"""Cosine from which keys are one where no second moment weighs them: all keys have much in common, and only the metric takes that out."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """How one fact stands to the others.

    standing   "new". "changed": an earlier fact has another target for its very prompt, which gives way. "conflict": another target for
               the same question about the subject in other words, or twice for one prompt among the new facts; or a key that another
               fact's with another target nearly has, so that one would arrive at the other too
    because    of a change or conflict, what with. A fact that the model says already is in conflict too where another is asked for in its
               place, but not for its key: it holds with the other as it is
    crowding   share of its key that the earlier facts' keys explain, in the metric of the second moment, in the layer where it is largest.
               None: not measured
    """

    standing: Standing
    because: str = ""
    crowding: float | None = None


def standing(
    lm: LanguageModel,
    facts: Sequence[Fact],
    held: Sequence[tuple[str, Fact]],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    known: Sequence[bool] = (),
) -> list[Place]:
    """The place of each new fact among the earlier ones and one another.

    held     earlier facts, each behind who has it, in words
    layers   in which keys are compared, while the model has its base weights
    moments  second moments of these layers. Where there is none keys are compared as they are, which finds only those that are the same
    known    for each new fact whether the model says it already
    """
    everything = [*facts, *(fact for _, fact in held)]
    whose = [*([_HERE] * len(facts)), *(who for who, _ in held)]
    told = [*known, *([False] * (len(everything) - len(known)))]
    crowded, shared = _keys(
        lm,
        everything,
        len(facts),
        layers,
        moments,
        [i for i, holds in enumerate(told) if not holds],
    )
    phrased = _phrased(everything)
    about: dict[str, list[int]] = {}
    for i, fact in enumerate(everything):
        for name in {fact.subject, fact.text}:
            about.setdefault(name, []).append(i)
    found = []
    for i, fact in enumerate(facts):
        stands: Standing = "known" if told[i] else "new"
        why = ""
        for j in dict.fromkeys([*about[fact.subject], *about[fact.text]]):
            who, other = whose[j], everything[j]
            if _wanted(other) == _wanted(fact):
                continue
            if other.text == fact.text and who != _HERE:
                stands, why = ("known", "") if told[i] else ("changed", f"{who} {other}")
            elif other.text == fact.text or _same_question(fact, other, (phrased[i], phrased[j])):
                stands, why = "conflict", f"{who} {other}"
                break
        if stands == "new" and i in shared:
            cosine, j = shared[i]
            stands, why = (
                "conflict",
                f"{whose[j]} {everything[j]}, with nearly the same key (cosine {cosine:.3f})",
            )
        found.append(Place(standing=stands, because=why, crowding=crowded[i]))
    return found


def relations(facts: Sequence[Fact]) -> list[str | None]:
    """Each fact's relation: its own, else that of the bundled phrasing that its prompt is; None where that is no single one."""
    return [fact.relation or phrased for fact, phrased in zip(facts, _phrased(facts), strict=True)]


def _keys(
    lm: LanguageModel,
    everything: Sequence[Fact],
    new: int,
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    written: Sequence[int],
) -> tuple[list[float | None], dict[int, tuple[float, int]]]:
    """Of the first `new` facts: how crowded each one's key is by those behind them; {i: (cosine, j)} where j, with another target, has
    nearly its key, both among the facts that are `written`."""
    crowded: list[float | None] = [None] * new
    shared: dict[int, tuple[float, int]] = {}
    targets = [_wanted(fact) for fact in everything]
    numbers = {target: i for i, target in enumerate(dict.fromkeys(targets))}
    groups = torch.tensor([numbers[target] for target in targets])
    for layer in layers:
        own = read_keys(lm, everything, layer, ["{}"])[:, 0].cpu()
        moment = moments.get(layer)
        if moment is not None and len(everything) > new:
            shares = interference(own[:new], own[new:], moment).explained.tolist()
            crowded = [
                share if old is None else max(old, share)
                for old, share in zip(crowded, shares, strict=True)
            ]
        if len(written) > 1:
            factor = (
                torch.eye(own.shape[1], dtype=torch.float64) if moment is None else moment.factor
            )
            others, cosines = closest(own[list(written)], factor, groups[list(written)])
            least = SAME_KEY if moment is None else SHARED_KEY
            for i, other, cosine in zip(written, others.tolist(), cosines.tolist(), strict=True):
                if i < new and cosine >= least:
                    shared[i] = max(shared.get(i, (0.0, 0)), (cosine, written[other]))
    return crowded, shared


def _wanted(fact: Fact) -> str:
    return (fact.target or "").strip()


def _phrased(facts: Sequence[Fact]) -> list[str | None]:
    """The relation of the bundled phrasing that each fact's prompt is; None where that is no single one."""
    known: dict[str, set[str]] = {}
    for relation in atlas.relations():
        for template in atlas.phrasings(relation).every:
            known.setdefault(template, set()).add(relation)
    return [
        next(iter(found)) if len(found := known.get(fact.prompt, set())) == 1 else None
        for fact in facts
    ]


def _same_question(one: Fact, other: Fact, phrased: tuple[str | None, str | None]) -> bool:
    """Whether two facts about a subject answer one question: by their own relation, that of their phrasings, or their paraphrases."""
    if one.subject != other.subject:
        return False
    named = one.relation is not None and one.relation == other.relation
    known = phrased[0] is not None and phrased[0] == phrased[1]
    return (
        named or known or one.text in other.paraphrase_texts or other.text in one.paraphrase_texts
    )
