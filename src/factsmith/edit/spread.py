"""The methods of the MEMIT family: all facts at once, spread over several layers.

    delta = all_at_once(inputs, "memit")

First the targets are searched: the stream after the last edited layer, at each fact's subject
token. Then each layer, from the lowest up, adds its share of what is still missing (`_write`).
MEMIT, EMMET and AlphaEdit differ only in the formula of a layer, `SpreadConfig.update`.

MEMIT is Meng et al. 2022, https://arxiv.org/abs/2210.07229, algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.executor import Executor, Local, executor_in_use
from ..core.fact import Fact
from ..core.gap import Gap
from ..core.progress import Progress, tell
from ..core.slots import fill
from ..corpus.moments import SecondMoment
from ..model.language_model import LanguageModel
from . import solve
from .configs import SpreadConfig
from .contexts import SUBJECT, context_weights
from .delta import Delta, applied
from .inputs import EditInputs, recipe_of, with_shared_keys
from .keys import in_context, read_keys, read_stream, to_down
from .search import find_targets
from .target import Targets

_FARTHER = 1.5
"""How much farther than the clamp a repair may search. The first pass does not, because near
targets cost the model less, and most facts take with them."""

_ASKED = 1024
"""Questions of a part, where the executor in use cuts work into parts."""

_REACHED = 1.0
"""Nats. A target that has less probability than 1/e even after the wider search cannot be reached
at this site. To write it again would only cost other facts."""


def all_at_once(inputs: EditInputs, method: str) -> Delta:
    """Search the targets, write them layer by layer, and repair as often as the settings say."""
    run = _Run(_filled(inputs), method)
    for attempt in range(run.config.repair + 1):
        with applied(inputs.lm, run.parts):
            short = list(range(len(inputs.facts))) if not attempt else run.short_of_target()
            if not short:
                break
            run.write(short, run.targets_for(short, attempt), attempt)
    return run.result()


def _filled(inputs: EditInputs) -> EditInputs:
    """Return the inputs with the settings filled in that depend on the number of facts."""
    config, layers = inputs.config, set(inputs.layers)
    assert isinstance(config, SpreadConfig)
    count = len(inputs.facts) + sum(
        len(delta.facts) for delta in inputs.beneath if set(delta.layers) & layers
    )
    d_ff = inputs.lm.ffn[inputs.layers[0]].n_original
    return dataclasses.replace(inputs, config=config.for_facts(count, len(layers), d_ff))


@dataclass
class _Run:
    """One edit in progress.

    Attributes:
        inputs: What the edit works from.
        method: The method's name.
        parts: The deltas written so far: the first pass, then the repairs.
        v_star: (n, d_model) the wanted stream after the last edited layer. None before the first
            pass.
        keys: {layer: (n, d_ff)} each fact's mean key.
        convergence: For each fact, how the search for its target ended.
        anchor: The norm that targets are rescaled to. None: not known yet, or not wanted.
        stored: {layer: (d_ff, d_ff)} Σ k kᵀ over the keys of earlier edits. None: no such keys.
        fingerprint: That of the model before the edit.
    """

    inputs: EditInputs
    method: str
    parts: list[Delta] = field(default_factory=list)
    v_star: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    convergence: list[Mapping[str, Any]] = field(default_factory=list)
    anchor: float | None = None
    stored: dict[int, Tensor | None] = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.convergence = [{}] * len(self.inputs.facts)
        self.anchor = _anchor(self.config, self.inputs.beneath)
        self.stored = {layer: _stored(self.inputs.beneath, layer) for layer in self.inputs.layers}
        self.fingerprint = self.inputs.lm.fingerprint

    @property
    def config(self) -> SpreadConfig:
        """The method's settings."""
        assert isinstance(self.inputs.config, SpreadConfig)
        return self.inputs.config

    def short_of_target(self) -> list[int]:
        """Return the facts that the model does not assert yet, if their target can be reached."""
        lost = set()
        if self.inputs.known_targets is None:
            lost = {
                i
                for i, record in enumerate(self.convergence)
                if record["attempt"] > 1 and record.get("nll", 0.0) >= _REACHED
            }
        missed = not_taken(self.inputs.lm, self.inputs.facts, self.inputs.contexts)
        return [i for i in missed if i not in lost]

    def targets_for(self, short: Sequence[int], attempt: int) -> Targets:
        """Return the targets of some facts: as given, as kept, or searched on the present model."""
        inputs, config, last = self.inputs, self.config, self.inputs.layers[-1]
        facts = [inputs.facts[i] for i in short]
        if inputs.targets is not None and not attempt:
            return inputs.targets
        if inputs.known_targets is not None:
            return inputs.known_targets(facts, last, "stream")
        search = dataclasses.replace(config, clamp=_FARTHER * config.clamp) if attempt else config
        step = f"searching targets, repair {attempt}" if attempt else "searching targets"
        report = _counting(inputs.progress, step, len(facts))
        return find_targets(
            inputs.lm, facts, last, search, inputs.contexts, site="stream", progress=report
        )

    def write(self, short: Sequence[int], targets: Targets, attempt: int) -> None:
        """Write the targets of some facts in one pass over the layers, and keep the other facts."""
        inputs = self.inputs
        v_star = self._anchored(targets)
        for i, record in zip(short, targets.convergence, strict=True):
            self.convergence[i] = {**record, "attempt": attempt + 1}
        holding = [inputs.facts[i] for i in sorted(set(range(len(inputs.facts))) - set(short))]
        part = self._write([inputs.facts[i] for i in short], v_star, holding)
        self.parts.append(part)
        if self.v_star is None:
            # Copies: repairs must not change what the caller gave, or what the first part keeps.
            self.v_star = v_star.clone()
            self.keys = {layer: rows.clone() for layer, rows in part.k_star.items()}
        else:
            self.v_star[short] = v_star
            for layer in inputs.layers:
                self.keys[layer][short] = part.k_star[layer]

    def _anchored(self, targets: Targets) -> Tensor:
        """Return v_star with the part of the feed-forward network rescaled to the anchor's norm."""
        if self.config.norm_anchor is None:
            return targets.v_star
        # The wanted output of the feed-forward network alone.
        ffn = targets.ffn_initial + targets.v_star - targets.v_initial
        if self.anchor is None:
            self.anchor = float(ffn.norm(dim=-1).mean())
        return targets.v_star - ffn + solve.anchored(ffn, self.anchor)

    def _write(self, facts: Sequence[Fact], v_star: Tensor, holding: Sequence[Fact]) -> Delta:
        """Write in one pass over the layers, lowest first: MEMIT, algorithm 1.

        Each layer adds its share of what is still missing. Keys and stream are read on the model
        whose lower layers are already edited.

        Args:
            facts: The facts to write.
            v_star: (n, d_model) the wanted stream after the last edited layer.
            holding: Facts whose outputs stay. Their keys count as stored keys do.
        """
        inputs, config, layers = self.inputs, self.config, self.inputs.layers
        lm, contexts = inputs.lm, inputs.contexts
        rows = _Rows(lm, config, contexts)
        parts: list[Delta] = []
        with ExitStack() as stack:
            for done, layer in enumerate(layers):
                tell(inputs.progress, "writing layers", done, len(layers))
                keys, stored = read_keys(lm, facts, layer, contexts).cpu(), self.stored[layer]
                asked = rows.of(keys, facts, layer)
                if holding:
                    kept = read_keys(lm, holding, layer, contexts).cpu()
                    kept = rows.of(kept, holding, layer).double()
                    stored = kept.T @ kept if stored is None else stored + kept.T @ kept
                missing = v_star - read_stream(lm, facts, layers[-1]).to(v_star)
                # The share is taken from the stream. If a norm follows the down-projection, a part
                # of an addition does not have that part of its effect.
                share = solve.share(missing, len(layers) - done, config.spread)
                residuals = to_down(lm, facts, layer, share).cpu()
                left, right = rows.update(asked, residuals, inputs.moments[layer], stored)
                part = Delta(
                    layers={layer: (left.float().cpu(), right.float().cpu())},
                    k_star={layer: torch.einsum("ncm,c->nm", keys, rows.weights)},
                    v_star=v_star.cpu(),
                    facts=tuple(facts),
                    method=self.method,
                    config={},
                    fingerprint=self.fingerprint,
                )
                stack.enter_context(applied(lm, part))
                parts.append(part)
        return dataclasses.replace(
            parts[0],
            layers={layer: factors for part in parts for layer, factors in part.layers.items()},
            k_star={layer: keys for part in parts for layer, keys in part.k_star.items()},
        )

    def result(self) -> Delta:
        """Return all passes as one Delta."""
        inputs = self.inputs
        assert self.v_star is not None
        return dataclasses.replace(
            self.parts[0],
            layers={
                layer: _joined([part.layers[layer] for part in self.parts])
                for layer in inputs.layers
            },
            k_star=self.keys,
            v_star=self.v_star.cpu(),
            config=recipe_of(inputs, layers=list(inputs.layers), norm_anchor=self.anchor),
            convergence=with_shared_keys(inputs, self.keys, self.convergence),
        )


class _Rows:
    """Turns the keys of a fact in its contexts into rows of a layer's system.

    With keys="mean" a fact has one row, the mean key. With "each" it has a weighted row for each
    context, and for the subject alone if the settings give it a share.
    """

    def __init__(self, lm: LanguageModel, config: SpreadConfig, contexts: Sequence[str]) -> None:
        self.lm, self.config = lm, config
        self.weights = torch.tensor(context_weights(contexts), dtype=torch.float32)
        share = config.subject_share
        subject = torch.full(
            (len(SUBJECT) if share else 0,), share / len(SUBJECT), dtype=torch.float32
        )
        self.roots = torch.cat([self.weights * (1 - share), subject]).sqrt()[:, None]

    def of(self, keys: Tensor, facts: Sequence[Fact], layer: int) -> Tensor:
        """Return keys (n, contexts, d_ff) as rows of the system."""
        if self.config.keys == "mean":
            return torch.einsum("ncm,c->nm", keys, self.weights)
        if self.config.subject_share:
            alone = [Fact(fact.subject, "{}", fact.target) for fact in facts]
            keys = torch.cat([keys, read_keys(self.lm, alone, layer, SUBJECT).cpu()], dim=1)
        return (keys * self.roots).flatten(0, 1)

    def update(
        self, rows: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's update (d_model, n) and (n, d_ff).

        Args:
            rows: Rows of the system, as `of` returns them.
            residuals: (n, d_model) the wanted changes of the output.
            moment: The layer's second moment.
            stored: (d_ff, d_ff) Σ k kᵀ over stored keys. None: no such keys.
        """
        if self.config.keys == "mean":
            return self.config.update(rows, residuals, moment, stored)
        # The rows of a fact share its residual, so the rank stays that of the facts.
        each = (residuals[:, None] * self.roots).flatten(0, 1)
        _, right = self.config.update(rows, each, moment, stored)
        summed = (right.view(len(residuals), len(self.roots), -1) * self.roots.to(right)).sum(1)
        return residuals.T, summed


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the sum of several updates of one layer as one pair of factors, float32."""
    left, right = solve.compact(
        torch.cat([left for left, _ in parts], dim=1), torch.cat([right for _, right in parts])
    )
    return left.float(), right.float()


def not_taken(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]) -> list[int]:
    """Return the facts that did not take.

    A fact with a target takes if the model asserts it in all contexts. A fact to forget takes if
    the model asserts it in none.
    """
    pairs = [
        (
            i,
            fill(in_context(lm, context, fact), fact.subject).text,
            target,
            fact.gap if context.endswith("{}") else "auto",
        )
        for i, fact in enumerate(facts)
        if (target := fact.target or fact.target_true) is not None
        for context in contexts
    ]
    if not pairs:
        return []
    executor = executor_in_use()
    size = _ASKED if executor.cuts else len(pairs)
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    on: Executor = executor if len(parts) > 1 else Local()  # one part is asked at once
    said = [says for part in on.map(partial(_says, lm), parts) for says in part]
    missed = (
        i for (i, *_), says in zip(pairs, said, strict=True) if says == (facts[i].target is None)
    )
    return sorted(set(missed))


def _says(lm: LanguageModel, pairs: Sequence[tuple[int, str, str, Gap]]) -> list[bool]:
    """Return whether the model says each (number, prompt, target, gap)."""
    _, prompts, targets, gaps = zip(*pairs, strict=True)
    return lm.says(prompts, targets, gaps=gaps, by_tokens=True)


def _stored(beneath: Sequence[Delta], layer: int) -> Tensor | None:
    """Return Σ k kᵀ over the keys that earlier edits wrote into a layer, (d_ff, d_ff) float64.

    Returns:
        None if they wrote nothing there.
    """
    keys = [
        delta.k_star[layer].double()
        for delta in beneath
        if layer in delta.layers and len(delta.k_star[layer])
    ]
    return sum((k.T @ k for k in keys[1:]), keys[0].T @ keys[0]) if keys else None


def _anchor(config: SpreadConfig, beneath: Sequence[Delta]) -> float | None:
    """Return the norm to rescale to: the setting, or that of the first round.

    Returns:
        None if no norm is wanted, or if this is the first round.
    """
    if isinstance(config.norm_anchor, (int, float)):
        return float(config.norm_anchor)
    first = next((d.config["norm_anchor"] for d in beneath if d.config.get("norm_anchor")), None)
    return None if config.norm_anchor is None or first is None else float(first)


def _counting(progress: Progress | None, step: str, total: int) -> Callable[[int], None]:
    return lambda done: tell(progress, step, done, total)
