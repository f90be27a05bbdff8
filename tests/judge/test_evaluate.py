"""The runner: what is asked when, what is counted how, and that a killed run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, byte_tokenizer, shared_dir, tiny_model
from factsmith.core.errors import DamagedError, FingerprintError, InputError, NumericsError
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta, applied
from factsmith.judge.drift import drift
from factsmith.judge.editor import Editor
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.metrics import ngram_entropy, reference_consistency
from factsmith.judge.records import Question, Record, Suite
from factsmith.judge.rows import BASE, Row
from factsmith.judge.run import evaluate
from factsmith.judge.score import is_same, score
from factsmith.judge.suites import load_suite
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap


def record(n: int, *questions: Question) -> Record:
    fact = Fact(f"Entity{n}", "The home of {} is", "Oslo", target_true="Rome")
    own = (
        Question(kind="prompt", prompt=fact.text, answers=("Oslo",), against="Rome"),
        Question(
            kind="paraphrase", prompt=f"Entity{n} lives in", answers=("Oslo",), against="Rome"
        ),
        Question(
            kind="neighbour", prompt=f"The home of Other{n} is", answers=("Rome",), against="Oslo"
        ),
        Question(kind="locality", prompt=f"The colour of Entity{n} is", answers=()),
        Question(
            kind="negation",
            prompt=f"It is not true that the home of Entity{n} is",
            answers=(),
            against="Oslo",
        ),
    )
    return Record(id=f"r{n}", facts=(fact,), questions=(*own, *questions))


PROSE = "The harbour was quiet in the morning, and nobody had seen the old captain since."
RECORDS = [record(n) for n in range(5)]


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def editor(lm: LanguageModel, log: list[tuple[str, ...]], strength: float = 300.0) -> Editor:
    """Pushes the unembedding's row of O, so that every answer begins with it; says what it was given."""

    @contextmanager
    def write(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        bias = lm.module.transformer.ln_f.bias
        row = lm.module.get_output_embeddings().weight[
            lm.tokenizer("O", add_special_tokens=False)["input_ids"][0]
        ]
        before = bias.detach().clone()
        log.append(tuple(fact.subject for fact in facts))
        with torch.no_grad():
            bias += strength * row
        try:
            yield {"facts": len(facts), "what": "not a number"}  # type: ignore[dict-item]
        finally:
            with torch.no_grad():
                bias.copy_(before)

    return write


def test_two_way_success_agrees_with_a_few_plain_lines(lm: LanguageModel) -> None:
    """COUNTERFACT's ES, PS and NS: the mean log-probability of either candidate, from one plain pass each."""
    rows = score(lm, RECORDS)
    by_kind: dict[str, list[bool]] = {}
    for one in RECORDS:
        for q in one.questions:
            if q.answers and q.against:
                logs = []
                for text in (q.answers[0], q.against):
                    head, tail = (
                        lm.tokenizer(q.prompt)["input_ids"],
                        lm.tokenizer(" " + text)["input_ids"],
                    )
                    log_p = (
                        lm.module(input_ids=torch.tensor([head + tail]))
                        .logits[0, len(head) - 1 : -1]
                        .log_softmax(-1)
                    )
                    logs.append(float(log_p.gather(1, torch.tensor(tail)[:, None]).mean()))
                by_kind.setdefault(q.kind, []).append(logs[0] > logs[1])
    for kind, expected in by_kind.items():
        assert [row.success for row in rows if row.kind == kind] == expected
    assert {row.success for row in rows if row.kind in ("locality", "negation")} == {None}


def test_single_edits_are_written_judged_and_taken_back(lm: LanguageModel) -> None:
    log: list[tuple[str, ...]] = []
    before = lm.fingerprint
    found = evaluate(lm, RECORDS, {"pusher": editor(lm, log)}, size=1, drift_tokens=0)
    assert log == [(f"Entity{n}",) for n in range(5)] and lm.fingerprint == before
    base, after = found.asked(BASE), found.asked("pusher")
    assert len(base) == len(after) == 25 and [row.prompt for row in base] == [
        row.prompt for row in after
    ]
    assert all(row.answer.startswith("O") for row in after) and not any(
        row.answer.startswith("O") for row in base
    )
    assert {row.stayed for row in base} == {None} and {
        row.stayed for row in after if row.kind in ("neighbour", "locality")
    } == {False}
    assert found.notes["pusher", 3] == {"facts": 1.0} and found.notes[BASE, 0] == {}
    negated = [row.exact for row in after if row.kind == "negation"]
    assert negated == [not row.answer.startswith("Oslo") for row in after if row.kind == "negation"]
    assert "base" in repr(found) and "pusher" in repr(found) and "<table>" in found._repr_html_()
    control = evaluate(lm, RECORDS, {"nothing": editor(lm, [], 0.0)}, size=1)
    assert [row.answer for row in control.asked("nothing")] == [
        row.answer for row in control.asked(BASE)
    ]
    assert all(
        row.stayed for row in control.asked("nothing") if row.kind in ("neighbour", "locality")
    )


def pushed(lm: LanguageModel, strength: float) -> Delta:
    """Layer 1 writes the unembedding's row of O wherever its first neuron fires."""
    row = (
        lm.module.get_output_embeddings()
        .weight[lm.tokenizer("O", add_special_tokens=False)["input_ids"][0]]
        .detach()
        .clone()
    )
    key = torch.zeros(1, lm.ffn[1].d_ff)
    key[0, 0] = 1.0
    return Delta(
        layers={1: (strength * row[:, None], key)},
        k_star={1: key},
        v_star=row[None],
        facts=(Fact("Entity9", "{} is", "O"),),
        method="by hand",
        config={},
        fingerprint=lm.fingerprint,
    )


def test_a_delta_is_judged_as_it_is(lm: LanguageModel, tmp_path: Path) -> None:
    delta, suite = (
        pushed(lm, 300.0),
        Suite(name="own", records=tuple(RECORDS), skipped=(), source="here", digest="0"),
    )
    before = lm.fingerprint
    found = evaluate(lm, suite, delta=delta, folder=tmp_path / "kept")
    assert lm.fingerprint == before and found.editors == (BASE, "delta") and found.size == 5
    assert [row.answer for row in found.asked(BASE)] == [row.answer for row in score(lm, RECORDS)]
    with applied(lm, delta):
        inside = score(lm, RECORDS)
    assert [(row.answer, row.log_wanted) for row in found.asked("delta")] == [
        (row.answer, row.log_wanted) for row in inside
    ]
    assert [row.log_wanted for row in inside] != [
        row.log_wanted for row in score(lm, RECORDS)
    ]  # it does something
    told = found.to_dict()
    assert (
        json.loads(json.dumps(told))["measures"]["delta"]["prompt exact"]["value"]
        == found.summary("delta")["prompt exact"].value
    )
    assert "| prompt exact |" in found.to_markdown() and "delta" in found.to_markdown()
    with pytest.raises(InputError, match="other settings"):  # the folder holds another delta's rows
        evaluate(lm, suite, delta=pushed(lm, 2.0), folder=tmp_path / "kept")


def test_several_deltas_lie_on_top_of_one_another(lm: LanguageModel) -> None:
    deltas = [pushed(lm, 1.0), pushed(lm, 2.0)]
    both = evaluate(lm, RECORDS, delta=deltas, drift_tokens=0).asked("delta")
    with applied(lm, deltas):
        assert [row.log_wanted for row in both] == pytest.approx(
            [row.log_wanted for row in score(lm, RECORDS)], abs=1e-5
        )
    assert [row.log_wanted for row in both] != [
        row.log_wanted for row in evaluate(lm, RECORDS, delta=deltas[0]).asked("delta")
    ]


def test_a_sample_is_drawn_by_seed_and_the_base_alone_can_be_asked(lm: LanguageModel) -> None:
    found = evaluate(lm, RECORDS, limit=3, seed=1)
    assert found.editors == (BASE,) and len({row.record for row in found.rows}) == 3
    assert found.rows == evaluate(lm, RECORDS, limit=3, seed=1).rows
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
    found = evaluate(
        lm, RECORDS, {"pusher": editor(lm, log, 0.1)}, size=2, sequence=True, retained=1
    )
    assert log == [("Entity0", "Entity1"), ("Entity2", "Entity3"), ("Entity4",)]
    last = found.asked("pusher")
    assert {row.record for row in last} == {f"r{n}" for n in range(5)} and {
        row.unit for row in last
    } == {2}
    again = [row for row in found.asked("pusher", 1) if row.written == 0]
    assert [(row.record, row.kind) for row in again] == [("r0", "prompt")]
    kept = found.retention("pusher", "tokens")
    assert set(kept) == {0, 1, 2} and set(kept[0]) == {0, 1, 2} and set(kept[2]) == {2}
    rows = {
        (row.unit, row.prompt): row.log_wanted
        for row in found.rows
        if row.editor == "pusher" and row.record == "r0"
    }
    pushed = [rows[unit, RECORDS[0].questions[0].prompt] for unit in range(3)]
    assert len(set(pushed)) == 3, "each round changed the model further"


def test_a_killed_run_goes_on_where_it_stood(lm: LanguageModel, tmp_path: Path) -> None:
    for name, arguments in (("single", {"size": 1}), ("sequence", {"size": 2, "sequence": True})):
        straight = evaluate(lm, RECORDS, {"pusher": editor(lm, [], 0.1)}, **arguments)  # type: ignore[arg-type]
        folder, log = tmp_path / name, []  # type: tuple[Path, list[tuple[str, ...]]]

        @contextmanager
        def dies(facts: Sequence[Fact], log: list[tuple[str, ...]] = log) -> Iterator[None]:
            if len(log) == 2:
                raise KeyboardInterrupt
            with editor(lm, log, 0.1)(facts):
                yield {"facts": len(facts)}  # type: ignore[misc]

        with pytest.raises(KeyboardInterrupt):
            evaluate(lm, RECORDS, {"pusher": dies}, folder=folder, **arguments)  # type: ignore[arg-type, dict-item]
        file = folder / "rows.jsonl"
        with file.open("a") as torn:
            torn.write(json.dumps(vars(straight.rows[0])) + '\n{"editor": "pus')
        log.clear()
        again = evaluate(lm, RECORDS, {"pusher": editor(lm, log, 0.1)}, folder=folder, **arguments)  # type: ignore[arg-type]
        assert again.rows == straight.rows and again.notes == straight.notes
        loaded = Evaluation.load(folder)
        assert vars(loaded) == vars(again) and loaded.summary("pusher") == straight.summary(
            "pusher"
        )
        assert len(log) == 3, "rounds that were asked are written again, single edits are not"
        log.clear()
        assert (
            evaluate(lm, RECORDS, {"pusher": editor(lm, log)}, folder=folder, **arguments).rows
            == straight.rows
            and not log
        )  # type: ignore[arg-type]
        with pytest.raises(InputError, match="size"):
            evaluate(
                lm,
                RECORDS,
                {"pusher": editor(lm, [])},
                size=3,
                folder=folder,
                sequence=bool(arguments.get("sequence")),
            )
        with pytest.raises(InputError, match="records"):
            evaluate(lm, RECORDS[:4], {"pusher": editor(lm, [])}, folder=folder, **arguments)  # type: ignore[arg-type]
        with pytest.raises(FingerprintError):
            other = wrap(tiny_model("gpt2", seed=7, **GPT2), byte_tokenizer())
            evaluate(other, RECORDS, {"pusher": editor(other, [])}, folder=folder, **arguments)  # type: ignore[arg-type]
        for damaged in (
            b"\xff\xfe",
            b"{}\n",
            b"nothing\n",
            file.read_bytes().replace(b'"kind"', b'"sort"', 1),
        ):
            (tmp_path / "damaged").mkdir(exist_ok=True)
            (tmp_path / "damaged" / "rows.jsonl").write_bytes(damaged)
            with pytest.raises(DamagedError):
                evaluate(
                    lm,
                    RECORDS,
                    {"pusher": editor(lm, [])},
                    folder=tmp_path / "damaged",
                    **arguments,
                )  # type: ignore[arg-type]


def test_a_run_says_what_is_missing(lm: LanguageModel, tmp_path: Path) -> None:
    """A run that was stopped holds fewer edits than there are to be, and what is not finished can be left out."""
    done = evaluate(lm, RECORDS, {"first": editor(lm, [])}, size=2, drift_tokens=0, folder=tmp_path)
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
        return editor(lm, [])(facts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            lm,
            RECORDS,
            {"first": editor(lm, []), "second": dies},
            size=2,
            drift_tokens=0,
            folder=tmp_path,
        )
    stopped = Evaluation.load(tmp_path)
    assert stopped.editors == (BASE, "first", "second") and stopped.unfinished == {"second": 2}
    assert vars(stopped.finished()) == vars(done)


def test_a_size_above_the_number_of_records_is_that_number(lm: LanguageModel) -> None:
    found = evaluate(lm, RECORDS, {"pusher": editor(lm, [])}, size=100, drift_tokens=0)
    assert (found.size, found.units) == (5, 1)


def breaking(lm: LanguageModel, value: float) -> Editor:
    """Writes a value into a whole down-projection."""

    @contextmanager
    def write(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        weight = lm.module.transformer.h[1].mlp.c_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(value)
        try:
            yield {"norm": float("inf"), "seconds": 1.0}
        finally:
            with torch.no_grad():
                weight.copy_(before)

    return write


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_broken_model_counts_as_wrong_and_the_run_goes_on(
    lm: LanguageModel, tmp_path: Path, value: float, sequence: bool
) -> None:
    records = [replace(one, generation_prompts=("Entity is",)) for one in RECORDS]
    editors = {"breaker": breaking(lm, value), "pusher": editor(lm, [], 0.1)}
    arguments: dict[str, Any] = {
        "size": 2,
        "sequence": sequence,
        "texts": [PROSE],
        "drift_tokens": 30,
    }
    found = evaluate(lm, records, editors, folder=tmp_path, **arguments)
    broken, others = found.asked("breaker"), found.asked("pusher")
    assert {
        row.success for row in broken if row.log_wanted is not None and row.log_against is not None
    } == {False}
    assert {row.tokens for row in broken} == {0.0, None} and all(
        row.broken for row in broken if row.log_wanted is not None
    )
    assert found.summary("breaker")["prompt magnitude"].value == 0
    assert not any(row.broken for row in others) and len(others) == len(broken), "the control"
    assert [found.notes["breaker", unit] for unit in range(3)] == [
        {"seconds": 1.0, "broken": 1.0}
    ] * 3
    assert (
        found.measured("breaker")["broken"] == 3
        and "broken" not in found.measured("pusher")
        and found.drift("pusher")
    )
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (
        vars(Evaluation.load(tmp_path))
        == vars(found)
        == vars(evaluate(lm, records, editors, folder=tmp_path, **arguments))
    )


def test_a_write_torn_inside_a_character_is_dropped(lm: LanguageModel, tmp_path: Path) -> None:
    records = [
        replace(one, questions=(replace(one.questions[0], prompt=f"Zürich {one.id}"),))
        for one in RECORDS
    ]
    found = evaluate(lm, records, {"pusher": editor(lm, [])}, drift_tokens=0, folder=tmp_path)
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    place = whole.rindex("ü".encode())
    file.write_bytes(whole[: place + 1])
    assert Evaluation.load(tmp_path).unfinished == {"pusher": 4}
    again = evaluate(lm, records, {"pusher": editor(lm, [])}, drift_tokens=0, folder=tmp_path)
    assert again.rows == found.rows
    first = whole.index("ü".encode())
    file.write_bytes(whole[: first + 1] + whole[first + 2 :])
    with pytest.raises(DamagedError, match="no text"):  # not in the last line: damaged
        Evaluation.load(tmp_path)


def test_what_was_not_touched_stayed(lm: LanguageModel) -> None:
    """Records that share a prompt, with right answers of different lengths, in different edits; and an answer whose first phrase is cut."""
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
        found = evaluate(
            lm,
            records,
            {"nothing": editor(lm, [], 0.0)},
            size=size,
            sequence=sequence,
            drift_tokens=0,
        )
        assert len({row.answer for row in found.rows}) == 1, "decoded equally far"
        assert {row.stayed for row in found.asked("nothing")} == {True}
    for said in ("1,000 people", "3.5 million", "", "... and so on"):
        assert is_same(said, said, "Rome") is True
    assert is_same("Oslo", "Rome", None) is False and is_same("2,000", "1,000", None) is False


def test_drift_is_that_of_the_edited_model(lm: LanguageModel) -> None:
    """What is noted behind an edit is what `drift` says of the same change, and grows along a sequence; nothing changed is no drift."""
    push = editor(lm, [], 0.2)
    found = evaluate(
        lm,
        RECORDS,
        {"pusher": push, "nothing": editor(lm, [], 0.0)},
        size=2,
        sequence=True,
        drift_tokens=60,
        texts=[PROSE],
    )
    one = drift(lm, lambda: push([]), texts=[PROSE], max_tokens=60, n_facts=0)
    noted = found.drift("pusher", 0)
    assert noted["kl_text"] == pytest.approx(one.kl_text, rel=1e-4)
    assert noted["perplexity"] == pytest.approx(one.perplexity[1] / one.perplexity[0], rel=1e-4)
    assert noted["kl_text"] < found.drift("pusher", 1)["kl_text"] < found.drift("pusher")["kl_text"]
    assert found.drift("nothing") == {
        "kl_text": pytest.approx(0, abs=1e-6),
        "perplexity": pytest.approx(1),
    }
    assert found.drift(BASE) == {} and not evaluate(
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
    found = evaluate(lm, writing, {"pusher": editor(lm, [])}, **arguments)
    told = {(one.editor, one.record): one for one in found.written}
    assert set(told) == {(name, f"r{n}") for name in (BASE, "pusher") for n in range(3)}
    base, pushed = told[BASE, "r1"], told["pusher", "r1"]
    assert base.texts[0].startswith("Entity1 is") and base.texts != pushed.texts
    for one in (base, pushed):
        assert one.entropy == ngram_entropy(one.texts) and one.consistency == reference_consistency(
            one.texts, ["OOOO is nice."]
        )
    assert told[BASE, "r0"].consistency is None
    assert found.summary("pusher")["text entropy"].value == pytest.approx(
        sum(told["pusher", f"r{n}"].entropy for n in range(3)) / 3
    )
    assert found.summary(BASE)["text consistency"].n == 1
    assert (
        evaluate(lm, writing, {"pusher": editor(lm, [])}, **arguments).written == found.written
    ), "the same seed, the same text"
    assert (
        evaluate(lm, writing, {"pusher": editor(lm, [])}, **{**arguments, "seed": 1}).written
        != found.written
    )
    evaluate(lm, writing, {"pusher": editor(lm, [])}, folder=tmp_path, **arguments)
    assert (
        evaluate(lm, writing, {"pusher": editor(lm, [])}, folder=tmp_path, **arguments).written
        == found.written
    )
    behind = evaluate(lm, writing, {"pusher": editor(lm, [], 0.1)}, sequence=True, **arguments)
    assert {one.unit for one in behind.written if one.editor == "pusher"} == {2}


def test_kept_rows_hold_any_text(lm: LanguageModel, tmp_path: Path) -> None:
    """What splits a line for Python, and for nobody else, does not split one here."""
    odd = [
        replace(
            RECORDS[0],
            questions=(replace(RECORDS[0].questions[0], prompt="a\u2028b\x85c\x1cd\x0be"),),
        )
    ]
    found = evaluate(lm, odd, {"pusher": editor(lm, [])}, drift_tokens=0, folder=tmp_path)
    assert Evaluation.load(tmp_path).rows == found.rows
    assert (
        evaluate(lm, odd, {"pusher": editor(lm, [])}, drift_tokens=0, folder=tmp_path).rows
        == found.rows
    )
    with pytest.raises(InputError, match="no rows"):
        Evaluation.load(tmp_path / "nowhere")
    (tmp_path / "rows.jsonl").write_text('{"format": "evaluation 4"}\n')
    with pytest.raises(DamagedError, match="line 1"):
        Evaluation.load(tmp_path)


def test_an_edit_that_fails_is_counted_and_said(lm: LanguageModel, tmp_path: Path) -> None:
    @contextmanager
    def sometimes(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        if facts[0].subject == "Entity1":
            raise NumericsError("no finite target")
        with editor(lm, [])(facts) as notes:
            yield notes

    for _ in range(2):
        found = evaluate(lm, RECORDS, {"pusher": sometimes}, drift_tokens=0, folder=tmp_path)
        assert (
            found.failed == {("pusher", 1): "no finite target"} and found.notes["pusher", 1] == {}
        )
        answers = {(row.editor, row.prompt): row.answer for row in found.rows}
        prompts = [question.prompt for question in RECORDS[1].questions]
        assert [answers["pusher", p] for p in prompts] == [answers[BASE, p] for p in prompts]

    def refuses(facts: Sequence[Fact]) -> Any:
        raise InputError("not for me")

    with pytest.raises(InputError, match="not for me"):
        evaluate(lm, RECORDS, {"refuses": refuses})


def test_a_probe_is_asked_before_and_at_the_end(lm: LanguageModel, tmp_path: Path) -> None:
    bias, asked = lm.module.transformer.ln_f.bias, []

    def probe() -> dict[str, float]:
        asked.append(1)
        return {"bias": float(bias.norm())}

    for sequence in (False, True):
        found = evaluate(
            lm,
            RECORDS,
            {"pusher": editor(lm, [], 0.1)},
            size=2,
            sequence=sequence,
            probe=probe,
            drift_tokens=0,
        )
        assert (
            found.probed(BASE) == {"bias": float(bias.norm())}
            and found.probed("pusher")["bias"] != found.probed(BASE)["bias"]
        )
        assert all(set(note) <= {"facts", "probe: bias"} for note in found.notes.values())
    assert len(asked) == 4
    evaluate(lm, RECORDS, {"pusher": editor(lm, [])}, drift_tokens=0, folder=tmp_path)
    with pytest.raises(InputError, match="probe"):
        evaluate(
            lm, RECORDS, {"pusher": editor(lm, [])}, drift_tokens=0, folder=tmp_path, probe=probe
        )


def test_a_run_is_gone_on_with_by_the_same_editor(lm: LanguageModel, tmp_path: Path) -> None:
    class Described:
        def __init__(self, description: str) -> None:
            self.description = description

        def __call__(self, facts: Sequence[Fact]) -> Any:
            return editor(lm, [])(facts)

    evaluate(lm, RECORDS, {"it": Described("steps=1")}, drift_tokens=0, folder=tmp_path)
    assert evaluate(
        lm, RECORDS, {"it": Described("steps=1")}, drift_tokens=0, folder=tmp_path
    ).editors == (BASE, "it")
    with pytest.raises(InputError, match="steps=2"):
        evaluate(lm, RECORDS, {"it": Described("steps=2")}, drift_tokens=0, folder=tmp_path)


def test_shares_scores_and_their_intervals_by_hand(lm: LanguageModel) -> None:
    """Three records, one question each of the three kinds and a multi-hop case that any of two questions hits."""
    found = evaluate(lm, RECORDS[:3], {"pusher": editor(lm, [])})

    def row(n: int, kind: str, success: bool, exact: bool, group: int | None = None) -> Row:
        logs = (-1.0, -2.0) if success else (-2.0, -1.0)
        fields = {
            **vars(found.rows[0]),
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
    made = type(found)(**{**vars(found), "rows": (*found.rows, *rows)})
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


def test_bad_input_is_refused_in_words(lm: LanguageModel) -> None:
    nothing = Record(id="x", facts=(), questions=())
    write = editor(lm, [])
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


def test_counterfact_success_of_a_hundred_records_agrees_with_plain_lines() -> None:
    path = shared_dir() / "data" / "counterfact" / "full-1017.json"
    lm = wrap(tiny_model("gpt2", **{**GPT2, "n_positions": 512}), byte_tokenizer())
    suite = load_suite(path, limit=100, seed=4)
    rows = score(lm, suite.records, max_new_tokens=1)
    raw = {f"{entry['case_id']}": entry for entry in json.loads(path.read_text())}
    compared = 0
    for one in suite.records[:100:10]:
        entry = raw[one.id.split()[-1]]
        edit = entry["requested_rewrite"]
        asked = [(edit["prompt"].format(edit["subject"]), False)]
        asked += [(p, False) for p in entry["paraphrase_prompts"]] + [
            (p, True) for p in entry["neighborhood_prompts"]
        ]
        for prompt, stays in asked:
            nll = []
            for text in (edit["target_new"]["str"], edit["target_true"]["str"]):
                head, tail = (
                    lm.tokenizer(prompt)["input_ids"],
                    lm.tokenizer(" " + text.strip())["input_ids"],
                )
                log_p = (
                    lm.module(input_ids=torch.tensor([head + tail]))
                    .logits[0, len(head) - 1 : -1]
                    .log_softmax(-1)
                )
                nll.append(-float(log_p.gather(1, torch.tensor(tail)[:, None]).mean()))
            expected = nll[1] < nll[0] if stays else nll[0] < nll[1]
            own = [
                row
                for row in rows
                if row.record == one.id
                and row.prompt == prompt
                and row.kind in ("prompt", "paraphrase", "neighbour")
            ]
            assert own and all(row.success == expected for row in own)
            compared += 1
    assert compared > 100
