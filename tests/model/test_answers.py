"""An answer begins with a target when the target is a whole word."""

from __future__ import annotations

import pytest

from factsmith.model.answers import begins_with


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
