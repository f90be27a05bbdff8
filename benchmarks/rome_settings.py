"""Search ROME's settings on a bundled model: layer x learning rate x clamp x KL x weight decay x steps.

    python benchmarks/rome_settings.py --model atlas --facts 60 --vary layer=0,1,2,3
    python benchmarks/rome_settings.py --model atlas --facts 60 --set layer=1 --vary lr=0.25,0.5,1 clamp=2,4,6 --json settings.json
    python benchmarks/rome_settings.py --model atlas --facts 200 --set layer=1 --one-by-one        # one setting: rome() itself, timed

Each fact the model knows gets a random other object of its relation, as a single edit on the unedited model. By greedy exact match of
the whole object: efficacy (the edited prompt), generalization (other phrasings of the same fact), specificity (other subjects of the
relation, half of them with the same true object where there are such, keep theirs). The same seed asks the same questions.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import factsmith.model.load
from factsmith.edit.delta import applied
from factsmith.edit.methods import RomeConfig, generate_contexts, rome, rome_each
from factsmith.edit.moments import SecondMoment, second_moments
from factsmith.fact import Fact, Probe
from factsmith.model import atlas
from factsmith.model.load import LanguageModel
from factsmith.model.tokens import align, target_ids


@torch.no_grad()
def exact(lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], rows: int = 256) -> list[bool]:
    """Whether greedy decoding of each prompt gives the whole answer: every token of it is the likeliest after those before it."""
    heads = [lm.prompt_ids(p) for p in prompts]
    tails = [target_ids(lm.tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
    order = sorted(range(len(heads)), key=lambda i: len(heads[i]) + len(tails[i]))
    right = [False] * len(heads)
    for at in range(0, len(order), rows):
        group = order[at : at + rows]
        batch = align(lm, [heads[i] + tails[i][:-1] for i in group], [0] * len(group))
        hidden = lm.last_hidden(batch)
        where = [(r, len(heads[i]) - 1 + j) for r, i in enumerate(group) for j in range(len(tails[i]))]
        picked = lm.head(hidden[[r for r, _ in where], [c for _, c in where]]).argmax(-1).tolist()
        for i in group:
            said, picked = picked[: len(tails[i])], picked[len(tails[i]) :]
            right[i] = said == tails[i]
    return right


def questions(lm: LanguageModel, count: int, seed: int, *, paraphrases: int = 5, neighbours: int = 10) -> list[Fact]:
    """Facts that the model knows in every phrasing asked, each with a new object, other phrasings and neighbours it also knows."""
    draw = random.Random(seed)
    known: dict[str, list[atlas.AtlasFact]] = defaultdict(list)
    pool = list(atlas.facts())
    draw.shuffle(pool)
    pool = pool[: 200 * count] if len(pool) > 200 * count else pool
    first = {r: atlas.phrasings(r).trained[0] for r in atlas.relations()}
    told = exact(lm, [first[f.relation].replace("{}", f.subject) for f in pool], [f.object for f in pool])
    for fact, right in zip(pool, told, strict=True):
        if right:
            known[fact.relation].append(fact)
    found: list[Fact] = []
    for fact in pool:
        same = known[fact.relation]
        objects = sorted({f.object for f in same} - {fact.object})
        if len(found) == count:
            break
        if fact not in same or len(same) < 20 or not objects:
            continue
        wording = atlas.phrasings(fact.relation)
        prompt, *others = draw.sample(wording.trained, min(len(wording.trained), paraphrases - 1))
        others = [*others, *wording.held_out]
        prompts = [prompt, *others]
        if not all(exact(lm, [p.replace("{}", fact.subject) for p in prompts], [fact.object] * len(prompts))):
            continue
        if any(p.replace("{}", fact.subject).count(fact.subject) > 1 for p in prompts):
            continue
        target = draw.choice(objects)
        rest = [f for f in same if f.subject != fact.subject and f.object != target]
        alike = [f for f in rest if f.object == fact.object]
        near = draw.sample(alike, min(len(alike), neighbours // 2))
        near += draw.sample([f for f in rest if f not in near], min(len(rest) - len(near), 2 * neighbours - len(near)))
        kept = exact(lm, [prompt.replace("{}", f.subject) for f in near], [f.object for f in near])
        near = [f for f, right in zip(near, kept, strict=True) if right][:neighbours]
        found.append(
            Fact(
                fact.subject,
                prompt,
                target,
                target_true=fact.object,
                paraphrases=tuple(others),
                neighbours=tuple(Probe(prompt.replace("{}", f.subject), f.object) for f in near),
                relation=fact.relation,
            )
        )
    return found


def judge(lm: LanguageModel, fact: Fact, delta: Any) -> dict[str, float]:
    """Efficacy, generalization and specificity (each 0 to 1) of one edit."""
    prompts = [fact.text, *fact.paraphrase_texts, *(p.prompt for p in fact.neighbours)]
    wanted = [fact.target] * (1 + len(fact.paraphrases)) + [p.expected or "" for p in fact.neighbours]
    with applied(lm, delta):
        right = exact(lm, prompts, wanted)
    cut = 1 + len(fact.paraphrases)
    return {
        "efficacy": float(right[0]),
        "generalization": statistics.fmean(right[1:cut]),
        "specificity": statistics.fmean(right[cut:] or [1]),
    }


def moments_of(lm: LanguageModel, layers: Sequence[int], seed: int, sentences: int = 4000) -> dict[int, SecondMoment]:
    """Second moments from the model's own sentences."""
    draw = random.Random(seed)
    told = draw.sample(atlas.facts(), sentences)
    texts = [draw.choice(atlas.phrasings(f.relation).trained).replace("{}", f.subject) + f" {f.object}." for f in told]
    return second_moments(lm, texts, layers)


def fields(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """{"lr": [0.25, 0.5]} from ["lr=0.25,0.5"]."""
    parsed: dict[str, list[Any]] = {}
    for pair in pairs:
        name, _, values = pair.partition("=")
        parsed[name] = [v if name == "scale" else int(v) if name in ("layer", "steps") else float(v) for v in values.split(",")]
    return parsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings that stay")
    parser.add_argument("--vary", nargs="*", default=[], metavar="FIELD=A,B,C", help="settings to search, every combination")
    parser.add_argument("--one-by-one", action="store_true", help="call rome() for each fact, as a user would, and time it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    lm = factsmith.model.load.load(args.model)
    facts = questions(lm, args.facts, args.seed)
    vary = fields(args.vary)
    base = dataclasses.asdict(RomeConfig.recommended(lm)) | {name: values[0] for name, values in fields(args.set).items()}
    settings = [base | dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    moments = moments_of(lm, sorted({s["layer"] for s in settings}), args.seed)
    contexts = generate_contexts(lm, args.seed)
    asked = sum(len(f.paraphrases) for f in facts), sum(len(f.neighbours) for f in facts)
    print(f"{args.model}: {len(facts)} facts, {asked[0]} paraphrases, {asked[1]} neighbours")
    print(f"{'efficacy':>9} {'general.':>9} {'specific.':>9} {'harmonic':>9} {'p(target)':>9} {'steps':>6} {'s/fact':>7}  settings")
    results = []
    for setting in settings:
        config = RomeConfig(**setting)
        start = time.perf_counter()
        if args.one_by_one:
            deltas = [rome(lm, fact, config, moments=moments, contexts=contexts) for fact in facts]
        else:
            deltas = rome_each(lm, facts, config, moments=moments, contexts=contexts)
        seconds = (time.perf_counter() - start) / len(facts)
        scores = [judge(lm, fact, delta) for fact, delta in zip(facts, deltas, strict=True)]
        mean = {name: statistics.fmean(s[name] for s in scores) for name in scores[0]}
        mean["harmonic"] = 3 / sum(1 / max(v, 1e-9) for v in mean.values())
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
        record = {"model": args.model, "fingerprint": lm.fingerprint, "facts": len(facts), "seed": args.seed, "contexts": contexts}
        args.json.write_text(json.dumps({**record, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
