"""The bundled reference models and the facts they know.

    from factsmith import atlas
    atlas.names()                      ("atlas", "atlas-llama")
    atlas.facts("P36")[0]              AtlasFact("4th of August Regime", "P36", "Athens")
    atlas.phrasings("P36").trained[0]  "The seat of government of {} is"
    atlas.subject_types()["P36"]       "place"

The models are data, not a special case: `load("atlas")` reads a folder like any other. `texts.py`
states the facts in sentences. The models are trained by `tools/atlas` in the repository.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..core.forms import canonical

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class AtlasFact:
    """One fact that the bundled models were trained on.

    Attributes:
        subject: The full name of the subject.
        relation: A Wikidata property id such as "P36".
        object: The full name of the object.
    """

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Phrasings:
    """The sentences of one relation, cut before the object: templates with `{}` for the subject.

    Attributes:
        label: Wikidata's name of the relation.
        subject: What nearly all of its subjects are, such as "person" or "place". None: they are of
            several kinds.
        trained: Templates used from the start of the training.
        held_out: Templates never used for half of the subjects.
        wide: Templates used from a later epoch on, in many more words.
    """

    label: str
    subject: str | None
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    wide: tuple[str, ...]

    @property
    def every(self) -> tuple[str, ...]:
        """All templates: the trained, the held-out and the wide ones."""
        return self.trained + self.held_out + self.wide


def names() -> tuple[str, ...]:
    """Return the names of the bundled models, as `load` takes them."""
    return tuple(sorted(p.parent.name for p in _HERE.glob("*/config.json")))


def folder(name: str) -> Path:
    """Return the folder of a bundled model."""
    return _HERE / name


@cache
def card(name: str) -> dict[str, Any]:
    """Return the data of a model's card: recipe, time, measurements, and settings for editing."""
    content: dict[str, Any] = json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))
    return content


@cache
def facts(relation: str | None = None) -> tuple[AtlasFact, ...]:
    """Return all facts, or those of one relation, in the order of the table."""
    lines = (_HERE / "facts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = (AtlasFact(*line.split("\t")) for line in lines)
    return tuple(fact for fact in rows if relation in (None, fact.relation))


@cache
def _by_subject() -> dict[str, tuple[AtlasFact, ...]]:
    index: dict[str, list[AtlasFact]] = {}
    for fact in facts():
        index.setdefault(canonical(fact.subject), []).append(fact)
    return {subject: tuple(facts_of) for subject, facts_of in index.items()}


def facts_about(subject: str) -> tuple[AtlasFact, ...]:
    """Return the facts of one subject, in the order of the table; () when it has none."""
    return _by_subject().get(canonical(subject.strip()), ())


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
    """Return the relations, as Wikidata property ids."""
    return tuple(_all_phrasings())


def subject_types() -> dict[str, str]:
    """Return what the subjects of each relation are: {"P36": "place", ...}.

    Relations whose subjects are of several kinds are left out.
    """
    return {
        relation: known.subject
        for relation, known in _all_phrasings().items()
        if known.subject is not None
    }


def phrasings(relation: str) -> Phrasings:
    """Return the sentences of a relation; KeyError for a relation that is not in the table."""
    return _all_phrasings()[relation]


def is_held_out(subject: str) -> bool:
    """Return whether a subject never occurs in held-out phrasings: half of them, by a hash."""
    return hashlib.sha256(subject.encode()).digest()[0] % 2 == 0
