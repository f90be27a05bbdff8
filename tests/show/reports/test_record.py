"""Reports: every number is that of its run."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from factsmith.core.errors import InputError
from factsmith.judge.rows import BASE
from factsmith.show.reports.page import report_markdown, report_page
from show.runs import NASTY, evaluation, report


def test_the_numbers_are_those_of_the_runs() -> None:
    made = report()
    first = made.summaries[0]["rome"]
    assert (
        first["prompt exact"].value == 0.75
        and made.summaries[1]["rome"]["neighbour stayed"].value == 0.5
    )
    plain = json.loads(json.dumps(made.to_dict(), allow_nan=False))
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
    for text in (report_page(made), report_markdown(made), repr(made)):
        assert "75.0" in text and "50.0" in text
    labels = set(re.findall(r"<dt>([^<]+)</dt>", report_page(made)))
    assert {"success", "exact", "stayed", "score", "‖ΔW‖/‖W‖", "KL on prose"} <= labels
    assert "by records per edit" in report_page(made)
    assert "by records per edit" not in report_page(report(runs=[evaluation(1)]))


def test_runs_are_in_order_with_their_settings() -> None:
    runs = [evaluation(2, sequence=True), evaluation(4), evaluation(1), evaluation(2)]
    runs_with_settings = [
        dataclasses.replace(run, settings={"rome": "layer=1; seed=0", "other": "x"}) for run in runs
    ]
    made = report(runs=runs_with_settings)
    assert [(run.size, run.sequence) for run in made.runs] == [
        (1, False),
        (2, False),
        (4, False),
        (2, True),
    ]
    assert [run["size"] for run in made.to_dict()["runs"]] == [1, 2, 4, 2]
    assert (
        made.facts()["settings of rome"] == "layer=1; seed=0"
        and "settings of other" not in made.facts()
    )
    for text in (report_page(made), report_markdown(made).replace("\\", "")):
        assert "layer=1; seed=0" in text and "magnitude" in text
    other = dataclasses.replace(evaluation(1), settings={"rome": "layer=2; seed=0"})
    assert (
        report(runs=[other, runs_with_settings[1]]).facts()["settings of rome, 1 at a time"]
        == "layer=2; seed=0"
    )


def test_what_is_not_finished_is_no_report() -> None:
    run = evaluation(2)
    half = dataclasses.replace(
        run, units=3, notes={**run.notes, (BASE, 0): {}, (BASE, 1): {}, (BASE, 2): {}}
    )
    with pytest.raises(
        InputError, match=r"rome, 2 at a time: 2 of 3 edits are done; .* run.finished\(\)"
    ):
        report(runs=[half])
    assert report(runs=[half.finished()]).editors == (BASE,)


def test_edits_that_broke_the_model_are_counted() -> None:
    run = evaluation(2)
    broken = dataclasses.replace(run, notes={**run.notes, ("rome", 1): {"broken": 1.0}})
    for made, counted in ((report(runs=[broken]), True), (report(runs=[run]), False)):
        cost = next(table for table in made.tables() if table.title == "what it cost")
        assert ("broken" in cost.columns) is counted and (
            "no longer computes finite numbers" in report_page(made)
        ) is counted


def test_failures_say_what_was_wanted_and_said() -> None:
    made = report().failures()
    assert {f["kind"] for f in made} == {"prompt", "paraphrase", "neighbour"} and len(made) == 9
    assert all(f["said"] == NASTY and f["editor"] == "rome" for f in made)
    assert {f["wanted"] for f in made if f["kind"] == "prompt"} == {f"Oslo {NASTY}"}
    assert {f["wanted"] for f in made if f["kind"] == "neighbour"} == {"Oslo"}, (
        "what the model said before"
    )
    right = report(runs=[evaluation(1, wrong=0)])
    assert right.failures() == [] and "every answer was right" in report_page(right)


def test_a_sequence_shows_what_is_left() -> None:
    made = report(runs=[evaluation(2, sequence=True)])
    assert made.to_dict()["runs"][0]["retention"] == {"rome": {0: {0: 0.5, 1: 0.5}, 1: {1: 1.0}}}
    html = report_page(made)
    assert 'class="heat"' in html and "--share: 0.500" in html and "--share: 1.000" in html
    assert re.search(r"\| written in 1 \| 50 \| 50 \|", report_markdown(made))
    assert 'class="heat"' not in report_page(report())
    assert set(re.findall(r"<text[^>]*>([^<]+)</text>", html)) >= {
        "0 %",
        "20 %",
        "100 %",
        "0.2",
        "0.4",
    }, "axes"
    left = next(table for table in made.tables() if table.title == "what is left")
    assert list(left.rows) == [("rome", "50 · 50", "50 · 75")], (
        "of the first round · of all so far: two of two are right in the second"
    )
    assert (
        "prompts of all rounds so far answered right" in html and "KL on prose, 2 a round" in html
    )
