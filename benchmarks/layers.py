"""Does the recommendation find the layer that an exhaustive sweep finds? Every layer, many facts, against a few trial edits.

    python benchmarks/layers.py --models atlas atlas-llama --facts 100 --seeds 0 1 2 3 4 --json benchmarks/results/layers.json

The sweep edits each fact alone at every layer of the model, and scores the layer by the harmonic mean of efficacy, generalization and
specificity (greedy exact match). The recommendation is `recommend_layers` as a user runs it, once for each seed, on trial facts whose
subjects are not among the sweep's. Its regret is what the sweep's best layer scores more than the recommended one, in points of 100.
A few seeds say little, so the race is also replayed on the sweep's trials: 2,000 times on that many of its facts drawn at random, with the
regret counted on the facts not drawn. Seconds are processor seconds of one thread.

The file is written as it grows. A sweep that is in it already, of the same weights and number of facts, is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import applied
from factsmith.edit.rome import rome_each
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.layer_choice import LayerScore, Trial
from factsmith.patch.layer_trials import choose, race
from factsmith.patch.trial_facts import judge, trial_facts
from factsmith.patch.layers import recommend_layers

SWEEP_SEED = 1_000_003


def sweep(lm: LanguageModel, facts: list[Fact]) -> dict[int, list[Trial]]:
    """Every fact as a single edit at every layer: {layer: its trials}."""
    moments = find_moments(lm, range(lm.n_layers), seed=SWEEP_SEED)
    contexts = generate_contexts(lm, SWEEP_SEED)
    trials: dict[int, list[Trial]] = {}
    for layer in range(lm.n_layers):
        config = dataclasses.replace(RomeConfig.recommended(lm), layer=layer)
        trials[layer] = []
        for fact, delta in zip(
            facts, rome_each(lm, facts, config, moments=moments, contexts=contexts), strict=True
        ):
            with applied(lm, delta):
                trials[layer].append(judge(lm, fact))
        print(f"  editing at layer {layer}: done", flush=True)
    return trials


def describe(score: LayerScore) -> str:
    shares = (score.efficacy, score.generalization or 0, score.specificity or 0)
    return "  ".join(f"{100 * x:6.2f}" for x in (*shares, score.score))


def resampled(trials: dict[int, list[Trial]], draws: int = 500) -> dict[int, float]:
    """How often each layer is the sweep's best when its facts are drawn anew from themselves: how sure the sweep itself is."""
    draw, count = random.Random(0), len(next(iter(trials.values())))
    won = dict.fromkeys(trials, 0)
    for _ in range(draws):
        picked = [draw.randrange(count) for _ in range(count)]
        won[
            max(
                trials,
                key=lambda layer: LayerScore.of(layer, [trials[layer][i] for i in picked]).score,
            )
        ] += 1
    return {layer: n / draws for layer, n in won.items()}


def replayed(
    trials: dict[int, list[Trial]], effects: Sequence[float], count: int, draws: int = 2000
) -> dict[str, Any]:
    """The race and the choice on trials that are there already: regret in points on the facts not drawn, layers chosen, edits spent."""
    draw, n_facts = random.Random(0), len(next(iter(trials.values())))
    regrets, chosen, edits = [], dict.fromkeys(trials, 0), []
    for _ in range(draws):
        order = draw.sample(range(n_facts), n_facts)
        drawn, rest = order[:count], order[count:]
        tables = {k: [some[i] for i in drawn] for k, some in trials.items()}
        raced = race(
            list(trials),
            count,
            lambda layers, which, tables=tables: {
                k: tables[k][which.start : which.stop] for k in layers
            },
        )
        layer = choose(raced, effects)[0]
        scores = {k: LayerScore.of(k, [trials[k][i] for i in rest]).score for k in trials}
        regrets.append(100 * (max(scores.values()) - scores[layer]))
        chosen[layer] += 1
        edits.append(sum(map(len, raced.values())))
    return {
        "draws": draws,
        "trials": count,
        "regret_points_mean": statistics.fmean(regrets),
        "regret_points_95": sorted(regrets)[math.ceil(0.95 * draws) - 1],
        "chosen": {layer: n / draws for layer, n in chosen.items()},
        "edits_mean": statistics.fmean(edits),
    }


def kept(file: Path | None) -> dict[str, dict[str, Any]]:
    """The records of an earlier run by the model's fingerprint, their trials by layer as `sweep` gives them."""
    records = (
        json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else []
    )
    for record in records:
        record["trials_by_layer"] = {
            int(k): [tuple(trial) for trial in some]
            for k, some in record["trials_by_layer"].items()
        }
    return {record["fingerprint"]: record for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["atlas", "atlas-llama"])
    parser.add_argument("--facts", type=int, default=100, help="of the sweep")
    parser.add_argument("--trials", type=int, default=24, help="trial edits of a recommendation")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="one recommendation each"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = kept(args.json)

    def save() -> None:
        if args.json:
            args.json.write_text(
                json.dumps(list(records.values()), indent=1) + "\n", encoding="utf-8"
            )

    for name in args.models:
        lm = load(name)
        facts = trial_facts(lm, args.facts, seed=SWEEP_SEED)
        print(
            f"{name}: {len(facts)} facts at each of {lm.n_layers} layers\n           efficacy general. specific. harmonic",
            flush=True,
        )
        record = records.get(lm.fingerprint, {})
        if record.get("facts") != len(facts):
            start = time.process_time()
            trials = sweep(lm, facts)
            record = {
                "model": name,
                "fingerprint": lm.fingerprint,
                "facts": len(facts),
                "seconds": time.process_time() - start,
            }
            record["trials_by_layer"] = trials
        trials = record["trials_by_layer"]
        found = {layer: LayerScore.of(layer, some) for layer, some in trials.items()}
        for layer, score in found.items():
            print(f"  layer {layer}: {describe(score)}")
        scores = {layer: score.score for layer, score in found.items()}
        best = max(scores, key=lambda layer: scores[layer])
        print(f"  best: layer {best}; {record['seconds']:.0f} s", flush=True)
        record |= {
            "best": best,
            "layers": [score.to_dict() for score in found.values()],
            "best_if_resampled": resampled(trials),
        }
        record["recommendations"] = []
        records[lm.fingerprint] = record
        save()
        subjects = {fact.subject for fact in facts}
        for seed in args.seeds:
            drawn = trial_facts(lm, args.trials + 8, seed=seed)
            others = [fact for fact in drawn if fact.subject not in subjects][: args.trials]
            start = time.process_time()
            choice = recommend_layers(lm, others, seed=seed)
            seconds = time.process_time() - start
            regret = 100 * (scores[best] - scores[choice.rome])
            edits = sum(score.trials for score in choice.scores)
            print(
                f"  seed {seed}: ROME {choice.rome}, MEMIT {list(choice.memit)}; regret {regret:.2f}; {edits} edits, {seconds:.0f} s",
                flush=True,
            )
            recommended = {
                "seed": seed,
                "rome": choice.rome,
                "memit": choice.memit,
                "regret_points": regret,
                "seconds": seconds,
            }
            recommended |= {
                "edits": edits,
                "scores": [s.to_dict() for s in choice.scores],
                "effects": choice.effects,
            }
            record["recommendations"].append(recommended)
            save()
        if record["recommendations"]:
            record["replayed"] = replayed(
                trials, record["recommendations"][0]["effects"], args.trials
            )
            print(f"  replayed: {record['replayed']}", flush=True)
            save()


if __name__ == "__main__":
    main()
