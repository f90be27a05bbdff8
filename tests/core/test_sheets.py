"""CSV: no text is a formula, every text can be read back, and numbers stay numbers."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factsmith.core.sheets import csv_text, plain_cell, safe_cell

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "＝1", "'=1", "'"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    assert safe_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["", " ", "euro", " the", "1=1", "a-b", -1.5, 3, None, True])
def test_other_cells_stay(value: object) -> None:
    assert safe_cell(value) is value


@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False)), min_size=1))
def test_every_text_is_read_back(cells: list[tuple[str, float]]) -> None:
    rows = [{"token": text, "=p": number} for text, number in cells]
    written = csv_text(rows).encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
    read = list(csv.reader(io.StringIO(written, newline="")))
    assert read[0] == ["token", "'=p"]
    assert [(plain_cell(text), float(number)) for text, number in read[1:]] == cells
    assert all(text.lstrip()[:1] not in tuple("=+-@") for text, _ in read[1:])
