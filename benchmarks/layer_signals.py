"""Ways to choose layers without trial edits, for `layers.py` to compare with its sweeps.

    choices = first_choices(lm)       # {"depth": Choice(rome=5, memit=(4, 5, 6, 7, 8), ...), ...}

- "depth" is the default, `first_choice`: a sixth of the depth. It does not run the model.
- "reach" reads how far a change can reach: the gradient of the likeliest next token's
  log-probability by what each layer writes at the subject's last token, times the norm of the
  stream there, over bundled prompts. It takes one forward and one backward pass. The layer with the
  largest reach is chosen, and MEMIT's run goes on while the reach is at least three quarters of it.
- "trace" traces a few bundled facts that the model knows, as the papers do (`mlp_effects`), and
  takes the layer where the MLPs around it bring back most. MEMIT's run lies around that layer, as
  `by_depth` does it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from factsmith import atlas
from factsmith.edit.configs import by_depth
from factsmith.edit.keys import subject_columns
from factsmith.model.language_model import LanguageModel
from factsmith.model.trace import recording, replacing
from factsmith.patch.layer_choice import first_choice
from factsmith.patch.layer_trials import RUN, mlp_effects
from factsmith.patch.trial_facts import trial_facts

PROMPTS = 16
"""Bundled prompts whose gradients are averaged."""

TRACED = 4
"""Bundled facts that are traced."""

WIDE = 0.75
"""A layer of MEMIT's run has at least this share of the largest reach."""


@dataclass(frozen=True)
class Choice:
    """Layers for ROME and MEMIT, and the processor seconds that choosing them took."""

    rome: int
    memit: tuple[int, ...]
    seconds: float


def first_choices(lm: LanguageModel) -> dict[str, Choice]:
    """Return the choice of each way. A way that needs facts is left out if the model knows none."""
    ways = {"depth": _by_depth, "reach": _by_reach, "trace": _by_trace}
    return {name: choice for name, way in ways.items() if (choice := _timed(lm, way)) is not None}


def _timed(
    lm: LanguageModel, way: Callable[[LanguageModel], tuple[int, tuple[int, ...]] | None]
) -> Choice | None:
    start = time.process_time()
    layers = way(lm)
    seconds = time.process_time() - start
    return None if layers is None else Choice(*layers, seconds)


def _by_depth(lm: LanguageModel) -> tuple[int, tuple[int, ...]]:
    choice = first_choice(lm)
    return choice.rome, choice.memit


def _by_reach(lm: LanguageModel) -> tuple[int, tuple[int, ...]]:
    reached = reach(lm)
    rome = max(range(lm.n_layers), key=reached.__getitem__)
    run = [rome]
    while len(run) < RUN and reached[run[-1] + 1] >= WIDE * reached[rome]:
        run.append(run[-1] + 1)
    return rome, tuple(run)


def _by_trace(lm: LanguageModel) -> tuple[int, tuple[int, ...]] | None:
    facts = trial_facts(lm, TRACED, paraphrases=1, neighbours=2, others=1)
    if not facts:
        return None
    effects = mlp_effects(lm, facts)
    rome = max(range(lm.n_layers), key=effects.__getitem__)
    return rome, by_depth(lm.n_layers, rome)


def reach(lm: LanguageModel, count: int = PROMPTS) -> list[float]:
    """Return how far a change of each layer's output at the subject's last token reaches.

    Args:
        lm: The model.
        count: How many bundled prompts are averaged.

    Returns:
        (n_layers) the mean over the prompts of ‖gradient‖ · ‖stream‖.
    """
    draw = random.Random(0)
    total = torch.zeros(lm.n_layers)
    for relation in draw.sample(sorted(atlas.relations()), count):
        fact = draw.choice(atlas.facts(relation))
        template = atlas.phrasings(relation).trained[0]
        ids, _, column = subject_columns(lm, template, fact.subject)
        total += _reach_of(lm, ids, column) / count
    return total.tolist()


def _reach_of(lm: LanguageModel, ids: list[int], column: int) -> Tensor:
    probes: list[Tensor] = []

    def probed(output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output).requires_grad_())
        return output + probes[-1]

    downs = [ffn.down for ffn in lm.ffn]
    layers = dict(enumerate(lm.layers))
    with torch.enable_grad(), recording(layers) as calls, replacing(dict.fromkeys(downs, probed)):
        logits = lm.module(torch.tensor([ids], device=lm.device)).logits[0, -1].float()
        gradients = torch.autograd.grad(logits.log_softmax(-1).max(), probes)
    streams = [calls[layer][0].output.reshape(len(ids), -1)[column] for layer in layers]
    return torch.stack(
        [
            gradient.reshape(len(ids), -1)[column].norm() * stream.detach().norm()
            for gradient, stream in zip(gradients, streams, strict=True)
        ]
    ).cpu()
