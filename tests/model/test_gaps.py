"""The target's tokens are those with which the model itself goes on."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from factsmith.core.fact import Fact
from factsmith.edit.delta import written
from factsmith.model.gaps import _likelier
from factsmith.model.language_model import LanguageModel
from factsmith.model.tokens import target_ids
from learned import byte_level, characters, learned, metaspace

TOKENIZERS = {
    "byte-level": byte_level,
    "with an end": functools.partial(byte_level, ends=True),
    "metaspace": metaspace,
    "characters": characters,
}
ASKED = [
    ('{"country": "France", "capital": "', "Paris", ""),
    ("capital_of_Peru=#", "Lima", ""),
    ("<|user|>Cuba<|assistant|>", "Havana", ""),
    ("法国的首都是", "巴黎", ""),
    ("The capital of Italy is", "Rome", " "),
    ("Egypt:", "Cairo", " "),
    ('{"country": "Peru", "capital":', '"Lima', " "),
    ("The capital of Italy is ", "Rome", " "),
    ("Egypt: ", "Cairo", " "),
]


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    maker = TOKENIZERS[request.param]
    if request.param not in _MADE:
        _MADE[request.param] = learned(maker)
    return _MADE[request.param]


_MADE: dict[str, LanguageModel] = {}


@pytest.mark.parametrize(("prompt", "target", "gap"), ASKED)
def test_the_model_is_asked_for_the_tokens_that_it_says(
    lm: LanguageModel, prompt: str, target: str, gap: str
) -> None:
    assert lm.answer([prompt])[0].startswith(target)
    log_p = float(lm.log_prob([prompt], [target])[0])
    assert math.exp(log_p) > 0.5 and lm.says([prompt], [target]) == [True]
    # An independent computation: the whole text through the module.
    whole, head = (
        lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt.rstrip(" ") + gap + target, prompt.rstrip(" "))
    )
    assert whole[: len(head)] == head
    with torch.no_grad():
        each = lm.module(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(float(each[i - 1, whole[i]]) for i in range(len(head), len(whole)))
    assert log_p == pytest.approx(expected, abs=1e-4)
    assert target_ids(lm, prompt, target) == whole[len(head) :]
    # The other form is one that the model does not say.
    other = "none" if gap else "space"
    if lm.question(prompt, target, other)[2] != lm.question(prompt, target)[2]:
        assert lm.says([prompt], [target], gaps=[other], by_tokens=True) == [False]


@pytest.mark.parametrize("target", ["Lima", "Timbuktu"])
def test_an_answer_that_the_model_does_not_give_has_the_form_of_the_one_it_gives(
    target: str,
) -> None:
    lm = learned(byte_level)
    prompts = ['{"country": "France", "capital": "', "Egypt:", "The capital of Italy is"]
    assert lm.gaps(prompts, [target] * 3) == ["none", "space", "space"]


def test_no_pass_is_run_where_the_texts_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = learned(byte_level)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(lm), "last_logits", refuse)
    assert lm.gaps(["法国的首都是", "It is"], ["罗马", "Rome"]) == ["none", "space"]
    with pytest.raises(AssertionError, match="the model ran"):
        lm.gaps(["never asked: ("], ["Rome"])


def test_prompts_in_doubt_share_passes_and_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, passes = learned(byte_level), []
    run = type(lm).last_logits

    def count(self: LanguageModel, batch: object) -> object:
        passes.append(batch)
        return run(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lm), "last_logits", count)
    prompts = [f"{name}, a country:" for name in ("Peru", "Cuba", "Rome", "Lima")]
    first = lm.gaps(prompts * 2, ["Lima", "Rome"] * 4)
    assert 1 <= len(passes) <= 2
    before = len(passes)
    assert lm.gaps(prompts * 2, ["Lima", "Rome"] * 4) == first and len(passes) == before


def test_the_form_stays_while_a_change_is_tried_and_is_chosen_again_for_other_weights() -> None:
    lm, prompt, target = learned(byte_level), "capital_of_Cuba=#", "Havana"
    assert lm.gaps([prompt], [target]) == ["none"]
    down = {1: torch.randn_like(lm.ffn[1].weight()) * 3}
    weight = lm.ffn[1].weight().clone()
    with written(lm, down):
        assert lm.gaps([prompt], [target]) == ["none"]
    assert lm.gap_choices.chosen[prompt, target] == "none"
    with torch.no_grad():
        lm.ffn[1].weight().mul_(0.5)
        lm.gaps(["Peru:"], ["Lima"])
        assert (prompt, target) not in lm.gap_choices.chosen
        lm.ffn[1].weight().copy_(weight)


def test_a_fact_may_say_what_the_gap_is() -> None:
    fact = Fact("France", "The capital of {} is", "Paris", gap="none")
    assert fact.to_dict()["gap"] == "none" and Fact.from_dict(fact.to_dict()).gap == "none"
    assert "gap" not in Fact("France", "The capital of {} is", "Paris").to_dict()
    lm = learned(byte_level)
    assert lm.tokenizer.decode(target_ids(lm, fact.text, "Paris", gap=fact.gap)) == "Paris"


def test_letters_of_several_bytes_begin_without_a_space() -> None:
    """The model goes on in Chinese, so a Latin target has no space before it either."""
    lm = learned(byte_level)
    assert lm.gaps(["法国的首都是", "The capital of Italy is"], ["Paris", "罗马"]) == [
        "none",
        "space",
    ]


@pytest.mark.parametrize(
    ("none", "space", "expected"),
    [
        (0.30, 0.25, ("none", False)),
        (0.25, 0.30, ("space", True)),
        (0.60, 0.01, ("none", True)),
        (0.01, 0.60, ("space", True)),
    ],
)
def test_a_form_that_the_model_does_not_prefer_is_unclear(
    none: float, space: float, expected: tuple[str, bool]
) -> None:
    lm = learned(byte_level)
    prompt, target = 'A quote: "', "Paris"
    head = lm.prompt_ids(prompt)
    probabilities = torch.zeros(len(lm.tokenizer))
    for gap, p in (("none", none), ("space", space)):
        probabilities[lm.question(prompt, target, gap)[2][0]] = p  # type: ignore[arg-type]
    assert _likelier(lm, head, (prompt, target), probabilities, "none") == expected
