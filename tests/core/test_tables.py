"""Results that show themselves: nothing lost, nothing let through to the terminal or the page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

import factsmith as fs
from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.tables import Shown, Table, counted, ending, quoted, visible
from factsmith.patch.verification import Check, Verification

EVIL = "<script>alert(1)</script>\x1b[31m\u202e"


class Cells(HTMLParser):
    """The text of every cell, and the names of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.add(tag)
        if tag in ("td", "th", "caption"):
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


class Result(Shown):
    def __init__(self, n: int) -> None:
        self.n = n

    def tables(self) -> list[Table]:
        rows = [(f"token {i} {EVIL}", f"{i / 7:.3f}") for i in range(self.n)]
        return [
            Table("a title", {"token": "<", "score": ">"}, rows, "a note"),
            Table("words alone", {}),
        ]


def cells(page: str) -> Cells:
    parser = Cells()
    parser.feed(page)
    return parser


def test_a_table_is_shown_as_text_and_as_html() -> None:
    text, page = repr(Result(3)), Result(3)._repr_html_()
    assert (
        text.splitlines()[0] == "a title"
        and "a note" in text
        and "words alone" in text
        and "… and" not in text
    )
    parsed = cells(page)
    assert (
        "script" not in parsed.elements
        and len([c for c in parsed.texts if c.startswith("token ")]) == 3
    )
    for shown in (text, page):
        assert "\x1b" not in shown and "\u202e" not in shown and "0.286" in shown
    assert "<script>" in text, "as text it is only text"
    ends = {len(line) for line in text.splitlines() if "0." in line}
    assert len(ends) == 1, "numbers are aligned at the right"


def test_of_a_long_table_the_first_rows_are_shown() -> None:
    text = repr(Result(1234))
    assert "token 19 " in text and "token 20 " not in text and "… and 1,214 more" in text
    assert (
        "… and 1,214 more" in Result(1234)._repr_html_()
        and "token 20 " not in Result(1234)._repr_html_()
    )
    assert len(Result(1234).tables()[0].rows) == 1234


def test_a_result_without_tables_cannot_be_made() -> None:
    with pytest.raises(TypeError):
        Shown()  # type: ignore[abstract]


def test_checks_that_failed_come_first() -> None:
    def check(prompt: str, held: bool) -> Check:
        return Check(
            role="prompt",
            prompt=prompt,
            wanted="b",
            before="a",
            after="b",
            p_before=0.1,
            p_after=None,
            held=held,
        )

    text = repr(Verification(checks=(check("first", True), check("second", False))))
    assert (
        text.index("second") < text.index("first") and "efficacy 50.0%" in text and "0.100" in text
    )


def test_small_words() -> None:
    assert [counted(n, "fact") for n in (0, 1, 2, 1234)] == [
        "0 facts",
        "1 fact",
        "2 facts",
        "1,234 facts",
    ]
    assert counted(2, "patch", "es") == "2 patches"
    assert visible("a\tb\x07c") == "a b�c"
    assert ending("one two three four", 10) == "… four" and ending("short", 10) == "short"


def test_every_result_of_reading_shows_itself_without_its_tensors(tmp_path: Path) -> None:
    lm = fs.wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    index = fs.build_index(
        lm,
        ["The capital of France is Paris.", "Bulgaria joined in 2007, <i>it</i> is said."],
        tmp_path,
    )
    composed = fs.compose(lm, "The capital of", contrast="x")
    results = [
        composed,
        fs.refinement(lm, ["The capital of", "Where is"]),
        fs.agreement(index.triggers, index.values),
        fs.profile(index.triggers, least=1),
        fs.census(lm),
        fs.card(lm, index, (1, 2), [("The capital of France is", "Paris")]),
        index,
        index.triggers,
        index.values,
    ]
    for result in results:
        assert isinstance(result, Shown)
        assert 2 <= len(repr(result).splitlines()) < 60 and "tensor(" not in repr(result)
        assert "<i>" not in result._repr_html_() and cells(result._repr_html_()).elements >= {
            "table",
            "td",
        }
    for part in composed.parts:
        assert f"{part.logit:+.2f}" in repr(composed)
    assert all(
        quoted(c.writes) in repr(composed).replace("\n", " ") and len(c.writes) == 5
        for c in composed.strongest(3)
    )
    assert "384 in 3 banks" in repr(index.triggers) and "25 largest, 25 smallest" in repr(
        index.triggers
    )
    assert "10 most promoted" in repr(index.values) and str(tmp_path) in repr(index).replace(
        "\n", ""
    )
    assert "in 1 bank\n" in repr(fs.value_tokens(lm, [1]))
    for other in (index.triggers.of((1, 2)), index.triggers.banks):
        assert len(repr(other)) < 3000 and "tensor(" not in repr(other)
