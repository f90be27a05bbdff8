"""Schedules: what they check, and how they cut records into edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from factsmith.core.errors import InputError
from factsmith.judge.schedule import Schedule
from factsmith.model.language_model import LanguageModel
from factsmith.model.tokens import target_ids
from judging import RECORDS, record


def test_records_are_cut_into_edits(tiny_gpt2: LanguageModel) -> None:
    schedule = Schedule(size=2).for_records(tiny_gpt2, RECORDS)
    assert [len(unit) for unit in schedule.units(RECORDS)] == [2, 2, 1]
    assert Schedule(size=100).for_records(tiny_gpt2, RECORDS).size == 5


def test_answers_are_as_long_as_the_longest_right_one(tiny_gpt2: LanguageModel) -> None:
    (long,) = [q for q in record(0).questions if q.kind == "paraphrase"]
    answer = "Oslo and then Rome and then Bergen"
    question = type(long)(kind="paraphrase", prompt=long.prompt, answers=("Oslo", answer))
    n = len(target_ids(tiny_gpt2.tokenizer, question.prompt, answer))
    assert n > 8
    assert Schedule().for_records(tiny_gpt2, [record(0, question)]).max_new_tokens == n + 1
    assert Schedule().for_records(tiny_gpt2, RECORDS).max_new_tokens == 8
    assert Schedule(max_new_tokens=3).for_records(tiny_gpt2, RECORDS).max_new_tokens == 3


def test_drift_is_measured_after_ten_single_edits_at_most() -> None:
    single, batch, rounds = Schedule(), Schedule(size=2), Schedule(sequence=True)
    assert [single.measures_drift(unit) for unit in (9, 10)] == [True, False]
    assert batch.measures_drift(10) and rounds.measures_drift(10)
    assert not Schedule(size=2, drift_tokens=0).measures_drift(0)


def test_numbers_of_numpy_become_plain_ones() -> None:
    assert type(Schedule(size=np.int64(3)).size) is int  # type: ignore[arg-type]
    assert Schedule(texts=["a", "b"]) == Schedule(texts=("a", "b"))
    assert Schedule(texts=["a"]).made_from()["texts"] != Schedule(texts=["b"]).made_from()["texts"]
    assert Schedule().made_from()["texts"] is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 0}, "size"),
        ({"retained": -1}, "retained"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"drift_tokens": 1.5}, "drift_tokens"),
        ({"continued": True}, "continued"),
        ({"seed": -1}, "seed"),
        ({"texts": "a"}, "texts"),
    ],
)
def test_what_is_no_schedule_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        Schedule(**fields)
    assert error.value.argument == words
