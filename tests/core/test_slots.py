"""The slot of a template is filled, and braces that are no slot mean themselves."""

import re

import pytest

from factsmith.core.errors import FactError
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactFile
from factsmith.core.slots import ONE_SLOT, count_slots, escape, fill, fill_all, literal

TEMPLATES = [
    ("The maker of {} is", "The maker of X is"),
    ('{"country": "{}", "capital": "', '{"country": "X", "capital": "'),
    ('{"a": {"country": "{}"}, "b": "', '{"a": {"country": "X"}, "b": "'),
    ("d = {{}}; d['{}'] =", "d = {}; d['X'] ="),
    ("{} in {{}} and {{}}", "X in {} and {}"),
    (r"\textbf{{}} is", r"\textbf{X} is"),
    ("f(){{{}}} of {}", "f(){{}} of X"),
]


@pytest.mark.parametrize(("template", "text"), TEMPLATES)
def test_a_fact_takes_a_prompt_with_one_slot(template: str, text: str) -> None:
    fact = Fact("X", template, "Y", paraphrases=[template])
    assert fact.text == text and fact.paraphrase_texts == (text,)
    start, stop = fill(template, "X")[1:]
    assert text[start:stop] == "X" and text[:start].count("X") == template[:start].count("X")


@pytest.mark.parametrize("template", ["no slot", "{} and {}", "{} {{}} {}", "{{}} and {{}}"])
def test_any_other_number_of_slots_is_refused(template: str) -> None:
    with pytest.raises(FactError, match="expected exactly one"):
        Fact("X", template, "Y")


def test_the_schema_accepts_what_a_fact_accepts() -> None:
    for template, _ in TEMPLATES:
        assert re.match(ONE_SLOT, template), template
    for template in ["no slot", "{} and {}", "{} {{}} {}", "{{}} and {{}}"]:
        assert not re.match(ONE_SLOT, template), template
    assert ONE_SLOT in str(FactFile.schema()).replace("\\\\", "\\")


def test_a_subject_with_spaces_or_braces_is_filled_once() -> None:
    filled = fill("the {} is", " {} ")
    assert filled.text == "the  {}  is" and filled.text[filled.start : filled.stop] == "{}"
    assert fill_all("{}, {}", "{}") == "{}, {}"


def test_a_text_becomes_a_part_of_a_template_and_back() -> None:
    for text in ("a = {}", "{{}}", "plain", "{}{}"):
        assert literal(escape(text)) == text
        assert fill(f"{escape(text)} {{}}", "X").text == f"{text} X" or count_slots(escape(text))


def test_a_template_without_a_slot_cannot_be_filled() -> None:
    with pytest.raises(ValueError, match="no slot"):
        fill("nothing", "X")
    assert fill_all("nothing", "X") == "nothing"
