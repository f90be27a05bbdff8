"""Tables in terminals of any width: no column is lost, no text is cut, no line is too long."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console

from factsmith.core.tables import Shown, Table

WIDTHS = [120, 80, 60, 40]
CHECKS = Table(
    "efficacy 100.0%, generalization 50.0%, specificity 33.3%, chat 12.5%, retention 99.9%",
    {
        "": "<",
        "prompt": "<",
        "before": "<",
        "p before": ">",
        "after": "<",
        "p after": ">",
        "held": "ok",
    },
    [
        ("prompt", "The mother tongue of Danielle Darrieux is",
         "French.", "0.953", "English. She", "0.997", "ok"),
        ("paraphrase", "Danielle Darrieux, a native speaker of",
         "Occitan", "0.250", "Basque", "0.125", "no"),
        ("neighbour", "Léon Blum writes in",
         "", "", "verse, mostly about gardens", "0.031", "no"),
    ],
    "p: of the target; for neighbours, of the answer before",
)  # fmt: skip
CJK, WORD = "日本国憲法前文第一段落四百字詰原稿用紙二枚分", "Donaudampfschifffahrtsgesellschaft" * 3
TABLES = {
    "checks": CHECKS,
    "numbers": Table(
        "by layer",
        {"layer": ">", **{f"measure{i}": ">" for i in range(9)}},
        [tuple(f"{row}{column}.5" for column in range(10)) for row in range(3)],
    ),
    "unnamed": Table(
        "",
        {"": "<", "value": ">", " ": "<"},
        [("room left", "12.3 %", "of the unrelated facts that may still be lost")],
    ),
    "number first": Table("", {"p": ">", "fact": "<"}, [("0.125", "the euro is a currency")] * 2),
    "CJK": Table("", {"neuron": "<", "token": "<", "score": ">"}, [("7", CJK, "1.25")]),
    "a long word": Table("", {"neuron": "<", "token": "<", "score": ">"}, [("7", WORD, "1.25")]),
}


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table.as_rich())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    assert max(map(cell_len, printed(TABLES[name], width).splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_word_is_printed_as_often_as_it_occurs(name: str, width: int) -> None:
    """Words of a cell may be printed on several lines; none is lost, and no name of a column is."""
    table = TABLES[name]
    text = printed(table, width)
    for word in (CJK, WORD):  # folded: its characters come in order, alone in their lines' column
        if any(word in row for row in table.rows):
            remaining = "".join(re.findall(f"[{re.escape(''.join(set(word)))}]", text))
            assert word in remaining
    words = [word for row in table.rows for cell in row for word in cell.split()]
    words += table.title.split() + table.note.split()
    for word in set(words) - {CJK, WORD}:
        pattern = rf"(?<!\S){re.escape(word)}(?!\S)"
        assert len(re.findall(pattern, text)) >= words.count(word), word
    for column in table.columns:
        if column.strip() and column not in ("neuron", "fact", "prompt"):  # those may head a block
            assert column in text


def test_a_table_that_rich_lays_out_loses_columns() -> None:
    """The control: the same rows in a plain rich table of 40 columns."""
    plain = rich_table.Table(box=None)
    for name, kind in CHECKS.columns.items():
        plain.add_column(name, no_wrap=kind != "<")
    for row in CHECKS.rows:
        plain.add_row(*row)
    console = Console(file=io.StringIO(), width=40, color_system=None)
    console.print(plain)
    assert isinstance(console.file, io.StringIO) and "Danielle" not in console.file.getvalue()


def test_rows_stay_in_columns_where_they_fit() -> None:
    wide = printed(CHECKS, 120).splitlines()
    assert wide[1].split() == ["prompt", "before", "p", "before", "after", "p", "after", "held"]
    starts = {line.index("0.") for line in wide if "0.953" in line or "0.250" in line}
    assert len(starts) == 1
    assert all(line.rstrip().endswith(("ok", "no")) for line in wide if "0.9" in line)


def test_text_wraps_between_words_before_the_columns_are_given_up() -> None:
    narrow = printed(CHECKS, 80)
    assert "held" in narrow.splitlines()[2] and "held:" not in narrow
    assert "p after: 0.997" not in narrow and re.search(r"0\.997 +ok", narrow)


@pytest.mark.parametrize("width", [60, 40])
def test_a_row_that_does_not_fit_becomes_a_block(width: int) -> None:
    text = printed(CHECKS, width)
    joined = " ".join(text.split())
    for row in CHECKS.rows:
        role, prompt, *rest = row
        assert f"{role} {prompt}" in joined
        names = list(CHECKS.columns)[2:]
        assert all(
            f"{name}: {cell}" in joined for name, cell in zip(names, rest, strict=True) if cell
        )
    assert "before: p before" not in joined, "an empty cell has no name without a value"
    lines = text.splitlines()
    heads = [line for line in lines if line.startswith(("prompt ", "paraphrase ", "neighbour "))]
    assert len(heads) == len(CHECKS.rows)


@pytest.mark.parametrize("width", [120, 40])
def test_numbers_and_verdicts_never_wrap(width: int) -> None:
    table = Table(
        "", {"share": ">", "held": "ok", "why": "<"}, [("1 234.5 %", "not asked", "x y " * 40)]
    )
    text = printed(table, width)
    assert "1 234.5 %" in text and "not asked" in text


def test_verdicts_are_coloured_and_rows_are_emphasised() -> None:
    table = Table("", {"": "<", " ": "ok"}, [("ok", "ok"), ("b", "no"), ("c", "later")], bold=[2])
    for width in (80, 7):  # in columns, and in blocks
        console = Console(
            file=io.StringIO(), width=width, force_terminal=True, color_system="standard"
        )
        console.print(table.as_rich())
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert text.count("\x1b[32mok") == 1, "a text is no verdict"
        assert "\x1b[1;31mno" in text and "\x1b[1mc" in text


@pytest.mark.parametrize(("columns", "width"), [(200, 140), (100, 100), (60, 60), (20, 40)])
def test_a_result_is_as_wide_as_the_terminal(
    columns: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result(Shown):
        def tables(self) -> list[Table]:
            return [CHECKS, Table("words " * 60, {})]

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = repr(Result()).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert max(len(line) for line in lines if line.startswith("words")) > width - len("words ") - 1
    assert "0.997" in repr(Result()) and "no" in repr(Result())


@pytest.mark.parametrize("columns", [200, 60, 20])
def test_without_a_terminal_no_line_of_a_result_wraps(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result(Shown):
        def tables(self) -> list[Table]:
            return [CHECKS, Table("words " * 60, {})]

    monkeypatch.setenv("COLUMNS", str(columns))
    lines = repr(Result()).splitlines()
    assert lines[-1] == ("words " * 60).strip()
    assert len(lines) == len(CHECKS.rows) + 4, "a title, the names, a row each, a note, the words"


def test_a_table_without_rows_is_its_title_and_names() -> None:
    assert printed(Table("nothing", {"": "<", "p": ">"}), 80).split() == ["nothing", "p"]


@pytest.mark.parametrize("width", [30, 45, 60])
def test_a_token_in_quotes_does_not_break(width: int) -> None:
    tokens = [f"' token{n}'" for n in range(12)] + ['" it\'s"', "'Paris'"]
    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None)
    console.print(Table("", {" ": "<", "  ": "<"}, [("promotes", " ".join(tokens))]).as_rich())
    lines = written.getvalue().splitlines()
    assert all(any(token in line for line in lines) for token in tokens), lines
    assert all(cell_len(line) <= width for line in lines) and len(lines) > 2
