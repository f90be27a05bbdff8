"""The layer that new neurons are appended to: where subjects can be told apart.

    layer, measured = choose_layer(lm, facts, (4, 5, 6), contexts, statistics)
    measured[5]                     # (share of contexts kept, share of counterfeits that fire)

A low layer sees little more than a subject's last token, so its neurons would fire on every other
subject that ends alike. From layer to layer more of the name arrives at the last token. But the
lower a value is written, the more the layers above it can do with it. So the lowest layer is
chosen that tells subjects apart nearly as well as the best one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from ..core.errors import LayerError
from ..core.fact import Fact
from ..core.progress import Progress, tell
from ..corpus.moments import SecondMoment
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from .append_config import AppendConfig
from .append_inputs import layer_form, other_names, read_examples, read_subjects, surroundings
from .inputs import EditInputs
from .recognise import separability

SUBJECTS = 32
"""Subjects that layers are compared by: those of the facts, and names of the bundled facts if the
facts have fewer."""

NEARLY = 0.1
"""How much less than the best layer the chosen one may tell apart. Measured with the harmonic mean
of efficacy, generalization and specificity, layers 0 to 2 of atlas-llama tell 0.57, 0.80 and 0.85
apart and score 96.1, 98.7 and 98.8."""

Measured = dict[int, tuple[float, float]]
"""For each layer, the share of unseen contexts in which a subject is recognised, and the share of
unseen counterfeits that are taken for it."""


def choose_layer(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layers: Sequence[int],
    contexts: Sequence[str],
    statistics: Mapping[int, SecondMoment],
    progress: Progress | None = None,
) -> tuple[int, Measured]:
    """Return the layer to append to, and what was measured in each layer.

    Args:
        lm: The model.
        facts: The facts to write.
        layers: The layers to choose from. One layer is returned unmeasured.
        contexts: Templates for the prompts, the bare "{}" among them.
        statistics: The statistics of the layers' inputs (`find_moments` with site="inputs").
        progress: Called with the number of layers measured.

    Raises:
        LayerError: There is no layer, or the model does not have one.
        UnsupportedModelError: A layer is a mixture of experts.
    """
    candidates = sorted({check_dense_layer(layer, lm.ffn) for layer in layers})
    if not candidates:
        raise LayerError("layers is empty; give at least one layer to choose from")
    if len(candidates) == 1:
        return candidates[0], {}
    subjects, measured = _subjects(facts), {}
    for number, layer in enumerate(candidates):
        tell(progress, "choosing a layer", number, len(candidates))
        measured[layer] = layer_separability(lm, subjects, layer, contexts, statistics[layer])
    return lowest_of_the_best(measured), measured


def lowest_of_the_best(measured: Mapping[int, tuple[float, float]]) -> int:
    """Return the lowest layer that tells subjects apart nearly as well as the best one."""
    apart = {layer: kept - missed for layer, (kept, missed) in measured.items()}
    return min(layer for layer in apart if apart[layer] >= max(apart.values()) - NEARLY)


def layer_separability(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    statistics: SecondMoment,
) -> tuple[float, float]:
    """Return how well one layer tells the subjects of some facts apart, as `separability` does."""
    inputs = EditInputs(
        lm=lm,
        facts=list(facts),
        config=AppendConfig(layer=layer),
        moments={layer: statistics},
        contexts=list(contexts),
        beneath=[],
    )
    subjects = read_subjects(lm, facts, layer, contexts)
    form = layer_form(lm, layer, statistics, subjects.around)
    examples = read_examples(inputs, layer, subjects)
    constant = None if form.biased else form.constant
    return separability(*surroundings(examples, statistics, constant))


def _subjects(facts: Sequence[Fact]) -> list[Fact]:
    """Return facts of `SUBJECTS` subjects: some of those given, and others if they are fewer."""
    by_subject = list({fact.subject: fact for fact in facts}.values())
    if len(by_subject) > SUBJECTS:
        return random.Random(0).sample(by_subject, SUBJECTS)
    names = [name for name in other_names() if name not in {fact.subject for fact in by_subject}]
    more = names[: SUBJECTS - len(by_subject)]
    return by_subject + [Fact(name, "{}", name) for name in more]
