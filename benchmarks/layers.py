"""Compare the layer that a few trial edits recommend with the best one of an exhaustive sweep.

    python benchmarks/layers.py --models atlas atlas-llama --facts 100 --seeds 0 1 2 3 4 \
        --json benchmarks/results/layers.json
    python benchmarks/layers.py --models ../shared/golden/facts-gpt2 --facts 30 --few --seeds
    python benchmarks/layers.py --models path/to/SmolLM2 --facts 20 --few --seeds --layers 0 5 10 \
        --suite ../shared/data/counterfact/full-1017.json

The sweep edits each fact alone at every layer of the model. A layer's score is the harmonic mean of
efficacy, generalization and specificity, by greedy exact match. With `--runs` it also writes a
batch of facts at once by MEMIT, into every run of up to five neighbouring layers but the last.

The first choices of `layer_signals.py` are then compared with the sweep: they make no trial edit.

The recommendation is `recommend_layers`, as a user calls it, once for each seed. Its trial facts
have other subjects than the sweep's facts. Its regret is the score of the sweep's best layer minus
the score of the recommended layer, in points of 100.

A few seeds say little. So the race is also replayed on the sweep's trials, 2,000 times. Each replay
draws as many facts as a recommendation tries, and counts the regret on the facts not drawn.

`--few` sweeps in seven contexts instead of 21 or more. `--suite` takes the sweep's facts from a
benchmark's file: those that the model says. `--layers` sweeps some of the layers.

Columns: efficacy, generalization, specificity and their harmonic mean, in per cent. Seconds are
processor seconds of one thread.

The JSON file grows as the script runs. It reuses a sweep that the file already has, if the weights
and the number of facts are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from factsmith.core.fact import Fact, Probe
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import applied
from factsmith.edit.methods import memit
from factsmith.edit.rome import rome_each
from factsmith.judge.suites import load_suite
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.layer_choice import LayerScore, Trial
from factsmith.patch.layer_trials import RUN, choose, race
from factsmith.patch.layers import few_contexts, recommend_layers, settled_facts
from factsmith.patch.trial_facts import judge, trial_facts
from layer_signals import first_choices

SWEEP_SEED = 1_000_003
"""Seed of the sweep's facts. The recommendations use small seeds."""
HEADER = "           efficacy general. specific. harmonic"

Trials = dict[int, list[Trial]]
"""The trials of each layer, in the order of the facts."""


def sweep(
    lm: LanguageModel,
    facts: list[Fact],
    layers: Sequence[int],
    trials: Trials,
    few: bool,
    kept: Callable[[], None],
) -> None:
    """Edit every fact alone at every layer, and add the trials; call `kept` after each layer."""
    moments = find_moments(lm, layers, seed=SWEEP_SEED)
    contexts = few_contexts(lm, SWEEP_SEED) if few else generate_contexts(lm, SWEEP_SEED)
    for layer in layers:
        config = dataclasses.replace(RomeConfig.recommended(lm), layer=layer)
        deltas = rome_each(lm, facts, config, moments=moments, contexts=contexts)
        trials[layer] = []
        for fact, delta in zip(facts, deltas, strict=True):
            with applied(lm, delta):
                trials[layer].append(judge(lm, fact))
        print(f"  editing at layer {layer}: done", flush=True)
        kept()


def sweep_runs(lm: LanguageModel, facts: list[Fact]) -> dict[str, list[Trial]]:
    """Write the facts at once into every run of layers, and return {"first-last": trials}."""
    batch = list({fact.subject: fact for fact in facts}.values())
    layers = range(lm.n_layers - 1)
    moments = find_moments(lm, layers, seed=SWEEP_SEED)
    trials = {}
    for last in layers:
        for first in range(max(0, last - RUN + 1), last + 1):
            run = tuple(range(first, last + 1))
            config = dataclasses.replace(MemitConfig.recommended(lm), layers=run)
            with applied(lm, memit(lm, batch, config, moments=moments, seed=SWEEP_SEED)):
                trials[f"{first}-{last}"] = [judge(lm, fact) for fact in batch]
            score = LayerScore.of(first, trials[f"{first}-{last}"])
            print(f"  MEMIT at {first}-{last}: {describe(score)}", flush=True)
    return trials


def suite_facts(lm: LanguageModel, file: Path, count: int) -> list[Fact]:
    """Return up to `count` facts of a benchmark's file that the model says, with new objects."""
    records = load_suite(file).records
    facts = [record.facts[0] for record in records]
    says = lm.says([fact.text for fact in facts], [fact.target_true or "" for fact in facts])
    known = [record for record, right in zip(records, says, strict=True) if right]
    random.Random(7).shuffle(known)
    chosen = []
    for record in known[:count]:
        (fact,) = record.facts
        asked: dict[str, list[str]] = {"paraphrase": [], "neighbour": []}
        for question in record.questions:
            asked.setdefault(question.kind, []).append(question.prompt)
        subject = fact.subject
        again = [text for text in asked["paraphrase"] if text.count(subject) == 1]
        chosen.append(
            dataclasses.replace(
                fact,
                paraphrases=tuple(text.replace(subject, "{}") for text in again),
                neighbours=tuple(Probe(text) for text in asked["neighbour"][:8]),
            )
        )
    return settled_facts(lm, chosen)


def compare_first_choices(lm: LanguageModel, record: dict[str, Any]) -> dict[str, Any]:
    """Return the regret of the choices that make no trial edit, and print it."""
    scores = {k: LayerScore.of(k, some).score for k, some in record["trials_by_layer"].items()}
    runs = {k: LayerScore.of(0, some).score for k, some in record.get("runs", {}).items()}
    compared = {}
    for name, choice in first_choices(lm).items():
        near = min(scores, key=lambda layer: abs(layer - choice.rome))
        run = f"{choice.memit[0]}-{choice.memit[-1]}"
        compared[name] = {
            "rome": choice.rome,
            "memit": choice.memit,
            "swept_layer": near,
            "regret_points": 100 * (max(scores.values()) - scores[near]),
            "memit_regret_points": 100 * (max(runs.values()) - runs[run]) if run in runs else None,
            "seconds": choice.seconds,
            "share_of_sweep": choice.seconds / record["seconds"],
        }
        print(f"  {name}: {compared[name]}", flush=True)
    return compared


def describe(score: LayerScore) -> str:
    """Return the columns of a layer."""
    shares = (score.efficacy, score.generalization or 0, score.specificity or 0)
    return "  ".join(f"{100 * x:6.2f}" for x in (*shares, score.score))


def resampled(trials: Trials, draws: int = 500) -> dict[int, float]:
    """Return how often each layer is the best one of a bootstrap over the facts.

    It says how sure the sweep itself is.
    """
    draw, count = random.Random(0), len(next(iter(trials.values())))
    won = dict.fromkeys(trials, 0)
    for _ in range(draws):
        picked = [draw.randrange(count) for _ in range(count)]
        scores = {
            k: LayerScore.of(k, [some[i] for i in picked]).score for k, some in trials.items()
        }
        won[max(scores, key=scores.__getitem__)] += 1
    return {layer: n / draws for layer, n in won.items()}


def replayed(
    trials: Trials, effects: Sequence[float], count: int, draws: int = 2000
) -> dict[str, Any]:
    """Replay the race and the choice on the trials of a sweep.

    Args:
        trials: The trials of the sweep.
        effects: Each layer's indirect effect, which the choice also uses.
        count: How many facts one replay draws.
        draws: How many replays.
    Returns:
        The regret in points on the facts not drawn, how often each layer is chosen, and the edits
        that a race takes.
    """
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
    """Return the records of an earlier run, by the model's fingerprint.

    Their trials have the form that `sweep` returns.
    """
    records = (
        json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else []
    )
    for record in records:
        record["trials_by_layer"] = {
            int(k): [tuple(trial) for trial in some]
            for k, some in record["trials_by_layer"].items()
        }
    return {record["fingerprint"]: record for record in records}


def sweep_record(
    name: str,
    lm: LanguageModel,
    facts: list[Fact],
    earlier: dict[str, Any],
    options: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return the record of a model's sweep, and print its layers.

    An earlier record of as many facts is kept, and its missing layers are swept.
    """
    record = earlier
    if record.get("facts") != len(facts):
        record = {
            "model": name,
            "fingerprint": lm.fingerprint,
            "facts": len(facts),
            "few_contexts": options.few,
            "seconds": 0.0,
            "trials_by_layer": {},
        }
    layers = options.layers or range(lm.n_layers)
    start = time.process_time() - record["seconds"]

    def kept() -> None:
        record["seconds"] = time.process_time() - start
        save(record)

    missing = [layer for layer in layers if layer not in record["trials_by_layer"]]
    if missing:
        sweep(lm, facts, missing, record["trials_by_layer"], options.few, kept)
    trials = record["trials_by_layer"]
    scores = [LayerScore.of(layer, some) for layer, some in trials.items()]
    for score in scores:
        print(f"  layer {score.layer}: {describe(score)}")
    best = max(scores, key=lambda score: score.score).layer
    print(f"  best: layer {best}; {record['seconds']:.0f} s", flush=True)
    return {
        "recommendations": [],
        **record,
        "best": best,
        "layers": [score.to_dict() for score in scores],
        "best_if_resampled": resampled(trials),
    }


def recommendation(
    lm: LanguageModel, record: dict[str, Any], facts: list[Fact], seed: int
) -> dict[str, Any]:
    """Recommend a layer from some facts, print its regret, and return it as a record."""
    scores = {k: LayerScore.of(k, some).score for k, some in record["trials_by_layer"].items()}
    start = time.process_time()
    choice = recommend_layers(lm, facts, seed=seed)
    seconds = time.process_time() - start
    regret = 100 * (scores[record["best"]] - scores[choice.rome])
    edits = sum(score.trials for score in choice.scores)
    print(
        f"  seed {seed}: ROME {choice.rome}, MEMIT {list(choice.memit)}; "
        f"regret {regret:.2f}; {edits} edits, {seconds:.0f} s",
        flush=True,
    )
    return {
        "seed": seed,
        "rome": choice.rome,
        "memit": choice.memit,
        "regret_points": regret,
        "seconds": seconds,
        "edits": edits,
        "scores": [score.to_dict() for score in choice.scores],
        "effects": choice.effects,
    }


def main() -> None:
    """Sweep each model, recommend layers, and compare the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["atlas", "atlas-llama"])
    parser.add_argument("--facts", type=int, default=100, help="facts of the sweep")
    parser.add_argument("--trials", type=int, default=24, help="trial edits of a recommendation")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="one recommendation each"
    )
    parser.add_argument("--layers", type=int, nargs="*", help="sweep these layers alone")
    parser.add_argument("--few", action="store_true", help="sweep in few contexts")
    parser.add_argument("--suite", type=Path, help="take the sweep's facts from this file")
    parser.add_argument("--runs", type=int, default=0, help="facts of MEMIT's sweep; 0: none")
    parser.add_argument("--json", type=Path, help="the file of all records, reused if it exists")
    args = parser.parse_args()
    if args.seeds and args.facts <= args.trials:
        parser.error(
            "--facts must be larger than --trials, so that some facts are left to judge by"
        )
    torch.set_num_threads(1)
    records = kept(args.json)

    def save(record: dict[str, Any]) -> None:
        records[record["fingerprint"]] = record
        if args.json:
            text = json.dumps(list(records.values()), indent=1) + "\n"
            args.json.write_text(text, encoding="utf-8")

    for name in args.models:
        lm = load(name)
        if args.suite is None:
            facts = trial_facts(lm, args.facts, seed=SWEEP_SEED)
        else:
            facts = suite_facts(lm, args.suite, args.facts)
        print(f"{name}: {len(facts)} facts\n{HEADER}", flush=True)
        earlier = next((r for key, r in records.items() if lm.has_fingerprint(key)), {})
        record = sweep_record(Path(name).name, lm, facts, earlier, args, save)
        if args.runs and "runs" not in record:
            record["runs"] = sweep_runs(lm, facts[: args.runs])
        record["first_choices"] = compare_first_choices(lm, record)
        save(record)
        recommend(lm, record, args, save)


def recommend(
    lm: LanguageModel,
    record: dict[str, Any],
    options: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Recommend a layer for each seed, and replay the race on the sweep."""
    if not options.seeds:
        return
    subjects = {fact.subject for fact in trial_facts(lm, options.facts, seed=SWEEP_SEED)}
    record["recommendations"] = []
    for seed in options.seeds:
        drawn = trial_facts(lm, options.trials + 8, seed=seed)
        others = [fact for fact in drawn if fact.subject not in subjects][: options.trials]
        record["recommendations"].append(recommendation(lm, record, others, seed))
        save(record)
    effects = record["recommendations"][0]["effects"]
    record["replayed"] = replayed(record["trials_by_layer"], effects, options.trials)
    print(f"  replayed: {record['replayed']}", flush=True)
    save(record)


if __name__ == "__main__":
    main()
