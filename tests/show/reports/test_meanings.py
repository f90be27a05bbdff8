"""Every number of a report has a meaning."""

from __future__ import annotations

from typing import get_args

from factsmith.judge.evaluation import DRIFTS
from factsmith.judge.records import QuestionKind
from factsmith.show.reports.meanings import MEANINGS, meanings
from show.runs import evaluation


def test_every_kind_of_question_and_every_drift_has_a_meaning() -> None:
    assert set(get_args(QuestionKind)) <= set(MEANINGS)
    assert set(DRIFTS) <= set(MEANINGS)


def test_a_report_explains_the_numbers_that_it_has() -> None:
    labels = meanings([evaluation(2)])
    assert {"prompt", "success", "seconds per edit", "‖ΔW‖/‖W‖", "KL on prose"} <= set(labels)
    assert not {"multihop", "other facts changed", "perplexity ratio"} & set(labels)
