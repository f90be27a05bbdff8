"""Filled prompts, and the answer that a trace or an attribution follows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.locate.question import (
    answer_to_follow,
    fill_prompts,
    own_answer,
    prompt_warnings,
)
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load

CURRENCY, OTHER = "The currency of Bulgaria is the", "The official language of Austria is"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("atlas")


def test_prompts_are_filled() -> None:
    prompts = ["The currency of {} is the", "In Bulgaria people pay with the"]
    assert fill_prompts(prompts, " Bulgaria ") == [CURRENCY, prompts[1]]
    assert fill_prompts([CURRENCY], None) == [CURRENCY]
    assert fill_prompts(["{} and {}"], "a") == ["a and a"]


@pytest.mark.parametrize(
    ("prompt", "subject", "options", "message"),
    [
        ("The {}", " ", {}, "subject is empty"),
        (" ", None, {}, "a prompt is empty"),
        ("The {}", None, {}, "no subject was given"),
        ("The sea", "Bulgaria", {}, "'Bulgaria' is not in 'The sea'"),
        ("{} and {}", "a", {"single_slot": True}, "2 slots"),
    ],
)
def test_prompts_that_cannot_be_filled_are_refused(
    prompt: str, subject: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fill_prompts([prompt], subject, **options)


def test_white_space_at_the_end_is_a_warning() -> None:
    assert prompt_warnings([CURRENCY]) == ()
    (text,) = prompt_warnings([CURRENCY, f"{CURRENCY} "])
    assert text.startswith(repr(f"{CURRENCY} "))


def test_the_own_answer_has_its_probability(lm: LanguageModel) -> None:
    answer = own_answer(lm, CURRENCY)
    assert answer.text == "lev" and answer.probability is not None
    assert math.log(answer.probability) == pytest.approx(float(lm.log_prob([CURRENCY], ["lev"])[0]))
    assert own_answer(lm, "Bulgaria").probability is None  # it goes on with a comma


def test_the_own_answer_is_followed_by_default(lm: LanguageModel) -> None:
    answer = answer_to_follow(lm, [CURRENCY], None)
    assert answer.target == answer.text == "lev" and answer.warnings == ()
    answer = answer_to_follow(lm, [CURRENCY, OTHER], None)
    assert answer.target == "lev" and len(answer.warnings) == 1
    assert f"{OTHER!r} with 'German'" in answer.warnings[0] and "not 'lev'" in answer.warnings[0]


def test_an_own_answer_that_is_not_of_whole_words(lm: LanguageModel) -> None:
    answer = answer_to_follow(lm, ["Bulgaria"], None)
    assert answer.target is None and not answer.whole
    assert "its first token is followed" in answer.warnings[0]
    with pytest.raises(InputError, match="not an answer of whole words"):
        answer_to_follow(lm, ["Bulgaria"], None, whole_words=True)


def test_a_target_that_the_model_does_not_say_must_be_forced(lm: LanguageModel) -> None:
    assert answer_to_follow(lm, [CURRENCY], "lev").warnings == ()
    with pytest.raises(InputError, match=r"with 'lev'.*not 'dinar'") as refused:
        answer_to_follow(lm, [CURRENCY], "dinar")
    assert refused.value.argument == "force"
    forced = answer_to_follow(lm, [CURRENCY], "dinar", force=True)
    assert forced.target == "dinar" and len(forced.warnings) == 1
    # One prompt that the model answers with the target is enough.
    assert len(answer_to_follow(lm, [OTHER, CURRENCY], "lev").warnings) == 1
