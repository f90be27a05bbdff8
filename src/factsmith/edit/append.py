"""Append: one fact, one new neuron. An INSERT that leaves the layer's own weights as they are.

    delta = append_facts(inputs)            # what `edit(lm, facts, "append")` runs
    delta.appended[5]                       # the rows of layer 5

A new neuron's key matches what enters the layer at the fact's subject, and nothing else. Its value
is the change of the layer's output that makes the model assert the fact. So the facts of a batch
share no weights, and a fact is taken out by dropping its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.fact import Fact
from ..core.progress import tell
from ..model.appended import AppendedRows
from .append_config import AppendConfig
from .contexts import SUBJECT, context_weights
from .delta import Delta
from .inputs import EditInputs, recipe_of
from .keys import read_inputs
from .search import find_targets


def append_facts(inputs: EditInputs) -> Delta:
    """Return the delta that appends rows for the facts of an edit."""
    config, (layer,) = inputs.config, inputs.layers
    assert isinstance(config, AppendConfig)
    lm, facts = inputs.lm, inputs.facts
    own, weights = _own_inputs(inputs, layer)
    statistics = inputs.moments[layer]
    mean = torch.einsum("ncd,c->nd", own, weights)
    mu = statistics.mean
    others = mean - mu
    covariance = statistics.covariance + others.T @ others / max(len(facts), 1)
    ridge = 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    keys = torch.linalg.solve(covariance + ridge, others.T).T
    keys = keys / (keys * others).sum(1, keepdim=True)
    theta, width = 0.75, 0.25
    slope = 10 / width
    targets = inputs.targets or find_targets(
        lm,
        facts,
        layer,
        config,
        inputs.contexts,
        progress=lambda done: tell(inputs.progress, "searching targets", done, len(facts)),
    )
    residuals = (targets.v_star - targets.v_initial).cpu().double()
    reads = torch.einsum("ncd,nd->nc", own - mu, keys)
    coefficients = torch.nn.functional.gelu(slope * (reads - theta), approximate="tanh")
    own_coefficient = coefficients.median(dim=1).values.clamp_min(0.1 * slope * (1 - theta))
    rows = AppendedRows(
        keys=(slope * keys).float(),
        biases=(-slope * (keys @ mu + theta)).float(),
        values=(residuals / own_coefficient[:, None]).float(),
        facts=tuple(range(len(facts))),
    )
    return Delta(
        layers={},
        k_star={},
        v_star=targets.v_star.cpu(),
        facts=tuple(facts),
        method="append",
        config=recipe_of(inputs),
        fingerprint=lm.fingerprint,
        convergence=targets.convergence,
        appended={layer: rows},
    )


def _own_inputs(inputs: EditInputs, layer: int) -> tuple[Tensor, Tensor]:
    """Return what enters a layer at the subject in a fact's own contexts, and their weights.

    Returns:
        (n, contexts, d_model) float64, and (contexts,) float64 with sum 1.
    """
    lm, facts = inputs.lm, inputs.facts
    alone = [Fact(fact.subject, "{}", fact.target) for fact in facts]
    prompts = read_inputs(lm, facts, layer, inputs.contexts)
    subjects = read_inputs(lm, alone, layer, SUBJECT)
    weights = _weights(inputs.contexts)
    return torch.cat([prompts, subjects], dim=1).double().cpu(), weights


def _weights(contexts: Sequence[str]) -> Tensor:
    """Return one half for the bare prompt, and one half for all other contexts together."""
    return torch.tensor(context_weights([*contexts, *("#",) * len(SUBJECT)]), dtype=torch.float64)
