"""Patches solved again from their targets, without a search, on a model that may have changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from conftest import TEXTS
from editing import change_of, full_rank_moments, new_model, output_at_subject, same_change
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_store import find_moments
from factsmith.edit import rome as editing_one_by_one
from factsmith.edit import spread as editing_all_at_once
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.configs import AlphaEditConfig, EditConfig, EmmetConfig, MemitConfig, RomeConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.methods import METHODS, edit
from factsmith.edit.resolve import resolve
from factsmith.edit.search import find_targets
from factsmith.edit.target import Targets
from factsmith.model.language_model import LanguageModel

FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "The official religion of {} is", "Islam"),
    Fact("LeBron James", "{} plays", "chess"),
]
SPREAD: dict[str, Any] = {"layers": (0, 1), "steps": 3, "scale": "auto", "lr": 0.1}
CONFIG: dict[str, EditConfig] = {
    "rome": RomeConfig(layer=1, steps=3),
    "r-rome": RomeConfig(layer=1, steps=3),
    "memit": MemitConfig(**SPREAD, moment_weight=10.0),
    "emmet": EmmetConfig(**SPREAD, moment_weight=10.0, keys="each"),
    "alphaedit": AlphaEditConfig(**SPREAD, threshold=None, energy=0.7, l2=1.0),
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Each of two families in turn."""
    return new_model(request.param)


@pytest.fixture(scope="module")
def moments(lm: LanguageModel) -> dict[int, SecondMoment]:
    return find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)


def close(one: Delta, other: Delta) -> bool:
    return all(
        float((one.dense(x) - other.dense(x)).norm() / other.dense(x).norm()) < 1e-3
        for x in one.layers
    )


@pytest.mark.parametrize("name", CONFIG)
def test_on_the_model_it_was_made_on_it_is_the_same(
    lm: LanguageModel, moments: dict[int, SecondMoment], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = edit(lm, FACTS, name, CONFIG[name], moments=moments, seed=1)

    def no_search(*args: Any, **options: Any) -> Any:
        raise AssertionError("searched")

    for module in (editing_one_by_one, editing_all_at_once):
        monkeypatch.setattr(module, "find_targets", no_search)
    again = resolve(lm, delta, moments=moments)
    assert close(again, delta) and again.config == delta.config
    assert again.facts == delta.facts and again.method == name
    assert all(record["solved"] == "again" for record in again.convergence)
    with pytest.raises(AssertionError, match="searched"):
        edit(lm, FACTS, name, CONFIG[name], moments=moments, seed=1)
    if name != "rome" and name != "r-rome":
        shifted = dataclasses.replace(delta, v_star=delta.v_star + 1)
        assert not close(resolve(lm, shifted, moments=moments), delta), "the control"


def test_rome_reaches_its_target_without_the_edit_beneath(
    lm: LanguageModel, moments: dict[int, SecondMoment]
) -> None:
    first = edit(lm, FACTS[0], "rome", CONFIG["rome"], moments=moments)
    with applied(lm, first):
        second = edit(lm, FACTS[1:], "rome", CONFIG["rome"], moments=moments, beneath=[first])
    again = resolve(lm, second, moments=moments)
    assert not close(again, second)
    # The fact that ROME writes last is exact. The one before it is only as near as C asks.
    for delta, exact in ((again, True), (second, False)):
        with applied(lm, delta):
            output = output_at_subject(lm, lm.ffn[1].down, FACTS[2])
            assert torch.allclose(output, second.v_star[1], atol=1e-4) == exact


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_some_facts_are_what_they_would_be_alone(
    lm: LanguageModel, moments: dict[int, SecondMoment], name: str
) -> None:
    """Some facts of a patch become what the method writes for them alone, with their targets."""
    delta = edit(lm, FACTS, name, CONFIG[name], moments=moments, seed=1)
    part = resolve(lm, delta, [FACTS[2], FACTS[0]], moments=moments)
    contexts = delta.config["contexts"]
    targets = find_targets(lm, FACTS, 1, CONFIG[name], contexts, site="stream")
    assert torch.allclose(targets.v_star, delta.v_star, atol=1e-4)
    chosen, facts = Targets.gathered([(targets, 2), (targets, 0)]), [FACTS[2], FACTS[0]]
    alone = edit(lm, facts, name, CONFIG[name], moments=moments, contexts=contexts, targets=chosen)
    assert close(part, alone) and not close(part, delta) and part.facts == (FACTS[2], FACTS[0])


def test_every_method_is_tested() -> None:
    assert {*CONFIG, "append"} == set(METHODS)


def test_of_appended_neurons_some_facts_are_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read, searched or solved: not even moments are needed."""
    lm = new_model("gpt2")
    moments = full_rank_moments(lm, site="inputs")
    config = AppendConfig(layer=1, steps=3)
    delta = edit(lm, FACTS, "append", config, moments=moments, contexts=["{}"])

    def no_pass(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model ran")

    monkeypatch.setattr(lm.module, "forward", no_pass)
    assert same_change(resolve(lm, delta, moments={}), delta)
    part = resolve(lm, delta, [FACTS[2], FACTS[0]], moments={}, search=True)
    assert part.facts == (FACTS[2], FACTS[0])
    rows, whole = part.appended[1], delta.appended[1]
    kept = [row for row, fact in enumerate(whole.facts) if fact != 1]
    assert all(torch.equal(t, whole.tensors()[name][kept]) for name, t in rows.tensors().items())
    assert [part.facts[i] for i in rows.facts] == [FACTS[whole.facts[row]] for row in kept]
    assert torch.equal(part.v_star, delta.v_star[[2, 0]])
    name = "not_told_apart_from"  # a fact by its index, which is another one now
    for record, before in zip(
        part.convergence, (delta.convergence[i] for i in (2, 0)), strict=True
    ):
        assert {**record, name: 0} == {**before, name: 0}
        assert record.get(name) == {2: 0, 0: 1}.get(before.get(name))
    assert len(change_of(part)["values 1"]) < len(change_of(delta)["values 1"]), "the control"
    for facts in ([], [dataclasses.replace(FACTS[0], target="Czech")]):
        with pytest.raises(InputError, match="expected some of the 3 facts"):
            resolve(lm, delta, facts, moments={})


def test_refusals(lm: LanguageModel, moments: dict[int, SecondMoment]) -> None:
    delta = edit(lm, FACTS[:2], "memit", CONFIG["memit"], moments=moments)
    other = Fact("Edwin", "The official religion of {} is", "Buddhism")
    for facts in ([], [FACTS[2]], [other]):
        with pytest.raises(InputError, match="expected some of the 2 facts"):
            resolve(lm, delta, facts, moments=moments)
    for config in (
        {},
        {**delta.config, "stepz": 1, "contexts": None},
        {**delta.config, "spread": "odd"},
    ):
        with pytest.raises(InputError):
            resolve(lm, dataclasses.replace(delta, config=config), moments=moments)
    with pytest.raises(InputError, match="no method"):
        resolve(lm, dataclasses.replace(delta, method="neurons"), moments=moments)
    with pytest.raises(InputError, match="expected a Delta"):
        resolve(lm, delta.facts, moments=moments)  # type: ignore[arg-type]


def test_a_patch_from_before_there_was_a_choice_is_searched_as_then(
    lm: LanguageModel, moments: dict[int, SecondMoment]
) -> None:
    config = dataclasses.replace(CONFIG["memit"], optimizer="adam")
    delta = edit(lm, FACTS, "memit", config, moments=moments, seed=1)
    assert delta.config["optimizer"] == "adam"
    kept = {name: value for name, value in delta.config.items() if name != "optimizer"}
    old = dataclasses.replace(delta, config=kept)
    assert close(resolve(lm, old, moments=moments, search=True), delta)
    new = edit(lm, FACTS, "memit", CONFIG["memit"], moments=moments, seed=1)
    assert new.config["optimizer"] == "margin" and not close(new, delta)
    assert close(resolve(lm, new, moments=moments, search=True), new)
