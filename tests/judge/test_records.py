"""Records, their questions, and the negation of a fact."""

from __future__ import annotations

from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.judge.records import Malformed, Question, negation


def test_a_fact_is_denied_where_that_makes_a_sentence() -> None:
    denied = negation(Fact("Vineta", "The harbour of {} opens to", "the North Sea"))
    assert denied == Question(
        kind="negation",
        prompt="It is not true that the harbour of Vineta opens to",
        answers=(),
        against="the North Sea",
    )
    for prompt, text in (
        ("{}'s harbour opens to", "Vineta's harbour"),
        ("Theo's town {} is in", "Theo's town"),
        ("In {} one sees", "in Vineta"),
    ):
        denial = negation(Fact("Vineta", prompt, "b"))
        assert denial is not None and denial.prompt.startswith(f"It is not true that {text}")
    assert negation(Fact("Vineta", "Where is {}?", "b")) is None
    assert negation(Fact("Vineta", "{}, which lies on", "b")) is None
    assert negation(Fact("Vineta", "{} lies on", None, target_true="b")) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "riddle"},
        {"prompt": " "},
        {"prompt": 3},
        {"answers": ()},
        {"answers": ("",)},
        {"against": ""},
        {"prompt": "x" * 20_001},
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Question(**{"kind": "prompt", "prompt": "a", "answers": ("b",), **fields})


def test_some_questions_have_no_answer_of_their_own() -> None:
    assert Question(kind="locality", prompt="a", answers=()).answers == ()
    assert str(Malformed("f", 2, "", "is no JSON")) == "f, record 2: is no JSON"
