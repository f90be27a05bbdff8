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
        "sampling text",
        "second moments",
        "solving",
        "facts",
        "verifying",
    ]


def test_the_layer_of_a_model_that_knows_nothing_depends_on_the_depth(
    lm: LanguageModel, bench: Workbench
) -> None:
    asked: list[str] = []
    proposal = bench.propose(FACT, progress=lambda what, done, total: asked.append(what), **ASKED)
    assert proposal.layers is not None and (proposal.layers.source, proposal.layers.rome) == (
        "depth",
        0,
    )
    assert proposal.delta is not None and sorted(proposal.delta.layers) == [0]
    assert any(
        "no layer was given" in warning and "knows 0 of the bundled facts" in warning
        for warning in proposal.warnings
    )
    assert proposal.to_dict()["layers"] == {
        "rome": 0,
        "source": "depth",
        "reason": proposal.layers.reason,
    }
    assert not (bench.ledger.folder / "layers.json").exists()
    assert "choosing layers: asking bundled facts" in asked
    alone = proposed(lm, FACT, **ASKED)
    assert alone.layers == proposal.layers and alone.warnings == proposal.warnings
