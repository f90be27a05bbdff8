"""layers.json is written, read, ignored for another model, and refused when damaged."""

from __future__ import annotations

import json

import pytest
import torch

from factsmith.core.errors import DamagedError
from factsmith.corpus.moments import SecondMoment
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from workbenches import ASKED, EASY, FACT, QUICK, hashes, moments_of


def test_recommended_layers_are_kept_in_the_workspace(
    eager: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(eager)
    first = bench.recommend_layers([EASY], **ASKED)
    assert (
        first.source == "trials"
        and first.fingerprint == eager.fingerprint
        and hashes(eager) == before
    )
    kept = json.loads((bench.ledger.folder / "layers.json").read_text())
    assert kept["rome"] == first.rome and kept["source"] == "trials"
    moment = SecondMoment.load(bench.ledger.folder / "moments" / f"layer{first.rome}.safetensors")
    assert torch.equal(moment.matrix, moments_of(eager)[first.rome].matrix)
    assert len(list((bench.ledger.folder / "moments").iterdir())) == 1, "only the chosen layer's"

    # From this line on, a measurement fails with TypeError.
    monkeypatch.setattr("factsmith.keep.bench.measure_layers", None)
    again = bench.recommend_layers()
    assert (again.source, again.rome, again.memit, again.scores) == (
        "workspace",
        first.rome,
        first.memit,
        first.scores,
    )
    assert bench.recommend_layers(trials=1) == again
    for different in ({"trials": 2}, {"facts": [EASY]}, {"refresh": True}):
        with pytest.raises(TypeError):
            bench.recommend_layers(**different)


def test_a_choice_for_another_model_is_ignored(eager: LanguageModel, bench: Workbench) -> None:
    first = bench.recommend_layers([EASY], **ASKED)
    path = bench.ledger.folder / "layers.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "fingerprint": "00" * 32, "rome": 99, "memit": [99]}))
    proposal = bench.propose(FACT, **ASKED)
    assert proposal.layers is not None and proposal.layers.source == "depth"
    assert bench.recommend_layers([EASY], **ASKED) == first
    assert json.loads(path.read_text()) == fields, "the next measurement replaces it"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "rome": "first"}',
        "\x00",
        "[" * 99999,
    ],
)
def test_a_damaged_choice_is_refused(lm: LanguageModel, bench: Workbench, text: str) -> None:
    path = bench.ledger.folder / "layers.json"
    path.write_text(text)
    before = hashes(lm)
    for call in (
        lambda: bench.propose(FACT, **ASKED),
        lambda: bench.apply(FACT, **ASKED),
        lambda: bench.recommend_layers(),
    ):
        with pytest.raises(DamagedError, match="delete it"):
            call()
    assert hashes(lm) == before and bench.log() == [] and path.read_text() == text
    proposal = bench.propose(FACT, config=QUICK, **ASKED)
    assert proposal.delta is not None, "an edit of a named layer does not read the file"
    assert bench.recommend_layers(refresh=True).source == "depth"


def test_a_kept_layer_that_the_model_does_not_have_is_refused(
    eager: LanguageModel, bench: Workbench
) -> None:
    bench.recommend_layers([EASY], **ASKED)
    path = bench.ledger.folder / "layers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rome": 3}))
    with pytest.raises(DamagedError, match="does not have"):
        bench.propose(FACT, **ASKED)
