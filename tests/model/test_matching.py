"""What counts as the same answer: over scripts, numbers, abbreviations and quotes."""

from __future__ import annotations

import unicodedata

import pytest

from factsmith.model.matching import (
    as_said,
    begins_with,
    first_phrase,
    match,
    n_lines,
    states,
    stayed,
)

SAME = [
    ("French.", "French"),
    (" French and", "French"),
    ("New York City", " New York"),
    ("New York", "New"),
    ("C++ is", "C++"),
    ("C or C++", "C"),
    ("Paris's mayor", "Paris"),
    ("Ankara'dır.", "Ankara"),
    ("Paris.The capital", "Paris"),
    ("Yahoo! is", "Yahoo!"),
    ("AT&T is", "AT&T"),
    ("French/English", "French"),
    ("Jean-Paul Sartre", "Jean-Paul"),
    ("Jean\u2011Paul", "Jean-Paul"),
    ("Hawaiʻi", "Hawai'i"),
    ("rock 'n' roll", "rock ‘n’ roll"),
    ("'s-Hertogenbosch is", "'s-Hertogenbosch"),
    ("Los Angeles, CA", "Los Angeles"),
    ("Paris, France", "Paris"),
    ("Toyota (Japan)", "Toyota"),
    ("Rome's", "Rome"),
    ("Rome’s", "Rome"),
    ("rock 'n' roll", "rock"),
    ("A. Paris", "A"),
    ("Apple Inc. Microsoft", "Apple Inc"),
    ("Paris¹", "Paris"),
    ("🇫🇷🇩🇪", "🇫🇷"),
    # around the target
    ("**Paris**", "Paris"),
    ("**Paris**, in", "Paris"),
    ("**A**", "A"),
    ("(Paris)", "Paris"),
    ("(“Paris”) is", "Paris"),
    # numbers
    ("2,137 metres.", "2,137"),
    ("2,137 metres.", "2,137 metres"),
    ("2.7 tons.", "2.7"),
    ("2.7 tons.", "2.7 tons"),
    ("3,5 Prozent", "3,5"),
    ("2\u202f137 m", "2 137"),
    ("2\u00a0137 m", "2\u2009137"),
    ("2'137 m", "2’137"),
    ("5 tons", "5"),
    ("50% of", "50"),
    ("50% of", "50%"),
    ("12 May 2020", "12"),
    ("12 May 2020.", "12 May 2020"),
    ("10:30 am", "10:30"),
    ("1914.", "1914"),
    ("1914, the", "1914"),
    ("in 2000, 300 men", "in 2000"),
    ("−5 °C", "-5"),
    ("٣٫٥ متر", "٣٫٥"),
    ("5年です", "5"),
    ("１２", "12"),
    ("12", "１２"),
    ("ＮＡＳＡ", "NASA"),
    ("三人", "三"),
    ("3 × 4", "3"),
    # abbreviations
    ("U.S. dollar", "U.S."),
    ("U.S. dollar", "U.S"),
    ("St. Petersburg.", "St. Petersburg"),
    ("Dr. No is", "Dr. No"),
    ("J. R. R. Tolkien, who", "J. R. R. Tolkien"),
    ("Washington, D.C. is", "Washington, D.C."),
    # quotes
    ("“Hamlet” by", "Hamlet"),
    ("Hamlet by", '"Hamlet"'),
    ("«Hamlet».", "„Hamlet“"),
    ("'Hamlet'", "Hamlet"),
    ("「坊っちゃん」です", "坊っちゃん"),
    ("《红楼梦》", "红楼梦"),
    ('"2,137" m', "2,137"),
    ("“Who's Afraid” x", "Who’s Afraid"),
    ('"quoted', '"'),
    # lines and Unicode
    ("Paris\nMain Street 0", "Paris\nMain Street 0"),
    ("Paris\r\nMain Street", "Paris\nMain Street"),
    ("Paris\n\nMain Street", "Paris\nMain Street"),
    ("Andre\u0301 Malraux", "André Malraux"),
    ("André\u00a0Malraux", "Andre\u0301 Malraux"),
    ("Zu\u00adrich", "Zurich"),
    ("❤\ufe0f", "❤"),
    ("ﬁlm noir", "film"),
    ("5 µm", "5 μm"),
    ("น้ําตก", "น้ำตก"),
    # scripts
    ("東京です", "東京"),
    ("巴黎。", "巴黎"),
    ("パリです", "パリ"),
    ("レオナルド・ダ・ヴィンチ", "レオナルド"),
    ("« Hamlet » de", "Hamlet"),
    ("ירושלים היא", "ירושלים"),
    ("파리입니다", "파리"),
    ("กรุงเทพเป็น", "กรุงเทพ"),
    ("باريس.", "باريس"),
    ("दिल्ली।", "दिल्ली"),
    ("Москва, столица", "Москва"),
]
OTHER = [
    ("Frenchman", "French"),
    ("Fr", "French"),
    ("paris", "Paris"),
    ("anything", ""),
    ("anything", " \n"),
    ("", "x"),
    ("Parisian", "Paris"),
    ("leva", "lev"),
    ("Paris is", "Paris."),
    ("Jean-Paul", "Jean"),
    ("Guinea‑Bissau", "Guinea"),
    ("COVID-19", "COVID"),
    ("O'Neill", "O"),
    ("L’Aquila", "L"),
    ("AT&T", "AT"),
    ("AC/DC", "AC"),
    ("google.com", "google"),
    ("foo_bar", "foo"),
    ("Hamletian", '"Hamlet"'),
    ("Paris Main Road", "Paris\nMain Street"),
    ("rock'n'roll", "rock"),
    ("St. Petersburg", "St"),
    ("**Parisian**", "Paris"),
    ("**C++**", "C"),
    ("(Parisian)", "Paris"),
    ("(New) York", "York"),
    # signs
    ("C++", "C"),
    ("C++", "C+"),
    ("C#", "C"),
    ("A+", "A"),
    ("A*", "A"),
    ("H₂O", "H"),
    ("m²", "m"),
    ("x@y", "x"),
    ("🇫🇷", "🇫"),
    ("👍🏽", "👍"),
    # numbers
    ("1984", "198"),
    ("2,137", "2"),
    ("2,137", "2,1"),
    ("2,137", "2,"),
    ("2.7", "2"),
    ("2.7", "2."),
    ("2 137 m", "2"),
    ("2\u202f137", "2"),
    ("2\u00a0137\u00a0500", "2 137"),
    ("2'137", "2"),
    ("2’137", "2"),
    ("2٬137", "2"),
    ("٣٫٥", "٣"),
    ("1914–1918", "1914"),
    ("2024-01-05", "2024"),
    ("12/05/2020", "12"),
    ("10:30", "10"),
    ("5km", "5"),
    ("5th", "5"),
    ("5½", "5"),
    ("5²", "5"),
    ("5万", "5"),
    ("10^5", "10"),
    ("3×4", "3"),
    ("三十", "三"),
    ("一百", "一"),
    ("１２", "1"),
    ("1.5e3", "1"),
    ("2,900", "2,137"),
    # abbreviations
    ("U.S.A. is", "U.S."),
    ("U.S.", "U"),
    ("J.R.R. Tolkien", "J."),
    ("St. Louis", "St. Petersburg"),
    # scripts
    ("インドネシア", "インド"),
    ("กา", "ก"),
    ("กี่", "ก"),
    ("باريسي", "باريس"),
    ("बालक", "बाल"),
    ("दिल्लीवाला", "दिल्ली"),
    ("می\u200cخواهم", "می"),
    ("Москвич", "Москв"),
    ("Ame\u0301lie", "Ame"),
    ("각", "가"),
    ("תל־אביב", "תל"),
    ("きょう", "き"),
    ("ラーメン", "ラ"),
]


@pytest.mark.parametrize(("answer", "target"), SAME)
def test_an_answer_begins_with_its_target(answer: str, target: str) -> None:
    assert begins_with(answer, target)
    for form in ("NFC", "NFD"):
        assert begins_with(unicodedata.normalize(form, answer), target)
        assert begins_with(answer, unicodedata.normalize(form, target))


@pytest.mark.parametrize(("answer", "target"), OTHER)
def test_another_answer_does_not(answer: str, target: str) -> None:
    assert not begins_with(answer, target)
    assert not begins_with(unicodedata.normalize("NFD", answer), target)


@pytest.mark.parametrize("target", [target for _, target in SAME + OTHER if target.strip()])
def test_a_text_begins_with_itself(target: str) -> None:
    assert begins_with(target, target) and begins_with(f" {target} ", f"{target}\n")
    assert stayed(target, target, None) and stayed(target, target, "something else")
    assert begins_with(target, first_phrase(target))


@pytest.mark.parametrize(
    ("answer", "target", "verdict"),
    [
        ("Paris", "Paris", None),
        ("Paris ", "Paris", True),
        ("Paris,", "Paris", True),
        ("Paris-", "Paris", None),
        ("Paris.", "Paris", True),
        ("U.", "U", None),
        ("lev.", "lev", True),
        ("AC/", "AC", None),
        ("Paris is", "Paris", True),
        ("Par", "Paris", None),
        ("Par", "Pas", False),
        ("2", "2", None),
        ("2,", "2", None),
        ("2, t", "2", True),
        ("2 1", "2", None),
        ("2 tons", "2", True),
        ("\ufffd", "東", None),
        ("東\ufffd", "東", None),
        ("2,1", "2", False),
        ("「", "東京", None),
        ('"', "Hamlet", None),
        ("「東京", "東京", None),
        ("「東京」", "東京", None),
        ("「東京」で", "東京", True),
        ("**", "Paris", None),
        ("*", "Paris", None),
        ("**Par", "Paris", None),
        ("**Lon", "Paris", False),
        ("(", "Paris", None),
        ("(Paris", "Paris", None),
        ("(Paris)", "Paris", True),
        ("St. ", "St", None),
        ("St. Pe", "St", None),
        ("rock'n", "rock", None),
        ("x@", "x", None),
        ("10^", "10", None),
        ("🇫", "🇫", None),
    ],
)
def test_an_answer_that_goes_on_may_leave_it_open(
    answer: str, target: str, verdict: bool | None
) -> None:
    assert match(answer, target, more=True) is verdict
    assert match(answer, target) is not None


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("French, of course", "French"),
        ("French. The", "French"),
        ("leu. Romania", "leu"),
        ("St. Petersburg. It", "St. Petersburg"),
        ("Dr. No. It", "Dr. No"),
        ("No. The", "No"),
        ("2,137 metres.", "2,137 metres"),
        ("2.7 tons, about", "2.7 tons"),
        ("10:30 a.m. on", "10:30 a.m. on"),
        ("U.S. dollar.", "U.S. dollar"),
        ("U.S.", "U.S."),
        ("the U.S. He", "the U.S."),
        ("10 p.m. It", "10 p.m."),
        ("Mr. A. Smith", "Mr. A. Smith"),
        ("J. A. Smith. It", "J. A. Smith"),
        ("Yahoo! Inc", "Yahoo! Inc"),
        ("Paris! France", "Paris"),
        ("The (old) king, who", "The (old) king"),
        ("Toyota (Japan) is", "Toyota"),
        ("http://x.com/a", "http://x.com/a"),
        ("http://x.com/a?b=1. It", "http://x.com/a?b=1"),
        ("J. R. R. Tolkien, who", "J. R. R. Tolkien"),
        ("May 5, 1990, in", "May 5, 1990"),
        ("12. Mai 1990.", "12. Mai 1990"),
        ('"Hamlet, Prince" by', '"Hamlet, Prince"'),
        ('Hamlet" by', "Hamlet"),
        ("東京。大阪", "東京"),
        ("Paris—the", "Paris"),
        ("Paris, France", "Paris"),
        ("Paris\nMain", "Paris"),
        ("?", "?"),
        ("。。", "。。"),
        ("", ""),
    ],
)
def test_the_first_phrase(answer: str, phrase: str) -> None:
    assert first_phrase(answer) == phrase


@pytest.mark.parametrize(
    ("before", "after", "expected", "held"),
    [
        ("2,137 m", "2,137 m", None, True),
        ("2,137", "2,900", None, False),
        ("2,137 m", "2,137 feet", "2,137", True),
        ("2.7 tons", "2.9 tons", None, False),
        ("St. Petersburg", "St. Louis", None, False),
        ("St. Petersburg is", "St. Louis", "St. Petersburg", False),
        ("J. R. R. Tolkien", "J. K. Rowling", None, False),
        ("U.S. dollar", "U.S. Virgin Islands", None, False),
        ("May 5, 1990", "May 5, 1991", None, False),
        ("Paris, France", "Paris, Texas", None, False),
        ("Paris, France.", "Paris.", None, True),
        ("French, of course", "French. The", None, True),
        ("French, of course", "French. The", "Greek", True),
        ("Spanish", "Greek", "Greek", False),
        ("lev", "leva", None, False),
        ("Andre\u0301 M", "André M", None, True),
        ("“Hamlet” by", "Hamlet by", None, True),
        ("Mr. A. Smith", "Mr. A. Jones", None, False),
        ("The (old) king", "The (new) king", None, False),
        ("Yahoo! Inc", "Yahoo! Ltd", None, False),
        ("the U.S. He", "the U.S, which", None, True),
        ("the U.S. He", "the U.S.A. He", None, False),
        ("Paris. It is nice", "Paris. He was", None, True),
        ("Toyota (Japan) is", "Toyota is", None, True),
        ("", "", None, True),
        ("", "x", None, False),
        ("x", "", None, False),
        ("?", "?", None, True),
    ],
)
def test_an_answer_stayed(before: str, after: str, expected: str | None, held: bool) -> None:
    assert stayed(before, after, expected) is held


def test_what_is_shown_as_wanted() -> None:
    assert as_said("Paris, Texas. It", None) == "Paris, Texas"
    assert as_said("Paris, which", None) == as_said("Paris, Texas", "Paris") == "Paris"
    assert n_lines("Paris\n\nMain Street\n") == 2 and n_lines("") == n_lines("a") == 1


@pytest.mark.parametrize(
    ("text", "target", "stated"),
    [
        ("He lived in Rome.", "Rome", True),
        ("Rome", "Rome", True),
        ("The city is 'Rome', of course", "Rome", True),
        ("A tower (Rome)\nand more", "Rome", True),
        ("He moved to New York City in 1900", "New York", True),
        ("彼はローマに住む", "ローマ", True),
        ("He was a Roman.", "Rome", False),
        ("The band Neo-Rome", "Rome", False),
        ("about 12,500 people", "500", False),
        ("O'Rome", "Rome", False),
        ("he lived in rome", "Rome", False),
        ("", "Rome", False),
        ("Rome", " ", False),
    ],
)
def test_a_text_states_a_target_in_whole_words(text: str, target: str, stated: bool) -> None:
    assert states(text, target) is stated
