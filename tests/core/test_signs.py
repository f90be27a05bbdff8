"""Numbers that may be negative are never printed as a negative zero."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from factsmith.show.pages.page import signed

SOURCES = Path(__file__).resolve().parents[2] / "src" / "factsmith"
SIGNED = re.compile(r"\{[^{}\"]*:\+[^{}]*(?:\{\w+\})?[^{}]*\}")
"""A field of an f-string that shows a sign."""


def test_every_format_with_a_sign_leaves_out_the_sign_of_zero() -> None:
    roots = (SOURCES, SOURCES.parents[1] / "benchmarks", SOURCES.parents[1] / "tools")
    fields = [
        field
        for root in roots
        for path in root.rglob("*.py")
        for field in SIGNED.findall(path.read_text("utf-8"))
    ]
    assert len(fields) > 5 and [field for field in fields if ":+z" not in field] == []
    assert SIGNED.findall('f"{x:+.1%}"') == ["{x:+.1%}"], "a wrong one is seen"


@pytest.mark.parametrize(
    ("number", "text"), [(-0.001, "+0.00"), (-0.0, "+0.00"), (-0.006, "−0.01"), (0.5, "+0.50")]
)
def test_pages(number: float, text: str) -> None:
    assert signed(number) == text
