"""A plan compares new facts with the facts in effect and with one another."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import moments_file
from factsmith.edit.configs import RomeConfig
from factsmith.edit.keys import read_keys
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.patch.conflicts import compare_facts
from workbenches import hashes, moments_of


def test_a_plan_knows_one_question_in_other_words(lm: LanguageModel, bench: Workbench) -> None:
    """Paraphrases and bundled phrasings reveal a conflict of facts without a relation."""
    currency = atlas.phrasings("P38").every
    in_effect = [
        Fact("Entity0", "The home of {} is", " q", paraphrases=["Entity0 lives in"]),
        Fact("Bulgaria", currency[0], "euro"),
    ]
    bench.apply(in_effect, "rome", RomeConfig(layer=1, steps=4), moments=moments_of(lm), force=True)
    facts = [
        Fact("Entity0", "{} lives in", " z"),
        Fact("Entity0", "A house of {} is", " z", paraphrases=[in_effect[0].text]),
        Fact("Bulgaria", currency[1], "yen"),
        Fact("Bulgaria", currency[1].replace("{}", "all of {}"), "yen"),  # not a bundled phrasing
        Fact("Romania", currency[1], "yen"),
        Fact("Someone", "{} lives in", " z"),
    ]
    entries = [bench.plan(fact, "rome", RomeConfig(layer=1, steps=4)).entries[0] for fact in facts]
    assert [entry.standing for entry in entries] == ["conflict"] * 3 + ["new"] * 3
    assert str(in_effect[0]) in entries[0].because and str(in_effect[1]) in entries[2].because


def test_a_plan_sees_through_unicode_forms(lm: LanguageModel, bench: Workbench) -> None:
    moments, config = moments_of(lm), RomeConfig(layer=1, steps=4)
    composed = Fact("André Malraux", "The tongue of {} is", " q", relation="tongue")
    decomposed = "Andre\u0301\u00a0Malraux"
    same_text = Fact(decomposed, "The tongue of {} is", " z")
    same_relation = Fact(decomposed, "{} speaks", " z", relation="tongue")
    same_answer = Fact(decomposed, "The tongue of {} is", "q ")
    other = Fact("Andre Malraux", "The tongue of {} is", " z")
    for fact, standing in ((same_text, "conflict"), (same_relation, "conflict")):
        assert bench.plan([composed, fact], "rome", config).entries[1].standing == standing
    bench.apply([composed], "rome", config, moments=moments, force=True)
    for fact, standing in (
        (same_text, "changed"),
        (same_relation, "conflict"),
        (same_answer, "new"),
        (other, "new"),
    ):
        assert bench.plan([fact], "rome", config).entries[0].standing == standing, fact
    bench.apply([same_text], "rome", config, moments=moments, force=True)
    (change,) = bench.diff("base", "latest").facts
    assert (change.before, change.after) == (None, "z")
    checks = bench.verify().checks
    assert [check.wanted.strip() for check in checks if check.role == "prompt"] == ["z"]


def test_a_plan_knows_what_facts_meet(lm: LanguageModel, bench: Workbench) -> None:
    moments, config = moments_of(lm), RomeConfig(layer=1, steps=4)
    first = Fact("Entity0", "The home of {} is", " q", relation="home")
    bench.apply([first], "rome", config, moments=moments, force=True)
    facts = [
        Fact("Entity0", "The home of {} is", " z"),  # the same prompt, another target
        Fact("Entity0", "Home: {} in", " z", relation="home"),  # the same question in other words
        Fact("Someone", "A thing of {} is", " y"),
        # The same key and another target: the prompts agree up to the subject.
        Fact("Someone", "A thing of {} was", " x"),
    ]
    bare = bench.plan(facts, "rome", config)
    assert bare.layers == (1,)
    standings = ["changed", "conflict", "conflict", "conflict"]
    assert [e.standing for e in bare.entries] == standings and bare.entries[0].crowding is None
    assert "cosine 1.000" in bare.entries[2].because and any(
        "second moments are not kept" in note for note in bare.notes
    )
    # Another subject has another key.
    apart = bench.plan([facts[2], Fact("Somebody", "A thing of {} was", " x")], "rome", config)
    assert [e.standing for e in apart.entries] == ["new", "new"]
    assert bare.seconds is not None and bare.seconds > 0
    for layer, moment in moments.items():
        moment.save(moments_file(bench.ledger.folder / "moments", layer))
    before = hashes(lm)
    measured = bench.plan(facts, "rome", config)
    assert [e.standing for e in measured.entries] == standings and hashes(lm) == before
    assert (
        "nearly the same key" in measured.entries[2].because
        and len(measured.conflicts) == 3
        and measured.notes == ()
    )
    with bench.on_base():
        keys = read_keys(lm, [*facts, first], 1, ["{}"])[:, 0].double()
    lower = torch.linalg.cholesky(moments[1].matrix.double())
    white = torch.linalg.inv(lower) @ keys.T
    crowd = white[:, 4:]
    for entry, key in zip(measured.entries, white.T, strict=False):
        share = float((crowd.T @ key / crowd.norm()).square() / key.square().sum())
        assert entry.crowding == pytest.approx(share, rel=1e-3, abs=1e-6)
    assert measured.entries[0].crowding == pytest.approx(1) and measured.entries[2].crowding < 0.99
    assert "what they meet" in repr(measured) and json.dumps(measured.to_dict())


def test_what_the_model_says_already_can_be_a_conflict(lm: LanguageModel) -> None:
    """A known fact conflicts with a fact in effect through the relation. A shared key alone is no
    conflict: the model answers both prompts already.
    """
    in_effect = [("0a8b has", Fact("Lumia", "The maker of {} is", "Samsung", relation="maker"))]

    def compare(target: str, **fields: Any) -> tuple[str, str]:
        (place,) = compare_facts(
            lm, [Fact("Lumia", "{} comes out of", target, **fields)], in_effect, (), {}, [True]
        )
        return place.standing, place.because

    assert compare("Nokia", relation="maker") == (
        "conflict",
        "0a8b has The maker of Lumia is → Samsung",
    )
    assert compare("Samsung", relation="maker") == ("known", "") and compare("Nokia") == (
        "known",
        "",
    )
    one_key = [Fact("Lumia", "{} is in", "Oslo"), Fact("Lumia", "{} is by", "Rome")]

    def standings(*known: bool) -> list[str]:
        return [p.standing for p in compare_facts(lm, one_key, [], (1,), {}, known)]

    assert standings(True, True) == ["known", "known"]
    assert standings(False, False) == ["conflict", "conflict"]
    assert standings(True, False) == ["known", "new"], "only one of the two is written"
