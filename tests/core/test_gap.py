"""The gap between a prompt and its target, by the texts alone."""

from __future__ import annotations

import pytest

from factsmith.core.gap import before_gap, gap_notes, goes_on, plain_gap


@pytest.mark.parametrize(
    ("prompt", "target", "gap"),
    [
        ("The capital of France is", "Paris", "space"),
        ("Столица Франции —  город", "Париж", "space"),
        ("프랑스의 수도는", "파리", "space"),
        ("फ़्रांस की राजधानी", "पेरिस", "space"),
        ("It was founded in", "1889", "space"),
        ("法国的首都是", "巴黎", "none"),
        ("「", "巴黎", "none"),
        ("フランスの首都は", "パリ", "none"),
        ("ﾌﾗﾝｽの首都は", "ﾊﾟﾘ", "none"),
        ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", "none"),
        ("ເມືອງຫຼວງຂອງຝຣັ່ງແມ່ນ", "ປາຣີ", "none"),
        ("រដ្ឋធានីនៃប្រទេសបារាំងគឺ", "ប៉ារីស", "none"),
        ("ပြင်သစ်၏မြို့တော်မှာ", "ပဲရစ်", "none"),
        ("Answer:\n", "Paris", "none"),
        ("name\t", "Paris", "none"),
        ("", "Paris", "none"),
    ],
)
def test_scripts_and_line_breaks_decide(prompt: str, target: str, gap: str) -> None:
    assert plain_gap(prompt, target) == (gap, True)


@pytest.mark.parametrize(
    ("prompt", "target", "gap"),
    [
        ('{"capital": "', "Paris", "none"),
        ("The capital (", "Paris", "none"),
        ("la capitale de l'", "Allemagne", "none"),
        ('the ship "Argo"', "sank", "space"),
        ("capital_of_France=", "Paris", "space"),
        ("Question: what?", "Paris", "space"),
        ("in 19", "45", "space"),
        ("The capital of France is", "巴黎", "none"),
        ("法国的首都是", "Paris", "none"),
        ("法国 的 首都 是", "巴黎", "none"),
        ("Paris", ", the capital", "none"),
        ("he said", '"yes"', "space"),
    ],
)
def test_signs_and_mixed_scripts_leave_it_to_the_model(prompt: str, target: str, gap: str) -> None:
    assert plain_gap(prompt, target) == (gap, False)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("Paris is ", "Paris is"),
        ("Paris is \u00a0 ", "Paris is"),
        ("法国的首都是\u3000", "法国的首都是"),
        ("Paris is\n", "Paris is\n"),
        ("Paris is\t", "Paris is\t"),
        ("def f():\n    ", "def f():\n    "),
        ("La capitale est «\u00a0", "La capitale est «\u00a0"),
        ("La capitale est « ", "La capitale est «"),
        ("  ", "  "),
        ("", ""),
    ],
)
def test_a_space_at_the_end_is_the_gap(prompt: str, asked: str) -> None:
    assert before_gap(prompt) == asked
    assert any("belongs to the answer" in note for note in gap_notes([prompt])) is (prompt != asked)


def test_many_prompts_have_one_note() -> None:
    (note,) = gap_notes(["a ", "b ", "c", "a "])
    assert note.startswith("2 prompts (the first: 'a ') end in white space")
    (note,) = gap_notes(["a "])
    assert note.startswith("'a ' ends in white space")


def test_a_text_that_goes_on_is_no_answer() -> None:
    assert goes_on("Bulgaria", ", a country") and goes_on("Bulgaria", "-based")
    assert not goes_on("Bulgaria is", "red") and not goes_on("is", "(red)")


def test_a_line_break_at_the_end_is_part_of_a_prompt_and_a_note_says_so() -> None:
    (note,) = gap_notes(["The maker of Fiat 127 is\n"])
    assert "line break" in note and repr("The maker of Fiat 127 is\n") in note
    assert gap_notes(["The maker of\nFiat 127 is", "\n"]) == ()
    assert len(gap_notes(["a ", "b\t", "c\n"])) == 2
