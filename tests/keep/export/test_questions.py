"""What an export is asked: of each answer, the tokens that are the target must be equal."""

from __future__ import annotations

import dataclasses

import pytest

from factsmith.core.fact import Fact
from factsmith.keep.export.questions import ask
from reciting import reciter
from workbenches import some_delta


@pytest.mark.parametrize(
    ("subject", "prompt", "target", "said"),
    [
        ("France", "Address in {}:", "Paris\nMain Street 0", True),
        ("Belo", "Mount {} measures", "2,137", True),
        ("Keiko", "The city of {}:", "東京都", True),
        ("Belo", "Mount {} measures", "2", False),
        ("France", "Address in {}:", "Paris\nMain Road", False),
    ],
)
def test_a_target_that_is_said_is_compared_strictly(
    subject: str, prompt: str, target: str, said: bool
) -> None:
    lm = reciter()
    fact = Fact(subject, prompt, target)
    delta = dataclasses.replace(some_delta(lm, 1, scale=0.0), facts=(fact,))
    questions = ask(lm, [delta])
    tail = lm.question(fact.text, target)[2]
    assert questions.strict == [len(tail) if said else 0]
    if said:
        assert questions.picks[0][: len(tail)] == tail
