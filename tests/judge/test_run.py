"""Runs: what is asked when, and what is counted how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    NumericsError,
    SubjectError,
    TokenizerError,
)
from factsmith.core.fact import Fact
from factsmith.edit.delta import applied
from factsmith.judge.drift import drift
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.metrics import ngram_entropy, reference_consistency
from factsmith.judge.records import Question, Record, Suite
from factsmith.judge.rows import BASE
from factsmith.judge.run import evaluate
from factsmith.judge.score import score
from factsmith.judge.suites import load_suite
from factsmith.model.answers import stayed
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from judging import PROSE, RECORDS, breaker, pusher, pushing_delta, record, refuse_target


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def test_single_edits_are_written_judged_and_taken_back(lm: LanguageModel) -> None:
    log: list[tuple[str, ...]] = []
    before = lm.fingerprint
    evaluation = evaluate(lm, RECORDS, {"pusher": pusher(lm, log)}, size=1, drift_tokens=0)
    assert log == [(f"Entity{n}",) for n in range(5)] and lm.fingerprint == before
    base, after = evaluation.asked(BASE), evaluation.asked("pusher")
    assert len(base) == len(after) == 25 and [row.prompt for row in base] == [
        row.prompt for row in after
    ]
    assert all(row.answer.startswith("O") for row in after) and not any(
        row.answer.startswith("O") for row in base
    )
    assert {row.stayed for row in base} == {None} and {
        row.stayed for row in after if row.kind in ("neighbour", "locality")
    } == {False}
    assert evaluation.notes["pusher", 3] == {"facts": 1.0} and evaluation.notes[BASE, 0] == {}
    negated = [row.exact for row in after if row.kind == "negation"]
    assert negated == [not row.answer.startswith("Oslo") for row in after if row.kind == "negation"]
    assert (
        "base" in repr(evaluation)
        and "pusher" in repr(evaluation)
        and "<table>" in evaluation._repr_html_()
    )
    control = evaluate(lm, RECORDS, {"nothing": pusher(lm, [], 0.0)}, size=1)
    assert [row.answer for row in control.asked("nothing")] == [
        row.answer for row in control.asked(BASE)
    ]
    assert all(
        row.stayed for row in control.asked("nothing") if row.kind in ("neighbour", "locality")
    )


def test_a_delta_is_judged_as_it_is(lm: LanguageModel, tmp_path: Path) -> None:
    delta, suite = (
        pushing_delta(lm, 300.0),
        Suite(name="own", records=tuple(RECORDS), skipped=(), source="here", digest="0"),
    )
    before = lm.fingerprint
    evaluation = evaluate(lm, suite, delta=delta, folder=tmp_path / "kept")
    assert (
        lm.fingerprint == before and evaluation.editors == (BASE, "delta") and evaluation.size == 5
    )
    assert [row.answer for row in evaluation.asked(BASE)] == [
        row.answer for row in score(lm, RECORDS)
    ]
    with applied(lm, delta):
        inside = score(lm, RECORDS)
    assert [(row.answer, row.log_wanted) for row in evaluation.asked("delta")] == [
        (row.answer, row.log_wanted) for row in inside
    ]
    assert [row.log_wanted for row in inside] != [
        row.log_wanted for row in score(lm, RECORDS)
    ]  # it does something
    fields = evaluation.to_dict()
    assert (
        json.loads(json.dumps(fields))["measures"]["delta"]["prompt exact"]["value"]
        == evaluation.summary("delta")["prompt exact"].value
    )
    assert "| prompt exact |" in evaluation.to_markdown() and "delta" in evaluation.to_markdown()
    with pytest.raises(InputError, match="other settings"):  # the folder holds another delta's rows
        evaluate(lm, suite, delta=pushing_delta(lm, 2.0), folder=tmp_path / "kept")


def test_several_deltas_lie_on_top_of_one_another(lm: LanguageModel) -> None:
    deltas = [pushing_delta(lm, 1.0), pushing_delta(lm, 2.0)]
    both = evaluate(lm, RECORDS, delta=deltas, drift_tokens=0).asked("delta")
    with applied(lm, deltas):
        assert [row.log_wanted for row in both] == pytest.approx(
            [row.log_wanted for row in score(lm, RECORDS)], abs=1e-5
        )
    assert [row.log_wanted for row in both] != [
        row.log_wanted for row in evaluate(lm, RECORDS, delta=deltas[0]).asked("delta")
    ]


def test_a_sample_is_drawn_by_seed_and_the_base_alone_can_be_asked(lm: LanguageModel) -> None:
    evaluation = evaluate(lm, RECORDS, limit=3, seed=1)
    assert evaluation.editors == (BASE,) and len({row.record for row in evaluation.rows}) == 3
    assert evaluation.rows == evaluate(lm, RECORDS, limit=3, seed=1).rows
    assert (
        len(
            {
                tuple(row.record for row in evaluate(lm, RECORDS, limit=3, seed=seed).rows)
                for seed in range(8)
            }
        )
        > 1
    )
    assert len({row.record for row in evaluate(lm, RECORDS, limit=99).rows}) == 5
    assert (
        evaluate(lm, "atlas", limit=2).asked(BASE)[0].prompt
        == load_suite("atlas", limit=2).records[0].questions[0].prompt
    )


def test_a_sequence_puts_one_round_upon_another(lm: LanguageModel) -> None:
    log: list[tuple[str, ...]] = []
    evaluation = evaluate(
        lm, RECORDS, {"pusher": pusher(lm, log, 0.1)}, size=2, sequence=True, retained=1
    )
    assert log == [("Entity0", "Entity1"), ("Entity2", "Entity3"), ("Entity4",)]
    last = evaluation.asked("pusher")
    assert {row.record for row in last} == {f"r{n}" for n in range(5)} and {
        row.unit for row in last
    } == {2}
    again = [row for row in evaluation.asked("pusher", 1) if row.written == 0]
    assert [(row.record, row.kind) for row in again] == [("r0", "prompt")]
    kept = evaluation.retention("pusher", "tokens")
    assert set(kept) == {0, 1, 2} and set(kept[0]) == {0, 1, 2} and set(kept[2]) == {2}
    rows = {
        (row.unit, row.prompt): row.log_wanted
        for row in evaluation.rows
        if row.editor == "pusher" and row.record == "r0"
    }
    pushed = [rows[unit, RECORDS[0].questions[0].prompt] for unit in range(3)]
    assert len(set(pushed)) == 3, "each round changed the model further"


def test_a_size_above_the_number_of_records_is_that_number(lm: LanguageModel) -> None:
    evaluation = evaluate(lm, RECORDS, {"pusher": pusher(lm, [])}, size=100, drift_tokens=0)
    assert (evaluation.size, evaluation.units) == (5, 1)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_broken_model_counts_as_wrong_and_the_run_goes_on(
    lm: LanguageModel, tmp_path: Path, value: float, sequence: bool
) -> None:
    records = [replace(one, generation_prompts=("Entity is",)) for one in RECORDS]
    editors = {"breaker": breaker(lm, value), "pusher": pusher(lm, [], 0.1)}
    arguments: dict[str, Any] = {
        "size": 2,
        "sequence": sequence,
        "texts": [PROSE],
        "drift_tokens": 30,
    }
    evaluation = evaluate(lm, records, editors, folder=tmp_path, **arguments)
    broken, others = evaluation.asked("breaker"), evaluation.asked("pusher")
    assert {
        row.success for row in broken if row.log_wanted is not None and row.log_against is not None
    } == {False}
    assert {row.tokens for row in broken} == {0.0, None} and all(
        row.broken for row in broken if row.log_wanted is not None
    )
    assert evaluation.summary("breaker")["prompt magnitude"].value == 0
    assert not any(row.broken for row in others) and len(others) == len(broken), "the control"
    assert [evaluation.notes["breaker", unit] for unit in range(3)] == [
        {"seconds": 1.0, "broken": 1.0}
    ] * 3
    assert (
        evaluation.measured("breaker")["broken"] == 3
        and "broken" not in evaluation.measured("pusher")
        and evaluation.drift("pusher")
    )
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (
        vars(Evaluation.load(tmp_path))
        == vars(evaluation)
        == vars(evaluate(lm, records, editors, folder=tmp_path, **arguments))
    )


def test_what_was_not_touched_stayed(lm: LanguageModel) -> None:
    """Records share a prompt in different edits, with right answers of different lengths."""
    long = "Oslo and then Rome and then Bergen and then Paris"
    asked = [
        Question(kind="locality", prompt="The colour is", answers=(answer,))
        for answer in ("Oslo", long, "Rome")
    ]
    asked += [Question(kind="neighbour", prompt="The colour is", answers=("Oslo",), against="Rome")]
    records = [
        replace(one, questions=(question,)) for one, question in zip(RECORDS, asked, strict=False)
    ]
    for size, sequence in ((1, False), (2, False), (2, True)):
        evaluation = evaluate(
            lm,
            records,
            {"nothing": pusher(lm, [], 0.0)},
            size=size,
            sequence=sequence,
            drift_tokens=0,
        )
        assert len({row.answer for row in evaluation.rows}) == 1, "decoded equally far"
        assert {row.stayed for row in evaluation.asked("nothing")} == {True}
    for said in ("1,000 people", "3.5 million", "", "... and so on"):
        assert stayed(said, said, "Rome") is True
    assert stayed("Rome", "Oslo", None) is False and stayed("1,000", "2,000", None) is False


def test_drift_is_that_of_the_edited_model(lm: LanguageModel) -> None:
    """The noted drift is that of `drift`, grows along a sequence, and is 0 if nothing changed."""
    push = pusher(lm, [], 0.2)
    evaluation = evaluate(
        lm,
        RECORDS,
        {"pusher": push, "nothing": pusher(lm, [], 0.0)},
        size=2,
        sequence=True,
        drift_tokens=60,
        texts=[PROSE],
    )
    one = drift(lm, lambda: push([]), texts=[PROSE], max_tokens=60, n_facts=0)
    noted = evaluation.drift("pusher", 0)
    assert noted["kl_text"] == pytest.approx(one.kl_text, rel=1e-4)
    assert noted["perplexity"] == pytest.approx(one.perplexity[1] / one.perplexity[0], rel=1e-4)
    assert (
        noted["kl_text"]
        < evaluation.drift("pusher", 1)["kl_text"]
        < evaluation.drift("pusher")["kl_text"]
    )
    assert evaluation.drift("nothing") == {
        "kl_text": pytest.approx(0, abs=1e-6),
        "perplexity": pytest.approx(1),
    }
    assert evaluation.drift(BASE) == {} and not evaluate(
        lm, RECORDS, {"pusher": push}, size=5, drift_tokens=0
    ).drift("pusher")
    many = evaluate(
        lm, [record(n) for n in range(12)], {"pusher": push}, drift_tokens=20, texts=[PROSE]
    )
    assert sum("kl_text" in note for note in many.notes.values()) == 10, (
        "of single edits the first few"
    )


def test_models_go_on_writing(lm: LanguageModel, tmp_path: Path) -> None:
    writing = [
        replace(one, generation_prompts=(f"Entity{n} is",), references=("OOOO is nice.",)[: n % 2])
        for n, one in enumerate(RECORDS)
    ]
    arguments: dict[str, Any] = {"size": 2, "drift_tokens": 0, "continued": 3}
    evaluation = evaluate(lm, writing, {"pusher": pusher(lm, [])}, **arguments)
    written = {(one.editor, one.record): one for one in evaluation.written}
    assert set(written) == {(name, f"r{n}") for name in (BASE, "pusher") for n in range(3)}
    base, pushed = written[BASE, "r1"], written["pusher", "r1"]
    assert base.texts[0].startswith("Entity1 is") and base.texts != pushed.texts
    for one in (base, pushed):
        assert one.entropy == ngram_entropy(one.texts) and one.consistency == reference_consistency(
            one.texts, ["OOOO is nice."]
        )
    assert written[BASE, "r0"].consistency is None
    assert evaluation.summary("pusher")["text entropy"].value == pytest.approx(
        sum(written["pusher", f"r{n}"].entropy for n in range(3)) / 3
    )
    assert evaluation.summary(BASE)["text consistency"].n == 1
    assert (
        evaluate(lm, writing, {"pusher": pusher(lm, [])}, **arguments).written == evaluation.written
    ), "the same seed, the same text"
    assert (
        evaluate(lm, writing, {"pusher": pusher(lm, [])}, **{**arguments, "seed": 1}).written
        != evaluation.written
    )
    evaluate(lm, writing, {"pusher": pusher(lm, [])}, folder=tmp_path, **arguments)
    assert (
        evaluate(lm, writing, {"pusher": pusher(lm, [])}, folder=tmp_path, **arguments).written
        == evaluation.written
    )
    behind = evaluate(lm, writing, {"pusher": pusher(lm, [], 0.1)}, sequence=True, **arguments)
    assert {one.unit for one in behind.written if one.editor == "pusher"} == {2}


def test_an_edit_that_fails_is_counted_and_said(lm: LanguageModel, tmp_path: Path) -> None:
    @contextmanager
    def sometimes(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        if facts[0].subject == "Entity1":
            raise NumericsError("no finite target")
        with pusher(lm, [])(facts) as notes:
            yield notes

    for _ in range(2):
        evaluation = evaluate(lm, RECORDS, {"pusher": sometimes}, drift_tokens=0, folder=tmp_path)
        assert (
            evaluation.failed == {("pusher", 1): "no finite target"}
            and evaluation.notes["pusher", 1] == {}
        )
        answers = {(row.editor, row.prompt): row.answer for row in evaluation.rows}
        prompts = [question.prompt for question in RECORDS[1].questions]
        assert [answers["pusher", p] for p in prompts] == [answers[BASE, p] for p in prompts]

    def refuses(facts: Sequence[Fact]) -> Any:
        raise ValueError("a mistake of the program")

    with pytest.raises(ValueError, match="a mistake of the program"):
        evaluate(lm, RECORDS, {"refuses": refuses})


@pytest.mark.parametrize("kind", [InputError, SubjectError, TokenizerError, NumericsError])
@pytest.mark.parametrize("sequence", [False, True])
def test_an_error_of_one_record_is_its_failure_and_the_run_goes_on(
    lm: LanguageModel, kind: type[FactsmithError], sequence: bool
) -> None:
    def write(facts: Sequence[Fact]) -> Any:
        if facts[0].subject == "Entity1":
            raise kind("cannot be written")
        return pusher(lm, [])(facts)

    evaluation = evaluate(lm, RECORDS, {"own": write}, sequence=sequence, drift_tokens=0)
    assert evaluation.failed == {("own", 1): "cannot be written"}
    assert evaluation.measured("own")["failed"] == 1 and evaluation.measured("own")["edits"] == 4
    assert {row.record for row in evaluation.asked("own")} == {r.id for r in RECORDS}
    assert evaluation.to_dict()["failed"][0]["why"] == "cannot be written"


def test_an_editor_without_a_block_or_with_foreign_files_ends_the_run(lm: LanguageModel) -> None:
    def foreign(facts: Sequence[Fact]) -> Any:
        raise FingerprintError("of another model")

    with pytest.raises(FingerprintError, match="another model"):
        evaluate(lm, RECORDS, {"foreign": foreign}, drift_tokens=0)
    with pytest.raises(InputError, match="must return a `with` block"):
        evaluate(lm, RECORDS, {"nothing": lambda facts: None}, drift_tokens=0)


def test_a_record_that_cannot_be_asked_is_left_out(lm: LanguageModel, tmp_path: Path) -> None:
    """The model has 64 positions."""
    long = Question(kind="locality", prompt="q" * 80, answers=())
    records = [replace(RECORDS[0], questions=(long,)), *RECORDS[1:3]]
    for _ in range(2):  # the second time from the folder
        evaluation = evaluate(
            lm, records, {"pusher": pusher(lm, [])}, size=3, drift_tokens=0, folder=tmp_path
        )
        assert list(evaluation.unusable) == [(BASE, 0)] and not evaluation.failed
        assert "tokens" in evaluation.unusable[BASE, 0][records[0].id]
        assert evaluation.notes["pusher", 0]["facts"] == 2
        assert {row.record for row in evaluation.rows} == {r.id for r in records[1:]}
        assert evaluation.measured("pusher")["unusable"] == 1
        (entry,) = Evaluation.load(tmp_path).to_dict()["unusable"]
        assert entry["record"] == records[0].id and entry["editor"] == BASE
    with pytest.raises(InputError, match="none of 1 record"):
        evaluate(lm, records[:1], drift_tokens=0)


def test_one_bad_record_does_not_spoil_a_batch(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_target(monkeypatch, lm, "Rome")
    facts = [Fact(f"Entity{n}", "{} is in", target) for n, target in enumerate(["Oslo", "Rome"])]
    questions = (Question(kind="prompt", prompt="Entity is in", answers=("Oslo",)),)
    records = [
        Record(id=str(n), facts=(fact,), questions=questions) for n, fact in enumerate(facts)
    ]
    log: list[tuple[str, ...]] = []

    def write(facts: Sequence[Fact]) -> Any:
        for fact in facts:
            lm.question(fact.text, fact.target or "")
        return pusher(lm, log)(facts)

    evaluation = evaluate(lm, records, {"own": write}, size=2, drift_tokens=0)
    assert log == [("Entity0",)] and not evaluation.failed
    assert "no token" in evaluation.unusable["own", 0]["1"]
    assert {row.record for row in evaluation.asked("own")} == {"0", "1"}


def test_a_probe_is_asked_before_and_at_the_end(lm: LanguageModel, tmp_path: Path) -> None:
    bias, asked = lm.module.transformer.ln_f.bias, []

    def probe() -> dict[str, float]:
        asked.append(1)
        return {"bias": float(bias.norm())}

    for sequence in (False, True):
        evaluation = evaluate(
            lm,
            RECORDS,
            {"pusher": pusher(lm, [], 0.1)},
            size=2,
            sequence=sequence,
            probe=probe,
            drift_tokens=0,
        )
        assert (
            evaluation.probed(BASE) == {"bias": float(bias.norm())}
            and evaluation.probed("pusher")["bias"] != evaluation.probed(BASE)["bias"]
        )
        assert all(set(note) <= {"facts", "probe: bias"} for note in evaluation.notes.values())
    assert len(asked) == 4
    evaluate(lm, RECORDS, {"pusher": pusher(lm, [])}, drift_tokens=0, folder=tmp_path)
    with pytest.raises(InputError, match="probe"):
        evaluate(
            lm, RECORDS, {"pusher": pusher(lm, [])}, drift_tokens=0, folder=tmp_path, probe=probe
        )


def test_bad_input_is_refused_in_words(lm: LanguageModel) -> None:
    nothing = Record(id="x", facts=(), questions=())
    write = pusher(lm, [])
    cases = (
        ([], {"a": write}, {}, "no record with a fact"),
        ([nothing], {"a": write}, {}, "no record with a fact"),
        ([RECORDS[0], RECORDS[0]], {"a": write}, {}, "same id"),
        (RECORDS, {}, {}, "at least one"),
        (RECORDS, {BASE: write}, {}, "base"),
        (RECORDS, {"a": write}, {"size": 0}, "size"),
        (RECORDS, {"a": write}, {"retained": -1}, "retained"),
    )
    for records, editors, arguments, words in cases:
        with pytest.raises(InputError, match=words):
            evaluate(lm, records, editors, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no editor"):
        evaluate(lm, RECORDS[:1], {"a": write}).asked("b")
