"""How well do gradients rank the exact causal map? Chooses the defaults of `attribution_trace`.

    python benchmarks/attribution.py [--model atlas] [--facts 30] [--json benchmarks/results/attribution-atlas.json]

For facts of different relations that the model knows: the exact map of each kind, and estimates by the gradient of p or of log p, averaged
over 1 to 10 points between the corrupted and the clean embeddings (the same point for all corrupted runs of a pass, or staggered: each run
at a point of its own). Compared over all cells of a map, from the subject's first token on: Spearman's and Pearson's correlation, and
whether the largest cell is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import factsmith as fs
from factsmith import atlas
from factsmith.locate.attribution import rank_correlation
from factsmith.locate.kinds import window_spans
from factsmith.locate.runs import Runs, answer_probability, record_runs
from factsmith.model.trace import replacing

KINDS = ("state", "mlp", "attention")


def known_facts(lm: Any, count: int, seed: int = 0) -> list[fs.Fact]:
    """One fact of each of `count` relations, in a wording the model was trained on, that it answers rightly."""
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


def estimate(
    runs: Runs, kind: str, window: int, *, log: bool, staggered: bool, passes: int
) -> Tensor:
    """(S, n_layers) first-order effects, from the gradient of p(answer) or of its logarithm."""
    lm, live = runs.lm, runs.corrupted
    if kind == "state":
        sites: list[Any] = list(lm.layers)
        moved = [
            clean - corrupted
            for clean, corrupted in zip(runs.clean.hidden[1:], live.hidden[1:], strict=True)
        ]
    else:
        sites = [ffn.module for ffn in lm.ffn] if kind == "mlp" else list(lm.attention)
        moved = [out[:1] - out[1:] for out in runs.outputs[kind]]  # type: ignore[index]
    total = torch.zeros(live.n_live, lm.n_layers)
    for step in range(passes):
        share = torch.full((runs.samples,), (step + 0.5) / passes)
        if staggered:
            order = torch.arange(runs.samples).roll(step * max(1, runs.samples // passes))
            share = (order + (step + 0.5) / passes) / runs.samples
        probes: list[Tensor] = []

        def probed(output: Tensor, probes: list[Tensor] = probes) -> Tensor:
            probes.append(torch.zeros_like(output).requires_grad_())
            return output + probes[-1]

        with torch.enable_grad(), replacing(dict.fromkeys(sites, probed)):
            hidden = live.resume(
                0, live.hidden[0] + share[:, None, None] * (runs.clean.hidden[0] - live.hidden[0])
            )
            p = answer_probability(lm, hidden, runs.answer_ids)
            found = torch.autograd.grad((p.log() if log else p).sum(), probes)
        shaped = (g.reshape(runs.samples, -1, lm.d_model)[:, -live.n_live :] for g in found)
        total += (
            torch.stack(
                [(m * g).sum(-1).mean(0) for m, g in zip(moved, shaped, strict=True)], dim=1
            )
            / passes
        )
    spans = window_spans(lm.n_layers, window if kind != "state" else 1)
    return torch.stack([total[:, span.start : span.stop].sum(1) for span in spans], dim=1)[
        : len(runs.tokens) - runs.subject_span[0]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 5, 10])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    lm = fs.load(args.model)
    facts = known_facts(lm, args.facts)
    noise = fs.average_trace(lm, facts, kinds=["state"], samples=1).noise
    variants = [
        (log, staggered, passes)
        for log in (False, True)
        for staggered in (False, True)
        for passes in args.passes
    ]
    found: dict[tuple[str, bool, bool, int], list[tuple[float, float, float]]] = {}
    for fact in facts:
        runs = record_runs(lm, fact.text, fact.subject, target=fact.target, noise=noise)
        for kind in KINDS:
            exact = runs.trace(kind, window=args.window).effects[runs.subject_span[0] :].flatten()  # type: ignore[arg-type]
            for log, staggered, passes in variants:
                own = estimate(
                    runs, kind, args.window, log=log, staggered=staggered, passes=passes
                ).flatten()
                pearson = float(torch.corrcoef(torch.stack([own, exact]))[0, 1])
                found.setdefault((kind, log, staggered, passes), []).append(
                    (rank_correlation(own, exact), pearson, float(own.argmax() == exact.argmax()))
                )
    rows = []
    print(
        f"{'kind':<10} {'gradient of':<12} {'points':<10} {'passes':>6} {'Spearman':>9} {'median':>7} {'Pearson':>8} {'same peak':>10}"
    )
    for (kind, log, staggered, passes), values in found.items():
        spearman, pearson, peak = (list(column) for column in zip(*values, strict=True))
        row = {
            "kind": kind,
            "gradient_of": "log p" if log else "p",
            "points": "staggered" if staggered else "same",
            "passes": passes,
            "spearman_mean": round(statistics.mean(spearman), 3),
            "spearman_median": round(statistics.median(spearman), 3),
            "pearson_mean": round(statistics.mean(pearson), 3),
            "same_peak": round(statistics.mean(peak), 3),
        }
        rows.append(row)
        print(
            f"{kind:<10} {row['gradient_of']:<12} {row['points']:<10} {passes:>6} {row['spearman_mean']:>9} {row['spearman_median']:>7} "
            f"{row['pearson_mean']:>8} {row['same_peak']:>10}"
        )
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


if __name__ == "__main__":
    begun = time.process_time()
    main()
    print(f"{time.process_time() - begun:.0f} s")
