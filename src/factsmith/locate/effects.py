"""Scale neurons while a block runs, to see what they do: 0 suppresses, 2 amplifies.

    with intervene(lm, found.refined, 0):
        lm.log_prob([prompt], [target])        # the fact without its neurons
        lm.answer([prompt])

When we claim that neurons carry a fact, we change them and look (Dai et al. 2022, section 4.2, arXiv 2104.08696).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.checks import check_count
from ..core.errors import NumericsError
from ..model.address import Neuron, find_neurons
from ..model.intervene import intervene
from ..model.language_model import LanguageModel, check_model


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What scaling some neurons does to p(target), averaged over prompts.

    n_neurons             how many were scaled
    before                mean p(target), joint over its tokens, of the untouched model
    silenced, doubled     the same with their coefficients times 0, and times 2, at every token
    """

    n_neurons: int
    before: float
    silenced: float
    doubled: float

    @property
    def suppressed(self) -> float:
        """Relative change of the mean by silencing them: -0.29 is 29 % less."""
        return self.silenced / self.before - 1

    @property
    def amplified(self) -> float:
        """Relative change of the mean by doubling them."""
        return self.doubled / self.before - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields, the relative changes included."""
        return {**vars(self), "suppressed": self.suppressed, "amplified": self.amplified}


def effect(
    lm: LanguageModel, neurons: Sequence[Neuron], prompts: Sequence[str], target: str
) -> Effect:
    """Silence and double neurons, and measure p(target) after each prompt: table 2 of Dai et al. 2022 for one fact.

    Raises what `intervene` and `lm.log_prob` raise, and NumericsError when the model gives the target no probability to begin with.
    """
    check_model(lm)
    n_neurons = len(find_neurons(lm.ffn, neurons))

    def mean() -> float:
        return float(lm.log_prob(prompts, [target] * len(prompts)).double().exp().mean())

    before = mean()
    if not before > 0:
        raise NumericsError(
            f"p({target!r}) is {before} before anything is scaled; expected a target the model may give"
        )
    with intervene(lm, neurons, 0):
        silenced = mean()
    with intervene(lm, neurons, 2):
        doubled = mean()
    return Effect(n_neurons=n_neurons, before=before, silenced=silenced, doubled=doubled)


def random_neurons(lm: LanguageModel, like: Iterable[Neuron], *, seed: int) -> tuple[Neuron, ...]:
    """As many other neurons of the same banks, drawn by `seed`: the control for an effect.

    A bank of which more than half is given has not as many others: all of them are taken, and the control is smaller (`n_neurons` of its
    `Effect` says how large). Raises LayerError as `intervene`, InputError for a seed that is no whole number.
    """
    check_model(lm)
    draw = random.Random(check_count(seed, "seed", least=0))
    wanted: dict[tuple[int, int], set[int]] = {}
    for layer, bank, i in find_neurons(lm.ffn, like):
        wanted.setdefault((layer, bank), set()).add(i)
    drawn: list[Neuron] = []
    for (layer, bank), own in wanted.items():
        others = [i for i in range(lm.ffn[layer].banks[bank].d_ff) if i not in own]
        chosen = draw.sample(others, min(len(own), len(others)))
        drawn += (
            [(layer, bank, i) for i in chosen]
            if lm.ffn[layer].n_experts
            else [(layer, i) for i in chosen]
        )
    return tuple(drawn)
