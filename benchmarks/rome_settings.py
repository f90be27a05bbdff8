"""Search ROME's settings on a bundled model: layer x learning rate x clamp x KL x weight decay x steps.

    python benchmarks/rome_settings.py --model atlas --facts 60 --vary layer=0,1,2,3
    python benchmarks/rome_settings.py --model atlas --facts 60 --set layer=1 --vary lr=0.25,0.5,1 clamp=2,4,6 --json settings.json
    python benchmarks/rome_settings.py --model atlas --facts 200 --set layer=1 --one-by-one        # one setting: rome() itself, timed

Each fact the model knows gets a random other object of its relation, as a single edit on the unedited model. By greedy exact match of
the whole object: efficacy (the edited prompt), generalization (other phrasings of the same fact), specificity (other subjects of the
relation, half of them with the same true object where there are such, keep theirs). The same seed asks the same questions: those of
`factsmith.locate.layers.trial_facts`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import factsmith.model.load
from factsmith import atlas
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import applied
from factsmith.edit.methods import rome
from factsmith.edit.rome import rome_each
from factsmith.model.language_model import LanguageModel
from factsmith.patch.layer_choice import LayerScore
from factsmith.patch.trial_facts import judge, trial_facts


def moments_of(
    lm: LanguageModel, layers: Sequence[int], seed: int, sentences: int = 4000
) -> dict[int, SecondMoment]:
    """Second moments from the model's own sentences."""
    draw = random.Random(seed)
    told = draw.sample(atlas.facts(), sentences)
    texts = [
        draw.choice(atlas.phrasings(f.relation).trained).replace("{}", f.subject) + f" {f.object}."
        for f in told
    ]
    return second_moments(lm, texts, layers)


def fields(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """{"lr": [0.25, 0.5]} from ["lr=0.25,0.5"]."""
    parsed: dict[str, list[Any]] = {}
    for pair in pairs:
        name, _, values = pair.partition("=")
        parsed[name] = [
            v if name == "scale" else int(v) if name in ("layer", "steps") else float(v)
            for v in values.split(",")
        ]
    return parsed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings that stay"
    )
    parser.add_argument(
        "--vary",
        nargs="*",
        default=[],
        metavar="FIELD=A,B,C",
        help="settings to search, every combination",
    )
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="call rome() for each fact, as a user would, and time it",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    lm = factsmith.model.load.load(args.model)
    facts = trial_facts(lm, args.facts, seed=args.seed, others=0)
    vary = fields(args.vary)
    base = dataclasses.asdict(RomeConfig.recommended(lm)) | {
        name: values[0] for name, values in fields(args.set).items()
    }
    settings = [
        base | dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())
    ]
    moments = moments_of(lm, sorted({s["layer"] for s in settings}), args.seed)
    contexts = generate_contexts(lm, args.seed)
    asked = sum(len(f.paraphrases) for f in facts), sum(len(f.neighbours) for f in facts)
    print(f"{args.model}: {len(facts)} facts, {asked[0]} paraphrases, {asked[1]} neighbours")
    print(
        f"{'efficacy':>9} {'general.':>9} {'specific.':>9} {'harmonic':>9} {'p(target)':>9} {'steps':>6} {'s/fact':>7}  settings"
    )
    results = []
    for setting in settings:
        config = RomeConfig(**setting)
        start = time.perf_counter()
        if args.one_by_one:
            deltas = [rome(lm, fact, config, moments=moments, contexts=contexts) for fact in facts]
        else:
            deltas = rome_each(lm, facts, config, moments=moments, contexts=contexts)
        seconds = (time.perf_counter() - start) / len(facts)
        trials = []
        for fact, delta in zip(facts, deltas, strict=True):
            with applied(lm, delta):
                trials.append(judge(lm, fact))
        score = LayerScore.of(setting["layer"], trials)
        mean = {
            "efficacy": score.efficacy,
            "generalization": score.generalization or 0.0,
            "specificity": score.specificity or 0.0,
        }
        mean["harmonic"] = score.score
        ended = [d.convergence[0] for d in deltas]
        mean["p_target"] = statistics.fmean(2.718281828 ** -c["nll"] for c in ended)
        mean["steps"] = statistics.fmean(c["steps"] for c in ended)
        mean["seconds"] = seconds
        shown = " ".join(f"{k}={v}" for k, v in setting.items() if k in vary or not vary)
        print(
            f"{mean['efficacy']:9.3f} {mean['generalization']:9.3f} {mean['specificity']:9.3f} {mean['harmonic']:9.3f} "
            f"{mean['p_target']:9.3f} {mean['steps']:6.1f} {seconds:7.3f}  {shown}",
            flush=True,
        )
        results.append({"settings": setting, **mean})
    if args.json:
        record = {
            "model": args.model,
            "fingerprint": lm.fingerprint,
            "facts": len(facts),
            "seed": args.seed,
            "contexts": contexts,
        }
        args.json.write_text(
            json.dumps({**record, "results": results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
