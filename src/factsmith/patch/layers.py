"""Which layers to edit, measured on the model at hand by trial edits of real facts.

    choice = recommend_layers(load("gpt2"))
    choice.rome, choice.memit, choice.reason

The trials decide, and an average causal trace between layers that they cannot tell apart
(`layer_trials`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.executor import executor_in_use
from ..core.fact import Fact, Probe, listed
from ..core.progress import Progress, in_words, note, tell
from ..core.tables import counted
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments, kept_moments, moments_file
from ..edit.configs import MemitConfig, RomeConfig, shipped
from ..edit.contexts import chat_contexts, generate_contexts
from ..edit.delta import Delta, applied
from ..edit.rome import rome_each
from ..edit.target import Targets
from ..model.address import check_dense
from ..model.answers import as_said, is_answered, say
from ..model.language_model import LanguageModel, check_model
from ..model.subject import fact_span
from ..model.turns import asking
from .duration import seconds_to_search
from .layer_choice import MIN_FACTS, LayerChoice, LayerScore, Trial, depth_choice, published
from .layer_parts import judge_edits, search_at_layers
from .layer_trials import (
    SHALLOW,
    candidates,
    choose,
    mlp_effects,
    race,
    trace_window,
)
from .recipe import Sources
from .trial_facts import judge, trial_facts

_TRIALS, _DEEP_TRIALS, _TRACED = 24, 8, 6
"""Trial edits at the layers that stay in the race to the end, in a shallow model and in a deep one;
and facts that are traced. `benchmarks/layers.py` measures what they are worth.
"""

_STEPS = 8
"""Steps of a trial edit's search. The facts of a layer are searched in one batch, and most are done
by then; a layer where they take longer is no good layer."""

_DEEP_QUESTIONS = {"paraphrases": 3, "neighbours": 6, "others": 2}
"""What an edit of a deep model is judged by, at most: such a model takes long to ask."""

_TOGETHER = 6
"""Facts of one part, which are searched in one batch: those that a race begins with."""

_MOMENT_BYTES = 4 * 2**30
"""Memory for second moments of several layers.

Beyond it they are computed again for each round of trials.
"""


@asking(grad=True, changes=True)
def recommend_layers(
    lm: LanguageModel,
    facts: Iterable[Fact] | None = None,
    *,
    trials: int | None = None,
    texts: Iterable[str] | None = None,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerChoice:
    """Measure which layers to edit by trial edits, each taken back.

    A model of up to 12 layers has all of them tried, a deeper one six of the early layers. Where
    the trials cannot tell layers apart, an average causal trace decides.

    The other settings of the edits are those recommended for the model. A model that knows too few
    bundled facts gets a fixed share of its depth; `source` and `reason` say so. The model is as
    before when this returns, also after an exception.

    Args:
        lm: The model.
        facts: Edits to try, with paraphrases and neighbours to judge them by. None: bundled facts
            that the model knows.
        trials: Edits at the layers that stay in the race to the end. None: 24, or 8 in a model of
            more than 12 layers. Layers far behind get a quarter or a half as many, six at least.
        texts: Text for second moments; "own" is text that the model writes. None: those that came
            with the model, or that the user's cache has, or else the bundled corpus.
        contexts: Templates with `{}` for the prompt. None: the model writes them.
        seed: Seed of the facts, the contexts and the text.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        InputError: Fewer than one trial, or facts that cannot be asked.
        SubjectError: A subject is not in its prompt exactly once.
        UnsupportedModelError: No layer is dense.
        NumericsError: A number is not finite.
    """
    check_model(lm)
    check_dense(lm.ffn)
    sources = Sources(texts=texts, contexts=contexts, seed=seed)
    return measure_layers(lm, facts, sources, trials=trials, progress=progress)


def published_choice(lm: LanguageModel) -> LayerChoice | None:
    """Return the layers that came with the model, or were published for one of its shape.

    None: neither.
    """
    choice = published(lm, shipped(RomeConfig, lm).get("layer"))
    memit = shipped(MemitConfig, lm).get("layers")
    return (
        dataclasses.replace(choice, memit=tuple(memit)) if choice is not None and memit else choice
    )


def measure_layers(
    lm: LanguageModel,
    facts: Iterable[Fact] | None,
    sources: Sources,
    *,
    trials: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> LayerChoice:
    """Do what `recommend_layers` does, with the moments of a folder.

    Args:
        lm: The model.
        facts: Edits to try.
        sources: What the edits may draw on.
        trials: Edits at the layers that stay in the race.
        folder: Where second moments are looked for; the computed one of the chosen layer is kept
            there.
        progress: Called with the step's name, how much is done, and how much there is.
    """
    usual = _TRIALS if lm.n_layers <= SHALLOW else _DEEP_TRIALS
    count = usual if trials is None else trials
    if count < 1:
        raise InputError(f"trials is {count}; expected at least one trial edit")
    config = RomeConfig.recommended(lm)
    if config.searched_by == "margin":
        config = dataclasses.replace(config, steps=min(config.steps, _STEPS))
    tried, guess = _facts_to_try(lm, facts, count, config, sources, progress)
    if guess is not None:
        return guess
    effects = mlp_effects(
        lm,
        tried[:_TRACED],
        progress=partial(tell, progress, "choosing layers: tracing facts"),
    )
    layers = candidates(lm)
    trial = _Trials(lm, tried, config, layers, sources, folder, progress)
    trial.announce()
    results = race(layers, len(tried), trial.run)
    scores = tuple(LayerScore.of(layer, some) for layer, some in results.items())
    measured: dict[str, Any] = {
        "scores": scores,
        "effects": effects,
        "window": trace_window(lm.n_layers),
        "facts": tuple(tried),
        "seed": sources.seed,
    }
    if not any(score.score for score in scores):
        why = f"{lm.name} took none of {len(tried)} trial edits at any of {len(layers)} layers"
        return dataclasses.replace(depth_choice(lm, config.layer or 0, why), **measured)
    rome_layer, memit_layers = choose(results, effects)
    trial.keep(rome_layer)
    total = sum(score.trials for score in scores)
    facts_tried = "one fact" if len(tried) == 1 else f"{len(tried)} facts"
    reason = f"the best of {len(layers)} layers in {total} trial edits of {facts_tried}"
    return LayerChoice(
        rome=rome_layer,
        memit=memit_layers,
        source="trials",
        reason=reason,
        fingerprint=lm.fingerprint,
        **measured,
    )


def _facts_to_try(
    lm: LanguageModel,
    facts: Iterable[Fact] | None,
    count: int,
    config: RomeConfig,
    sources: Sources,
    progress: Progress | None,
) -> tuple[list[Fact], LayerChoice | None]:
    """The facts to try edits on; and a choice by depth, where the model knows too few."""
    if facts is not None:
        return settled_facts(lm, listed(facts)), None
    tried = trial_facts(
        lm,
        count,
        seed=sources.seed,
        progress=partial(tell, progress, "choosing layers: asking bundled facts"),
        **({} if lm.n_layers <= SHALLOW else _DEEP_QUESTIONS),
    )
    if len(tried) >= min(MIN_FACTS, count):
        return tried, None
    why = f"{lm.name} knows {len(tried)} of the bundled facts that were asked, too few for trials"
    return [], depth_choice(lm, config.layer or 0, why)


def few_contexts(lm: LanguageModel, seed: int) -> list[str]:
    """The contexts of a trial edit: the bare prompt, two texts of the model, the chat template.

    A patch has 20 texts. With two a search takes a fraction of the time, and the layers compare the
    same.
    """
    return [*generate_contexts(lm, seed, chat=False)[::10], *chat_contexts(lm)[:1]]


@dataclass
class _Trials:
    """Trial edits at several layers, with the second moments that they need.

    Attributes:
        lm: The model.
        facts: The edits to try.
        config: The settings of the edits.
        layers: The layers in the race.
        sources: What the edits may draw on.
        folder: Where second moments are looked for and kept.
        progress: Called with the step's name, how much is done, and how much there is.
        moments: The second moments in memory, by layer.
        computed: Those that were computed here and fit into memory.
    """

    lm: LanguageModel
    facts: Sequence[Fact]
    config: RomeConfig
    layers: Sequence[int]
    sources: Sources
    folder: Path | None
    progress: Progress | None
    moments: dict[int, SecondMoment] = field(default_factory=dict)
    computed: dict[int, SecondMoment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed = self.sources.seed
        given = self.sources.contexts
        self.contexts = few_contexts(self.lm, seed) if given is None else list(given)
        self.done, self.most = 0, len(self.layers) * len(self.facts)
        widest = max(self.lm.ffn[layer].d_ff for layer in self.layers)
        # The sum, the matrix and the factor of each layer are in float64.
        self.at_once = max(1, _MOMENT_BYTES // (3 * 8 * widest**2))

    def announce(self) -> None:
        """Say how many edits are tried at most, and about how long they take."""
        seconds = self.most * seconds_to_search(
            self.lm, self.facts[:4], n_contexts=len(self.contexts), steps=self.config.passes
        )
        note(
            self.progress,
            f"At most {counted(self.most, 'trial edit')} at {counted(len(self.layers), 'layer')}: "
            f"about {in_words(seconds)} or less.",
            argument="trials",
        )

    def run(self, layers: Sequence[int], which: range) -> dict[int, list[Trial]]:
        """Try some of the edits at some layers; their results by layer."""
        facts = [self.facts[i] for i in which]
        results: dict[int, list[Trial]] = {}
        # Only these layers are still in the race.
        self.most = self.done + len(layers) * (len(self.facts) - which.start)
        for start in range(0, len(layers), self.at_once):
            group = layers[start : start + self.at_once]
            self._hold(group)
            if executor_in_use().cuts:
                results |= self._try_in_parts(facts, group)
                continue
            for layer in group:
                results[layer] = self._try(facts, layer)
        return results

    def keep(self, layer: int) -> None:
        """Write the computed second moment of a layer into the folder, if there is one."""
        if self.folder is not None and layer in self.computed:
            self.computed[layer].save(moments_file(self.folder, layer))

    def _try_in_parts(self, facts: Sequence[Fact], group: Sequence[int]) -> dict[int, list[Trial]]:
        """Try some edits at some layers by the executor in use.

        Its parts search targets, and judge edits. The edits are solved here, so no second moment is
        sent.
        """
        self._tell(0)
        chunks = [facts[i : i + _TOGETHER] for i in range(0, len(facts), _TOGETHER)]
        by_layer = search_at_layers(
            self.lm, self.config, self.contexts, chunks, group, progress=self._tell
        )
        edits = [
            self._solved(chunk, layer, targets)
            for layer in group
            for chunk, targets in zip(chunks, by_layer[layer], strict=True)
        ]
        self.done += len(facts) * len(group)
        step = "choosing layers: judging edits"
        total = len(facts) * len(group)
        judged = judge_edits(self.lm, edits, lambda done: tell(self.progress, step, done, total))
        n = len(chunks)
        self._tell(0)
        return {
            layer: [trial for part in judged[i * n : (i + 1) * n] for trial in part]
            for i, layer in enumerate(group)
        }

    def _solved(
        self, facts: Sequence[Fact], layer: int, targets: Targets | None = None
    ) -> list[Delta]:
        """Return a trial edit for each fact at a layer, searched if the targets are not given."""
        return rome_each(
            self.lm,
            facts,
            dataclasses.replace(self.config, layer=layer),
            moments=self.moments,
            contexts=self.contexts,
            seed=self.sources.seed,
            targets=targets,
            progress=lambda _, solved, __: self._tell(solved),
        )

    def _try(self, facts: Sequence[Fact], layer: int) -> list[Trial]:
        self._tell(0)
        deltas = self._solved(facts, layer)
        trials = []
        for fact, delta in zip(facts, deltas, strict=True):
            with applied(self.lm, delta):
                trials.append(judge(self.lm, fact))
        self.done += len(facts)
        self._tell(0)
        return trials

    def _tell(self, solved: int) -> None:
        """Report the edits that are done at all layers, with those that are solved at this one."""
        tell(self.progress, "choosing layers: trial edits", self.done + solved, self.most)

    def _hold(self, group: Sequence[int]) -> None:
        """Bring the second moments of a group of layers into memory: kept ones, or computed now."""
        fits = len(self.layers) <= self.at_once
        for layer in [] if fits else set(self.moments) - set(group):
            del self.moments[layer]
        if self.sources.texts is None:
            absent = [layer for layer in group if layer not in self.moments]
            self.moments.update(kept_moments(self.lm, absent, self.folder))
        if missing := [layer for layer in group if layer not in self.moments]:
            new = find_moments(
                self.lm,
                missing,
                texts=self.sources.texts,
                seed=self.sources.seed,
                progress=self.progress,
            )
            self.moments.update(new)
            self.computed.update(new if fits else {})


def settled_facts(lm: LanguageModel, facts: Sequence[Fact]) -> list[Fact]:
    """The facts that the model does not say yet, settled by what it says today.

    Neighbours expect what the model says, and a true target that it does not say is left out.
    """
    pairs = {(probe.prompt, probe.expected) for fact in facts for probe in fact.neighbours}
    pairs |= {(fact.text, target) for fact in facts for target in (fact.target, fact.target_true)}
    # Of several targets for a prompt, the answer to the longest one serves all.
    longest = dict(sorted(((p, t or "") for p, t in pairs), key=lambda pair: len(pair[1])))
    answers = say(lm, sorted(longest), [longest[prompt] for prompt in sorted(longest)])
    said = {prompt: answer.text for prompt, answer in zip(sorted(longest), answers, strict=True)}
    settled = []
    for fact in facts:
        fact_span(lm, fact)
        answer = said[fact.text]
        if fact.target is None or is_answered(lm, fact.text, answer, fact.target):
            continue
        near = [probe for probe in fact.neighbours if said[probe.prompt]]
        near = [Probe(probe.prompt, as_said(said[probe.prompt], probe.expected)) for probe in near]
        true = fact.target_true
        if true is not None and not is_answered(lm, fact.text, answer, true):
            true = None
        settled.append(Fact.from_dict({**fact.to_dict(), "neighbours": near, "target_true": true}))
    if not settled:
        every = "the fact" if len(facts) == 1 else f"all {len(facts)} facts"
        raise InputError(
            f"the model already says {every}, so no edit could be tried; give targets that it does "
            "not say"
        )
    return settled
