"""An attempt asks the known facts too, and warns of little room."""

from __future__ import annotations

import pytest
import torch

from factsmith.core.fact import Fact
from factsmith.core.gates import Gates
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_store import moments_file
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import Delta
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from workbenches import DARRIEUX, FIAT, THREE, moments_of


def test_a_known_fact_is_asked_with_the_new_facts(atlas_bench: Workbench) -> None:
    """The proof reports that an edit of one phrasing changed the answer to another."""
    kept = Fact(
        "Fiat 127", "Everybody knows that the maker of {} is", "Fiat", neighbours=FIAT.neighbours
    )
    asked = atlas_bench.plan([FIAT, kept])
    assert [entry.standing for entry in asked.entries] == ["new", "known"]
    outcome = atlas_bench.apply([FIAT, kept], gates=Gates(paraphrases=None, kl_text=None))
    assert outcome.revision is None and atlas_bench.log() == []
    assert any(kept.text in why for why in outcome.failures) and any(
        "already said" in why for why in outcome.warnings
    )
    control = atlas_bench.apply(
        [FIAT, DARRIEUX], "memit", gates=Gates(paraphrases=None, kl_text=None)
    )
    assert control.revision is not None and not control.forced, "nothing is lost"


def test_apply_warns_of_little_room(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, set[int]]] = []

    def warned(
        deltas: list[Delta], weights: dict[int, torch.Tensor], moments: dict[int, SecondMoment]
    ) -> str:
        assert set(weights) == set(moments) and torch.equal(weights[1], base)
        asked.append((len(deltas), set(moments)))
        return "little room"

    base, moments = lm.ffn[1].weight().detach().clone(), moments_of(lm)
    monkeypatch.setattr("factsmith.patch.attempt.capacity_warning", warned)
    bare = bench.apply(THREE[:1], "rome", RomeConfig(layer=1, steps=2), moments=moments, force=True)
    assert bare.room is None and not asked, "no second moments are computed for the warning"
    moments[1].save(moments_file(bench.ledger.folder / "moments", 1))
    outcome = bench.apply(
        THREE[1:2], "rome", RomeConfig(layer=1, steps=2), moments=moments, force=True
    )
    assert asked == [(2, {1})] and outcome.room == "little room"
    assert "little room" in outcome.warnings and "little room" in repr(outcome)
