"""Facts: what is taken, what is refused, and how they are written as fields."""

from __future__ import annotations

from typing import Any

import pytest

from factsmith.core.errors import FactError
from factsmith.core.fact import Fact, Probe
from full_fact import FULL


def test_prompts_are_filled_in() -> None:
    assert FULL.text == "The river of N'Djamena is"
    assert FULL.paraphrase_texts == ("N'Djamena lies on", "Q: Which river? A: N'Djamena's is")
    assert FULL.neighbours == (
        Probe("Cairo lies on"),
        Probe("Paris lies on", "Seine"),
        Probe("Rome lies on", "Tiber"),
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"subject": "  "}, "subject is empty"),
        ({"target": ""}, "target is empty"),
        ({"prompt": "no slot"}, "prompt has 0 slots"),
        ({"prompt": "{} and {}"}, "prompt has 2 slots"),
        ({"prompt": 3}, "prompt is 3; expected text"),
        ({"target_true": " b "}, "must differ"),
        ({"paraphrases": "one text"}, "paraphrases"),
        ({"neighbours": [{"prompt": "x", "answer": "y"}]}, "neighbours.0.answer"),
        ({"neighbours": [7]}, "neighbours.0"),
    ],
)
def test_unusable_facts_are_refused_by_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FactError, match=words):
        Fact(**{"subject": "a", "prompt": "{} is", "target": "b", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"subject": "a"},
        {"subject": "a", "prompt": "{}", "target": "b", "colour": "red"},
        ["a"],
        None,
    ],
)
def test_only_known_fields_make_a_fact(fields: Any) -> None:
    with pytest.raises(FactError):
        Fact.from_dict(fields)


def test_forgetting_has_a_word_of_its_own() -> None:
    facts = [
        Fact("Ann", "{} lives in", forget=True),
        Fact("Ann", "{} lives in", None),
        Fact.from_dict({"subject": "Ann", "prompt": "{} lives in", "target": None}),
        Fact.from_dict({"subject": "Ann", "prompt": "{} lives in", "forget": True}),
    ]
    assert len(set(facts)) == 1 and facts[0].forget and facts[0].target is None
    assert Fact.from_dict(facts[0].to_dict()) == facts[0]
    options: list[dict[str, Any]] = [{}, {"forget": False}, {"target": "", "forget": False}]
    for fields in options:
        with pytest.raises(FactError, match="target is empty"):
            Fact("Ann", "{} lives in", **fields)
    with pytest.raises(FactError, match="give one of them"):
        Fact("Ann", "{} lives in", "Oslo", forget=True)
    with pytest.raises(FactError, match="forget is 'yes'"):
        Fact("Ann", "{} lives in", forget="yes")  # type: ignore[arg-type]
