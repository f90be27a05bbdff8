"""Measure what the neurons of the bundled models are selective for, layer by layer.

    python benchmarks/selectivity.py --kept FOLDER --pictures docs \\
        --json benchmarks/results/selectivity.json

Also measure whether keys and values agree, and what the models are made of. There are two corpora:

crossed  Facts chosen so that subjects, relations and objects can be told apart, in six phrasings
         each. That is fewer than half of a neuron's 25 triggers, so no neuron is selective for what
         it met in one fact alone. The control deals labels out fact by fact.
stated   Two sentences for each of 5,000 facts drawn at random, so triggers are of many facts. It
         serves the subject's type, the agreement of keys and values, and the census.

A neuron that fires on a word of a name may know nothing about the bearer of the name. So subjects
are also looked for after the subject, and objects before the answer is read. Both count only
neurons with at least 15 of their triggers there.

FOLDER keeps the triggers: four scans of about a minute each. The pictures are profile-lines.png,
profile-parts.png, agreement.png and census.png.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith import atlas
from factsmith.atlas.texts import as_fact, crossed
from factsmith.read.profile import Profile
from factsmith.read.statements import PARTS, Statement

TOP, EACH, LEAST, SAMPLE = 25, 6, 15, 5000
SIGNS = ("top", "bottom")


def scanned(lm: fs.LanguageModel, texts: list[str], folder: Path) -> fs.Triggers:
    """Return the triggers kept in a folder. If there are none, scan the texts and keep them."""
    if (folder / "triggers.safetensors").is_file():
        return fs.Triggers.load(folder, lm)
    return fs.find_triggers(lm, texts, top=TOP, folder=folder)


def rows(profile: Profile) -> dict[str, Any]:
    """Return a profile as plain numbers, with the shares not explained by a simpler feature."""
    result: dict[str, Any] = {
        feature: {
            "share": profile.share[:, column].tolist(),
            "chance": profile.chance[:, column].tolist(),
            "needed": profile.needed[:, column].tolist(),
            "without_token": profile.share_of(feature, without=["token"]).tolist(),
        }
        for column, feature in enumerate(profile.features)
    }
    if "type" in profile.features:
        result["type"]["without_relation"] = profile.share_of("type", without=["relation"]).tolist()
    for feature, possible in zip(profile.features, profile.possible.tolist(), strict=True):
        if not math.isnan(possible):
            result[feature]["possible"] = possible
    return {"neurons": profile.counted.tolist(), "features": result}


def profiles(triggers: fs.Triggers, statements: list[Statement], sign: Any) -> dict[str, Profile]:
    """Return profiles of all triggers, those after the subject, and those before the answer."""
    labels = fs.fact_labels(statements, atlas.subject_types())
    groups = {each.text: each.fact for each in statements}
    by_text = {each.text: each for each in statements}

    def after_subject(trigger: fs.Trigger) -> bool:
        subject = by_text[trigger.text].subject
        return subject is not None and trigger.start >= subject[1]

    def before_answer(trigger: fs.Trigger) -> bool:
        return trigger.stop < by_text[trigger.text].answer[0]

    return {
        "all": fs.profile(triggers, labels, groups=groups, sign=sign),
        "behind subject": fs.profile(
            triggers,
            {"subject": labels["subject"]},
            groups=groups,
            only=after_subject,
            sign=sign,
            least=LEAST,
        ),
        "before answer": fs.profile(
            triggers,
            {"object": labels["object"]},
            groups=groups,
            only=before_answer,
            sign=sign,
            least=LEAST,
        ),
    }


def shuffled(
    triggers: fs.Triggers, statements: list[Statement], sign: Any
) -> dict[str, list[float]]:
    """Return the control that must show nothing: each fact has the labels of another fact."""
    facts = list(dict.fromkeys(each.fact for each in statements))
    other = dict(zip(facts, random.Random(1).sample(facts, len(facts)), strict=True))
    types = atlas.subject_types()
    labels: dict[str, dict[str, Any]] = {
        "relation": {each.text: other[each.fact].relation for each in statements},
        "type": {each.text: types.get(other[each.fact].relation or "") for each in statements},
        "subject": {each.text: other[each.fact].subject for each in statements},
        "object": {each.text: other[each.fact].target for each in statements},
    }
    profile = fs.profile(
        triggers, labels, groups={each.text: each.fact for each in statements}, sign=sign
    )
    return {
        feature: profile.share[:, profile.features.index(feature)].tolist() for feature in labels
    }


LINES = (
    "token",
    "position",
    "relation",
    ("relation", "token"),
    "subject",
    ("subject", "token"),
    "object",
)
"""The features that the picture of the profiles shows."""


def main() -> None:
    """Scan the bundled models, and write the numbers and pictures that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=Path, required=True, help="folder for the triggers")
    parser.add_argument(
        "--each",
        type=int,
        default=EACH,
        help="phrasings of a crossed fact; with 24 a fact fills a neuron's triggers by itself",
    )
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    statements = fs.statements(crossed(atlas.facts()), each=given.each)
    sample = fs.statements(map(as_fact, random.Random(0).sample(atlas.facts(), SAMPLE)), each=2)
    sentences, groups = [each.text for each in sample], {each.text: each.fact for each in sample}
    known = fs.fact_labels(sample, atlas.subject_types())
    known = {feature: known[feature] for feature in ("relation", "type", "subject")}
    result: dict[str, Any] = {
        "crossed": {"sentences": len(statements), "facts": len({each.fact for each in statements})}
    }
    seen: dict[str, Profile] = {}
    agreements, censuses = {}, {}
    for name in atlas.names():
        lm = fs.load(name)
        stated = scanned(lm, sentences, given.kept / f"{name}-stated")
        triggers = scanned(
            lm, [each.text for each in statements], given.kept / f"{name}-crossed-{given.each}"
        )
        of_model: dict[str, Any] = {}
        for sign in SIGNS:
            each_profile = profiles(triggers, statements, sign)
            of_model[sign] = {what: rows(each) for what, each in each_profile.items()}
            many = fs.profile(stated, known, groups=groups, sign=sign)  # type: ignore[arg-type]
            of_model[sign]["stated"] = rows(many)
            of_model[sign]["shuffled"] = shuffled(triggers, statements, sign)
            layers = each_profile["all"].layers
            of_model[sign]["parts"] = [each_profile["all"].tally("part", layer) for layer in layers]
            of_model[sign]["types"] = [many.tally("type", layer) for layer in layers]
            of_model[sign]["relations"] = [
                each_profile["all"].tally("relation", layer) for layer in layers
            ]
            if sign == "top":
                seen[name] = each_profile["all"]
            print(name, sign, json.dumps(of_model[sign]["all"]["features"]), flush=True)
        values = fs.value_tokens(lm, top=10)
        for sign in SIGNS:
            agree = fs.agreement(stated, values, sign=sign)  # type: ignore[arg-type]
            of_model[sign]["agreement"] = {
                part: getattr(agree, part).tolist() for part in ("share", "within", "chance")
            }
            agreements.update({name: agree} if sign == "top" else {})
        moments = fs.second_moments(lm, sentences, range(lm.n_layers), max_tokens=math.inf)
        censuses[name] = fs.census(
            lm, triggers=stated, moments={layer: each.matrix for layer, each in moments.items()}
        )
        of_model["census"] = [
            [each.ffn, each.attention, each.neurons, each.idle, each.effective_rank]
            for each in censuses[name].layers
        ]
        result[name] = of_model
    if given.json:
        given.json.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    if given.pictures:
        fs.profile_lines(seen, LINES, path=given.pictures / "profile-lines.png")
        fs.profile_bars(seen, "part", values=PARTS, path=given.pictures / "profile-parts.png")
        fs.agreement_chart(agreements, path=given.pictures / "agreement.png")
        fs.census_chart(censuses, path=given.pictures / "census.png")


if __name__ == "__main__":
    main()
