"""Reports as pages and Markdown: no text acts, and no file of others is replaced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from factsmith.core.errors import InputError
from factsmith.show.reports.page import report_markdown, report_page
from show.html import Page, fetched
from show.runs import evaluation, report


def test_the_page_runs_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    html = report_page(report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    page = Page(html)
    assert not page.tags("script") and not page.tags("a") and fetched(page) == []
    assert not [name for _, names in page.elements for name in names if name.startswith("on")]
    assert "script-src &#39;none&#39;" in html or "script-src 'none'" in html
    text = " ".join(page.inside["body"])
    assert "alert(1)" in text and "{{ 7*7 }}" in text
    assert "\x1b" not in html and "\u202e" not in html
    Page("<p></p>")
    with pytest.raises(AssertionError):
        Page("<p><b></p>")


def test_markdown_holds_no_markup_of_theirs(tmp_path: Path) -> None:
    text = report_markdown(report(), tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    assert not re.search(r"(?<!\\)<|(?<!\\)\[a|(?<!\\)`", text) and "\x1b" not in text
    widths = {
        len(re.findall(r"(?<!\\)\|", line))
        for line in text.splitlines()
        if line.startswith("| ") and "alert" in line
    }
    assert widths == {7}, "a failure has six cells, whatever is in them"
    assert [line for line in text.splitlines() if line.startswith("## ")][-1] == "## Made from"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        report(runs=[])
    with pytest.raises(InputError, match="two runs of the same size"):
        report(runs=[evaluation(1), evaluation(1)])
    with pytest.raises(InputError, match="Report"):
        report_page(evaluation(1))  # type: ignore[arg-type]
    (tmp_path / "theirs.html").write_text("<p>mine</p>")
    for name in ("theirs.html", "x.doc"):
        with pytest.raises(InputError):
            report_page(report(), tmp_path / name)
    assert (tmp_path / "theirs.html").read_text() == "<p>mine</p>"
