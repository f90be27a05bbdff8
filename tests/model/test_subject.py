"""The subject of a prompt: by its slot, by a search for whole words, or by a number."""

import unicodedata

import pytest

from conftest import byte_tokenizer
from factsmith.core.errors import InputError, SubjectError
from factsmith.core.fact import Fact
from factsmith.model.subject import fact_span, find_subject, read_prompt, subject_span
from factsmith.model.tokens import encode

CASES = [
    ("Iran", "In Iranian history, the capital of {} is"),
    ("Fiat 127", "Fiat 127, a small car: the maker of {} is"),
    ("Ana", "The mother tongue of {}, daughter of Anastasia, is"),
    ("is", "The language of {} is"),
    ("a", "{} banana"),
]


@pytest.mark.parametrize(("subject", "prompt"), CASES)
def test_the_slot_says_where_the_subject_is(subject: str, prompt: str) -> None:
    fact, place = Fact(subject, prompt, "Rome"), prompt.index("{}")
    assert read_prompt(prompt, subject) == (fact.text, place, place + len(subject))
    tokenizer = byte_tokenizer()
    first, stop = fact_span(tokenizer, fact)
    _, offsets = encode(tokenizer, fact.text)
    assert offsets[first][1] > place and offsets[stop - 1][1] == place + len(subject)


def test_a_text_means_its_only_whole_word() -> None:
    text = "In Iranian history, the capital of Iran is"
    assert find_subject(text, "Iran") == (35, 39)
    assert find_subject(text, "Iran", occurrence=1) == (3, 7)
    assert find_subject("Iranian history", "Iran") == (0, 4)


def test_several_whole_words_are_listed_and_one_can_be_named() -> None:
    text = "Iran and Iraq: in Iran"
    with pytest.raises(SubjectError, match=r"1: '\[Iran\] and Iraq.*2: .*\[Iran\]'") as error:
        find_subject(text, "Iran")
    assert error.value.argument == "occurrence"
    assert find_subject(text, "Iran", occurrence=2) == (18, 22)
    assert subject_span(byte_tokenizer(), text, "Iran", occurrence=1)[0] == 0


@pytest.mark.parametrize("occurrence", [0, 3, -1, True, "1", 1.5])
def test_a_number_that_no_occurrence_has_is_refused(occurrence: object) -> None:
    with pytest.raises(InputError, match="occurrence"):
        find_subject("Iran and Iran", "Iran", occurrence=occurrence)  # type: ignore[arg-type]


def test_a_number_and_a_slot_contradict_each_other() -> None:
    with pytest.raises(SubjectError, match="leave one out"):
        read_prompt("In {}, Iran", "Iran", occurrence=1)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("space", [" ", "\u00a0", "\u202f"])
def test_forms_of_accents_and_spaces_are_equal(form: str, space: str) -> None:
    text = unicodedata.normalize(form, f"The first language of André{space}Malraux is")
    subject = unicodedata.normalize("NFC" if form == "NFD" else "NFD", "André Malraux")
    start, stop = find_subject(text, subject)
    assert unicodedata.normalize("NFC", text[start:stop]).split() == ["André", "Malraux"]
    assert text[stop:] == " is"


def test_another_case_is_refused_with_what_the_prompt_has() -> None:
    with pytest.raises(SubjectError, match="the prompt has 'FIAT 127'"):
        find_subject("The maker of FIAT 127 is", "Fiat 127")


def test_braces_of_a_text_that_names_the_subject() -> None:
    assert read_prompt('{"a": {{}}, "c": "Iran", "d": "', "Iran").text.startswith('{"a": {}, "c"')
    assert read_prompt("x{{}} of Iran", "Iran").text == "x{} of Iran"
    assert read_prompt("x{{}}", "Iran").text == "x{Iran}"
    with pytest.raises(InputError, match="2 slots"):
        read_prompt("{} and {}", "Iran")
