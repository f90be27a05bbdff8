"""Messages about foreign values stay short, whatever the values are."""

from __future__ import annotations

import pytest

from factsmith.core.errors import FactError, first_line
from factsmith.core.explain import NAMED, short
from factsmith.core.fact import Fact

LONG = {
    "a text": "x" * 10**6,
    "a nested list": [[[["deep"] * 99] * 99] * 99],
    "an integer of too many digits": 10**5000,
    "a mapping": {i: i for i in range(10**5)},
}


@pytest.mark.parametrize("kind", LONG)
def test_a_quoted_value_is_never_long(kind: str) -> None:
    assert 0 < len(short(LONG[kind])) <= 160


def test_a_short_value_is_quoted_whole() -> None:
    assert short("Łódź") == "'Łódź'" and short([1, None]) == "[1, None]"


def test_a_message_names_the_first_faults_and_counts_the_others() -> None:
    with pytest.raises(FactError) as refused:
        Fact("a", "{} is", "b", paraphrases=[7] * 20)  # type: ignore[list-item]
    message = str(refused.value)
    assert message.startswith("fact: paraphrases.0 is 7; expected text")
    assert message.count("paraphrases.") == NAMED and message.endswith("; and 15 more")


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"  # type: ignore[arg-type]
