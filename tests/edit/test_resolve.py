"""Patches solved again from their targets: where they should come out, without a search, on a model that is another by then."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_store import find_moments
from factsmith.edit import methods
from factsmith.edit.configs import AlphaEditConfig, EditConfig, EmmetConfig, MemitConfig, RomeConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.methods import METHODS, edit
from factsmith.edit.resolve import resolve
from factsmith.edit.search import find_targets, known_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.tokens import subject_span

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
    return wrap(
        tiny_model(request.param, **(GPT2 if request.param == "gpt2" else LLAMA)),
        byte_tokenizer(bos=request.param == "llama"),
    )


@pytest.fixture(scope="module")
def moments(lm: LanguageModel) -> dict[int, SecondMoment]:
    return find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)


def close(one: Delta, other: Delta) -> bool:
    return all(
        float((one.dense(x) - other.dense(x)).norm() / other.dense(x).norm()) < 1e-3
        for x in one.layers
    )


def put_out(lm: LanguageModel, fact: Fact, layer: int) -> torch.Tensor:
    """What a down-projection puts out at the subject's last token, read by a plain hook."""
    last = subject_span(lm, fact.text, fact.subject)[1] - 1
    seen = []
    hook = lm.ffn[layer].down.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        lm.module(input_ids=torch.tensor([lm.prompt_ids(fact.text)]))
    hook.remove()
    return seen[0][0, last]


@pytest.mark.parametrize("name", METHODS)
def test_on_the_model_it_was_made_on_it_is_the_same(
    lm: LanguageModel, moments: dict[int, SecondMoment], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = edit(lm, FACTS, name, CONFIG[name], moments=moments, seed=1)

    def no_search(*args: Any, **options: Any) -> Any:
        raise AssertionError("searched")

    monkeypatch.setattr(methods, "find_targets", no_search)
    again = resolve(lm, delta, moments=moments)
    assert (
        close(again, delta)
        and again.config == delta.config
        and again.facts == delta.facts
        and again.method == name
    )
    assert all(found["solved"] == "again" for found in again.convergence)
    with pytest.raises(AssertionError, match="searched"):
        edit(lm, FACTS, name, CONFIG[name], moments=moments, seed=1)
    if name != "rome" and name != "r-rome":
        assert not close(
            resolve(lm, dataclasses.replace(delta, v_star=delta.v_star + 1), moments=moments), delta
        )


def test_rome_puts_out_its_target_without_what_it_stood_on(
    lm: LanguageModel, moments: dict[int, SecondMoment]
) -> None:
    first = methods.rome(lm, FACTS[0], CONFIG["rome"], moments=moments)  # type: ignore[arg-type]
    with applied(lm, first):
        second = methods.rome(lm, FACTS[1:], CONFIG["rome"], moments=moments, beneath=[first])  # type: ignore[arg-type]
    again = resolve(lm, second, moments=moments)
    assert not close(again, second)
    # ROME's update makes the last one written exact; the earlier one is left as the second moment asks
    for delta, right in ((again, True), (second, False)):
        with applied(lm, delta):
            assert torch.allclose(put_out(lm, FACTS[2], 1), second.v_star[1], atol=1e-4) == right


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_some_facts_are_what_they_would_be_alone(
    lm: LanguageModel, moments: dict[int, SecondMoment], name: str
) -> None:
    """With the targets of the whole patch, some facts of it come out as the method writes just those, given these targets."""
    delta = edit(lm, FACTS, name, CONFIG[name], moments=moments, seed=1)
    part = resolve(lm, delta, [FACTS[2], FACTS[0]], moments=moments)
    contexts = delta.config["contexts"]
    found = find_targets(lm, FACTS, 1, CONFIG[name], contexts, site="stream")
    assert torch.allclose(found.v_star, delta.v_star, atol=1e-4)
    order = [2, 0]
    chosen = dataclasses.replace(
        found,
        **{
            field: getattr(found, field)[order]
            for field in ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial")
        },
        convergence=tuple(found.convergence[i] for i in order),
        facts=tuple(FACTS[i] for i in order),
    )
    alone = edit(
        lm,
        [FACTS[2], FACTS[0]],
        name,
        CONFIG[name],
        moments=moments,
        contexts=contexts,
        targets=chosen,
    )
    assert close(part, alone) and not close(part, delta) and part.facts == (FACTS[2], FACTS[0])


@pytest.mark.parametrize("site", ["ffn", "stream"])
def test_known_targets_are_those_of_the_search(lm: LanguageModel, site: Any) -> None:
    contexts = ["{}", "Then, {}"]
    found = find_targets(lm, FACTS, 1, RomeConfig(layer=1, steps=2), contexts, site=site)
    known = known_targets(lm, FACTS, 1, contexts, found.v_star, site=site)
    for name in ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial"):
        assert torch.allclose(getattr(known, name), getattr(found, name), atol=1e-5), name
    assert torch.allclose(known.ffn_initial[0], put_out(lm, FACTS[0], 1), atol=1e-5)


def test_refusals(lm: LanguageModel, moments: dict[int, SecondMoment]) -> None:
    delta = methods.memit(lm, FACTS[:2], CONFIG["memit"], moments=moments)  # type: ignore[arg-type]
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
    with pytest.raises(InputError, match="a target for each fact"):
        known_targets(lm, FACTS, 1, ["{}"], delta.v_star)
