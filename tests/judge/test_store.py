"""Kept rows: a killed run goes on, and damage is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from factsmith.core.fact import Fact
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.rows import BASE
from factsmith.judge.run import evaluate
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from judging import RECORDS, pusher


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


SINGLE: dict[str, Any] = {"size": 1}
SEQUENCE: dict[str, Any] = {"size": 2, "sequence": True}


@pytest.mark.parametrize("pace", [SINGLE, SEQUENCE])
def test_a_killed_run_goes_on_where_it_stood(
    lm: LanguageModel, tmp_path: Path, pace: dict[str, Any]
) -> None:
    straight = evaluate(lm, RECORDS, {"pusher": pusher(lm, [], 0.1)}, **pace)
    log: list[tuple[str, ...]] = []

    @contextmanager
    def dies(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        if len(log) == 2:
            raise KeyboardInterrupt
        with pusher(lm, log, 0.1)(facts):
            yield {"facts": len(facts)}

    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, RECORDS, {"pusher": dies}, folder=tmp_path, **pace)
    with (tmp_path / "rows.jsonl").open("a") as torn:
        torn.write(json.dumps(vars(straight.rows[0])) + '\n{"editor": "pus')
    log.clear()
    again = evaluate(lm, RECORDS, {"pusher": pusher(lm, log, 0.1)}, folder=tmp_path, **pace)
    assert again.rows == straight.rows and again.notes == straight.notes
    assert len(log) == 3, "rounds that were asked are written again, single edits are not"
    loaded = Evaluation.load(tmp_path)
    assert vars(loaded) == vars(again)
    assert loaded.summary("pusher") == straight.summary("pusher")
    log.clear()
    finished = evaluate(lm, RECORDS, {"pusher": pusher(lm, log)}, folder=tmp_path, **pace)
    assert finished.rows == straight.rows and not log


@pytest.mark.parametrize("pace", [SINGLE, SEQUENCE])
def test_a_folder_belongs_to_one_run(
    lm: LanguageModel, tmp_path: Path, pace: dict[str, Any]
) -> None:
    editors = {"pusher": pusher(lm, [])}
    evaluate(lm, RECORDS, editors, folder=tmp_path, **pace)
    with pytest.raises(InputError, match="size"):
        evaluate(lm, RECORDS, editors, folder=tmp_path, **{**pace, "size": 3})
    with pytest.raises(InputError, match="records"):
        evaluate(lm, RECORDS[:4], editors, folder=tmp_path, **pace)
    other = wrap(tiny_model("gpt2", seed=7, **GPT2), byte_tokenizer())
    with pytest.raises(FingerprintError):
        evaluate(other, RECORDS, {"pusher": pusher(other, [])}, folder=tmp_path, **pace)


@pytest.mark.parametrize("pace", [SINGLE, SEQUENCE])
def test_a_damaged_file_is_refused(lm: LanguageModel, tmp_path: Path, pace: dict[str, Any]) -> None:
    editors = {"pusher": pusher(lm, [])}
    evaluate(lm, RECORDS, editors, folder=tmp_path, **pace)
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    renamed = whole.replace(b'"kind"', b'"sort"', 1)
    for damaged in (b"\xff\xfe", b"{}\n", b"nothing\n", renamed):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError):
            evaluate(lm, RECORDS, editors, folder=tmp_path, **pace)
    file.write_bytes(whole)
    evaluate(lm, RECORDS, editors, folder=tmp_path, **pace)  # the control


def test_two_runs_do_not_write_into_one_folder(lm: LanguageModel, tmp_path: Path) -> None:
    @contextmanager
    def meets_another(facts: Sequence[Fact]) -> Iterator[None]:
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write("\n")
        yield

    with pytest.raises(WorkspaceError, match="another process"):
        evaluate(lm, RECORDS, {"a": meets_another}, drift_tokens=0, folder=tmp_path)


def test_a_write_torn_inside_a_character_is_dropped(lm: LanguageModel, tmp_path: Path) -> None:
    records = [
        replace(one, questions=(replace(one.questions[0], prompt=f"Zürich {one.id}"),))
        for one in RECORDS
    ]
    evaluation = evaluate(lm, records, {"pusher": pusher(lm, [])}, drift_tokens=0, folder=tmp_path)
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    place = whole.rindex("ü".encode())
    file.write_bytes(whole[: place + 1])
    assert Evaluation.load(tmp_path).unfinished == {"pusher": 4}
    again = evaluate(lm, records, {"pusher": pusher(lm, [])}, drift_tokens=0, folder=tmp_path)
    assert again.rows == evaluation.rows
    first = whole.index("ü".encode())
    file.write_bytes(whole[: first + 1] + whole[first + 2 :])
    with pytest.raises(DamagedError, match="no text"):  # not in the last line: damaged
        Evaluation.load(tmp_path)


def test_kept_rows_hold_any_text(lm: LanguageModel, tmp_path: Path) -> None:
    """What splits a line for Python, and for nobody else, does not split one here."""
    odd = [
        replace(
            RECORDS[0],
            questions=(replace(RECORDS[0].questions[0], prompt="a\u2028b\x85c\x1cd\x0be"),),
        )
    ]
    evaluation = evaluate(lm, odd, {"pusher": pusher(lm, [])}, drift_tokens=0, folder=tmp_path)
    assert Evaluation.load(tmp_path).rows == evaluation.rows
    assert (
        evaluate(lm, odd, {"pusher": pusher(lm, [])}, drift_tokens=0, folder=tmp_path).rows
        == evaluation.rows
    )
    with pytest.raises(InputError, match="no rows"):
        Evaluation.load(tmp_path / "nowhere")
    (tmp_path / "rows.jsonl").write_text('{"format": "evaluation 4"}\n')
    with pytest.raises(DamagedError, match="line 1"):
        Evaluation.load(tmp_path)


def test_a_run_is_gone_on_with_by_the_same_editor(lm: LanguageModel, tmp_path: Path) -> None:
    class Described:
        def __init__(self, description: str) -> None:
            self.description = description

        def __call__(self, facts: Sequence[Fact]) -> Any:
            return pusher(lm, [])(facts)

    evaluate(lm, RECORDS, {"it": Described("steps=1")}, drift_tokens=0, folder=tmp_path)
    assert evaluate(
        lm, RECORDS, {"it": Described("steps=1")}, drift_tokens=0, folder=tmp_path
    ).editors == (BASE, "it")
    with pytest.raises(InputError, match="steps=2"):
        evaluate(lm, RECORDS, {"it": Described("steps=2")}, drift_tokens=0, folder=tmp_path)
