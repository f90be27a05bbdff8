"""Which layers to edit: what was published for a model, or what a causal trace and a few trial
edits say.

    choice = published(lm)                        # LayerChoice of a model with a preset, or None
    facts = trial_facts(lm, 24)                   # edits to try: real facts that the model knows,
    each with another object effects = mlp_effects(lm, facts)              # where the subject's
    last token is read by the MLPs trials = race(candidates(lm, effects), 24, try_edits)   # trial
    edits; try_edits is the caller's: nothing here edits rome, memit = choose(trials, effects)

`recommend.recommend_layers(lm, facts=None, *, trials=24, seed=0, progress=None) -> LayerChoice`
does all of it.

The trace bounds the search, the trials decide. A trace alone says where a fact is read, which is
not the best place to write it (Hase et al. 2023, arXiv 2301.04213: the two hardly correlate);
trials alone would have to edit every layer of a deep model.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Container, Mapping, Sequence

import torch

from .. import atlas
from ..core.errors import InputError, UnsupportedModelError
from ..core.fact import Fact, Probe
from ..locate.causal import causal_trace
from ..model.language_model import LanguageModel
from ..model.tokens import target_ids
from .layer_choice import MIN_FACTS, LayerScore, Trial

CANDIDATES = 12
"""At most so many neighbouring layers are tried, those where the MLPs' effect is largest: however
deep the model, 12 × 24 edits at most.
"""

RUN = 5
"""At most so many layers for MEMIT: its published ranges have five, or six (GPT-J)."""

LEVEL = 0.03
"""A layer this far below the best is never chosen before it, though few trials may leave more than
that to chance.
"""

NEAR = 0.95
"""MEMIT's run goes on while a layer's score is at least this share of the best: a layer that drops
facts would waste its part of them.
"""

_ROUND = 256

_ROUNDS = 16
"""Bundled facts are asked 256 at a time, 4,096 at most; after one round without any answer there is
no second.
"""


# ── facts to try
# ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def trial_facts(
    lm: LanguageModel,
    count: int,
    *,
    seed: int = 0,
    paraphrases: int = 5,
    neighbours: int = 10,
    others: int = 3,
) -> list[Fact]:
    """Up to `count` edits to try: bundled real-world facts that the model knows, each to be given
    another object of its relation.

    paraphrases  other phrasings of the fact, of those in which the model knows it (1 to so many)
    neighbours   prompts about other subjects of the relation that it answers rightly, half of them
    with the same true object where there
                 are such (1 to so many)
    others       prompts about other relations of the same subject that it answers rightly (0 to so
    many), added to the neighbours

    The same model, arguments and seed give the same facts. A model that knows none of the first 256
    asked is asked no more.
    """
    draw = random.Random(seed)
    pool = list(atlas.facts())
    draw.shuffle(pool)
    known: set[atlas.AtlasFact] = set()
    found: list[Fact] = []
    for at in range(0, min(len(pool), _ROUND * _ROUNDS), _ROUND):
        asked = pool[at : at + _ROUND]
        wording = [draw.choice(atlas.phrasings(fact.relation).trained) for fact in asked]
        told = _says(
            lm,
            [
                (_fill(prompt, fact), fact.object)
                for prompt, fact in zip(wording, asked, strict=True)
            ],
        )
        new = [fact for fact, is_right in zip(asked, told, strict=True) if is_right]
        known.update(new)
        if not known:
            break
        for fact in new:
            trial = _trial(lm, fact, known, draw, paraphrases, neighbours, others)
            found += [trial] if trial is not None else []
            if len(found) == count:
                return found
    return found


def _trial(
    lm: LanguageModel,
    fact: atlas.AtlasFact,
    known: Container[atlas.AtlasFact],
    draw: random.Random,
    n_paraphrases: int,
    n_neighbours: int,
    n_others: int,
) -> Fact | None:
    """The edit to try on a fact; None when the model does not know it well enough, or nothing near
    it.
    """
    told = atlas.phrasings(fact.relation)
    wording = [
        prompt
        for prompt in (*told.trained, *told.held_out)
        if _fill(prompt, fact).count(fact.subject) == 1
    ]
    same = atlas.facts(fact.relation)
    objects = sorted(
        {f.object for f in same} - {f.object for f in same if f.subject == fact.subject}
    )
    sure = [
        prompt
        for prompt, right in zip(
            wording, _says(lm, [(_fill(p, fact), fact.object) for p in wording]), strict=True
        )
        if right
    ]
    if len(sure) < 2 or not objects:
        return None
    prompt, *paraphrases = draw.sample(sure, min(len(sure), 1 + n_paraphrases))
    target = draw.choice(objects)
    if not _fits(lm, _fill(prompt, fact), target):
        return None

    # What the model is known to know is asked first, so that few questions are needed also of a
    # model that knows little.
    rest = [f for f in same if f.subject != fact.subject and f.object != target]
    rest = sorted(draw.sample(rest, len(rest)), key=lambda f: f not in known)
    near = _answered(
        lm,
        [(_fill(prompt, f), f.object) for f in rest if f.object == fact.object],
        n_neighbours // 2,
    )
    near += _answered(
        lm,
        [(_fill(prompt, f), f.object) for f in rest if f.object != fact.object],
        n_neighbours - len(near),
    )
    own = [f for f in atlas.facts_about(fact.subject) if f.relation != fact.relation]
    near += _answered(
        lm, [(_fill(atlas.phrasings(f.relation).trained[0], f), f.object) for f in own], n_others
    )
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


def judge(lm: LanguageModel, fact: Fact) -> Trial:
    """How a trial edit holds, asked of the model while it carries it; neighbours without an
    expected answer are not asked.
    """
    kept = [probe for probe in fact.neighbours if probe.expected is not None]
    prompts = [fact.text, *fact.paraphrase_texts, *(probe.prompt for probe in kept)]
    if fact.target is None:
        raise InputError(f"the fact about {fact.subject!r} has no target; a trial edit writes one")
    right = lm.says(
        prompts,
        [fact.target] * (1 + len(fact.paraphrases)) + [probe.expected or "" for probe in kept],
    )
    cut = 1 + len(fact.paraphrases)
    return (
        float(right[0]),
        statistics.fmean(right[1:cut]) if cut > 1 else None,
        statistics.fmean(right[cut:]) if kept else None,
    )


def _fill(prompt: str, fact: atlas.AtlasFact) -> str:
    return prompt.replace("{}", fact.subject)


def _answered(
    lm: LanguageModel, pairs: Sequence[tuple[str, str]], enough: int
) -> list[tuple[str, str]]:
    """The first `enough` of (prompt, answer) that the model says; it is asked four times as many at
    most.
    """
    found: list[tuple[str, str]] = []
    for at in range(0, min(len(pairs), 4 * enough), max(1, enough)):
        some = pairs[at : at + enough]
        found += [pair for pair, right in zip(some, _says(lm, some), strict=True) if right]
        if len(found) >= enough:
            break
    return found[:enough]


def _says(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """`lm.says`, and False for what the model's tokenizer cannot write or its positions cannot
    hold.
    """
    fitting = [i for i, (prompt, answer) in enumerate(pairs) if _fits(lm, prompt, answer)]
    said = [False] * len(pairs)
    if fitting:
        for i, right in zip(
            fitting,
            lm.says([pairs[i][0] for i in fitting], [pairs[i][1] for i in fitting]),
            strict=True,
        ):
            said[i] = right
    return said


def _fits(lm: LanguageModel, prompt: str, answer: str) -> bool:
    try:
        length = len(lm.prompt_ids(prompt)) + len(target_ids(lm.tokenizer, prompt, answer))
    except InputError:
        return False
    return lm.max_tokens is None or length <= lm.max_tokens


# ── from trace and trials to layers
# ────────────────────────────────────────────────────────────────────────────────────────


def trace_window(n_layers: int) -> int:
    """Neighbouring MLPs restored together: a fifth of the depth, 10 at most (the paper's 10 of
    GPT-2 XL's 48).
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
    """(n_layers,) average indirect effect of the MLPs around each layer at the subject's last
    token, over what the model says today.

    Meng et al. 2022, section 2.2 (arXiv 2202.05262). The answer followed is the fact's true target,
    or the model's own next token.
    """
    window, total = trace_window(lm.n_layers), torch.zeros(lm.n_layers)
    for done, fact in enumerate(facts, start=1):
        found = causal_trace(
            lm,
            fact.text,
            fact.subject,
            target=fact.target_true,
            kind="mlp",
            window=window,
            samples=samples,
            seed=seed,
        )
        total += found.effects[found.subject_span[1] - 1] / len(facts)
        if progress is not None:
            progress(done, len(facts))
    return tuple(total.tolist())


def candidates(lm: LanguageModel, effects: Sequence[float], most: int = CANDIDATES) -> list[int]:
    """The layers to try: all dense ones of a model of up to `most` layers, else so many neighbours
    whose effects have the largest sum.

    Raises UnsupportedModelError when no layer has a single dense feed-forward memory.
    """
    first = max(
        range(max(1, lm.n_layers - most + 1)), key=lambda start: sum(effects[start : start + most])
    )
    dense = [layer for layer in range(lm.n_layers) if not lm.ffn[layer].n_experts]
    if not dense:
        raise UnsupportedModelError(
            f"every layer of {lm.name} is a mixture of experts; a layer to edit has one dense "
            "down-projection"
        )
    return [layer for layer in dense if first <= layer < first + most] or dense[:most]


def race(
    layers: Sequence[int],
    count: int,
    try_edits: Callable[[Sequence[int], range], Mapping[int, Sequence[Trial]]],
) -> dict[int, list[Trial]]:
    """Try edits at every layer, more of them at the better ones, until every layer that may be the
    best has tried all `count`.

    try_edits  called with (layers, numbers of the edits to try there); gives their trials by layer

    After a quarter and after half of the edits, six at least, layers clearly behind the best pause;
    fewer than six tell nothing, and all layers try them. A layer that paused comes back and makes
    up what it missed as soon as the best of the others falls to where it may be itself. No edit is
    tried twice at a layer: `count` × layers is the most it can cost, and what it does cost when no
    layer is clearly behind. Returns every layer's trials, in the order of the edits.
    """
    trials: dict[int, list[Trial]] = {layer: [] for layer in layers}
    running = list(layers)
    for upto in dict.fromkeys(
        min(count, max(MIN_FACTS, math.ceil(count * share))) for share in (0.25, 0.5, 1)
    ):
        while behind := [layer for layer in running if len(trials[layer]) < upto]:
            start = min(len(trials[layer]) for layer in behind)
            for layer, more in try_edits(
                [layer for layer in behind if len(trials[layer]) == start], range(start, upto)
            ).items():
                trials[layer] += more
            # What was just seen decides anew: a layer still to make up its edits may be out after
            # all, one that paused may be back.
            running = _in_the_race(trials)
    return trials


def choose(
    trials: Mapping[int, Sequence[Trial]], effects: Sequence[float]
) -> tuple[int, tuple[int, ...]]:
    """The layer for ROME and the consecutive layers for MEMIT, from each layer's trials of the same
    edits and the (n_layers,) effects.

    ROME  the layer with the best score among those that tried all the edits. Where the trials
    cannot tell others from it, the trace says:
          of those within two standard errors of the paired difference, and within 3 points, the one
          where the MLPs' effect is largest, then the earliest. So a trace that misleads costs 3
          points of the measured score at most.
    MEMIT the run of neighbours around it whose score is at least 95 % of the best, the better side
    first, five at most. Each layer of a run
          takes a share of the change, so one where edits fail would lose its share. A layer that
          left the race early is judged by its few.
    """
    scores = {layer: LayerScore.of(layer, some).score for layer, some in trials.items()}
    most = max(len(some) for some in trials.values())
    full = [layer for layer, some in trials.items() if len(some) == most]
    first = max(full, key=lambda layer: scores[layer])
    best = scores[first]
    level = [
        layer
        for layer in full
        if best - scores[layer] <= min(LEVEL, 2 * _standard_error(trials[first], trials[layer]))
    ]
    rome = max(level, key=lambda layer: (effects[layer], -layer))
    run = [rome]
    while best > 0 and len(run) < RUN:
        near = [layer for layer in (run[0] - 1, run[-1] + 1) if scores.get(layer, 0) >= NEAR * best]
        if not near:
            break
        run = sorted([*run, max(near, key=lambda layer: (scores[layer], -layer))])
    return rome, tuple(run)


def _in_the_race(trials: Mapping[int, Sequence[Trial]]) -> list[int]:
    """The layers that may be the best: none is clearly, by two standard errors, behind the best of
    those with the most trials.
    """
    scores = {layer: LayerScore.of(layer, some).score for layer, some in trials.items()}
    most = max(len(some) for some in trials.values())
    best = max(
        (layer for layer, some in trials.items() if len(some) == most),
        key=lambda layer: scores[layer],
    )
    return [
        layer
        for layer, some in trials.items()
        if layer == best or scores[best] - scores[layer] <= 2 * _cautious_error(trials[best], some)
    ]


def _cautious_error(these: Sequence[Trial], those: Sequence[Trial]) -> float:
    """The standard error of the difference of two layers' scores that a race may rely on: never 0,
    however alike the edits went.

    That of the edits, and of half an edit more that held only here and half an edit that held only
    there, the adjusted interval for matched proportions (Agresti and Min 2005, doi
    10.1002/sim.1781): with n edits that went alike it is 1 / (n + 2). Infinite for one.
    """
    fewest = min(len(these), len(those))
    return math.hypot(_standard_error(these, those), 1 / (fewest + 2)) if fewest > 1 else math.inf


def _standard_error(these: Sequence[Trial], those: Sequence[Trial]) -> float:
    """The jackknife standard error of the difference of two layers' scores; 0 for a single edit.

    Both tried the same edits in the same order, one of them perhaps the first of them only: an edit
    is left out wherever it was tried.
    """
    n = max(len(these), len(those))
    if min(len(these), len(those)) < 2:
        return 0.0
    differences = []
    for i in range(n):
        one, other = (
            LayerScore.of(0, [*some[:i], *some[i + 1 :]]).score for some in (these, those)
        )
        differences.append(one - other)
    return math.sqrt(
        (n - 1) / n * sum((d - statistics.fmean(differences)) ** 2 for d in differences)
    )
