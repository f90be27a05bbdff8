"""ROME and r-ROME: one rank-one update for each fact, one fact after another.

    delta = one_by_one(inputs)                    # ROME, rank n_facts
    delta = one_by_one(inputs, one_key=True)      # r-ROME
    deltas = rome_each(lm, facts, moments=...)    # a delta for each fact alone

ROME is Meng et al. 2022, https://arxiv.org/abs/2202.05262. r-ROME is Gupta et al. 2024,
https://arxiv.org/abs/2403.07175.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from ..core.fact import Fact, listed
from ..core.progress import Progress, tell
from ..model.language_model import LanguageModel
from ..model.turns import asking
from . import solve
from .configs import RomeConfig
from .delta import Delta, applied
from .inputs import EditInputs, Moments, edit_inputs, recipe_of, with_shared_keys
from .search import find_targets
from .target import Targets


def one_by_one(inputs: EditInputs, *, one_key: bool = False) -> Delta:
    """Write the facts one after another, each solved on the model that carries the ones before it.

    Args:
        inputs: The edit, at one layer.
        one_key: Use the key averaged over contexts in both places of equation 2 (r-ROME). ROME's
            code has it in one place, and the key of the bare prompt in the other.

    Returns:
        The sum of the updates, of rank n_facts.
    """
    lm, (layer,) = inputs.lm, inputs.layers
    fingerprint = lm.fingerprint
    deltas: list[Delta] = []
    for done, fact in enumerate(inputs.facts):

        def report(searched: int, done: int = done) -> None:
            tell(inputs.progress, "writing facts", done, len(inputs.facts))

        report(0)
        with applied(lm, deltas):
            targets = _targets_of(inputs, fact, report)
            deltas += _deltas(inputs, [fact], targets, fingerprint, one_key)
    keys = torch.cat([delta.k_star[layer] for delta in deltas])
    left = torch.cat([delta.layers[layer][0] for delta in deltas], dim=1)
    right = torch.cat([delta.layers[layer][1] for delta in deltas])
    convergence = [record for delta in deltas for record in delta.convergence]
    return dataclasses.replace(
        deltas[0],
        layers={layer: (left, right)},
        k_star={layer: keys},
        v_star=torch.cat([delta.v_star for delta in deltas]),
        facts=tuple(inputs.facts),
        convergence=with_shared_keys(inputs, {layer: keys}, convergence),
    )


@asking(grad=True, changes=True)
def rome_each(
    lm: LanguageModel,
    facts: Iterable[Fact],
    config: RomeConfig | None = None,
    *,
    moments: Moments | None = None,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> list[Delta]:
    """Return the delta that `rome` gives for each fact alone. All are searched in one batch.

    This measures many single edits, as the paper's tables do. The facts are independent, so they
    may name one prompt several times. Arguments and errors are otherwise those of `rome`.

    Args:
        lm: The model.
        facts: The facts.
        config: The settings.
        moments: The second moment.
        contexts: Templates with `{}` for the prompt.
        seed: Seed of the contexts.
        targets: What `find_targets` returned for these facts. None: they are searched.
        progress: Called with the step's name, how much is done, and how much there is.
    """
    config = config or RomeConfig.recommended(lm)
    inputs = edit_inputs(lm, listed(facts), config, moments=moments, contexts=contexts, seed=seed)
    (layer,) = inputs.layers
    count = len(inputs.facts)
    if targets is None:
        targets = find_targets(
            lm,
            inputs.facts,
            layer,
            inputs.config,
            inputs.contexts,
            progress=lambda done: tell(progress, "searching targets", done, count),
        )
    return _deltas(inputs, inputs.facts, targets, lm.fingerprint, one_key=False)


def _targets_of(inputs: EditInputs, fact: Fact, progress: Callable[[int], object]) -> Targets:
    """Return the target of one fact: as given, as kept, or searched on the present model.

    A search reports after each of its steps, so that it can be interrupted there.
    """
    (layer,) = inputs.layers
    if inputs.targets is not None:
        return inputs.targets
    if inputs.known_targets is not None:
        return inputs.known_targets([fact], layer, "ffn")
    return find_targets(inputs.lm, [fact], layer, inputs.config, inputs.contexts, progress=progress)


def _deltas(
    inputs: EditInputs, facts: Sequence[Fact], targets: Targets, fingerprint: str, one_key: bool
) -> list[Delta]:
    """Return one rank-one Delta for each fact, from its target."""
    (layer,) = inputs.layers
    k_prompt, v_initial = targets.k_prompt, targets.v_initial
    if one_key:  # the output for the mean key, which no prompt has: W k̄ = W k + W (k̄ − k)
        weight = inputs.lm.ffn[layer].original_weight().to(v_initial)
        k_prompt, v_initial = targets.k_star, v_initial + (targets.k_star - k_prompt) @ weight.T
    factor = inputs.moments[layer].factor.cpu()
    deltas = []
    for i, fact in enumerate(facts):
        residual = targets.v_star[i] - v_initial[i]
        left, right = solve.rome(targets.k_star[i].cpu(), k_prompt[i].cpu(), residual.cpu(), factor)
        deltas.append(
            Delta(
                layers={layer: (left.float().cpu(), right.float().cpu())},
                k_star={layer: targets.k_star[i : i + 1].cpu()},
                v_star=targets.v_star[i : i + 1].cpu(),
                facts=(fact,),
                method="r-rome" if one_key else "rome",
                config=recipe_of(inputs),
                fingerprint=fingerprint,
                convergence=targets.convergence[i : i + 1],
            )
        )
    return deltas
