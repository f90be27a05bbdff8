"""Edits to try a layer with: real facts that the model knows, each given another object.

facts = trial_facts(lm, 24)
with applied(lm, delta):
    efficacy, generalization, specificity = judge(lm, facts[0])
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from .. import atlas
from ..core.errors import InputError
from ..core.fact import Fact, Probe
from ..model.language_model import LanguageModel
from ..model.tokens import target_ids
from .layer_choice import Trial

_ROUND = 256
_ROUNDS = 16
"""Bundled facts are asked 256 at a time, 4,096 at most. After one round without any answer there is
no second.
"""


def trial_facts(
    lm: LanguageModel,
    count: int,
    *,
    seed: int = 0,
    paraphrases: int = 5,
    neighbours: int = 10,
    others: int = 3,
    progress: Callable[[int, int], object] | None = None,
) -> list[Fact]:
    """Return up to `count` edits to try: bundled facts that the model knows, with another object.

    The same model, arguments and seed give the same facts. A model that knows none of the first 256
    facts is not asked further.

    Args:
        lm: The model.
        count: How many edits.
        seed: Seed of what is drawn.
        paraphrases: Other phrasings of each fact, of those in which the model knows it; from 1 to
            so many.
        neighbours: Prompts about other subjects of the relation that the model answers rightly,
            half of them with the same true object where there are such; from 1 to so many.
        others: Prompts about other relations of the same subject that the model answers rightly;
            they are added to the neighbours.
        progress: Called with (edits drawn, edits wanted).
    """
    draw = random.Random(seed)
    pool = list(atlas.facts())
    draw.shuffle(pool)
    known: set[atlas.AtlasFact] = set()
    maker = _Maker(lm, draw, known, paraphrases, neighbours, others)
    trials: list[Fact] = []
    progress = progress or (lambda done, total: None)
    progress(0, count)
    for start in range(0, min(len(pool), _ROUND * _ROUNDS), _ROUND):
        asked = pool[start : start + _ROUND]
        wording = [draw.choice(atlas.phrasings(fact.relation).trained) for fact in asked]
        pairs = [(_fill(prompt, f), f.object) for prompt, f in zip(wording, asked, strict=True)]
        new = [fact for fact, right in zip(asked, _says(lm, pairs), strict=True) if right]
        known.update(new)
        if not known:
            break
        for fact in new:
            if (trial := maker.trial(fact)) is not None:
                trials.append(trial)
                progress(len(trials), count)
            if len(trials) == count:
                return trials
    return trials


def judge(lm: LanguageModel, fact: Fact) -> Trial:
    """Return how a trial edit holds, asked of the model while it carries the edit.

    Neighbours without an expected answer are not asked.
    """
    if fact.target is None:
        raise InputError(
            f"the fact about {fact.subject!r} has no target; give one, since a trial edit writes it"
        )
    near = [probe for probe in fact.neighbours if probe.expected is not None]
    prompts = [fact.text, *fact.paraphrase_texts, *(probe.prompt for probe in near)]
    n_written = 1 + len(fact.paraphrases)
    wanted = [fact.target] * n_written + [probe.expected or "" for probe in near]
    right = lm.says(prompts, wanted)
    generalization = statistics.fmean(right[1:n_written]) if n_written > 1 else None
    specificity = statistics.fmean(right[n_written:]) if near else None
    return float(right[0]), generalization, specificity


@dataclass(frozen=True)
class _Maker:
    """Makes trial edits.

    Attributes:
        lm: The model.
        draw: What is drawn with.
        known: Facts that the model is already known to know.
        n_paraphrases: At most so many other phrasings.
        n_neighbours: At most so many prompts about other subjects.
        n_others: At most so many prompts about the same subject.
    """

    lm: LanguageModel
    draw: random.Random
    known: Container[atlas.AtlasFact]
    n_paraphrases: int
    n_neighbours: int
    n_others: int

    def trial(self, fact: atlas.AtlasFact) -> Fact | None:
        """The edit to try on a fact; None when the model does not know it, or nothing near it."""
        phrasings = atlas.phrasings(fact.relation)
        every = (*phrasings.trained, *phrasings.held_out)
        wording = [prompt for prompt in every if _fill(prompt, fact).count(fact.subject) == 1]
        same = atlas.facts(fact.relation)
        true = {f.object for f in same if f.subject == fact.subject}
        objects = sorted({f.object for f in same} - true)
        said = _says(self.lm, [(_fill(prompt, fact), fact.object) for prompt in wording])
        sure = [prompt for prompt, right in zip(wording, said, strict=True) if right]
        if len(sure) < 2 or not objects:
            return None
        n_drawn = min(len(sure), 1 + self.n_paraphrases)
        prompt, *paraphrases = self.draw.sample(sure, n_drawn)
        target = self.draw.choice(objects)
        if not _fits(self.lm, _fill(prompt, fact), target):
            return None
        near = self._near(fact, prompt, target)
        if not near:
            return None
        return Fact(
            fact.subject,
            prompt,
            target,
            target_true=fact.object,
            paraphrases=tuple(paraphrases),
            neighbours=tuple(Probe(asked, answer) for asked, answer in near),
            relation=fact.relation,
        )

    def _near(self, fact: atlas.AtlasFact, prompt: str, target: str) -> list[tuple[str, str]]:
        """Prompts whose answers must stay, with their answers."""
        # Facts that the model is known to know are asked first: few questions are then needed, also
        # of a model that knows little.
        same = atlas.facts(fact.relation)
        rest = [f for f in same if f.subject != fact.subject and f.object != target]
        rest = sorted(self.draw.sample(rest, len(rest)), key=lambda f: f not in self.known)
        alike = [(_fill(prompt, f), f.object) for f in rest if f.object == fact.object]
        unlike = [(_fill(prompt, f), f.object) for f in rest if f.object != fact.object]
        near = _answered(self.lm, alike, self.n_neighbours // 2)
        near += _answered(self.lm, unlike, self.n_neighbours - len(near))
        about = [f for f in atlas.facts_about(fact.subject) if f.relation != fact.relation]
        first = [(_fill(atlas.phrasings(f.relation).trained[0], f), f.object) for f in about]
        return near + _answered(self.lm, first, self.n_others)


def _fill(prompt: str, fact: atlas.AtlasFact) -> str:
    return prompt.replace("{}", fact.subject)


def _answered(
    lm: LanguageModel, pairs: Sequence[tuple[str, str]], enough: int
) -> list[tuple[str, str]]:
    """The first `enough` of (prompt, answer) that the model says; four times as many are asked."""
    said: list[tuple[str, str]] = []
    for start in range(0, min(len(pairs), 4 * enough), max(1, enough)):
        some = pairs[start : start + enough]
        said += [pair for pair, right in zip(some, _says(lm, some), strict=True) if right]
        if len(said) >= enough:
            break
    return said[:enough]


def _says(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """`lm.says`, and False for what the tokenizer cannot write or the positions cannot hold."""
    fitting = [i for i, (prompt, answer) in enumerate(pairs) if _fits(lm, prompt, answer)]
    said = [False] * len(pairs)
    if fitting:
        right = lm.says([pairs[i][0] for i in fitting], [pairs[i][1] for i in fitting])
        for i, says in zip(fitting, right, strict=True):
            said[i] = says
    return said


def _fits(lm: LanguageModel, prompt: str, answer: str) -> bool:
    try:
        length = len(lm.prompt_ids(prompt)) + len(target_ids(lm, prompt, answer))
    except InputError:
        return False
    return lm.max_tokens is None or length <= lm.max_tokens
