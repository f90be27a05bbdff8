"""Where phrases stand, against regular expressions and by hand."""

from __future__ import annotations

import random
import re

import pytest

from factsmith.read.phrase import folded, phrase_end


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("Parish priest near Paris.", "paris", "Parish priest near Paris"),
        ("Parish", "Paris", None),
        ("unParis Paris_1 Paris2", "Paris", None),
        ("(Paris)", "PARIS", "(Paris"),
        ("東京は日本の首都です", "東京", "東京"),
        ("東京は日本の首都です", "首都", "東京は日本の首都"),
        ("ภาษาไทยง่าย", "ไทย", "ภาษาไทย"),
        ("서울은 수도이다", "서울", "서울"),
        ("iPhone発売", "iphone", "iPhone"),
        ("Die Straße ist lang", "STRASSE", "Die Straße"),
        ("Die Straße ist lang", "straße ist", "Die Straße ist"),
        ("ßßß Straße, ﬃx ende", "ENDE", "ßßß Straße, ﬃx ende"),
        ("in İstanbul now", "İSTANBUL", "in İstanbul"),
        ("Oπλίτης", "OΠΛΊΤΗΣ", "Oπλίτης"),
        ("cafe\u0301 bar", "cafe", None),  # the accent goes on with the word
        ("C++ and C", "c++", "C++"),
        ("a\0b Paris", "b paris", "a\0b Paris"),
        ("what?", "?", "what?"),
        ("", "x", None),
    ],
)
def test_where_a_phrase_ends(text: str, phrase: str, expected: str | None) -> None:
    end = phrase_end(text, folded(phrase))
    assert (None if end is None else text[:end]) == expected


def test_against_regular_expressions() -> None:
    chosen = random.Random(0)
    matches = 0
    for _ in range(4000):
        text = "".join(chosen.choice("aab AB_1,.") for _ in range(14))
        phrase = "".join(chosen.choice("ab A,") for _ in range(chosen.randint(1, 3))).strip()
        if not phrase:
            continue
        left, right = (r"\b" if re.match(r"\w", c) else "" for c in (phrase[0], phrase[-1]))
        brute = re.search(left + re.escape(phrase) + right, text, re.IGNORECASE)
        assert phrase_end(text, folded(phrase)) == (brute and brute.end()), (text, phrase)
        matches += brute is not None
    assert 500 < matches < 3500
