"""The bundled reference models and the facts they know.

    from factsmith.model import atlas
    atlas.names()                      ("atlas", "atlas-llama")
    atlas.facts()[0]                   AtlasFact(subject='A Thousand Plateaus', relation='P101', object='philosophy')
    atlas.phrasings("P36").trained[0]  'The seat of government of {} is'
    atlas.subject_types()["P36"]       'place'

The models are data, not a special case: `load("atlas")` reads a folder like any other. `corpus.py` writes the facts out
as sentences, `train.py` trains on them; both are needed only to make the models again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class AtlasFact:
    """One fact the bundled models were told: `relation` is a Wikidata property id such as "P36"."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Phrasings:
    """The sentences of one relation, cut before the object: templates with `{}` for the subject.

    label     Wikidata's name of the relation
    subject   what nearly all of its subjects are ("person", "place" ...); None where they are of several kinds
    trained   told from the start
    wide      told from a later epoch on: the same things in many more words
    held_out  never told about half of the subjects
    """

    label: str
    subject: str | None
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    wide: tuple[str, ...]

    @property
    def every(self) -> tuple[str, ...]:
        """All of them."""
        return self.trained + self.held_out + self.wide


def names() -> tuple[str, ...]:
    """The bundled models, by the name that `load` takes."""
    return tuple(sorted(p.parent.name for p in _HERE.glob("*/config.json")))


def folder(name: str) -> Path:
    """The folder of a bundled model."""
    return _HERE / name


@cache
def card(name: str) -> dict[str, Any]:
    """The model card's data: recipe, time, the measured table, and the settings found for editing."""
    content: dict[str, Any] = json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))
    return content


@cache
def facts(relation: str | None = None) -> tuple[AtlasFact, ...]:
    """The facts, all or those of one relation, in the order of the table."""
    lines = (_HERE / "facts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = (AtlasFact(*line.split("\t")) for line in lines)
    return tuple(fact for fact in rows if relation in (None, fact.relation))


@cache
def _by_subject() -> dict[str, tuple[AtlasFact, ...]]:
    index: dict[str, list[AtlasFact]] = {}
    for fact in facts():
        index.setdefault(fact.subject, []).append(fact)
    return {subject: tuple(own) for subject, own in index.items()}


def facts_about(subject: str) -> tuple[AtlasFact, ...]:
    """The facts of one subject, in the order of the table; () when it has none."""
    return _by_subject().get(subject, ())


@cache
def _all_phrasings() -> dict[str, Phrasings]:
    content = yaml.safe_load((_HERE / "phrasings.yaml").read_text(encoding="utf-8"))
    kinds = ("trained", "held_out", "wide")
    return {
        relation: Phrasings(
            label=entry["label"],
            subject=entry["subject"],
            **{kind: tuple(entry[kind]) for kind in kinds},
        )
        for relation, entry in content.items()
    }


def relations() -> tuple[str, ...]:
    """The relations, as Wikidata property ids."""
    return tuple(_all_phrasings())


def subject_types() -> dict[str, str]:
    """What the subjects of each relation are, {"P36": "place", ...}, of the relations whose subjects are of one kind."""
    return {
        relation: known.subject
        for relation, known in _all_phrasings().items()
        if known.subject is not None
    }


def phrasings(relation: str) -> Phrasings:
    """The sentences in which a relation's facts were told; KeyError for a relation that is not in the table."""
    return _all_phrasings()[relation]


def is_held_out(subject: str) -> bool:
    """Whether the held-out phrasings were kept from this subject (half of them, by a hash of the name)."""
    return hashlib.sha256(subject.encode()).digest()[0] % 2 == 0
