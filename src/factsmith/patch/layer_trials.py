"""From a causal trace and trial edits to the layers to edit.

    effects = mlp_effects(lm, facts)                        # where the subject's last token is read
    trials = race(candidates(lm), 24, try_edits)            # try_edits is the caller's
    rome, memit = choose(trials, effects)

The trials decide, and the trace between layers that they cannot tell apart. A trace alone says
where a fact is read, which is not the best place to write it (Hase et al. 2023, arXiv 2301.04213:
the two hardly correlate). A deep model has some of its layers tried.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch

from ..core.executor import executor_in_use
from ..core.fact import Fact
from ..locate.corruption import Corruption, TracedPrompt
from ..locate.kinds import Restoration
from ..locate.runs import record_prompt
from ..locate.sweep import restored_scores
from ..model.address import check_dense
from ..model.language_model import LanguageModel
from .layer_choice import MIN_FACTS, LayerScore, Trial

SHALLOW = 12
"""A model of at most so many dense layers has all of them tried."""

CANDIDATES = 6
"""So many layers of a deeper model are tried, spread over the early 60 %. However deep the model,
there are 6 × 8 edits at most. Neighbours score alike, so a best layer between two of them costs
little."""

_EARLY = 0.6
"""The share of the depth that is searched. All published layers lie in the first 40 %, and later
changes come too late for the last token to read them."""

RUN = 5
"""At most so many layers for MEMIT: its published ranges have five, or six (GPT-J)."""

LEVEL = 0.03
"""A layer this far below the best is never chosen before it, even where few trials leave more than
that to chance.
"""

NEAR = 0.95
"""MEMIT's run goes on while a layer's score is at least this share of the best. A layer that drops
facts would waste its part of them.
"""


def trace_window(n_layers: int) -> int:
    """Return how many neighbouring MLPs are restored together: a fifth of the depth, 10 at most.

    The paper restores 10 of GPT-2 XL's 48.
    """
    return max(1, min(10, round(n_layers / 5)))


def mlp_effects(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    samples: int = 10,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, ...]:
    """Compute the average indirect effect of the MLPs around each layer, (n_layers,).

    It is taken at the subject's last token, over what the model says today: Meng et al. 2022,
    section 2.2 (arXiv 2202.05262).

    Args:
        lm: The model.
        facts: The facts to trace. The answer followed is a fact's true target, or the model's own
            next token.
        samples: Corrupted runs for each fact.
        seed: Seed of the noise.
        progress: Called with (facts done, facts in all).
    """
    restoration = Restoration("mlp", trace_window(lm.n_layers))
    total = torch.zeros(lm.n_layers, dtype=torch.float32)
    task = partial(_effects, lm, restoration, Corruption(samples=samples, seed=seed))
    for done, effects in enumerate(executor_in_use().map(task, facts), start=1):
        total += effects / len(facts)
        if progress is not None:
            progress(done, len(facts))
    return tuple(total.tolist())


def _effects(
    lm: LanguageModel, restoration: Restoration, corruption: Corruption, fact: Fact
) -> torch.Tensor:
    """Return the indirect effects (n_layers,) at the last token of one fact's subject."""
    prompt = TracedPrompt.of_fact(lm, fact)
    runs = record_prompt(lm, prompt, corruption, target=fact.target_true)
    scores = restored_scores(runs, restoration, [runs.prompt.span[1] - 1])
    return (scores[0] - runs.p_corrupted).cpu()


def candidates(lm: LanguageModel) -> list[int]:
    """Return the layers to try: all dense ones of a shallow model, or some of a deep one.

    Those of a deep model are spread evenly over the early layers. The one at a sixth of the depth
    is among them, where patches go without a measurement.

    Raises:
        UnsupportedModelError: No layer is dense.
    """
    check_dense(lm.ffn)
    dense = [layer for layer in range(lm.n_layers) if not lm.ffn[layer].n_experts]
    if len(dense) <= SHALLOW:
        return dense
    step = max(1, round(_EARLY * len(dense) / CANDIDATES))
    first = min(range(len(dense)), key=lambda i: abs(dense[i] - lm.n_layers // 6)) % step
    return dense[first::step][:CANDIDATES]


def race(
    layers: Sequence[int],
    count: int,
    try_edits: Callable[[Sequence[int], range], Mapping[int, Sequence[Trial]]],
) -> dict[int, list[Trial]]:
    """Try edits at every layer, more of them at the better ones.

    The race ends when every layer that may be the best has tried all edits. After a quarter and
    after half of them, layers that are clearly behind the best pause. They pause after six edits at
    the earliest, since fewer say too little. A paused layer comes back, and makes up what it
    missed, as soon as the best of the others falls to where it may be itself. No edit is tried
    twice at a layer, so the race costs `count` × layers edits at most.

    Args:
        layers: The layers.
        count: How many edits there are.
        try_edits: Called with (layers, numbers of the edits to try there); returns {layer: trials}.

    Returns:
        Every layer's trials, in the order of the edits.
    """
    trials: dict[int, list[Trial]] = {layer: [] for layer in layers}
    running = list(layers)
    stages = [min(count, max(MIN_FACTS, math.ceil(count * part))) for part in (0.25, 0.5, 1)]
    for upto in dict.fromkeys(stages):
        while behind := [layer for layer in running if len(trials[layer]) < upto]:
            start = min(len(trials[layer]) for layer in behind)
            least = [layer for layer in behind if len(trials[layer]) == start]
            for layer, more in try_edits(least, range(start, upto)).items():
                trials[layer] += more
            # What was just seen decides again: a layer that has edits to make up may be out after
            # all, and one that paused may be back.
            running = _in_the_race(trials)
    return trials


def choose(
    trials: Mapping[int, Sequence[Trial]], effects: Sequence[float]
) -> tuple[int, tuple[int, ...]]:
    """Choose the layer for ROME and the consecutive layers for MEMIT.

    ROME gets the layer with the best score, of those that tried all edits. Where the trials cannot
    tell others from it, the trace decides. These are the layers within two standard errors of the
    paired difference, and within 3 points: the one where the MLPs' effect is largest wins, then the
    earliest. So a trace that misleads costs 3 points of the measured score at most.

    MEMIT gets the run of neighbours around it whose score is at least 95 % of the best, the better
    side first, five at most. Each layer of a run takes a share of the change, so a layer where
    edits fail would lose its share. A layer that left the race early is judged by its few edits. A
    layer between two that were tried counts as much as their scores say, on a straight line.

    Args:
        trials: {layer: trials} of the same edits in the same order.
        effects: (n_layers,) of `mlp_effects`.
    """
    scores = {layer: LayerScore.of(layer, some).score for layer, some in trials.items()}
    most = max(len(some) for some in trials.values())
    full = [layer for layer, some in trials.items() if len(some) == most]
    first = max(full, key=lambda layer: scores[layer])
    best = scores[first]
    between = _between(scores)

    def is_level(layer: int) -> bool:
        error = _standard_error(trials[first], trials[layer])
        return best - scores[layer] <= min(LEVEL, 2 * error)

    rome = max(filter(is_level, full), key=lambda layer: (effects[layer], -layer))
    run = [rome]
    while best > 0 and len(run) < RUN:
        ends = (run[0] - 1, run[-1] + 1)
        near = [layer for layer in ends if between.get(layer, 0) >= NEAR * best]
        if not near:
            break
        run = sorted([*run, max(near, key=lambda layer: (between[layer], -layer))])
    return rome, tuple(run)


def _between(scores: Mapping[int, float]) -> dict[int, float]:
    """The scores of the layers that were tried, and of those between two of them."""
    tried = sorted(scores)
    every = dict(scores)
    for low, high in pairwise(tried):
        for layer in range(low + 1, high):
            share = (layer - low) / (high - low)
            every[layer] = (1 - share) * scores[low] + share * scores[high]
    return every


def _in_the_race(trials: Mapping[int, Sequence[Trial]]) -> list[int]:
    """The layers that may be the best.

    None of them is two standard errors behind the best of those with the most trials.
    """
    scores = {layer: LayerScore.of(layer, some).score for layer, some in trials.items()}
    most = max(len(some) for some in trials.values())
    full = [layer for layer, some in trials.items() if len(some) == most]
    best = max(full, key=lambda layer: scores[layer])
    return [
        layer
        for layer, some in trials.items()
        if layer == best or scores[best] - scores[layer] <= 2 * _cautious_error(trials[best], some)
    ]


def _cautious_error(these: Sequence[Trial], those: Sequence[Trial]) -> float:
    """The standard error of the difference of two layers' scores that a race may rely on.

    It is never 0, however alike the edits went: half an edit is added that held only at one layer,
    and half an edit that held only at the other. This is the adjusted interval for matched
    proportions (Agresti and Min 2005, doi 10.1002/sim.1781). With n edits that went alike it is
    1 / (n + 2); for a single edit it is infinite.
    """
    fewest = min(len(these), len(those))
    return math.hypot(_standard_error(these, those), 1 / (fewest + 2)) if fewest > 1 else math.inf


def _standard_error(these: Sequence[Trial], those: Sequence[Trial]) -> float:
    """The jackknife standard error of the difference of two layers' scores; 0 for a single edit.

    Both layers tried the same edits in the same order, though one may have tried only the first of
    them. An edit is left out wherever it was tried.
    """
    n = max(len(these), len(those))
    if min(len(these), len(those)) < 2:
        return 0.0

    def without(trials: Sequence[Trial], i: int) -> float:
        return LayerScore.of(0, [*trials[:i], *trials[i + 1 :]]).score

    differences = [without(these, i) - without(those, i) for i in range(n)]
    mean = statistics.fmean(differences)
    return math.sqrt((n - 1) / n * sum((each - mean) ** 2 for each in differences))
