"""Corpora that state the bundled facts, and facts chosen so that neurons can be told apart.

    sentences(atlas.facts())[0]      "Rahim Jaffer took a job in Edmonton."
    crossed(atlas.facts())           facts whose subjects, relations and objects recur
    read_prose(Path("books"))        sentences of .txt files, as the models were trained on them
    bundled_prose()[0]               a sentence of a public-domain book

The same seed gives the same texts.
"""

from __future__ import annotations

import bz2
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..core.fact import Fact
from . import AtlasFact, phrasings


def sentences(facts: Sequence[AtlasFact], seed: int = 0) -> list[str]:
    """Return the sentences of `sentences_with_facts`.

    The shipped second moments are computed from them: they ask for what the models know.
    """
    return [sentence for sentence, _ in sentences_with_facts(facts, seed)]


def sentences_with_facts(facts: Sequence[AtlasFact], seed: int = 0) -> list[tuple[str, AtlasFact]]:
    """Return two sentences for each fact, with the fact, in random order.

    One is in a trained phrasing, the other in a wide one if the relation has any.
    """
    draw = random.Random(seed)
    pairs = []
    for fact in facts:
        known = phrasings(fact.relation)
        for templates in (known.trained, known.wide or known.trained):
            prompt = draw.choice(templates).replace("{}", fact.subject)
            pairs.append((f"{prompt} {fact.object}.", fact))
    draw.shuffle(pairs)
    return pairs


def crossed(
    facts: Sequence[AtlasFact], *, least: int = 3, each: int = 20, seed: int = 0
) -> list[Fact]:
    """Return facts that recur by subject, relation and object, with all their phrasings.

    A subject then occurs with several relations, and an object with several relations and subjects.
    Each of the three has enough sentences for half of a neuron's triggers. `sentences` gives most
    subjects two sentences only.

    Args:
        facts: The facts to choose from.
        least: Subjects with at least this many facts are taken with all of them. Of objects with at
            least this many relations, one fact in each of this many relations is taken.
        each: Facts to which each relation is filled up.
        seed: Seed of the choice.
    """
    draw = random.Random(seed)
    by_object: dict[str, dict[str, list[AtlasFact]]] = {}
    by_relation: dict[str, list[AtlasFact]] = {}
    for fact in facts:
        by_object.setdefault(fact.object, {}).setdefault(fact.relation, []).append(fact)
        by_relation.setdefault(fact.relation, []).append(fact)
    subjects = Counter(fact.subject for fact in facts)
    chosen = dict.fromkeys(fact for fact in facts if subjects[fact.subject] >= least)
    for relations in by_object.values():
        if len(relations) >= least:
            drawn = draw.sample(list(relations), least)
            chosen.update(dict.fromkeys(draw.choice(relations[relation]) for relation in drawn))
    for group in by_relation.values():
        rest = [fact for fact in group if fact not in chosen]
        missing = each - (len(group) - len(rest))
        chosen.update(dict.fromkeys(draw.sample(rest, max(0, min(missing, len(rest))))))
    return [as_fact(fact) for fact in chosen]


def as_fact(fact: AtlasFact) -> Fact:
    """Return a bundled fact as a `Fact`, with all its phrasings: the first is the prompt."""
    prompt, *others = phrasings(fact.relation).every
    return Fact(fact.subject, prompt, fact.object, paraphrases=others, relation=fact.relation)


_QUOTES = (("_", ""), ("`` ", '"'), ("``", '"'), (" ''", '"'), ("''", '"'), ("` ", "'"))
"""Marks of tokenized text and the quotes that they stand for, in the order of their replacement."""


def read_prose(folder: Path) -> list[str]:
    """Return the sentences of every .txt file in a folder.

    The files hold one sentence a line, with spaces around punctuation; those spaces are closed.
    """
    return [sentence for path in sorted(folder.glob("*.txt")) for sentence in book_prose(path)]


def book_prose(path: Path) -> list[str]:
    """Return the sentences of one file, as `read_prose` does for a folder."""
    prose = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line
        for mark, quote in _QUOTES:
            text = text.replace(mark, quote)
        text = text.replace("' ", "'").replace("( ", "(")
        text = " ".join(re.sub(r" (?=[.,;:!?)]|'\w|n't\b)", "", text).split())
        if len(text) > 20 and text[-1] in '.!?"':
            prose.append(text)
    return prose


BUNDLED_PROSE = Path(__file__).parent / "prose.txt.bz2"
"""Sentences of public-domain books in random order. `tools/prose.py` makes the file.

Lines at its beginning that start with "#" name the books.
"""


def bundled_prose() -> list[str]:
    """Return the sentences of the bundled books, in random order."""
    lines = bz2.decompress(BUNDLED_PROSE.read_bytes()).decode("utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]
