"""Evaluations: measures by hand, and runs that were stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.rows import BASE, Row
from factsmith.judge.run import evaluate
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from judging import RECORDS, pusher


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def test_a_run_says_what_is_missing(lm: LanguageModel, tmp_path: Path) -> None:
    """A run that was stopped lacks edits, and its unfinished editors can be left out."""
    done = evaluate(lm, RECORDS, {"first": pusher(lm, [])}, size=2, drift_tokens=0, folder=tmp_path)
    assert (done.units, done.unfinished, done.pace) == (
        3,
        {},
        "2 at a time",
    ) and done.finished().rows == done.rows
    calls: list[int] = []

    def dies(facts: Sequence[Fact]) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pusher(lm, [])(facts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            lm,
            RECORDS,
            {"first": pusher(lm, []), "second": dies},
            size=2,
            drift_tokens=0,
            folder=tmp_path,
        )
    stopped = Evaluation.load(tmp_path)
    assert stopped.editors == (BASE, "first", "second") and stopped.unfinished == {"second": 2}
    assert vars(stopped.finished()) == vars(done)


def test_shares_scores_and_their_intervals_by_hand(lm: LanguageModel) -> None:
    """Three records with a question of each kind, and a case that one of two questions hits."""
    evaluation = evaluate(lm, RECORDS[:3], {"pusher": pusher(lm, [])})

    def row(n: int, kind: str, success: bool, exact: bool, group: int | None = None) -> Row:
        logs = (-1.0, -2.0) if success else (-2.0, -1.0)
        fields = {
            **vars(evaluation.rows[0]),
            "record": f"r{n}",
            "kind": kind,
            "exact": exact,
            "group": group,
            "editor": "made",
        }
        return Row(**{**fields, "log_wanted": logs[0], "log_against": logs[1]})

    rows = [
        row(n, kind, success, n == 0)
        for kind, shares in _SHARES.items()
        for n, success in enumerate(shares)
    ]
    rows += [
        row(0, "multihop", True, False, 0),
        row(0, "multihop", True, True, 0),
        row(1, "multihop", True, False, 0),
    ]
    made = type(evaluation)(**{**vars(evaluation), "rows": (*evaluation.rows, *rows)})
    shares = made.summary("made")
    assert shares["prompt success"].value == 1 and shares[
        "paraphrase success"
    ].value == pytest.approx(2 / 3)
    assert shares["score"].value == pytest.approx(3 / (1 + 3 / 2 + 3)) and shares[
        "score exact"
    ].value == pytest.approx(1 / 3)
    assert (shares["multihop exact"].value, shares["multihop exact"].n) == (0.5, 2)
    assert shares["prompt success"].low == shares["prompt success"].high == 1
    assert (
        0
        == shares["neighbour success"].low
        < shares["neighbour success"].value
        < shares["neighbour success"].high
    )
    assert shares["score"].low <= shares["score"].value <= shares["score"].high
    assert shares["prompt magnitude"].value == pytest.approx(math.exp(-1) - math.exp(-2))
    assert "prompt magnitude" in {row[0] for row in made.tables()[0].rows}
    assert "score" not in {name for name in made.summary("made") if name.startswith("multihop")}


_SHARES = {
    "prompt": (True, True, True),
    "paraphrase": (True, True, False),
    "neighbour": (True, False, False),
}
