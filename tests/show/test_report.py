"""Reports: every number where it belongs, whatever texts hold, and nothing written where it should not be."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.records import Question, QuestionKind, Record, Suite
from factsmith.judge.rows import BASE, Row
from factsmith.show.reports.page import report_page
from factsmith.show.reports.record import MEANINGS, Report, report_markdown

NASTY = '</td><script>alert(1)</script>|`x`\n## [a](b) \u202e&amp; "q" {{ 7*7 }} \x1b[31m'


def row(
    editor: str, unit: int, record: str, kind: QuestionKind, right: bool, written: int = 0
) -> Row:
    stays = kind == "neighbour" and editor != BASE
    answer = "Oslo" if right else NASTY
    logs = (-0.1, -2.0) if right else (-2.0, -0.1)
    return Row(
        editor=editor, unit=unit, record=record, kind=kind, group=None, prompt=f"{kind} {record} {NASTY}", written=written, answer=answer,
        exact=right, stayed=right if stays else None, log_wanted=logs[0], log_against=logs[1], tokens=float(right),
    )  # fmt: skip


def evaluation(size: int, *, sequence: bool = False, wrong: int = 1) -> Evaluation:
    """Four records; the editor gets all but `wrong` of each kind right, the base model none."""
    rows, kinds = [], ("prompt", "paraphrase", "neighbour")  # type: tuple[list[Row], tuple[QuestionKind, ...]]
    units = range(0, 4, size)
    for at in range(4):
        rows += [
            row(BASE, at // size, f"r{at}", kind, kind == "neighbour", at // size) for kind in kinds
        ]
    for unit in range(len(units)):
        for at in range(4):
            if (sequence and at // size <= unit) or (not sequence and at // size == unit):
                rows += [
                    row("rome", unit, f"r{at}", kind, at >= wrong, at // size) for kind in kinds
                ]
    notes: dict[tuple[str, int], dict[str, float]] = {
        ("rome", unit): {"seconds": 2.0, "norm": 0.1 * (unit + 1), "kl_text": 0.1 + 0.3 * unit}
        for unit in range(len(units))
    }
    if size > 1:
        notes[BASE, 0] = {"probe: task acc": 0.5}
        notes["rome", len(units) - 1] |= {"probe: task acc": 0.25}
    return Evaluation(
        rows=tuple(rows), notes=notes, failed={("rome", 0): f"no {NASTY}"} if size > 1 else {}, size=size, sequence=sequence, skipped=0,
        model=f"model {NASTY}", fingerprint="f" * 64,
    )  # fmt: skip


def suite() -> Suite:
    records = tuple(
        Record(
            id=f"r{at}",
            facts=(Fact("x", "{} is", "Oslo"),),
            questions=(
                Question(kind="prompt", prompt=f"prompt r{at} {NASTY}", answers=(f"Oslo {NASTY}",)),
            ),
        )
        for at in range(4)
    )
    return Suite(
        name="counterfact", records=records, skipped=(), source=f"file {NASTY}", digest="d" * 64
    )


def report(**changes: Any) -> Report:
    return Report(
        **{
            "runs": [evaluation(1), evaluation(2, wrong=2)],
            "suite": suite(),
            "left_out": {NASTY: 3},
            "version": "1.2",
            **changes,
        }
    )


class Page(HTMLParser):
    """Elements of a page, and what would run or be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = dict(attrs)
        self.fetched += [
            f"{tag} {name}" for name in names if name in ("src", "href") or name.startswith("on")
        ]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_runs_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    html = report_page(report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    page = Page(html)
    assert page.open == [] and "script" not in page.tags and page.fetched == []
    assert "script-src &#39;none&#39;" in html or "script-src 'none'" in html
    assert (
        "alert(1)" in "".join(page.text)
        and "{{ 7*7 }}" in "".join(page.text)
        and "\x1b" not in html
        and "\u202e" not in html
    )
    Page("<p></p>")
    with pytest.raises(AssertionError):
        Page("<p><b></p>")


def test_the_numbers_are_those_of_the_runs() -> None:
    found = report()
    first = found.summaries[0]["rome"]
    assert (
        first["prompt exact"].value == 0.75
        and found.summaries[1]["rome"]["neighbour stayed"].value == 0.5
    )
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [run["measures"]["rome"]["paraphrase success"]["value"] for run in plain["runs"]] == [
        0.75,
        0.5,
    ]
    assert plain["runs"][0]["measures"]["base"]["prompt exact"]["value"] == 0
    assert plain["runs"][1]["edits"] == {
        "rome": {
            "edits": 1,
            "failed": 1,
            "seconds": 2.0,
            "seconds_a_record": 1.0,
            "norm": 0.2,
            "kl_text": 0.25,
        }
    }
    assert plain["runs"][1]["probed"] == {"base": {"task acc": 0.5}, "rome": {"task acc": 0.25}}
    assert (
        plain["runs"][1]["failed"] == [{"editor": "rome", "edit": 0, "why": f"no {NASTY}"}]
        and not plain["runs"][0]["failed"]
    )
    for text in (report_page(found), report_markdown(found), repr(found)):
        assert "75.0" in text and "50.0" in text
    assert set(re.findall(r"<dt>(\w+)</dt>", report_page(found))) >= {
        "success",
        "exact",
        "stayed",
        "score",
        "norm",
    } & set(MEANINGS)
    assert "against the number of edits" in report_page(found)
    assert "against the number of edits" not in report_page(report(runs=[evaluation(1)]))


def test_runs_stand_in_order_with_their_settings() -> None:
    runs = [evaluation(2, sequence=True), evaluation(4), evaluation(1), evaluation(2)]
    told = [
        dataclasses.replace(run, settings={"rome": "layer=1; seed=0", "other": "x"}) for run in runs
    ]
    found = report(runs=told)
    assert [(run.size, run.sequence) for run in found.runs] == [
        (1, False),
        (2, False),
        (4, False),
        (2, True),
    ]
    assert [run["size"] for run in found.to_dict()["runs"]] == [1, 2, 4, 2]
    assert (
        found.facts()["settings of rome"] == "layer=1; seed=0"
        and "settings of other" not in found.facts()
    )
    for text in (report_page(found), report_markdown(found).replace("\\", "")):
        assert "layer=1; seed=0" in text and "magnitude" in text
    other = dataclasses.replace(evaluation(1), settings={"rome": "layer=2; seed=0"})
    assert (
        report(runs=[other, told[1]]).facts()["settings of rome, 1 at a time"] == "layer=2; seed=0"
    )


def test_what_is_not_finished_is_no_report() -> None:
    run = evaluation(2)
    half = dataclasses.replace(
        run, units=3, notes={**run.notes, (BASE, 0): {}, (BASE, 1): {}, (BASE, 2): {}}
    )
    with pytest.raises(
        InputError, match=r"rome, 2 at a time: 2 of 3 edits are there; .* run.finished\(\)"
    ):
        report(runs=[half])
    assert report(runs=[half.finished()]).editors == (BASE,)


def test_edits_that_broke_the_model_are_counted() -> None:
    run = evaluation(2)
    broken = dataclasses.replace(run, notes={**run.notes, ("rome", 1): {"broken": 1.0}})
    for found, there in ((report(runs=[broken]), True), (report(runs=[run]), False)):
        cost = next(table for table in found.tables() if table.title == "what it cost")
        assert ("broken" in cost.columns) is there and (
            "no longer computes finite numbers" in report_page(found)
        ) is there


def test_failures_say_what_was_wanted_and_said() -> None:
    found = report().failures()
    assert {f["kind"] for f in found} == {"prompt", "paraphrase", "neighbour"} and len(found) == 9
    assert all(f["said"] == NASTY and f["editor"] == "rome" for f in found)
    assert {f["wanted"] for f in found if f["kind"] == "prompt"} == {f"Oslo {NASTY}"}
    assert {f["wanted"] for f in found if f["kind"] == "neighbour"} == {"Oslo"}, (
        "what the model said before"
    )
    right = report(runs=[evaluation(1, wrong=0)])
    assert right.failures() == [] and "every answer was right" in report_page(right)


def test_a_sequence_shows_what_is_left() -> None:
    found = report(runs=[evaluation(2, sequence=True)])
    assert found.to_dict()["runs"][0]["retention"] == {"rome": {0: {0: 0.5, 1: 0.5}, 1: {1: 1.0}}}
    html = report_page(found)
    assert 'class="heat"' in html and "--share: 0.500" in html and "--share: 1.000" in html
    assert re.search(r"\| written in 1 \| 50 \| 50 \|", report_markdown(found))
    assert 'class="heat"' not in report_page(report())
    assert set(re.findall(r"<text[^>]*>([^<]+)</text>", html)) >= {
        "0 %",
        "20 %",
        "100 %",
        "0.2",
        "0.4",
    }, "axes"
    left = next(table for table in found.tables() if table.title == "what is left")
    assert list(left.rows) == [("rome", "50 · 50", "50 · 75")], (
        "of the first round · of all so far: two of two are right in the second"
    )
    assert (
        "prompts of all rounds so far answered right" in html and "KL on prose, 2 a round" in html
    )


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
    with pytest.raises(InputError, match="two of the same"):
        report(runs=[evaluation(1), evaluation(1)])
    with pytest.raises(InputError, match="Report"):
        report_page(evaluation(1))  # type: ignore[arg-type]
    (tmp_path / "theirs.html").write_text("<p>mine</p>")
    for name in ("theirs.html", "x.doc"):
        with pytest.raises(InputError):
            report_page(report(), tmp_path / name)
    assert (tmp_path / "theirs.html").read_text() == "<p>mine</p>"
