"""Texts that look the same have one form."""

import pytest

from factsmith.core.forms import canonical, occurrences


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


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("In Iranian history, Iran", "Iran", [("Iran", False), ("Iran", True)]),
        ("André Malraux is", "Andre\u0301\u00a0Malraux", [("André Malraux", True)]),
        ("Andre\u0301\u202fMalraux is", "André Malraux", [("Andre\u0301\u202fMalraux", True)]),
        ("José", "Jose", []),
        ("Jose\u0301", "Jose", []),
        ("한국의 수도", "한국", [("한국", True)]),
        ("\u1112\u1161\u11ab국", "한국", [("\u1112\u1161\u11ab국", True)]),
        ("東京は日本の首都です", "日本", [("日本", True)]),
        ("q\u0307\u0323", "q\u0323\u0307", [("q\u0307\u0323", True)]),
        ("aaa", "aa", [("aa", False), ("aa", False)]),
        ("Fiat 1270", "Fiat 127", [("Fiat 127", False)]),
        ("fiat", "Fiat", []),
        ("anything", "", []),
    ],
)
def test_a_part_is_where_a_reader_sees_it(
    text: str, part: str, expected: list[tuple[str, bool]]
) -> None:
    places = occurrences(text, part)
    assert [(text[place.start : place.stop], place.is_whole) for place in places] == expected


def test_case_can_be_ignored() -> None:
    (place,) = occurrences("die STRASSE Straße", "strasse straße", ignore_case=True)
    assert (place.start, place.stop) == (4, 18)
    assert not occurrences("die STRASSE", "strasse")
