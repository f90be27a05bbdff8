"""An outcome says whether `apply` kept the patch, and the revision records it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from factsmith.core.errors import FingerprintError
from factsmith.core.fact import Fact
from factsmith.core.gates import Gates
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import Delta
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from workbenches import FACT, FIAT, QUICK, hashes, moments_of


def test_a_known_fact_is_not_written(lm: LanguageModel, bench: Workbench) -> None:
    said = lm.answer([FACT.text])[0]
    fact = Fact(FACT.subject, FACT.prompt, said)
    before = hashes(lm)
    outcome = bench.apply(fact)
    assert outcome.revision is None and outcome.delta is None and "already" in outcome.warnings[0]
    assert (
        hashes(lm) == before
        and bench.log() == []
        and not (bench.ledger.folder / "moments").exists()
    )
    forced = bench.apply(fact, config=QUICK, force=True)
    assert forced.revision is not None and not any(
        "already" in warning for warning in forced.warnings
    )
    assert hashes(lm) != before


def test_a_patch_that_does_not_hold_is_not_kept(lm: LanguageModel, bench: Workbench) -> None:
    before = lm.fingerprint
    # One step makes no update, so the target cannot be reached.
    weak = RomeConfig(layer=1, steps=1)
    outcome = bench.apply(FACT, config=weak, moments=moments_of(lm), contexts=["{}"])
    assert (
        outcome.proposal.failed
        and outcome.revision is None
        and "did not take" in " ".join(outcome.warnings)
    )
    assert bench.log() == [] and lm.fingerprint == before
    forced = bench.apply(FACT, config=weak, moments=moments_of(lm), contexts=["{}"], force=True)
    assert forced.revision is not None and forced.revision.report["efficacy"] == 0.0


def test_apply_records_the_edit(lm: LanguageModel, bench: Workbench) -> None:
    moments = moments_of(lm)
    outcome = bench.apply(
        FACT,
        config=QUICK,
        moments=moments,
        contexts=["{}", "Well. {}"],
        message="as asked",
        force=True,
    )
    revision = outcome.revision
    assert revision is not None and outcome.delta is not None and outcome.verification is not None
    assert (revision.message, revision.method, revision.layers, revision.facts) == (
        "as asked",
        "rome",
        (1,),
        (FACT,),
    )
    assert revision.config["contexts"] == ["{}", "Well. {}"] and revision.config["steps"] == 3
    assert revision.moments == hashlib.sha256(moments[1].matrix.numpy().tobytes()).hexdigest()
    assert revision.report["checks"] == outcome.verification.to_dict()["checks"]
    stored = Delta.load(bench.ledger.delta_folder(revision))
    assert torch.equal(stored.dense(1), outcome.delta.dense(1))
    assert [check.role for check in outcome.verification.checks] == [
        "prompt",
        "paraphrase",
        "neighbour",
    ]
    json.dumps(outcome.to_dict()), json.dumps(bench.status().to_dict())


def test_a_conflict_is_refused_and_recorded_when_forced(atlas_bench: Workbench) -> None:
    first = atlas_bench.apply(FIAT).revision
    assert first is not None
    against = Fact("Fiat 127", "{} is made by", "Honda")
    refused = atlas_bench.apply(against)
    assert refused.revision is None and refused.delta is None and len(atlas_bench.log()) == 1
    assert refused.failures[0].startswith("conflict") and first.id[:10] in refused.failures[0]
    forced = atlas_bench.apply(against, force=True)
    assert forced.forced and forced.revision is not None
    assert forced.revision.report["forced"] and "Toyota" in forced.revision.report["conflicts"][0]


def test_a_dry_run_is_kept_as_it_was_solved(atlas_bench: Workbench) -> None:
    tried = atlas_bench.apply(FIAT, dry_run=True, gates=Gates())
    assert tried.holds and tried.revision is None and atlas_bench.log() == []
    base = hashes(atlas_bench.lm)
    kept = atlas_bench.keep(tried, message="as tried")
    assert kept.revision is not None and kept.revision.message == "as tried"
    assert not kept.forced and kept.gates == tried.gates and kept.delta is tried.delta
    assert kept.revision.report["seconds"] == sum(tried.proposal.seconds.values())
    assert "Toyota" in atlas_bench.lm.answer([FIAT.text])[0]
    with pytest.raises(FingerprintError):  # the weights are no longer those of the dry run
        atlas_bench.keep(tried)
    atlas_bench.revert("latest")
    assert hashes(atlas_bench.lm) == base
    again = atlas_bench.keep(tried)  # the same weights again
    assert again.revision is not None and again.revision.delta == kept.revision.delta


def test_a_failed_dry_run_is_kept_only_by_force(lm: LanguageModel, bench: Workbench) -> None:
    weak = RomeConfig(layer=1, steps=1)
    tried = bench.apply(FACT, config=weak, moments=moments_of(lm), contexts=["{}"], dry_run=True)
    before = lm.fingerprint
    assert tried.failed and bench.keep(tried).revision is None
    assert bench.log() == [] and lm.fingerprint == before
    forced = bench.keep(tried, force=True)
    assert forced.forced and forced.revision is not None
    assert bench.log()[0].report["forced"] and len(bench.log()) == 1
