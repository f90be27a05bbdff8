"""Erase and rewrite neurons for good, and measure what other facts lose."""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import factsmith as fs
from factsmith import atlas
from factsmith.model.language_model import LanguageModel

from .facts import N_SOME, SOME, StudiedFact
from .numbers import Bootstrap, change, rounded, side_effects


def probes(
    asked: Sequence[StudiedFact], seed: int
) -> Callable[[StudiedFact], tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Return a function that gives the probes of a fact: (prompt, object) of other facts.

    They are up to five of its relation, and eight of other relations.
    """

    def others(a: StudiedFact) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        draw = random.Random(f"{seed} {a.fact.subject} {a.fact.relation}")
        within = [
            b
            for b in asked
            if b is not a and b.fact.relation == a.fact.relation and b.fact.object != a.fact.object
        ]
        across = [b for b in asked if b.fact.relation != a.fact.relation]
        pick = [draw.sample(some, min(n, len(some))) for some, n in ((within, 5), (across, 8))]
        near, far = ([(draw.choice(b.own_prompts), b.fact.object) for b in some] for some in pick)
        return near, far

    return others


def ask(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return log p(target) of (prompt, target) pairs, float64."""
    return lm.log_prob([p for p, _ in pairs], [t for _, t in pairs]).double()


def erased(
    lm: LanguageModel, asked: Sequence[StudiedFact], given: argparse.Namespace
) -> dict[str, Any]:
    """Erase each fact's neurons as a Delta.

    Returns the change of the fact itself, of others of its relation, and of other relations.
    """
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
            part: change(boot, torch.stack(before[part]).numpy(), torch.stack(logs[part]).numpy())
            for part in parts[:2]
        }
        | {part: side_effects(before[part], logs[part]) for part in parts[2:]}
        for name, logs in after.items()
    }


def erased_relations(lm: LanguageModel, asked: Sequence[StudiedFact]) -> dict[str, Any]:
    """Erase the 20 neurons most common among a relation's facts: the paper's table 6.

    Returns the growth of perplexity on the relation's facts, and on the others.
    """
    rows: dict[str, Any] = {}
    for relation in sorted({a.fact.relation for a in asked}):
        alike = [a for a in asked if a.fact.relation == relation]
        common = Counter(n for a in alike for n in a.neurons["share 0.7"]).most_common(20)
        if not common:
            continue
        parts = [
            [(p, a.fact.object) for a in alike for p in a.own_prompts],
            [
                (a.own_prompts[i % len(a.own_prompts)], a.fact.object)
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
    lm: LanguageModel, asked: Sequence[StudiedFact], given: argparse.Namespace
) -> dict[str, Any]:
    """Rewrite each fact to another object of its relation.

    Returns how often the model says the new object, how often it still says the old one, and what
    other facts lose.
    """
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
            own_prompts, held_out = (
                a.own_prompts[::4],
                a.held_out[1:3],
            )  # three, and one of each kind
            target = new[id(a)]
            delta = fs.rewrite(
                lm,
                a.neurons[name],
                a.fact.object,
                target,
                prompt=own_prompts[0] if signed else None,
                remove=1,
                add=add,
            )
            cuts = [len(part) for part in others(a)]
            pairs = [pair for part in others(a) for pair in part]
            for part, log in zip(before, clean[id(a)].split(cuts), strict=True):
                before[part].append(log)
            with fs.applied(lm, delta):
                n_own, n_new = len(own_prompts), len(own_prompts) + len(held_out)
                right = lm.says(
                    [*own_prompts, *held_out, *own_prompts],
                    [target] * n_new + [a.fact.object] * n_own,
                )
                for part, log in zip(after, ask(lm, pairs).split(cuts), strict=True):
                    after[part].append(log)
            said["own"].append(statistics.mean(right[:n_own]))
            said["held_out"].append(statistics.mean(right[n_own:n_new]))
            said["old_own"].append(statistics.mean(right[-n_own:]))
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
