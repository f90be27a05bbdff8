"""Texts that look the same have one form."""

import pytest

from factsmith.core.forms import canonical


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Andre\u0301", "Andr\u00e9", True),
        ("a\u00a0b", "a b", True),
        ("a\u202fb", "a b", True),
        ("a\u3000b", "a b", True),
        ("a\nb", "a b", False),
        ("Andre", "Andr\u00e9", False),
        ("\u2167", "VIII", False),
    ],
)
def test_texts_that_look_the_same_have_one_form(left: str, right: str, same: bool) -> None:
    assert (canonical(left) == canonical(right)) is same
