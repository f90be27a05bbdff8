"""Search ROME's settings on a bundled model: every combination of the values that are given.

    python benchmarks/rome_settings.py --model atlas --facts 60 --vary layer=0,1,2,3
    python benchmarks/rome_settings.py --model atlas --facts 60 --set layer=1 \\
        --vary lr=0.25,0.5,1 clamp=2,4,6 --json settings.json
    python benchmarks/rome_settings.py --model atlas --facts 200 --set layer=1 --one-by-one

The last line measures one setting, and the time of `rome` itself.

Each fact that the model knows gets a random other object of its relation, as a single edit of the
unedited model. Answers are compared by greedy exact match of the whole object. Efficacy is that of
the edited prompt, and generalization that of other phrasings of the same fact. Specificity asks
about other subjects of the relation, half of them with the same true object if there are such,
which keep their own object. The same seed asks the same questions: those of `trial_facts`.
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
from factsmith.core.fact import Fact
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
    """Return second moments from sentences that the model was trained on."""
    draw = random.Random(seed)
    texts = [
        draw.choice(atlas.phrasings(f.relation).trained).replace("{}", f.subject) + f" {f.object}."
        for f in draw.sample(atlas.facts(), sentences)
    ]
    return second_moments(lm, texts, layers)


def fields(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Return {"lr": [0.25, 0.5]} from ["lr=0.25,0.5"]."""
    parsed: dict[str, list[Any]] = {}
    for pair in pairs:
        name, _, values = pair.partition("=")
        parsed[name] = [
            v if name == "scale" else int(v) if name in ("layer", "steps") else float(v)
            for v in values.split(",")
        ]
    return parsed


def measured(
    lm: LanguageModel,
    facts: Sequence[Fact],
    config: RomeConfig,
    given: dict[str, Any],
    one_by_one: bool,
) -> dict[str, float]:
    """Edit each fact alone, and return means over the edits.

    Args:
        lm: The model.
        facts: The facts.
        config: The settings.
        given: The moments and contexts of the edits.
        one_by_one: Call `rome` for each fact, not `rome_each` for all.
    """
    start = time.perf_counter()
    if one_by_one:
        deltas = [rome(lm, fact, config, **given) for fact in facts]
    else:
        deltas = rome_each(lm, facts, config, **given)
    seconds = (time.perf_counter() - start) / len(facts)
    trials = []
    for fact, delta in zip(facts, deltas, strict=True):
        with applied(lm, delta):
            trials.append(judge(lm, fact))
    score = LayerScore.of(config.layer or 0, trials)
    ends = [delta.convergence[0] for delta in deltas]
    return {
        "efficacy": score.efficacy,
        "generalization": score.generalization or 0.0,
        "specificity": score.specificity or 0.0,
        "harmonic": score.score,
        "p_target": statistics.fmean(2.718281828 ** -end["nll"] for end in ends),
        "steps": statistics.fmean(end["steps"] for end in ends),
        "seconds": seconds,
    }


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings for all rows"
    )
    parser.add_argument(
        "--vary",
        nargs="*",
        default=[],
        metavar="FIELD=A,B,C",
        help="settings to search, in every combination",
    )
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="call rome() for each fact, as a user does, and measure its time",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


HEADER = (
    f"{'efficacy':>9} {'general.':>9} {'specific.':>9} {'harmonic':>9} {'p(target)':>9} "
    f"{'steps':>6} {'s/fact':>7}  settings"
)


def main() -> None:
    """Measure every combination of settings, and print a row for each."""
    args = arguments()
    lm = factsmith.model.load.load(args.model)
    facts = trial_facts(lm, args.facts, seed=args.seed, others=0)
    vary = fields(args.vary)
    fixed = {name: values[0] for name, values in fields(args.set).items()}
    base = dataclasses.asdict(RomeConfig.recommended(lm)) | fixed
    settings = [
        base | dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())
    ]
    moments = moments_of(lm, sorted({s["layer"] for s in settings}), args.seed)
    contexts = generate_contexts(lm, args.seed)
    paraphrases = sum(len(fact.paraphrases) for fact in facts)
    neighbours = sum(len(fact.neighbours) for fact in facts)
    print(f"{args.model}: {len(facts)} facts, {paraphrases} paraphrases, {neighbours} neighbours")
    print(HEADER)
    results = []
    for setting in settings:
        given = {"moments": moments, "contexts": contexts}
        mean = measured(lm, facts, RomeConfig(**setting), given, args.one_by_one)
        shown = " ".join(f"{k}={v}" for k, v in setting.items() if k in vary or not vary)
        shares = " ".join(f"{value:9.3f}" for value in list(mean.values())[:5])
        print(f"{shares} {mean['steps']:6.1f} {mean['seconds']:7.3f}  {shown}", flush=True)
        results.append({"settings": setting, **mean})
    if args.json:
        record = {
            "model": args.model,
            "fingerprint": lm.fingerprint,
            "facts": len(facts),
            "seed": args.seed,
            "contexts": contexts,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
