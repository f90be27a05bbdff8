"""A plan reports the model's answers and chooses the layers."""

from __future__ import annotations

import json

import pytest

from factsmith.core.fact import Fact
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.patch.bench import Scratch
from factsmith.patch.plan import plan
from patching import proposed
from workbenches import ASKED, FACT, QUICK, hashes


def test_a_plan_reports_the_models_answers(lm: LanguageModel, bench: Workbench) -> None:
    before = hashes(lm)
    said = lm.answer([FACT.text])[0]
    already = Fact(FACT.subject, FACT.prompt, said.split()[0] if said.split() else said)
    planned = bench.plan([FACT, already])
    assert [entry.answer.startswith(said) for entry in planned.entries] == [True, True]
    assert planned.entries[0].probability == pytest.approx(
        float(lm.log_prob([FACT.text], ["English"]).exp()[0])
    )
    assert planned.new == (FACT,) and planned.known == (already,)
    assert hashes(lm) == before and bench.log() == []
    json.dumps(planned.to_dict())


def test_plan_and_propose_need_no_workspace(lm: LanguageModel) -> None:
    before = hashes(lm)
    assert plan(Scratch(lm), FACT).new == (FACT,)
    seen: list[str] = []
    proposal = proposed(
        lm, FACT, config=QUICK, progress=lambda what, done, total: seen.append(what)
    )
    assert proposal.delta is not None and hashes(lm) == before
    assert list(dict.fromkeys(seen)) == [
        "planning",
        "second moments",
        "solving",
        "writing facts",
        "verifying",
    ]


def test_a_model_that_nothing_is_known_about_gets_a_first_choice_without_trial_edits(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("a trial edit was made, or a fact was asked for one")

    for name in ("rome_each", "trial_facts", "mlp_effects"):
        monkeypatch.setattr(f"factsmith.patch.layers.{name}", forbidden)
    with pytest.raises(AssertionError):
        bench.recommend_layers(**ASKED)  # control: `factsmith layers` makes them
    asked: list[str] = []
    proposal = bench.propose(FACT, progress=lambda what, done, total: asked.append(what), **ASKED)
    assert proposal.layers is not None and (proposal.layers.source, proposal.layers.rome) == (
        "depth",
        0,
    )
    assert proposal.delta is not None and sorted(proposal.delta.layers) == [0]
    assert any(
        "no layer was given" in warning and "`factsmith layers` measures" in warning
        for warning in proposal.warnings
    )
    assert proposal.to_dict()["layers"] == {
        "rome": 0,
        "source": "depth",
        "reason": proposal.layers.reason,
    }
    assert not any(step.startswith("choosing layers") for step in asked)
    alone = proposed(lm, FACT, **ASKED)
    assert alone.layers == proposal.layers and alone.warnings == proposal.warnings
    dry = bench.plan(FACT)
    assert dry.layers == (0,), "a plan names the layers that the patch will edit"
    assert any("no layer was given" in note for note in dry.notes)
    named = bench.plan(FACT, config=QUICK)
    assert not any("no layer was given" in note for note in named.notes)
