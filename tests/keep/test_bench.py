"""A workspace keeps moments, layers and facts for the next patch."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer
from factsmith.core.errors import FingerprintError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.keep.ledger import BASE
from factsmith.keep.workbench import Workbench
from factsmith.model.answers import answer_tokens
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.patch import layers as recommend
from workbenches import (
    ASKED,
    DARRIEUX,
    EASY,
    FACT,
    FIAT,
    QUICK,
    TEXTS,
    hashes,
    moments_of,
    some_delta,
    with_changes,
)


def test_earlier_patches_are_asked_again(lm: LanguageModel, bench: Workbench) -> None:
    moments = moments_of(lm)
    slight = dataclasses.replace(QUICK, clamp=1e-6)  # no patch takes, and none is lost
    options: dict[str, Any] = {
        "config": slight,
        "moments": moments,
        "contexts": ["{}"],
        "force": True,
    }
    (said,) = lm.answer(["Rome is the capital of"])
    # The model says this one already, so it holds. It is written because of `force`.
    holds = Fact("Rome", "{} is the capital of", said)
    bench.apply(holds, **options)
    # This one does not take. It never held, so it cannot be lost and is not asked again.
    bench.apply(FACT, **options)
    asked = bench.apply(Fact("Paris", "{} is the capital of", "Spain"), **options).verification
    assert asked is not None and lm.answer([FACT.text])[0].strip() != "Finnish"
    assert [check.prompt for check in asked.checks if check.role == "earlier"] == [holds.text]
    again = bench.apply(Fact(FACT.subject, FACT.prompt, "Spanish"), **options)
    assert again.verification is not None
    assert [check.prompt for check in again.verification.checks if check.role == "earlier"] == [
        holds.text
    ]
    now = hashes(lm)
    checks = bench.verify().checks
    assert hashes(lm) == now
    assert {check.prompt: check.wanted for check in checks if check.role == "prompt"} == {
        holds.text: said.strip(),
        FACT.text: "Spanish",
        "Paris is the capital of": "Spain",
    }
    bench.checkout(BASE)
    prompts, wanted = [check.prompt for check in checks], [check.wanted for check in checks]
    assert [check.before for check in checks] == lm.answer(
        prompts, max_new_tokens=answer_tokens(lm, prompts, wanted)
    )


def test_a_replaced_fact_is_not_asked_again(atlas_bench: Workbench) -> None:
    atlas_bench.apply(FIAT)
    assert atlas_bench.plan(with_changes(FIAT, target="Honda")).entries[0].standing == "changed"
    assert atlas_bench.apply(with_changes(FIAT, target="Honda")).revision is not None
    outcome = atlas_bench.apply(DARRIEUX)
    assert outcome.revision is not None and outcome.verification is not None
    earlier = {
        check.prompt: check.wanted
        for check in outcome.verification.checks
        if check.role == "earlier"
    }
    assert earlier == {FIAT.text: "Honda"}
    # It agrees with the fact in effect. The control agrees with the fact that was replaced.
    in_other_words = atlas_bench.plan(Fact("Fiat 127", "{} is made by", "Honda"))
    assert not in_other_words.conflicts
    control = atlas_bench.plan(Fact("Fiat 127", "{} is made by", "Toyota"))
    assert control.conflicts and "Honda" in control.entries[0].because


def test_second_moments_are_the_base_models_and_are_kept(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = moments_of(lm)[1].matrix
    bench.commit(some_delta(lm, 1, (0,)))  # changes the input of layer 1
    assert not torch.allclose(moments_of(lm)[1].matrix, expected)
    outcome = bench.apply(FACT, config=QUICK, texts=TEXTS, contexts=["{}"], force=True)
    assert (
        outcome.revision is not None
        and outcome.revision.moments == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    )
    kept = SecondMoment.load(bench.ledger.folder / "moments" / "layer1.safetensors")
    assert torch.equal(kept.matrix, expected)
    # The next patch reads the kept moments and computes none.
    monkeypatch.setattr("factsmith.corpus.moments_store.moments_with_total", None)
    again = bench.apply(Fact("Edwin", "{} is a", "king"), config=QUICK, contexts=["{}"], force=True)
    assert again.revision is not None and again.revision.moments == outcome.revision.moments


def test_a_patch_without_a_layer_uses_the_kept_choice(
    eager: LanguageModel, bench: Workbench
) -> None:
    bench.recommend_layers([EASY], **ASKED)
    path = bench.ledger.folder / "layers.json"
    fields = json.loads(path.read_text())
    for layer in (2, 0):
        path.write_text(json.dumps({**fields, "rome": layer, "memit": [layer]}))
        proposal = bench.propose(FACT, **ASKED)
        assert proposal.delta is not None and sorted(proposal.delta.layers) == [layer]
        assert proposal.layers is not None
        assert (
            proposal.layers.source == "workspace" and proposal.to_dict()["layers"]["rome"] == layer
        )
        assert not any("no layer was given" in warning for warning in proposal.warnings)
    eager.config.factsmith = {"rome": {"layer": 1, "steps": 2}}
    kept = bench.propose(FACT, **ASKED).layers
    assert kept is not None and kept.rome == 0, "the kept choice precedes the model's settings"
    named = bench.propose(FACT, config=QUICK, **ASKED)
    assert named.layers is None and named.delta is not None
    assert sorted(named.delta.layers) == [1], "a named layer precedes every choice"
    path.unlink()
    shipped = bench.propose(FACT, **ASKED)
    assert shipped.layers is not None and (shipped.layers.source, shipped.layers.rome) == (
        "model",
        1,
    )
    brought = bench.propose(FACT, moments={2: moments_of(eager)[2]}, contexts=["{}"])
    assert brought.layers is None and brought.delta is not None
    assert sorted(brought.delta.layers) == [2]
    assert "recommended layer 1: layer 2 is edited" in brought.warnings[0]
    every = bench.propose(FACT, moments=moments_of(eager), contexts=["{}"])
    assert every.delta is not None and every.plan.advice == ()
    assert sorted(every.delta.layers) == [1], "the recommended layer has moments"


def test_a_measurement_replaces_the_first_choice(
    eager: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.propose(FACT, **ASKED).layers
    assert first is not None and first.source == "depth" and not first.scores
    monkeypatch.setattr(recommend, "trial_facts", lambda lm, count, **options: [EASY] * 6)
    measured = bench.recommend_layers(**ASKED)
    assert measured.source == "trials" and measured.trials == 6
    path = bench.ledger.folder / "layers.json"
    kept = json.loads(path.read_text())
    assert kept["rome"] == measured.rome
    # A choice of few trial edits, which earlier versions kept after a patch.
    path.write_text(json.dumps({**kept, "rome": 2, "memit": [2], "quick": True}))
    again = bench.propose(FACT, **ASKED)
    assert again.layers is not None and (again.layers.source, again.layers.rome) == ("workspace", 2)
    assert not bench.recommend_layers(**ASKED).quick, "a direct call measures thoroughly"
    assert json.loads(path.read_text()) == kept


def test_layers_are_measured_on_the_base_weights(eager: LanguageModel, bench: Workbench) -> None:
    expected = bench.recommend_layers([EASY], **ASKED)
    bench.commit(some_delta(eager, 1, (0, 1, 2), scale=0.5))
    patched = hashes(eager)
    assert bench.recommend_layers([EASY], **ASKED) == expected and hashes(eager) == patched


def test_a_bench_follows_what_another_one_did(lm: LanguageModel, bench: Workbench) -> None:
    base = hashes(lm)
    assert bench.at == BASE and not bench.follow()
    twin = wrap(copy.deepcopy(lm.module), byte_tokenizer())
    with Workbench(twin, bench.ledger.folder) as other:
        revision = other.commit(some_delta(twin, 0))
        patched = hashes(twin)
        assert bench.at == BASE and hashes(lm) == base, "control: nothing moves by itself"
        assert bench.follow()
        assert (bench.at, hashes(lm)) == (revision.id, patched)
        assert not bench.follow()
        other.checkout(BASE)
    assert bench.follow() and hashes(lm) == base
    with torch.no_grad():
        lm.ffn[0].values.add_(1)
    bench.ledger.checkout(revision.id)
    with pytest.raises(FingerprintError):
        bench.follow()
