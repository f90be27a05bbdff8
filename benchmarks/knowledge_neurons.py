"""Do knowledge neurons carry facts? The tables of Dai et al. 2022 (arXiv 2104.08696) on the bundled models, and how many neurons it takes.

    python benchmarks/knowledge_neurons.py --model atlas --room 0.05 0.75 --json benchmarks/results/knowledge_neurons.json    # 26 minutes
    python benchmarks/knowledge_neurons.py --model atlas-llama --json benchmarks/results/knowledge_neurons.json    # adds its part
    python benchmarks/knowledge_neurons.py --facts 24 --relations 4                                               # a minute

Neurons are located with a relation's first ten trained phrasings; effects are measured on these ("own") and on paraphrases never used for
locating ("held-out": the relation's two held-out sentences and two of its wide ones). Two populations:

    known   facts the model answers right on most of its own phrasings, p about 0.98: nothing is left to amplify
    unsure  facts whose mean p over their own phrasings lies in --room; BERT, in the paper, is as unsure of its facts

A change of probability is the authors' aggregate: per relation the mean of p after over the mean of p before, less one, then the mean over
relations; intervals are 95 % of a bootstrap over the facts of each relation. Scopes: "last" scales the neurons where the target is
predicted (the paper does so at the mask), "every" at every token, as `factsmith.intervene` and an erased value do.

Controls, with as many neurons: drawn from the whole model; drawn from the same layers; the most active ones.
Interventions run in batches in which every row has neurons of its own; `check` in the JSON is the largest difference from
`factsmith.intervene`, from a hook of its own on whole passes, and from erased weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import factsmith as fs
from factsmith import atlas
from factsmith.locate.neurons import KnowledgeNeurons, knowledge_neurons, refine_relation
from factsmith.model.address import Neuron
from factsmith.model.language_model import LanguageModel
from factsmith.model.replay import Replay, record
from factsmith.model.tokens import target_ids
from factsmith.model.trace import replacing

KS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 50)
OWN = 10  # every relation has ten trained phrasings at least
SOME = [
    *range(0, OWN, 2),
    *range(OWN, OWN + 4),
]  # prompts for what is dear: half of the own ones, and all held-out ones
N_SOME = OWN // 2
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
ROUNDS = 2000  # of the bootstrap
WAYS = (("last", 0.0), ("last", 2.0), ("every", 0.0), ("every", 2.0))
PAPER = {
    "neurons a fact": "4.13",
    "suppress": "-29.0 %",
    "amplify": "+31.2 %",
    "baseline": "-1.5 % / -1.3 %",
    "shared within / across relations": "1.23 / 0.09",
    "update success": "34.4 %",
}


@dataclass
class Asked:
    """One fact, its prompts and what was found about it."""

    fact: atlas.AtlasFact
    own: list[str]
    held: list[str]
    neurons: dict[str, list[Neuron]] = field(default_factory=dict)
    found: KnowledgeNeurons | None = None

    @property
    def record(self) -> KnowledgeNeurons:
        assert self.found is not None
        return self.found

    @property
    def prompts(self) -> list[str]:
        return self.own + self.held


# ── which facts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def texts(fact: atlas.AtlasFact, templates: Iterable[str]) -> list[str]:
    return [t.replace("{}", fact.subject) for t in templates]


def probabilities(
    lm: LanguageModel, facts: Sequence[atlas.AtlasFact], columns: Sequence[int]
) -> np.ndarray[Any, Any]:
    """p(object) of each fact after some of its relation's trained phrasings: (n, len(columns))."""
    found = np.zeros((len(facts), len(columns)))
    for place, column in enumerate(columns):
        for at in range(0, len(facts), 2000):
            some = facts[at : at + 2000]
            prompts = [
                atlas.phrasings(f.relation).trained[column].replace("{}", f.subject) for f in some
            ]
            found[at : at + len(some), place] = (
                lm.log_prob(prompts, [f.object for f in some]).double().exp().numpy()
            )
    return found


def scan(lm: LanguageModel, cache: Path) -> dict[atlas.AtlasFact, float]:
    """Mean p of the bundled facts over their own phrasings; kept on disk under the model's fingerprint.

    Facts that two phrasings show to be well known (0.93) keep the mean of these two: nine in ten, and none of them is wanted here.
    """
    file = cache / f"factsmith-scan-{lm.fingerprint[:16]}.npy"
    if not file.is_file():
        mean = probabilities(lm, atlas.facts(), (0, 6)).mean(1)
        near = np.nonzero(mean < 0.93)[0]
        mean[near] = probabilities(lm, [atlas.facts()[i] for i in near], range(OWN)).mean(1)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, mean)
    return dict(zip(atlas.facts(), np.load(file).tolist(), strict=True))


def prepared(
    lm: LanguageModel, by_relation: Mapping[str, Sequence[atlas.AtlasFact]], count: int
) -> list[Asked]:
    """`count` facts with their prompts, as evenly over the relations as there are facts; the object has one tokenization in them all."""
    chosen: list[Asked] = []
    for turn in range(count):
        for relation, facts in by_relation.items():
            if turn < len(facts) and len(chosen) < count:
                fact, p = facts[turn], atlas.phrasings(relation)
                held = [*p.held_out, *random.Random(relation).sample(p.wide, 2)]
                asked = Asked(fact, texts(fact, p.trained[:OWN]), texts(fact, held))
                if (
                    len(
                        {
                            tuple(target_ids(lm.tokenizer, prompt, fact.object))
                            for prompt in asked.prompts
                        }
                    )
                    == 1
                ):
                    chosen.append(asked)
    return sorted(chosen, key=lambda a: (a.fact.relation, a.fact.subject))


def known(lm: LanguageModel, given: argparse.Namespace) -> list[Asked]:
    """Facts answered with the whole object after at least seven of their ten own phrasings, of `--relations` relations."""
    draw = random.Random(given.seed)
    by_relation = {}
    for relation in sorted(draw.sample(atlas.relations(), given.relations)):
        told = atlas.facts(relation)
        some = draw.sample(told, min(len(told), 10 + 2 * given.facts // given.relations))
        asked = [(f, p) for f in some for p in texts(f, atlas.phrasings(relation).trained[:OWN])]
        right = lm.says([p for _, p in asked], [f.object for f, _ in asked])
        count = Counter(f for (f, _), ok in zip(asked, right, strict=True) if ok)
        by_relation[relation] = [f for f in some if count[f] >= 0.7 * OWN]
    return prepared(lm, by_relation, given.facts)


def unsure(lm: LanguageModel, given: argparse.Namespace) -> list[Asked]:
    """Facts whose mean p over their ten own phrasings lies in `--room`, of all relations with two of them or more."""
    p = scan(lm, given.cache)
    facts = [f for f in atlas.facts() if given.room[0] <= p[f] <= given.room[1]]
    random.Random(given.seed).shuffle(facts)
    by_relation: dict[str, list[atlas.AtlasFact]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    return prepared(
        lm, {r: some for r, some in sorted(by_relation.items()) if len(some) > 1}, given.facts
    )


# ── intervening ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Subject:
    """The prompts of one fact, run once; then log p(target) with any neurons scaled, each row its own."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[str], target: str) -> None:
        self.lm = lm
        heads = [lm.prompt_ids(p) for p in prompts]
        tail = target_ids(lm.tokenizer, prompts[0], target)
        batch = lm.align([h + tail[:-1] for h in heads], [len(h) - 1 for h in heads])
        self.target = torch.tensor(tail)
        self.replays: dict[str, Replay] = {"every": record(lm, batch)}
        self.replays["last"] = self.replays["every"].at(batch.pivot)
        self.clean = self.log_p([()], 1.0, "last")[0]

    @torch.no_grad()
    def log_p(
        self,
        sets: Sequence[Sequence[Neuron]],
        scale: float,
        scope: str,
        prompts: Sequence[int] | None = None,
    ) -> Tensor:
        """(len(sets), n_prompts) float64: log p(target) of every prompt with each set of neurons scaled."""
        replay = self.replays[scope]
        columns = range(replay.batch.size) if prompts is None else prompts
        pairs = [(s, p) for s in range(len(sets)) for p in columns]
        size = max(1, 3000 // replay.n_live)
        found = [
            self._run(replay, [sets[s] for s, _ in part], [p for _, p in part], scale)
            for part in _cut(pairs, size)
        ]
        return torch.cat(found).view(len(sets), len(columns))

    def _run(
        self, replay: Replay, sets: Sequence[Sequence[Neuron]], rows: Sequence[int], scale: float
    ) -> Tensor:
        ffn = self.lm.ffn
        factors = torch.ones(len(sets), len(ffn), max(f.d_ff for f in ffn))
        touched: set[int] = set()
        for row, neurons in enumerate(sets):
            if neurons:
                place = torch.tensor(neurons)  # (n, 2)
                factors[row, place[:, 0], place[:, 1]] = scale
                touched.update(place[:, 0].unique().tolist())

        def scaled(layer: int) -> Callable[[Tensor], Tensor]:
            factor = factors[:, layer, None, : ffn[layer].d_ff]
            return lambda m: (m.view(len(sets), -1, m.shape[-1]) * factor).view(m.shape)

        first = min(touched, default=len(ffn))
        index = torch.tensor(rows)
        with replacing({ffn[layer].down: scaled(layer) for layer in touched}, where="input"):
            hidden = replay.resume(first, replay.hidden[first][index], index)
        logits = replay.logits(hidden[:, -len(self.target) :]).double()
        return (
            logits.log_softmax(-1)
            .gather(-1, self.target.expand(len(rows), -1)[..., None])[..., 0]
            .sum(1)
        )


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def ranked(scores: Tensor, n: int) -> list[Neuron]:
    """The n neurons with the largest scores (n_layers, d_ff), largest first."""
    return [
        divmod(flat, scores.shape[1])
        for flat in scores.flatten().topk(min(n, scores.numel())).indices.tolist()
    ]


def anywhere(lm: LanguageModel, n: int, draw: random.Random) -> list[Neuron]:
    every = [(layer, i) for layer in range(lm.n_layers) for i in range(lm.ffn[layer].d_ff)]
    return list(draw.sample(every, n))


def same_layers(lm: LanguageModel, neurons: Sequence[Neuron], draw: random.Random) -> list[Neuron]:
    """As many other neurons of the same layers."""
    found: list[Neuron] = []
    for layer, count in sorted(Counter(n[0] for n in neurons).items()):
        others = [(layer, i) for i in range(lm.ffn[layer].d_ff) if (layer, i) not in set(neurons)]
        found += draw.sample(others, min(count, len(others)))
    return found


# ── numbers over facts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def rounded(x: float) -> float:
    return float(f"{x:.5g}")


class Bootstrap:
    """95 % intervals by drawing the facts of each relation anew; [value, low, high] of a mean or a change."""

    def __init__(self, asked: Sequence[Asked], seed: int = 0) -> None:
        names = [a.fact.relation for a in asked]
        self.names = sorted(set(names))
        self.groups = np.array(
            [[n == name for name in self.names] for n in names], dtype=float
        )  # (n_facts, n_relations)
        draw = np.random.default_rng(seed)
        self.weights = np.ones(
            (ROUNDS + 1, len(asked))
        )  # how often each fact is drawn; first row: once each
        for group in self.groups.T.astype(bool):
            self.weights[1:, group] = draw.multinomial(
                group.sum(), np.full(group.sum(), 1 / group.sum()), size=ROUNDS
            )

    def change(self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> list[float]:
        """The authors' aggregate: mean over relations of the mean after over the mean before, less one."""
        return self._interval(
            (
                (self.weights * after) @ self.groups / ((self.weights * before) @ self.groups) - 1
            ).mean(1)
        )

    def by_relation(
        self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]
    ) -> dict[str, float]:
        """The same for each relation."""
        return {
            n: rounded(float(x))
            for n, x in zip(
                self.names, after @ self.groups / (before @ self.groups) - 1, strict=True
            )
        }

    def mean(
        self, values: np.ndarray[Any, Any], of: np.ndarray[Any, Any] | float = 1.0
    ) -> list[float]:
        """Mean over facts, or the sum over facts as a part of another's sum."""
        return self._interval(
            self.weights @ values / (self.weights @ np.broadcast_to(of, values.shape))
        )

    def _interval(self, found: np.ndarray[Any, Any]) -> list[float]:
        return [rounded(float(x)) for x in (found[0], *np.quantile(found[1:], [0.025, 0.975]))]


def change(
    boot: Bootstrap, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """What became of p, given log p before and after, (n_facts, n_prompts)."""
    p, q = np.exp(before), np.exp(after)
    odds = (after - np.log1p(-np.minimum(q, 1 - 1e-12))) - (
        before - np.log1p(-np.minimum(p, 1 - 1e-12))
    )
    p_mean, q_mean = p.mean(1), q.mean(1)
    return {
        "change": boot.change(p_mean, q_mean),
        "by_relation": boot.by_relation(p_mean, q_mean),
        "mean_of_ratios": rounded(float((q_mean / p_mean).mean() - 1)),
        "log_odds": boot.mean(odds.mean(1)),
        "share_of_room": boot.mean(q_mean - p_mean, of=1 - p_mean),
        "p_before": rounded(float(p_mean.mean())),
        "p_after": rounded(float(q_mean.mean())),
    }


def spread(counts: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of counts (None: beyond what was tried), the share below a dozen, and of those beyond."""
    finite = np.array(counts, dtype=float)
    low, middle, high = (
        None if math.isinf(q) else float(q)
        for q in np.quantile(finite, [0.25, 0.5, 0.75], method="higher")
    )
    return {
        "median": middle,
        "quartiles": [low, high],
        "below_12": rounded(float((finite < 12).mean())),
        "beyond": rounded(float(np.isinf(finite).mean())),
    }


# ── the parts of the study ──────────────────────────────────────────────────────────────────────────────────────────────────


def locate(lm: LanguageModel, asked: list[Asked], given: argparse.Namespace) -> dict[str, Any]:
    """Find every fact's neurons, and the controls with as many; returns how many there are and what they share."""
    draw = random.Random(given.seed)
    for a in asked:
        a.found = knowledge_neurons(lm, a.own, a.fact.object)
    for relation in sorted({a.fact.relation for a in asked}):
        own = [a for a in asked if a.fact.relation == relation]
        for a, adjusted in zip(own, refine_relation([a.record for a in own]), strict=True):
            activation = a.record.activations.mean(0)
            for name, found in (("share 0.7", a.record), ("relation share", adjusted)):
                a.neurons[name] = list(found.refined)
                a.neurons[f"{name}: activation baseline"] = list(found.baseline)
                a.neurons[f"{name}: as many, most active"] = ranked(activation, len(found.refined))
    for a in asked:
        for name in ("share 0.7", "relation share"):
            a.neurons[f"{name}: random"] = anywhere(lm, len(a.neurons[name]), draw)
            a.neurons[f"{name}: random, same layers"] = same_layers(lm, a.neurons[name], draw)
    for relation in sorted({a.fact.relation for a in asked}):
        own = [a for a in asked if a.fact.relation == relation]
        for a in own:
            # Neurons of more than a tenth of the relation's other facts are the relation's, and are not edited (the authors' code).
            shared = Counter(n for b in own if b is not a for n in b.neurons["share 0.7"])
            a.neurons["of the fact alone"] = [
                n for n in a.neurons["share 0.7"] if shared[n] <= 0.1 * (len(own) - 1)
            ]
    layers = Counter(n[0] for a in asked for n in a.neurons["share 0.7"])
    return {
        "coarse": rounded(statistics.mean(len(c) for a in asked for c in a.record.coarse)),
        "sets": {
            name: {
                "neurons": rounded(statistics.mean(len(a.neurons[name]) for a in asked)),
                "median": statistics.median(len(a.neurons[name]) for a in asked),
                "none": rounded(statistics.mean(not a.neurons[name] for a in asked)),
                **overlap(asked, name),
            }
            for name in (
                "share 0.7",
                "relation share",
                "share 0.7: activation baseline",
                "relation share: activation baseline",
                "of the fact alone",
            )
        },
        "by_layer": [
            rounded(layers[layer] / max(1, sum(layers.values()))) for layer in range(lm.n_layers)
        ],
    }


def overlap(asked: Sequence[Asked], name: str) -> dict[str, float]:
    """How many neurons two facts share, on average, within a relation and across relations."""
    shared: dict[bool, list[int]] = {True: [], False: []}
    for a, b in combinations(asked, 2):
        shared[a.fact.relation == b.fact.relation].append(
            len(set(a.neurons[name]) & set(b.neurons[name]))
        )
    return {
        name: rounded(statistics.mean(shared[same] or [0]))
        for name, same in (("shared_within", True), ("shared_across", False))
    }


def effects(
    lm: LanguageModel, asked: list[Asked]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The table of interventions; effect against number of neurons; how many neurons carry half of a prediction."""
    names = [n for n in asked[0].neurons if n != "of the fact alone"]
    logs: dict[
        tuple[str, str, float], list[Tensor]
    ] = {}  # (set or curve, scope, scale) -> per fact (n_sets or n_ks, n_prompts)
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
            here = names if scope == "last" else [n for n in names if "as many" not in n]
            columns = range(len(a.prompts)) if scope == "last" else SOME
            for name, row in zip(
                here,
                subject.log_p([a.neurons[n] for n in here], scale, scope, columns),
                strict=True,
            ):
                logs.setdefault((name, scope, scale), []).append(row)
            for name, order in orders.items():
                if name == "attribution" or (scope == "last" and scale == 0):
                    logs.setdefault((f"curve {name}", scope, scale), []).append(
                        subject.log_p([order[:k] for k in KS], scale, scope, SOME)
                    )
        halving(a, subject, halves, draw)
    return _table(asked, names, logs, clean), _curves(asked, logs, clean), halves_summary(halves)


def _table(
    asked: Sequence[Asked],
    names: Sequence[str],
    logs: Mapping[tuple[str, str, float], list[Tensor]],
    clean: Sequence[Tensor],
) -> dict[str, Any]:
    boot = Bootstrap(asked)
    before = torch.stack(list(clean)).numpy()
    table: dict[str, Any] = {}
    for name in names:
        for scope, scale in WAYS:
            if (name, scope, scale) in logs:
                after = torch.stack(logs[name, scope, scale]).numpy()
                old = before if scope == "last" else before[:, SOME]
                n_own = OWN if scope == "last" else N_SOME
                table.setdefault(name, {}).setdefault(scope, {})[
                    "suppress" if scale == 0 else "amplify"
                ] = {
                    "own": change(boot, old[:, :n_own], after[:, :n_own]),
                    "held_out": change(boot, old[:, n_own:], after[:, n_own:]),
                }
    for name in ("share 0.7", "relation share"):
        for scope, whats in table[name].items():
            for what, found in whats.items():
                for part, entry in found.items():
                    controls = (f"{name}: random", f"{name}: random, same layers")
                    entry["times"] = {
                        c: times(entry, table[c][scope][what][part]) for c in controls
                    }
    return table


def times(effect: Mapping[str, Any], control: Mapping[str, Any]) -> list[float]:
    """How many times a control's change an effect is: by the control's value, and by the bound of its interval farther from zero."""
    value, low, high = control["change"]
    return [
        rounded(abs(effect["change"][0]) / max(abs(x), 1e-6))
        for x in (value, max(low, high, key=abs))
    ]


def _curves(
    asked: Sequence[Asked],
    logs: Mapping[tuple[str, str, float], list[Tensor]],
    clean: Sequence[Tensor],
) -> dict[str, Any]:
    """Change of p with the k first neurons of an order scaled: {order: {scope: {suppress: {own: [[value, low, high] per k]}}}}."""
    boot = Bootstrap(asked)
    before = torch.stack(list(clean)).exp().numpy()[:, SOME]
    curves: dict[str, Any] = {"k": list(KS)}
    for (name, scope, scale), found in logs.items():
        if name.startswith("curve "):
            after = torch.stack(found).exp().numpy()  # (n_facts, n_ks, n_prompts)
            for part, columns in {"own": slice(0, N_SOME), "held_out": slice(N_SOME, None)}.items():
                values = [
                    boot.change(before[:, columns].mean(1), after[:, k, columns].mean(1))
                    for k in range(len(KS))
                ]
                place = curves.setdefault(name.removeprefix("curve "), {}).setdefault(scope, {})
                place.setdefault("suppress" if scale == 0 else "amplify", {})[part] = values
    return curves


def halving(
    a: Asked, subject: Subject, halves: dict[str, list[float]], draw: random.Random
) -> None:
    """The least number of neurons, first in an order, without which p is half of what it was; and half of the attributions' sum.

    For single predictions (two prompts, each with its own order) and for the fact (mean p over its own prompts, mean attribution).
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
        _least(subject, ranked(scores.mean(0), HALVING[-1]), range(len(a.own)))
    )
    held = range(len(a.own), len(a.prompts))
    halves.setdefault("fact, held-out prompts: attribution", []).append(
        _least(subject, ranked(scores.mean(0), HALVING[-1]), held)
    )


def _least(subject: Subject, order: Sequence[Neuron], prompts: Sequence[int]) -> float:
    half = subject.clean[list(prompts)].exp().mean() / 2
    for ks in (HALVING[:12], HALVING[12:24], HALVING[24:30], HALVING[30:36], HALVING[36:]):
        p = subject.log_p([order[:k] for k in ks], 0.0, "last", prompts).exp().mean(1)
        if (p <= half).any():
            return float(ks[int((p <= half).nonzero()[0])])
    return math.inf


def halves_summary(halves: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Counts as they are, None where no number of neurons tried (up to 3,072) does it, and their distribution."""
    return {
        name: {**spread(counts), "counts": [None if math.isinf(c) else int(c) for c in counts]}
        for name, counts in halves.items()
    }


def probes(
    asked: Sequence[Asked], seed: int
) -> Callable[[Asked], tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """For a fact: prompts and objects of up to five others of its relation, and of eight of other relations."""

    def others(a: Asked) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        draw = random.Random(f"{seed} {a.fact.subject} {a.fact.relation}")
        within = [
            b
            for b in asked
            if b is not a and b.fact.relation == a.fact.relation and b.fact.object != a.fact.object
        ]
        across = [b for b in asked if b.fact.relation != a.fact.relation]
        pick = [draw.sample(some, min(n, len(some))) for some, n in ((within, 5), (across, 8))]
        return tuple([(draw.choice(b.own), b.fact.object) for b in some] for some in pick)  # type: ignore[return-value]

    return others


def ask(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> Tensor:
    return lm.log_prob([p for p, _ in pairs], [t for _, t in pairs]).double()


def side_effects(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    """Mean p before and after, and how much the perplexity of the right object grew."""
    old, new = torch.cat(list(before)), torch.cat(list(after))
    return {
        "p_before": rounded(float(old.exp().mean())),
        "p_change": rounded(float(new.exp().mean() / old.exp().mean() - 1)),
        "perplexity_growth": rounded(float((old.mean() - new.mean()).exp() - 1)),
    }


def erased(lm: LanguageModel, asked: Sequence[Asked], given: argparse.Namespace) -> dict[str, Any]:
    """Erase each fact's neurons as a Delta: the fact itself, others of its relation, and of other relations."""
    others, boot = probes(asked, given.seed), Bootstrap(asked)
    parts = ("own", "held_out", "relation", "elsewhere")
    before: dict[str, list[Tensor]] = {part: [] for part in parts}
    names = ("share 0.7", "relation share", "of the fact alone", "share 0.7: random, same layers")
    after: dict[str, dict[str, list[Tensor]]] = {
        name: {part: [] for part in parts} for name in names
    }
    for a in asked:
        within, across = others(a)
        pairs = [(a.prompts[i], a.fact.object) for i in SOME] + within + across
        cuts = [N_SOME, len(SOME) - N_SOME, len(within), len(across)]

        def note(into: dict[str, list[Tensor]], pairs: Any = pairs, cuts: Any = cuts) -> None:
            for part, log in zip(parts, ask(lm, pairs).split(cuts), strict=True):
                into[part].append(log)

        note(before)
        for name in names:
            with fs.applied(lm, fs.erase(lm, a.neurons[name]) if a.neurons[name] else []):
                note(after[name])
    return {
        name: {
            part: change(boot, torch.stack(before[part]).numpy(), torch.stack(found[part]).numpy())
            for part in parts[:2]
        }
        | {part: side_effects(before[part], found[part]) for part in parts[2:]}
        for name, found in after.items()
    }


def erased_relations(lm: LanguageModel, asked: Sequence[Asked]) -> dict[str, Any]:
    """Erase the 20 neurons most common among a relation's facts (the paper's table 6): growth of perplexity there, and elsewhere."""
    rows = {}
    for relation in sorted({a.fact.relation for a in asked}):
        own = [a for a in asked if a.fact.relation == relation]
        common = Counter(n for a in own for n in a.neurons["share 0.7"]).most_common(20)
        if not common:
            continue
        parts = [
            [(p, a.fact.object) for a in own for p in a.own],
            [
                (a.own[i % len(a.own)], a.fact.object)
                for i, a in enumerate(asked)
                if a.fact.relation != relation
            ],
        ]
        before = [ask(lm, part) for part in parts]
        with fs.applied(lm, fs.erase(lm, [n for n, _ in common])):
            after = [ask(lm, part) for part in parts]
        rows[relation] = {
            "neurons": len(common),
            "relation": side_effects(before[:1], after[:1]),
            "elsewhere": side_effects(before[1:], after[1:]),
        }
    growth = [
        [row[part]["perplexity_growth"] for row in rows.values()]
        for part in ("relation", "elsewhere")
    ]
    return {
        "relations": rows,
        "median_growth": {
            "relation": statistics.median(growth[0]),
            "elsewhere": statistics.median(growth[1]),
        },
    }


def rewritten(
    lm: LanguageModel, asked: Sequence[Asked], given: argparse.Namespace
) -> dict[str, Any]:
    """Rewrite each fact to another object of its relation: is the new one said, is the old one still, and what of other facts."""
    others = probes(asked, given.seed)
    result: dict[str, Any] = {}
    draw = random.Random(given.seed)
    objects = {
        relation: sorted({f.object for f in atlas.facts(relation)})
        for relation in {a.fact.relation for a in asked}
    }
    new = {
        id(a): draw.choice([o for o in objects[a.fact.relation] if o != a.fact.object])
        for a in asked
    }
    alone, refined = "of the fact alone", "share 0.7"
    settings = [(alone, False, add) for add in (8.0, 4.0, 2.0, 1.0)] + [
        (alone, True, 8.0),
        (alone, True, 2.0),
    ]
    settings += [
        (refined, False, 8.0),
        (refined, True, 8.0),
        ("relation share", False, 8.0),
        (f"{refined}: random", False, 8.0),
    ]
    clean = {id(a): ask(lm, [pair for part in others(a) for pair in part]) for a in asked}
    for name, signed, add in settings:
        said: dict[str, list[float]] = {part: [] for part in ("own", "held_out", "old_own", "none")}
        before: dict[str, list[Tensor]] = {"relation": [], "elsewhere": []}
        after: dict[str, list[Tensor]] = {"relation": [], "elsewhere": []}
        for a in asked:
            said["none"].append(float(not a.neurons[name]))
            if not a.neurons[name]:  # the authors leave such facts out
                continue
            own, held = a.own[::4], a.held[1:3]  # three, and one of either kind
            target = new[id(a)]
            delta = fs.rewrite(
                lm,
                a.neurons[name],
                a.fact.object,
                target,
                prompt=own[0] if signed else None,
                remove=1,
                add=add,
            )
            cuts = [len(part) for part in others(a)]
            pairs = [pair for part in others(a) for pair in part]
            for part, log in zip(before, clean[id(a)].split(cuts), strict=True):
                before[part].append(log)
            with fs.applied(lm, delta):
                right = lm.says(
                    [*own, *held, *own],
                    [target] * (len(own) + len(held)) + [a.fact.object] * len(own),
                )
                for part, log in zip(after, ask(lm, pairs).split(cuts), strict=True):
                    after[part].append(log)
            said["own"].append(statistics.mean(right[: len(own)]))
            said["held_out"].append(statistics.mean(right[len(own) : len(own) + len(held)]))
            said["old_own"].append(statistics.mean(right[-len(own) :]))
        kept = [a for a in asked if a.neurons[name]]
        result[f"{name}, {'signed' if signed else 'as in the paper'}, add {add:g}"] = {
            **{
                part: Bootstrap(kept).mean(np.array(values))
                for part, values in said.items()
                if part != "none"
            },
            "no_neurons": rounded(statistics.mean(said["none"])),
            **{part: side_effects(before[part], after[part]) for part in before},
        }
    return result


def check(lm: LanguageModel, asked: Sequence[Asked]) -> float:
    """The largest difference in log p between the batches used here and the public way, on a few facts."""
    worst = 0.0
    for a in [a for a in asked if a.neurons["share 0.7"]][:: max(1, len(asked) // 4)]:
        neurons, subject = a.neurons["share 0.7"], Subject(lm, a.prompts, a.fact.object)
        pairs = [(p, a.fact.object) for p in a.prompts]
        for scale in (0.0, 2.0):
            with fs.intervene(lm, neurons, scale):
                public = ask(lm, pairs)
            worst = max(
                worst, float((public - subject.log_p([neurons], scale, "every")[0]).abs().max())
            )
            worst = max(
                worst,
                float(
                    (_by_hook(lm, a, neurons, scale) - subject.log_p([neurons], scale, "last")[0])
                    .abs()
                    .max()
                ),
            )
        with fs.applied(lm, fs.erase(lm, neurons)):
            worst = max(
                worst,
                float((ask(lm, pairs) - subject.log_p([neurons], 0.0, "every")[0]).abs().max()),
            )
    return worst


@torch.no_grad()
def _by_hook(lm: LanguageModel, a: Asked, neurons: Sequence[Neuron], scale: float) -> Tensor:
    """log p with neurons scaled at the last prompt token and at the target's, by one whole pass of the bare model a prompt."""
    found = []
    for prompt in a.prompts:
        head, tail = lm.prompt_ids(prompt), target_ids(lm.tokenizer, prompt, a.fact.object)
        handles = []
        for layer, i in neurons:  # type: ignore[misc]

            def hook(module: Any, args: Any, i: int = i, at: int = len(head) - 1) -> Any:
                changed = args[0].clone()
                changed[:, at:, i] *= scale
                return (changed,)

            handles.append(lm.ffn[layer].down.register_forward_pre_hook(hook))
        logits = (
            lm.module(input_ids=torch.tensor([head + tail[:-1]]))
            .logits[0, len(head) - 1 :]
            .double()
            .log_softmax(-1)
        )
        for handle in handles:
            handle.remove()
        found.append(logits.gather(1, torch.tensor(tail)[:, None]).sum())
    return torch.stack(found)


def study(
    lm: LanguageModel, asked: list[Asked], given: argparse.Namespace, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Everything about one population."""
    result: dict[str, Any] = {
        "facts": len(asked),
        "relations": len({a.fact.relation for a in asked}),
    }
    p = torch.stack([lm.log_prob(a.own, [a.fact.object] * OWN).exp() for a in asked]).mean(1)
    result["p"] = [rounded(float(x)) for x in p.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))]
    result["located"] = locate(lm, asked, given)
    tell("located")
    result["check"] = rounded(check(lm, asked))
    result["effects"], result["curves"], result["half"] = effects(lm, asked)
    tell("effects, curves, halves")
    result["erase"] = erased(lm, asked, given)
    result["erase_relations"] = erased_relations(lm, asked)
    tell("erased")
    result["rewrite"] = rewritten(lm, asked, given)
    tell("rewritten")
    return result


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def percent(x: Sequence[float]) -> str:
    """A share and its interval in percent."""
    return f"{100 * x[0]:+.1f} [{100 * x[1]:+.1f}, {100 * x[2]:+.1f}]"


def markdown(model: str, population: str, r: Mapping[str, Any]) -> str:
    """The tables of one population; percentages with 95 % intervals."""
    lines = [f"\n### {model}, {population}: {r['facts']} facts of {r['relations']} relations", ""]
    lines += [f"Mean p over own prompts, least, quartiles, most: {r['p']}", ""]
    located = r["located"]
    lines += [
        f"Coarse sets: {located['coarse']:.1f} neurons a prompt. Layers of the refined ones: {located['by_layer']}",
        "",
        "| set | neurons a fact (mean, median) | none | shared within | shared across |",
        "|---|---|---|---|---|",
    ]
    for name, s in located["sets"].items():
        row = (
            f"{s['neurons']:.2f}, {s['median']:g}",
            f"{s['none']:.0%}",
            f"{s['shared_within']:.2f}",
            f"{s['shared_across']:.3f}",
        )
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        "Change of p(target) in %:",
        "",
        "| neurons | scope | suppress, own | suppress, held-out | amplify, own | amplify, held-out |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, scopes in r["effects"].items():
        for scope, e in scopes.items():
            cells = [
                percent(e[what][part]["change"])
                for what in ("suppress", "amplify")
                for part in ("own", "held_out")
            ]
            lines.append(f"| {name} | {scope} | {' | '.join(cells)} |")
    lines += [
        "",
        "Log-odds, and share of the room up to p = 1 taken (own prompts, last):",
        "",
        "| neurons | suppress | amplify | room |",
        "|---|---|---|---|",
    ]
    for name in ("share 0.7", "relation share"):
        e = r["effects"][name]["last"]
        odds = [f"{e[w]['own']['log_odds'][0]:+.2f}" for w in ("suppress", "amplify")]
        lines.append(
            f"| {name} | {odds[0]} | {odds[1]} | {percent(e['amplify']['own']['share_of_room'])} |"
        )
    lines += [
        "",
        "Suppressing the k neurons with the largest mean attribution (held-out prompts):",
        "",
        "| k | " + " | ".join(map(str, KS)) + " |",
    ]
    lines.append("|---" * (len(KS) + 1) + "|")
    for order in ("attribution", "activation", "random"):
        for scope, found in r["curves"][order].items():
            lines.append(
                f"| {order}, {scope} | "
                + " | ".join(f"{100 * v[0]:+.0f}" for v in found["suppress"]["held_out"])
                + " |"
            )
    lines += [
        "",
        "Neurons that carry half:",
        "",
        "| | median | quartiles | below 12 | not by 3,072 |",
        "|---|---|---|---|---|",
    ]
    for name, h in r["half"].items():
        low, middle, high = (
            "-" if n is None else f"{n:g}"
            for n in (h["quartiles"][0], h["median"], h["quartiles"][1])
        )
        lines.append(
            f"| {name} | {middle} | {low}, {high} | {h['below_12']:.0%} | {h['beyond']:.0%} |"
        )
    lines += [
        "",
        "Erased (as a Delta):",
        "",
        "| neurons | own | held-out | p of others of the relation | p elsewhere |",
        "|---|---|---|---|---|",
    ]
    for name, e in r["erase"].items():
        side = [f"{100 * e[part]['p_change']:+.1f}" for part in ("relation", "elsewhere")]
        lines.append(
            f"| {name} | {percent(e['own']['change'])} | {percent(e['held_out']['change'])} | {side[0]} | {side[1]} |"
        )
    growth = r["erase_relations"]["median_growth"]
    lines += [
        "",
        f"The relation's 20 commonest erased: perplexity {growth['relation']:+.0%} there, {growth['elsewhere']:+.0%} elsewhere (medians).",
    ]
    lines += [
        "",
        "Rewritten:",
        "",
        "| | new said, own | new said, held-out | old still said | no neurons | p, relation | p, elsewhere |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, e in r["rewrite"].items():
        side = [f"{100 * e[part]['p_change']:+.1f}" for part in ("relation", "elsewhere")]
        said = [percent(e[part]) for part in ("own", "held_out", "old_own")]
        lines.append(
            f"| {name} | {' | '.join(said)} | {e['no_neurons']:.0%} | {side[0]} | {side[1]} |"
        )
    return "\n".join(lines)


def draw(populations: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How many neurons carry half of a prediction: the share of prompts that need no more than so many; {population: its numbers}."""
    series = {}
    for name, found in populations.items():
        for way in ("attribution", "activation"):
            counts = [c for c in found["half"][f"prediction: {way}"]["counts"] if c is not None]
            total = len(found["half"][f"prediction: {way}"]["counts"])
            share = [100 * sum(c <= k for c in counts) / total for k in HALVING]
            label = {"attribution": "by attribution", "activation": "most active"}[way]
            series[f"{name}, {label}"] = (HALVING, share, share, share)
    fs.curves(
        series,
        x_label="neurons suppressed",
        y_label="% of prompts whose p has halved",
        title="Neurons that carry half of a prediction (line: a dozen)",
        mark_x=12,
        mark_y=50,
        log_x=True,
        path=path,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas", choices=atlas.names())
    parser.add_argument("--facts", type=int, default=200, help="facts in each population")
    parser.add_argument("--relations", type=int, default=20, help="relations of the known facts")
    parser.add_argument(
        "--populations", nargs="+", default=["known", "unsure"], choices=["known", "unsure"]
    )
    parser.add_argument(
        "--room", type=float, nargs=2, default=(0.05, 0.7), help="mean p of the unsure facts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the scan of all facts is kept",
    )
    parser.add_argument(
        "--json", type=Path, help="write the numbers here, beside those of the other model"
    )
    parser.add_argument(
        "--draw", type=Path, help="draw the halves of --json's numbers here, and measure nothing"
    )
    given = parser.parse_args()
    if given.draw:
        return draw(json.loads(given.json.read_text())[given.model]["populations"], given.draw)
    torch.set_num_threads(1)
    started = time.process_time()

    def tell(what: str) -> None:
        print(f"{time.process_time() - started:7.0f} s  {what}", flush=True)

    lm = fs.load(given.model)
    result: dict[str, Any] = {
        "seed": given.seed,
        "paper": PAPER,
        "room": list(given.room),
        "populations": {},
    }
    for name in given.populations:
        asked = {"known": known, "unsure": unsure}[name](lm, given)
        tell(f"{name}: {len(asked)} facts chosen")
        result["populations"][name] = study(lm, asked, given, tell)
        print(markdown(given.model, name, result["populations"][name]), flush=True)
    result["seconds"] = round(time.process_time() - started)
    if given.json:
        whole = json.loads(given.json.read_text()) if given.json.is_file() else {}
        text = json.dumps({**whole, given.model: result}, indent=1)
        # Lists of numbers on one line each.
        given.json.write_text(
            re.sub(r"\[([^\[\]{}]*)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
        )


if __name__ == "__main__":
    main()
