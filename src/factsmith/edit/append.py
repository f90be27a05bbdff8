"""Append: one fact, one new neuron. An INSERT that leaves the layer's own weights as they are.

    delta = append_facts(inputs)            # what `edit(lm, facts, "append")` runs
    delta.appended[5]                       # the rows of layer 5

The keys of a fact's rows match what enters the layer at the fact's subject, and nothing else
(`recognise`). Its value is the change of the layer's output that makes the model assert the fact.
So the facts share no weights, and a fact is taken out by dropping its rows.

Facts of one subject enter the layer alike. They are searched one after another, each on the model
that carries those before it. Then the facts that the model does not assert are searched again on
the model that carries all rows, and the difference is added to their own values.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.fact import Fact
from ..core.forms import canonical
from ..core.progress import Progress, tell
from .append_config import AppendConfig
from .append_inputs import SubjectInputs, layer_form, read_examples, read_subjects, surroundings
from .delta import Delta, applied
from .forms import NeuronRows, make_rows
from .inputs import EditInputs, recipe_of
from .recognise import Recognised, recognise
from .search import find_targets
from .spread import not_taken
from .target import Targets

_FARTHER = 1.5
"""How much farther than the clamp a repair may search."""

_SILENT = 0.1
"""Share of the usual coefficient below which a fact's neurons count as silent on its prompt. A
subject of one token that begins the prompt is not read in models without a start token: the first
position hardly shows which token it has."""


def append_facts(inputs: EditInputs) -> Delta:
    """Return the delta that appends rows for the facts of an edit."""
    run = _Run(inputs)
    for wave in _waves(inputs.facts):
        with applied(inputs.lm, run.parts):
            run.write(wave, "searching targets")
    for attempt in range(1, run.config.repair + 1):
        with applied(inputs.lm, run.parts):
            missed = run.short_of_target()
            if not missed:
                break
            run.write(missed, f"searching targets, repair {attempt}", repairs=True)
    return run.result()


def _waves(facts: Sequence[Fact]) -> list[list[int]]:
    """Return the numbers of the facts in groups that have each subject once."""
    seen: Counter[str] = Counter()
    waves: list[list[int]] = []
    for i, fact in enumerate(facts):
        subject = canonical(fact.subject)
        if seen[subject] == len(waves):
            waves.append([])
        waves[seen[subject]].append(i)
        seen[subject] += 1
    return waves


@dataclass
class _Run:
    """One edit in progress.

    Attributes:
        inputs: What the edit works from.
        subjects: What enters the layer at the facts' subjects.
        recognised: The reads that tell the facts' subjects apart.
        rows: The neurons, without values.
        strengths: (n,) what the neurons of each fact have together on its bare prompt. If they are
            nearly silent there, the median over the contexts.
        silent: (n,) whether they are.
        changes: (n, d_model) what is added to the layer's output at each subject.
        v_star: (n, d_model) the wanted output.
        convergence: For each fact, how the search for its target ended.
        written: Whether a fact has a value yet.
    """

    inputs: EditInputs
    subjects: SubjectInputs = field(init=False)
    recognised: Recognised = field(init=False)
    rows: NeuronRows = field(init=False)
    strengths: Tensor = field(init=False)
    silent: Tensor = field(init=False)
    changes: Tensor = field(init=False)
    v_star: Tensor = field(init=False)
    convergence: list[Mapping[str, Any]] = field(init=False)
    written: set[int] = field(default_factory=set)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        inputs, n = self.inputs, len(self.inputs.facts)
        lm, layer, progress = inputs.lm, self.layer, inputs.progress
        self.fingerprint = lm.fingerprint
        self.subjects = read_subjects(lm, inputs.facts, layer, inputs.contexts, progress)
        statistics = inputs.moments[layer]
        form = layer_form(lm, layer, statistics, self.subjects.around)
        self.recognised = recognise(
            *surroundings(
                read_examples(inputs, layer, self.subjects),
                statistics,
                None if form.biased else form.constant,
            ),
            progress=partial(_report, progress, "telling subjects apart", n),
        )
        read = self.recognised
        self.rows = make_rows(read.weights, read.offsets, read.floor, read.ceiling, form)
        strengths = self.rows.own_strengths(self.subjects.inputs)
        bare, usual = strengths[:, self.subjects.bare], strengths.median(1).values
        self.silent = bare < _SILENT * usual
        self.strengths = torch.where(self.silent, usual, bare)
        self.changes = torch.zeros(n, lm.d_model, dtype=torch.float64)
        self.v_star = torch.zeros(n, lm.d_model, dtype=torch.float32)
        self.convergence = [{}] * n

    @property
    def config(self) -> AppendConfig:
        """The method's settings."""
        assert isinstance(self.inputs.config, AppendConfig)
        return self.inputs.config

    @property
    def layer(self) -> int:
        """The layer that gets the rows."""
        (layer,) = self.inputs.layers
        return layer

    @property
    def parts(self) -> list[Delta]:
        """The rows that have a value, as one delta, or none yet."""
        return [self._delta(sorted(self.written))] if self.written else []

    def short_of_target(self) -> list[int]:
        """Return the facts that the model does not assert in all contexts."""
        tell(self.inputs.progress, "asking the facts", 0, None)
        return not_taken(self.inputs.lm, self.inputs.facts, self.inputs.contexts)

    def write(self, numbers: Sequence[int], step: str, *, repairs: bool = False) -> None:
        """Search the targets of some facts on the present model, and change their values.

        Args:
            numbers: The facts.
            step: What the progress says.
            repairs: Whether they are written already. Then the search may go farther.
        """
        inputs, config = self.inputs, self.config
        if inputs.targets is not None and not repairs:
            targets = Targets.gathered([(inputs.targets, i) for i in numbers])
        else:
            targets = find_targets(
                inputs.lm,
                [inputs.facts[i] for i in numbers],
                self.layer,
                dataclasses.replace(config, clamp=_FARTHER * config.clamp) if repairs else config,
                inputs.contexts,
                progress=partial(_report, inputs.progress, step, len(numbers)),
            )
        self.v_star[numbers] = targets.v_star.float().cpu()
        self.changes[numbers] += (targets.v_star - targets.v_initial).double().cpu()
        self.written.update(numbers)
        for i, record in zip(numbers, targets.convergence, strict=True):
            attempt = self.convergence[i].get("attempt", 0) + 1
            self.convergence[i] = {**record, "attempt": attempt, **self._record(i)}

    def result(self) -> Delta:
        """Return the rows of all facts as one delta."""
        return self._delta(list(range(len(self.inputs.facts))))

    def _record(self, i: int) -> dict[str, Any]:
        """Return what the keys of a fact are known to do."""
        record = {"coefficient": float(self.strengths[i]), **self.recognised.record(i)}
        return {**record, "silent_on_prompt": True} if self.silent[i] else record

    def _delta(self, numbers: Sequence[int]) -> Delta:
        """Return the rows of some facts as a delta."""
        inputs = self.inputs
        rows = self.rows.appended(self.changes, self.strengths)
        appended = dataclasses.replace(rows, inputs=self.subjects.mean.float())
        return Delta(
            layers={},
            k_star={},
            v_star=self.v_star[list(numbers)],
            facts=tuple(inputs.facts[i] for i in numbers),
            method="append",
            config=recipe_of(inputs),
            fingerprint=self.fingerprint,
            convergence=tuple(self.convergence[i] for i in numbers),
            appended={self.layer: appended.of(numbers)},
        )


def _report(progress: Progress | None, step: str, total: int, done: int) -> None:
    tell(progress, step, done, total)
