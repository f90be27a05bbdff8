"""Measure what neurons do: silence them and double them, and see what becomes of p(target).

    neurons = knowledge_neurons(lm, prompts, target)
    check = check_neurons(lm, neurons, seed=0)
    check.effects["refined"].suppressed        # -0.96: p(target) falls by 96 %
    check.effects["random"].suppressed         # -0.02: as many random neurons do nothing

An attribution is a claim about what an intervention would do. So the neurons are changed, and the
model is asked again (Dai et al. 2022, section 4.2, arXiv 2104.08696).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.checks import check_count
from ..core.errors import NumericsError
from ..core.tables import Shown, Table
from ..model.address import Neuron, find_neurons
from ..model.intervene import intervene
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .neurons import KnowledgeNeurons


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What scaling some neurons does to p(target), averaged over prompts.

    Attributes:
        n_neurons: Number of neurons scaled.
        before: Mean p(target), joint over its tokens, of the unchanged model.
        silenced: The same with the neurons' coefficients times 0, at every token.
        doubled: The same with the neurons' coefficients times 2, at every token.
    """

    n_neurons: int
    before: float
    silenced: float
    doubled: float

    @property
    def suppressed(self) -> float:
        """Relative change of the mean by silencing: -0.29 is 29 % less."""
        return self.silenced / self.before - 1

    @property
    def amplified(self) -> float:
        """Relative change of the mean by doubling."""
        return self.doubled / self.before - 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the relative changes."""
        return {**vars(self), "suppressed": self.suppressed, "amplified": self.amplified}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NeuronCheck(Shown):
    """Located neurons, and what silencing and doubling them does.

    Attributes:
        neurons: The located neurons.
        effects: The effect of each set of neurons: "refined", "random" (as many other neurons of
            the same layers) and "activation baseline" (the most active neurons).
    """

    neurons: KnowledgeNeurons
    effects: Mapping[str, Effect]

    def tables(self, n: int | None = None) -> list[Table]:
        """Return the strongest neurons, and the effect of each set.

        Args:
            n: Number of neurons to list. None: ten more than the refined set has.
        """
        rows = [
            (
                name,
                str(effect.n_neurons),
                *(
                    (f"{effect.suppressed:+z.1%}", f"{effect.amplified:+z.1%}")
                    if effect.n_neurons
                    else ("", "")
                ),
            )
            for name, effect in self.effects.items()
        ]
        return [
            *self.neurons.tables(n),
            Table(
                f"change of p({self.neurons.target.strip()}), mean over the prompts",
                {"set": "<", "neurons": ">", "silenced": ">", "doubled": ">"},
                rows,
                "random: as many other neurons of the same layers",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the record of the neurons, with the effects."""
        effects = {name: effect.to_dict() for name, effect in self.effects.items()}
        return {**self.neurons.to_dict(), "effects": effects}


def check_neurons(lm: LanguageModel, neurons: KnowledgeNeurons, *, seed: int = 0) -> NeuronCheck:
    """Silence and double located neurons, and two sets to compare them with.

    Args:
        lm: The model in which they were located.
        neurons: The located neurons.
        seed: Seed of the random neurons.

    Raises:
        InputError: when the seed is not a whole number of at least 0.
        NumericsError: when the model gives the target no probability.
    """
    sets = {
        "refined": neurons.refined,
        "random": random_neurons(lm, neurons.refined, seed=seed),
        "activation baseline": neurons.baseline,
    }
    effects = {
        name: effect(lm, chosen, neurons.prompts, neurons.target) for name, chosen in sets.items()
    }
    return NeuronCheck(neurons=neurons, effects=effects)


@asking(grad=True)
def effect(
    lm: LanguageModel, neurons: Sequence[Neuron], prompts: Sequence[str], target: str
) -> Effect:
    """Silence and double neurons, and measure p(target) after each prompt.

    This is table 2 of Dai et al. 2022 for one fact.

    Args:
        lm: The model.
        neurons: The neurons to scale.
        prompts: The prompts to ask.
        target: The text whose probability is measured.

    Raises:
        LayerError: when the model does not have a neuron.
        InputError: when a prompt or the target cannot be used.
        NumericsError: when the model gives the target no probability before anything is scaled.
    """
    check_model(lm)
    n_neurons = len(find_neurons(lm.ffn, neurons))

    def mean() -> float:
        return float(lm.log_prob(prompts, [target] * len(prompts)).double().exp().mean())

    before = mean()
    if not before > 0:
        raise NumericsError(
            f"p({target!r}) is {before} before anything is scaled. "
            "Give a target that the model may say.",
            argument="target",
        )
    with intervene(lm, neurons, 0):
        silenced = mean()
    with intervene(lm, neurons, 2):
        doubled = mean()
    return Effect(n_neurons=n_neurons, before=before, silenced=silenced, doubled=doubled)


def random_neurons(lm: LanguageModel, like: Iterable[Neuron], *, seed: int) -> tuple[Neuron, ...]:
    """Return as many other neurons of the same banks: the control for an effect.

    A bank of which more than half is given has fewer others. All of them are taken, and the control
    is smaller; `n_neurons` of its `Effect` says how large it is.

    Args:
        lm: The model.
        like: The neurons to compare with.
        seed: Seed of the choice.

    Raises:
        LayerError: when the model does not have a neuron.
        InputError: when the seed is not a whole number of at least 0.
    """
    check_model(lm)
    draw = random.Random(check_count(seed, "seed", least=0))
    given: dict[tuple[int, int], set[int]] = {}
    for layer, bank, i in find_neurons(lm.ffn, like):
        given.setdefault((layer, bank), set()).add(i)
    drawn: list[Neuron] = []
    for (layer, bank), taken in given.items():
        others = [i for i in range(lm.ffn[layer].banks[bank].d_ff) if i not in taken]
        chosen = draw.sample(others, min(len(taken), len(others)))
        drawn += (
            [(layer, bank, i) for i in chosen]
            if lm.ffn[layer].n_experts
            else [(layer, i) for i in chosen]
        )
    return tuple(drawn)
