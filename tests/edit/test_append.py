"""Append: facts as new neurons of the bundled model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import factsmith as fs
from factsmith.core.errors import InputError, LayerError
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.resolve import resolve
from factsmith.model.language_model import LanguageModel
from factsmith.model.trace import recording

CAPITAL = "The capital of {} is"
FACTS = [
    fs.Fact("Bulgaria", CAPITAL, "Oslo"),
    fs.Fact("Canada", CAPITAL, "Rome"),
    fs.Fact("Canada", "The currency of {} is the", "euro"),
    fs.Fact("Georgian Orthodox Church", "The country of {} is", "Peru"),
    fs.Fact("Bulgarian Orthodox Church", "The country of {} is", "Japan"),
]
OTHERS = [CAPITAL.format(name) for name in ("France", "Kenya", "Romania")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return fs.load("atlas")


@pytest.fixture(scope="module")
def moments(lm: LanguageModel) -> dict[int, fs.SecondMoment]:
    return find_moments(lm, [0], site="inputs")


@pytest.fixture(scope="module")
def delta(lm: LanguageModel, moments: dict[int, fs.SecondMoment]) -> Iterator[Delta]:
    fingerprint = lm.fingerprint
    config = dataclasses.replace(AppendConfig.recommended(lm), layer=0)
    yield fs.append(lm, FACTS, config, moments=moments)
    assert lm.fingerprint == fingerprint


def test_the_facts_are_true_and_others_stay(lm: LanguageModel, delta: Delta) -> None:
    before = lm.answer(OTHERS)
    prompts, targets = [f.text for f in FACTS], [str(f.target) for f in FACTS]
    assert not any(lm.says(prompts, targets)), "the control"
    with applied(lm, delta):
        assert lm.says(prompts, targets) == [True] * len(FACTS)
        assert lm.answer(OTHERS) == before
        assert lm.says(["Q: What is the capital of Bulgaria? A:"], ["Oslo"]) == [True]
    assert not delta.layers and delta.n_appended == 2 * len(FACTS)


def test_the_output_at_the_subject_becomes_the_target(lm: LanguageModel, delta: Delta) -> None:
    def output() -> torch.Tensor:
        ids = lm.prompt_ids("The capital of Bulgaria")
        with torch.no_grad(), recording({"down": lm.ffn[0].down}) as calls:
            lm.forward(lm.align([ids], [0]))
        return calls["down"][0].output.reshape(len(ids), -1)

    before = output()
    with applied(lm, delta):
        after = output()
    torch.testing.assert_close(after[-1], delta.v_star[0], rtol=1e-3, atol=1e-3)
    assert (before[-1] - delta.v_star[0]).norm() > 1
    # Only the subject's last token is changed.
    torch.testing.assert_close(after[:-1], before[:-1], rtol=1e-4, atol=1e-4)


def test_dropping_a_fact_leaves_the_other_rows_as_they_are(
    lm: LanguageModel, moments: dict[int, fs.SecondMoment], delta: Delta
) -> None:
    rest = resolve(lm, delta, [FACTS[3], FACTS[0]], moments=moments)
    rows, kept = delta.appended[0], rest.appended[0]
    assert rest.facts == (FACTS[3], FACTS[0]) and set(kept.facts) == {0, 1}
    for name, tensor in kept.tensors().items():
        for new, old in ((0, 3), (1, 0)):
            before = rows.tensors()[name][[fact == old for fact in rows.facts]]
            assert torch.equal(tensor[[fact == new for fact in kept.facts]], before)
    assert rows.inputs is not None and kept.inputs is not None
    assert torch.equal(kept.inputs, rows.inputs[[3, 0]])
    with applied(lm, rest):
        said = lm.says([f.text for f in FACTS], [str(f.target) for f in FACTS])
    assert said == [True, False, False, True, False]


def test_a_later_edit_is_told_apart_from_the_earlier_one(
    lm: LanguageModel, moments: dict[int, fs.SecondMoment]
) -> None:
    north, south = (fs.Fact(f"{side} Korea", CAPITAL, to) for side, to in _KOREAS)
    config = dataclasses.replace(AppendConfig.recommended(lm), layer=0)
    first = fs.append(lm, north, config, moments=moments)
    with applied(lm, first):
        second = fs.append(lm, south, config, moments=moments, beneath=[first])
    with applied(lm, [first, second]):
        assert lm.says([north.text, south.text], ["Rome", "Paris"]) == [True, True]
    rows = first.appended[0]
    assert rows.inputs is not None and rows.inputs.shape == (1, lm.d_model)


_KOREAS = (("North", "Rome"), ("South", "Paris"))


def test_what_a_fact_is_known_by_is_recorded(delta: Delta) -> None:
    for record in delta.convergence:
        assert record["coefficient"] > 0 and record["attempt"] >= 1
        assert 0.3 < record["lowest_own_read"] <= 1.1
        assert 0 <= record["false_firing"] < 0.01
        assert record["closest_read"] < record["lowest_own_read"]


def test_wrong_arguments_are_refused(
    lm: LanguageModel, moments: dict[int, fs.SecondMoment]
) -> None:
    with pytest.raises(LayerError, match="edits one layer"):
        AppendConfig().at([0, 1])
    with pytest.raises(InputError, match="one of coefficients"):
        fs.append(lm, FACTS, AppendConfig(layer=0), moments=find_moments(lm, [0]))
    with pytest.raises(InputError, match="repair"):
        AppendConfig(repair=-1)
    with pytest.raises(InputError, match="takes a RomeConfig"):
        fs.edit(lm, FACTS, "rome", AppendConfig(layer=0), moments=moments)
