"""Silence and double sets of neurons: a table, curves, and how many carry half of a prediction."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from factsmith.model.address import Neuron
from factsmith.model.language_model import LanguageModel

from .facts import N_SOME, OWN, SOME, StudiedFact
from .interventions import Subject, anywhere, ranked
from .numbers import Bootstrap, change, rounded, spread

KS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 50)
"""Numbers of neurons on the curves."""

HALVING = (
    *range(1, 25),
    28,
    32,
    40,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
)
"""Numbers of neurons tried for half of a prediction."""

WAYS = (("last", 0.0), ("last", 2.0), ("every", 0.0), ("every", 2.0))
"""Scopes and scales of the table."""


def effects(
    lm: LanguageModel, asked: list[StudiedFact]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the table of interventions, the curves over numbers of neurons, and the halves."""
    names = [n for n in asked[0].neurons if n != "of the fact alone"]
    # {(set or curve, scope, scale): for each fact log p, (n_sets or n_ks, n_prompts)}
    logs: dict[tuple[str, str, float], list[Tensor]] = {}
    clean: list[Tensor] = []
    halves: dict[str, list[float]] = {}
    draw = random.Random(1)
    for a in asked:
        subject = Subject(lm, a.prompts, a.fact.object)
        clean.append(subject.clean)
        orders = {
            "attribution": ranked(a.record.scores.mean(0), KS[-1]),
            "activation": ranked(a.record.activations.mean(0), KS[-1]),
            "random": anywhere(lm, KS[-1], draw),
        }
        for scope, scale in WAYS:
            sets = names if scope == "last" else [n for n in names if "as many" not in n]
            columns = range(len(a.prompts)) if scope == "last" else SOME
            scaled = subject.log_p([a.neurons[n] for n in sets], scale, scope, columns)
            for name, row in zip(sets, scaled, strict=True):
                logs.setdefault((name, scope, scale), []).append(row)
            for name, order in orders.items():
                if name == "attribution" or (scope == "last" and scale == 0):
                    logs.setdefault((f"curve {name}", scope, scale), []).append(
                        subject.log_p([order[:k] for k in KS], scale, scope, SOME)
                    )
        halving(a, subject, halves, draw)
    return _table(asked, names, logs, clean), _curves(asked, logs, clean), halves_summary(halves)


def _table(
    asked: Sequence[StudiedFact],
    names: Sequence[str],
    logs: Mapping[tuple[str, str, float], list[Tensor]],
    clean: Sequence[Tensor],
) -> dict[str, Any]:
    """The change of p with each set: {set: {scope: {"suppress" or "amplify": ...}}}."""
    boot = Bootstrap(asked)
    before = torch.stack(list(clean)).numpy()
    table: dict[str, Any] = {}
    for name in names:
        for scope, scale in WAYS:
            if (name, scope, scale) in logs:
                after = torch.stack(logs[name, scope, scale]).numpy()
                old = before if scope == "last" else before[:, SOME]
                n_own = OWN if scope == "last" else N_SOME
                what = "suppress" if scale == 0 else "amplify"
                table.setdefault(name, {}).setdefault(scope, {})[what] = {
                    "own": change(boot, old[:, :n_own], after[:, :n_own]),
                    "held_out": change(boot, old[:, n_own:], after[:, n_own:]),
                }
    for name in ("share 0.7", "relation share"):
        for scope, whats in table[name].items():
            for what, parts in whats.items():
                for part, entry in parts.items():
                    controls = (f"{name}: random", f"{name}: random, same layers")
                    entry["times"] = {
                        c: times(entry, table[c][scope][what][part]) for c in controls
                    }
    return table


def times(effect: Mapping[str, Any], control: Mapping[str, Any]) -> list[float]:
    """Return how many times a control's change an effect is.

    The first number divides by the control's value, the second by the end of its interval that is
    farther from zero.
    """
    value, low, high = control["change"]
    return [
        rounded(abs(effect["change"][0]) / max(abs(x), 1e-6))
        for x in (value, max(low, high, key=abs))
    ]


def _curves(
    asked: Sequence[StudiedFact],
    logs: Mapping[tuple[str, str, float], list[Tensor]],
    clean: Sequence[Tensor],
) -> dict[str, Any]:
    """The change of p with the k first neurons of an order scaled.

    {order: {scope: {"suppress": {"own": [[value, low, high] for each k]}}}}
    """
    boot = Bootstrap(asked)
    before = torch.stack(list(clean)).exp().numpy()[:, SOME]
    curves: dict[str, Any] = {"k": list(KS)}
    for (name, scope, scale), logs_of_facts in logs.items():
        if name.startswith("curve "):
            after = torch.stack(logs_of_facts).exp().numpy()  # (n_facts, n_ks, n_prompts)
            for part, columns in {"own": slice(0, N_SOME), "held_out": slice(N_SOME, None)}.items():
                values = [
                    boot.change(before[:, columns].mean(1), after[:, k, columns].mean(1))
                    for k in range(len(KS))
                ]
                place = curves.setdefault(name.removeprefix("curve "), {}).setdefault(scope, {})
                place.setdefault("suppress" if scale == 0 else "amplify", {})[part] = values
    return curves


def halving(
    a: StudiedFact, subject: Subject, halves: dict[str, list[float]], draw: random.Random
) -> None:
    """Add the least number of neurons without which p halves, and that of half the attributions.

    The neurons are the first of an order. This is done for single predictions (two prompts, each
    with its own order) and for the fact (mean p over its own prompts, mean attribution).
    """
    scores = a.record.scores
    for prompt in (0, 5):
        orders = {
            "attribution": ranked(scores[prompt], HALVING[-1]),
            "activation": ranked(a.record.activations[prompt], HALVING[-1]),
            "random": anywhere(
                subject.lm, min(HALVING[-1], sum(f.d_ff for f in subject.lm.ffn)), draw
            ),
        }
        for name, order in orders.items():
            halves.setdefault(f"prediction: {name}", []).append(_least(subject, order, [prompt]))
        positive = scores[prompt].flatten().clamp_min(0).sort(descending=True).values.cumsum(0)
        halves.setdefault("half of the positive attributions", []).append(
            1 + int((positive < positive[-1] / 2).sum())
        )
        short = bool(positive[-1] < a.record.probability[prompt] / 2)
        count = math.inf if short else 1 + int((positive < a.record.probability[prompt] / 2).sum())
        halves.setdefault("attributions sum to half of p", []).append(count)
    halves.setdefault("fact: attribution", []).append(
        _least(subject, ranked(scores.mean(0), HALVING[-1]), range(len(a.own_prompts)))
    )
    held = range(len(a.own_prompts), len(a.prompts))
    halves.setdefault("fact, held-out prompts: attribution", []).append(
        _least(subject, ranked(scores.mean(0), HALVING[-1]), held)
    )


def _least(subject: Subject, order: Sequence[Neuron], prompts: Sequence[int]) -> float:
    """The least number of neurons, first in the order, whose suppression halves p."""
    half = subject.clean[list(prompts)].exp().mean() / 2
    for ks in (HALVING[:12], HALVING[12:24], HALVING[24:30], HALVING[30:36], HALVING[36:]):
        p = subject.log_p([order[:k] for k in ks], 0.0, "last", prompts).exp().mean(1)
        if (p <= half).any():
            return float(ks[int((p <= half).nonzero()[0])])
    return math.inf


def halves_summary(halves: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the counts and their distribution.

    A count is None where no number of neurons tried (up to 3,072) halves p.
    """
    return {
        name: {**spread(counts), "counts": [None if math.isinf(c) else int(c) for c in counts]}
        for name, counts in halves.items()
    }
