"""How well do gradients rank the exact causal map? Chooses the defaults of `attribution_trace`.

    python benchmarks/attribution.py [--model atlas] [--facts 30] \
        [--json benchmarks/results/attribution-atlas.json]

The facts are of different relations, and the model knows them. For each fact the script computes
the exact map of each kind, and estimates of it. An estimate uses the gradient of p or of log p,
averaged over 1 to 10 points between the corrupted and the clean embeddings. All corrupted runs of a
pass share a point ("same"), or each run has its own ("staggered").

The maps are compared over all cells from the subject's first token on: Spearman's and Pearson's
correlation, and whether the largest cell is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

import factsmith as fs
from factsmith import atlas
from factsmith.locate.attribution import rank_correlation, restored_sites
from factsmith.locate.corruption import Corruption
from factsmith.locate.kinds import Restoration, TraceKind
from factsmith.locate.runs import Runs, answer_probability, record_runs
from factsmith.locate.sweep import trace_runs
from factsmith.model.trace import replacing


@dataclass(frozen=True)
class Variant:
    """One way to average the gradient.

    Attributes:
        log: Take the gradient of log p, and not of p.
        staggered: Give each corrupted run of a pass a point of its own.
        passes: Number of gradients.
    """

    log: bool
    staggered: bool
    passes: int

    def shares(self, step: int, samples: int) -> Tensor:
        """Return how far each corrupted run is on the way to the clean one: (samples,)."""
        middle = (step + 0.5) / self.passes
        if not self.staggered:
            return torch.full((samples,), middle)
        order = torch.arange(samples).roll(step * max(1, samples // self.passes))
        return (order + middle) / samples


def known_facts(lm: Any, count: int, seed: int = 0) -> list[fs.Fact]:
    """Return one fact of each of `count` relations that the model answers rightly.

    The prompt is a phrasing that the model was trained on.
    """
    facts: dict[str, fs.Fact] = {}
    every = atlas.facts()
    for index in np.random.RandomState(seed).permutation(len(every)):
        entry = every[index]
        fact = fs.Fact(
            entry.subject,
            atlas.phrasings(entry.relation).trained[0],
            entry.object,
            relation=entry.relation,
        )
        if (
            entry.relation in facts
            or fact.text.count(fact.subject) != 1
            or not lm.says([fact.text], [fact.target])[0]
        ):
            continue
        facts[entry.relation] = fact
        if len(facts) == count:
            break
    return list(facts.values())


def estimate(runs: Runs, restoration: Restoration, variant: Variant) -> Tensor:
    """Return the first-order effects from the subject's first token on: (S, n_layers)."""
    lm, live = runs.lm, runs.corrupted
    sites, moved = restored_sites(runs, restoration.part)
    total = torch.zeros(live.n_live, lm.n_layers)
    for step in range(variant.passes):
        share = variant.shares(step, runs.samples)
        probes: list[Tensor] = []

        def probed(output: Tensor, probes: list[Tensor] = probes) -> Tensor:
            probes.append(torch.zeros_like(output).requires_grad_())
            return output + probes[-1]

        with torch.enable_grad(), replacing(dict.fromkeys(sites, probed)):
            way = runs.clean.hidden[0] - live.hidden[0]
            hidden = live.resume(0, live.hidden[0] + share[:, None, None] * way)
            p = answer_probability(lm, hidden, runs.answer_ids)
            gradients = torch.autograd.grad((p.log() if variant.log else p).sum(), probes)
        shaped = (g.reshape(runs.samples, -1, lm.d_model)[:, -live.n_live :] for g in gradients)
        effects = [(m * g).sum(-1).mean(0) for m, g in zip(moved, shaped, strict=True)]
        total += torch.stack(effects, dim=1) / variant.passes
    spans = restoration.spans(lm.n_layers)
    summed = torch.stack([total[:, span.start : span.stop].sum(1) for span in spans], dim=1)
    return summed[: len(runs.columns)]


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 5, 10])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Compare every variant with the exact map, print the table, and write it as JSON."""
    args = parsed()
    torch.set_num_threads(1)
    lm = fs.load(args.model)
    facts = known_facts(lm, args.facts)
    noise = fs.average_trace(lm, facts, kinds=["state"], samples=1).noise
    variants = [
        Variant(log, staggered, passes)
        for log in (False, True)
        for staggered in (False, True)
        for passes in args.passes
    ]
    kinds: tuple[TraceKind, ...] = get_args(TraceKind)
    values: dict[tuple[str, Variant], list[tuple[float, float, float]]] = {}
    for fact in facts:
        corruption = Corruption(scale=noise)
        runs = record_runs(lm, fact.text, fact.subject, corruption, target=fact.target)
        for kind in kinds:
            restoration = Restoration(kind, args.window)
            exact = trace_runs(runs, restoration).effects[runs.columns.start :].flatten()
            for variant in variants:
                estimated = estimate(runs, restoration, variant).flatten()
                pearson = float(torch.corrcoef(torch.stack([estimated, exact]))[0, 1])
                same_peak = float(estimated.argmax() == exact.argmax())
                values.setdefault((kind, variant), []).append(
                    (rank_correlation(estimated, exact), pearson, same_peak)
                )
    rows = [row(kind, variant, each) for (kind, variant), each in values.items()]
    print_rows(rows)
    if args.json:
        content = {
            "model": args.model,
            "facts": len(facts),
            "noise": noise,
            "window": args.window,
            "samples": 10,
            "rows": rows,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def row(kind: str, variant: Variant, values: list[tuple[float, float, float]]) -> dict[str, Any]:
    """Return the statistics of one variant over the facts."""
    spearman, pearson, peak = (list(column) for column in zip(*values, strict=True))
    return {
        "kind": kind,
        "gradient_of": "log p" if variant.log else "p",
        "points": "staggered" if variant.staggered else "same",
        "passes": variant.passes,
        "spearman_mean": round(statistics.mean(spearman), 3),
        "spearman_median": round(statistics.median(spearman), 3),
        "pearson_mean": round(statistics.mean(pearson), 3),
        "same_peak": round(statistics.mean(peak), 3),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"{'kind':<10} {'gradient of':<12} {'points':<10} {'passes':>6} "
        f"{'Spearman':>9} {'median':>7} {'Pearson':>8} {'same peak':>10}"
    )
    for each in rows:
        print(
            f"{each['kind']:<10} {each['gradient_of']:<12} {each['points']:<10} "
            f"{each['passes']:>6} {each['spearman_mean']:>9} {each['spearman_median']:>7} "
            f"{each['pearson_mean']:>8} {each['same_peak']:>10}"
        )


if __name__ == "__main__":
    begun = time.process_time()
    main()
    print(f"{time.process_time() - begun:.0f} s")
