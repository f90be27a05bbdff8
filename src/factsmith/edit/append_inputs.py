"""What enters the edited layer at the facts' subjects, and at what they must be told apart from.

    subjects = read_subjects(lm, facts, layer, contexts)  # at the subjects, in their own contexts
    examples = read_examples(inputs, layer, subjects)     # and elsewhere

Strangers are tokens of ordinary text, all other tokens of the facts' prompts, subjects of earlier
patches, and counterfeits. A counterfeit ends with the last tokens of a subject, and begins as
another one does: "Georgian Orthodox Church" for "Bulgarian Orthodox Church". A key that has seen
only real subjects goes by the last token, and would fire on each unseen subject that shares it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import atlas
from ..core.fact import Fact
from ..core.forms import canonical
from ..core.progress import Progress, tell
from ..corpus.ordinary import ordinary_texts
from ..corpus.scan import scan
from ..corpus.second_moment import SecondMoment
from ..model.language_model import LanguageModel
from .contexts import SUBJECT, context_weights
from .delta import Delta
from .forms import NeuronForm, form_of
from .inputs import EditInputs
from .keys import read_inputs, read_inputs_of, subject_columns
from .recognise import Examples, scatter

BEGINNINGS = 12
"""Beginnings of sentences of ordinary text that are put in front of a subject."""

COUNTERFEITS = 8
"""Counterfeits of a fact's subject."""

OTHERS, _HEADS = 200, 200
"""Names of the bundled facts that are strangers to every fact, and subjects of the edit itself that
counterfeits begin as. Counterfeits also begin as the former."""

ENOUGH = 64
"""Subjects that show what contexts and counterfeits change. Fewer facts are joined by others."""

_FAINT = 0.2
"""The least c·x that inputs are divided by. Where it is less, a neuron has little to multiply."""

_BLOCK = 256
"""Facts that are read together."""


@dataclass(frozen=True, eq=False)
class SubjectInputs:
    """What enters a layer at the facts' subjects.

    Attributes:
        inputs: (n, contexts, d_model) float32 on the CPU.
        weights: (contexts,) float64 with sum 1: one half for the bare prompt.
        bare: The index of the bare prompt.
        groups: (n,) int64, equal for facts of one subject. These are no strangers to each other.
        names: For each fact, the token ids of its subject, in the forms that it takes in texts.
        others: (OTHERS, d_model) float32, what enters the layer at other names.
        spread: (d_model, d_model) as in `Examples`, from some of the other names. None: the facts
            are enough.
        n_spread: The number of these names.
    """

    inputs: Tensor
    weights: Tensor
    bare: int
    groups: Tensor
    names: list[set[tuple[int, ...]]]
    others: Tensor
    spread: Tensor | None
    n_spread: int

    @property
    def around(self) -> Tensor:
        """What enters the layer at any names: those of the facts, and others, (m, d_model) float64.

        A few facts alone would say nothing about names in general.
        """
        return torch.cat([self.mean, self.others.double()])

    @property
    def mean(self) -> Tensor:
        """The weighted mean over the contexts, (n, d_model) float64."""
        return torch.einsum("ncd,c->nd", self.inputs.double(), self.weights)


def read_subjects(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    progress: Progress | None = None,
) -> SubjectInputs:
    """Return what enters a layer at each fact's subject, in its prompt and alone.

    Args:
        lm: The model.
        facts: The facts.
        layer: The layer.
        contexts: Templates for the prompts, the bare "{}" among them.
        progress: Called with the number of facts read.
    """
    alone = [*SUBJECT, *beginnings(BEGINNINGS)]
    blocks = []
    for first in range(0, len(facts), _BLOCK):
        tell(progress, "reading subjects", first, len(facts))
        some = facts[first : first + _BLOCK]
        subjects = [Fact(fact.subject, "{}", fact.target) for fact in some]
        blocks.append(
            torch.cat(
                [
                    read_inputs(lm, some, layer, contexts).cpu(),
                    read_inputs(lm, subjects, layer, alone).cpu(),
                ],
                dim=1,
            )
        )
    # "#" stands for a context other than the bare prompt.
    weights = context_weights([*contexts, *("#",) * len(alone)])
    names = [canonical(fact.subject) for fact in facts]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return SubjectInputs(
        torch.cat(blocks),
        torch.tensor(weights, dtype=torch.float64),
        list(contexts).index("{}"),
        torch.tensor([numbers[name] for name in names]),
        [subject_forms(lm, fact) for fact in facts],
        read_inputs_of(lm, _other_rows(lm), layer).cpu(),
        *_spread(lm, layer, contexts, len(facts)),
    )


def _spread(
    lm: LanguageModel, layer: int, contexts: Sequence[str], n_facts: int
) -> tuple[Tensor | None, int]:
    """Return what other names show about contexts and counterfeits, if the facts are few."""
    n = ENOUGH - n_facts
    if n <= 0:
        return None, 0
    names = [Fact(name, "{}", name) for name in other_names()[:n]]
    alone = [*contexts, *SUBJECT, *beginnings(BEGINNINGS)]
    subjects = read_inputs(lm, names, layer, alone).cpu()
    counterfeits = read_inputs_of(lm, _counterfeits(lm, names, range(n)), layer).cpu()
    return scatter(subjects) + scatter(counterfeits.view(n, COUNTERFEITS, -1)), n


def beginnings(count: int) -> list[str]:
    """Return templates: one to eight words of ordinary text, and then the subject."""
    draw, texts = random.Random(1), list(ordinary_texts())
    templates: list[str] = []
    while len(templates) < count:
        words = draw.choice(texts).split()
        first, n = draw.randrange(max(1, len(words) - 10)), draw.randint(1, 8)
        text = " ".join(words[first : first + n]).replace("{", "").replace("}", "")
        if text and text[-1].isalpha():
            templates.append(text + " {}")
    return templates


def read_examples(inputs: EditInputs, layer: int, subjects: SubjectInputs) -> Examples:
    """Return what the keys of an edit are made from: the own inputs, and the strangers."""
    lm, facts, statistics = inputs.lm, inputs.facts, inputs.moments[layer]
    owners = SubjectEnds(subjects.names)
    parts: list[Tensor] = []
    counterfeits: list[Tensor] = []
    known: list[tuple[int, int]] = []

    def add(states: Tensor, sequences: Sequence[Sequence[int]]) -> None:
        start = sum(map(len, parts))
        known.extend((start + row, fact) for row, fact in owners.pairs(sequences))
        parts.append(states.float().cpu())

    if statistics.sample is not None and statistics.tails is not None:
        tails = [[token for token in tail if token >= 0] for tail in statistics.tails.tolist()]
        add(statistics.sample, tails)
    n_text = sum(map(len, parts))
    for first in range(0, len(facts), _BLOCK):
        tell(inputs.progress, "reading strangers", first, len(facts))
        rows = [lm.prompt_ids(fact.text) for fact in facts[first : first + _BLOCK]]
        read = scan(lm, rows, [layer], site="inputs")[(layer,)]
        places = zip(read.row.tolist(), read.column.tolist(), strict=True)
        add(read.m, [rows[row][: column + 1] for row, column in places])
        false = _counterfeits(lm, facts, range(first, first + len(rows)))
        counterfeits.append(read_inputs_of(lm, false, layer).cpu())
        add(counterfeits[-1], false)
    add(subjects.others, _other_rows(lm))
    for x in _earlier(inputs.beneath, layer):
        add(x, [])
    return Examples(
        subjects=subjects.inputs,
        weights=subjects.weights,
        groups=subjects.groups,
        strangers=torch.cat(parts),
        counterfeits=torch.cat(counterfeits).view(len(facts), COUNTERFEITS, -1),
        known=torch.tensor(known, dtype=torch.int64).reshape(-1, 2),
        n_text=n_text,
        spread=subjects.spread,
        n_spread=subjects.n_spread,
    )


def surroundings(
    examples: Examples, statistics: SecondMoment, constant: Tensor | None
) -> tuple[Examples, Tensor, Tensor]:
    """Return the examples as a layer's keys can read them, with mean and covariance of text.

    A key without a bias has its threshold θ in a direction c with c·x ≈ 1. Its neuron is active
    where w·x is above θ c·x. So it reads x / (c·x), where c·x is exactly 1.

    Args:
        examples: The inputs.
        statistics: Those of the layer's inputs.
        constant: (d_model,) the direction c. None: the keys have biases, and read x itself.
    """
    if constant is None or statistics.sample is None:
        return examples, statistics.mean, statistics.covariance

    def levelled(inputs: Tensor) -> Tensor:
        level = inputs.double() @ constant.double()
        return (inputs / level.clamp_min(_FAINT)[..., None]).to(inputs.dtype)

    text = levelled(statistics.sample.double())
    mean = text.mean(0)
    covariance = (text - mean).T @ (text - mean) / len(text)
    examples = dataclasses.replace(
        examples,
        subjects=levelled(examples.subjects),
        strangers=levelled(examples.strangers),
        counterfeits=levelled(examples.counterfeits),
    )
    return examples, mean, covariance


def layer_form(
    lm: LanguageModel, layer: int, statistics: SecondMoment, names: Tensor
) -> NeuronForm:
    """Return what the neurons of a layer are made of.

    The constant direction is that of ordinary text and of names, one half each.

    Args:
        lm: The model.
        layer: The layer.
        statistics: Those of its inputs.
        names: (n, d_model) float64, what enters it at names.
    """
    moment = statistics.covariance + torch.outer(statistics.mean, statistics.mean)
    mean = (statistics.mean + names.mean(0)) / 2
    return form_of(lm, layer, mean, (moment + names.T @ names / len(names)) / 2)


def _earlier(beneath: Sequence[Delta], layer: int) -> list[Tensor]:
    """Return the inputs at the subjects that earlier patches appended rows for."""
    rows = [delta.appended[layer] for delta in beneath if layer in delta.appended]
    return [each.inputs for each in rows if each.inputs is not None]


def subject_forms(lm: LanguageModel, fact: Fact) -> set[tuple[int, ...]]:
    """Return the tokens of a subject at the beginning of a text, and inside one."""
    names = set()
    for template in ("{}", "In {}"):
        ids, first, last = subject_columns(lm, template, fact.subject)
        names.add(tuple(ids[first : last + 1]))
    return names


class SubjectEnds:
    """Finds the facts whose subject ends a sequence of tokens."""

    def __init__(self, names: Sequence[set[tuple[int, ...]]]) -> None:
        self.facts: dict[tuple[int, ...], list[int]] = {}
        for fact, forms in enumerate(names):
            for form in forms:
                self.facts.setdefault(form, []).append(fact)
        self.lengths = sorted(set(map(len, self.facts)))

    def pairs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Return (sequence, fact) for each sequence that ends with the subject of a fact."""
        return [
            (row, fact)
            for row, ids in enumerate(sequences)
            for length in self.lengths
            if length <= len(ids)
            for fact in self.facts.get(tuple(ids[len(ids) - length :]), ())
        ]


def _counterfeits(
    lm: LanguageModel, facts: Sequence[Fact], numbers: Sequence[int]
) -> list[list[int]]:
    """Return counterfeits of some facts' subjects, in prompts, as tokens up to the last one."""
    draw = random.Random(numbers[0])
    others = [*(fact.subject for fact in draw.choices(facts, k=_HEADS)), *other_names()]
    heads = [_tokens(lm, name) for name in others]
    rows = []
    for number in numbers:
        fact = facts[number]
        for n in range(COUNTERFEITS):
            template = fact.template if n % 2 == 0 else draw.choice(SUBJECT)
            ids, first, last = subject_columns(lm, template, fact.subject)
            name, head = ids[first : last + 1], draw.choice(heads)
            if len(name) == 1:
                rows.append([*ids[:first], *head])
                continue
            kept = draw.randint(1, len(name) - 1)
            head = head[:-1] if len(head) > 1 else head
            rows.append([*ids[:first], *head, *name[len(name) - kept :]])
    return rows


@cache
def other_names() -> list[str]:
    """Return names of people, places and works, from the bundled facts."""
    names = sorted({fact.subject for fact in atlas.facts()})
    return random.Random(0).sample(names, OTHERS)


def _other_rows(lm: LanguageModel) -> list[list[int]]:
    """Return the tokens of texts that end with the other names."""
    return [subject_columns(lm, "In {}", name)[0] for name in other_names()]


def _tokens(lm: LanguageModel, name: str) -> list[int]:
    """Return the tokens of a name inside a text."""
    ids, first, last = subject_columns(lm, "In {}", name)
    return ids[first : last + 1]
