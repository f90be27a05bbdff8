from __future__ import annotations

import contextlib

import pytest

from factsmith.core.fact import Fact
from factsmith.model.answers import begins_with
from factsmith.model.language_model import LanguageModel
from factsmith.patch.proof import prove


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("French.", "French", True),
        (" French and", "French", True),
        ("Frenchman", "French", False),
        ("Fr", "French", False),
        ("New York City", " New York", True),
        ("1984", "198", False),
        ("東京です", "東京", True),
        ("C++", "C", True),
        ("anything", "", False),
    ],
)
def test_begins_with(answer: str, target: str, expected: bool) -> None:
    assert begins_with(answer, target) is expected


def test_prompts_are_asked_in_the_chat_template_too(tiny_gpt2: LanguageModel) -> None:
    fact = Fact("Edwin", "{} is a", "king")
    proof = prove(tiny_gpt2, [fact], contextlib.nullcontext, templates=["Q: {}\nA:"])
    assert [(check.role, check.prompt, check.wanted) for check in proof.checks] == [
        ("prompt", "Edwin is a", "king"),
        ("chat", "Q: Edwin is a\nA:", "king"),
    ]
    assert (
        proof.chat == 0.0
        and proof.to_dict()["chat"] == 0.0
        and "chat 0.0%" in proof.tables()[0].title
    )
    assert prove(tiny_gpt2, [fact], contextlib.nullcontext).chat is None
