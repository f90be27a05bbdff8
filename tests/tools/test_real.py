"""The benchmark of a real model: its jobs and limits, its records, and the rows of its table."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from conftest import shared_dir
from factsmith.core.fact import Fact
from factsmith.judge.records import Question, Record
from factsmith.model.language_model import LanguageModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import real  # noqa: E402
import real_quality  # noqa: E402
import real_records  # noqa: E402

BURN = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"


def record(name: str, subject: str, prompt: str, old: str, **fields: object) -> Record:
    """Return a record of one fact, whose prompt is its only question."""
    fact = Fact(subject, prompt, "Nowhere", target_true=old, **fields)  # type: ignore[arg-type]
    question = Question(kind="prompt", prompt=fact.text, answers=("Nowhere",), against=old)
    return Record(id=name, facts=(fact,), questions=(question,))


@pytest.mark.parametrize(
    ("asked", "run"),
    [
        (["ask"], ["init", "ask"]),
        (["patch 2"], ["init", "patch", "patch 2"]),
        (["layers"], ["layers"]),
        (["memit", "trace"], ["init", "trace", "memit"]),
    ],
)
def test_jobs_run_after_those_that_they_need(asked: list[str], run: list[str]) -> None:
    assert [job.name for job in real.selected(asked)] == run


def test_an_unknown_job_is_refused() -> None:
    with pytest.raises(SystemExit, match="there is no job sing"):
        real.selected(["ask", "sing"])


def test_the_seconds_are_those_of_all_processes() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"
    took = real.timed([sys.executable, "-c", child], os.environ)
    assert took.code == 0 and took.seconds > 0.29
    idle = real.timed([sys.executable, "-c", "import time; time.sleep(0.4)"], os.environ)
    assert idle.wall > 0.4 > idle.seconds, "waiting is not counted"


def test_a_job_over_its_limit_or_with_an_error_is_not_within(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = real.Job("ask", 8, ("ask", "{model}"))
    for seconds, code, within, word in (
        (7.9, 0, True, "ok"),
        (8.1, 0, False, "over"),
        (1, 2, False, "failed"),
    ):
        took = real.Took(seconds, 1.0, code, "", "it is broken")
        monkeypatch.setattr(real, "timed", lambda *_, took=took: took)
        row = real.run_job("m", job, tmp_path)
        assert row["within"] is within and word in real.line(row)
        assert ("errors" in row) is (code != 0)


def test_a_record_is_asked_about_other_facts_of_its_subject(tmp_path: Path) -> None:
    lines = [
        "subject\trelation\tobject",
        "Edwin\tP27\tFrance",
        "Edwin\tP103\tFrench",
        "Ida\tP27\tSpain",
    ]
    (tmp_path / "facts.tsv").write_text("\n".join(lines), encoding="utf-8")
    mine = record("full-1", "Edwin", "The mother tongue of {} is", "French", relation="P103")
    other = record("slim-2", "Edwin", "{} died in", "Paris")
    asked = real_records.with_same_subject([mine, other], tmp_path)
    about = [q for q in asked[0].questions if q.kind == "locality"]
    assert [q.answers for q in about] == [("France",), ("Paris",)]
    assert all("Edwin" in q.prompt for q in about), "not of Ida, and not the edited relation"


def test_a_run_that_was_killed_goes_on(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    records = [
        record(f"full-{i}", name, "{} is a", "king") for i, name in enumerate(("Edwin", "Ida"))
    ]
    path = tmp_path / "known.jsonl"
    whole = real_records.known_records(tiny_gpt2, path, lambda _: None, records)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and [each.says for each in whole] == [False, False]
    changed = {**json.loads(lines[0]), "says": True}
    path.write_text(json.dumps(changed) + "\n" + lines[1][:20], encoding="utf-8")
    again = real_records.known_records(tiny_gpt2, path, lambda _: None, records)
    assert [each.says for each in again] == [True, False], "the first was kept, the second asked"
    path.write_text(json.dumps({**changed, "model": "another"}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="another model"):
        real_records.known_records(tiny_gpt2, path, lambda _: None, records)


def test_each_method_has_a_row_with_its_own_settings_and_one_as_published() -> None:
    rows = real_quality.rows_of(["rome", "memit"], 25)
    assert rows == [
        ("rome", 1),
        ("rome as published", 1),
        ("memit", 10),
        ("memit as published", 10),
        ("memit", 25),
        ("memit as published", 25),
    ]
    assert real_quality.rows_of(["memit"], 6) == [("memit", 6), ("memit as published", 6)]
    assert real_quality.rows_of(["append"], 6) == [("append", 6)], "nothing was published for it"
    with pytest.raises(SystemExit, match="no row mend"):
        real_quality.rows_of(["mend"], 6)


def test_records_that_the_model_says_come_first_and_those_of_the_full_file(
    tiny_gpt2: LanguageModel,
) -> None:
    shared_dir()  # other facts of the subjects come from its facts.tsv
    known = real_records.Known
    knowns = [
        known(record("slim-1", "Edwin", "{} is a", "king"), True, True),
        known(record("full-2", "Ida", "{} is a", "poet"), True, True),
        known(record("full-3", "Ann", "{} is a", "poet"), False, True),
        known(record("full-4", "Bob", "{} is a", "poet"), False, False),
    ]

    def ids(**options: object) -> list[str]:
        chosen = real_quality.chosen(tiny_gpt2, knowns, **options)  # type: ignore[arg-type]
        return [each.id for each in chosen]

    assert ids(limit=None) == ["full-2", "slim-1"]
    assert ids(limit=1) == ["full-2"]
    assert ids(limit=None, ranked=True) == ["full-2", "slim-1", "full-3"]


def test_five_neighbours_are_asked_and_no_negation() -> None:
    whole = record("full-1", "Edwin", "{} is a", "king")
    near = [Question(kind="neighbour", prompt=f"{n} is a", answers=("king",)) for n in range(10)]
    denied = Question(kind="negation", prompt="It is not true that", answers=(), against="king")
    about = Question(kind="locality", prompt="Edwin lives in", answers=())
    asked = dataclasses.replace(whole, questions=(*whole.questions, denied, *near, about))
    kinds = [question.kind for question in real_quality.trimmed(asked).questions]
    assert kinds == ["prompt", *["neighbour"] * 5, "locality"]


def test_the_time_left_is_that_of_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 31.0, 52.0])
    monkeypatch.setattr(real_quality.time, "process_time", lambda: next(clock))
    lines: list[str] = []
    pace = real_quality.Pace("rome", lines.append)
    for done in (1, 3, 4, 5):  # three steps of the unedited model, then three edits
        pace("judging", done, 6)
    assert lines == [
        "rome: 1 of 3 edits, 42 processor seconds left",
        "rome: 2 of 3 edits, 21 processor seconds left",
    ]
