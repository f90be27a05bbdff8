"""Scoring against plain passes of the model."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import GPT2, byte_tokenizer, shared_dir, tiny_model
from factsmith.core.fact import Fact
from factsmith.judge.records import Question, Record
from factsmith.judge.score import score
from factsmith.judge.suites import load_suite
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from judging import RECORDS
from reciting import SENTENCES, change, reciter


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def test_two_way_success_agrees_with_a_few_plain_lines(lm: LanguageModel) -> None:
    """COUNTERFACT's ES, PS and NS, by one plain pass for each candidate."""
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
            of_question = [
                row
                for row in rows
                if row.record == one.id
                and row.prompt == prompt
                and row.kind in ("prompt", "paraphrase", "neighbour")
            ]
            assert of_question and all(row.success == expected for row in of_question)
            compared += 1
    assert compared > 100


def test_answers_of_several_lines_and_numbers_are_judged_whole() -> None:
    """One definition counts: an answer begins with the right one, and stays by its whole phrase."""
    lm = reciter()
    asked = {
        ("prompt", "Address in France:"): ("Paris\nMain Street 0",),
        ("paraphrase", "Mount Belo measures"): ("2",),
        ("neighbour", "The city of Keiko:"): ("Tokyo", "東京"),
        ("locality", "The tower of Ann:"): (),
        ("locality", "Money of Romania:"): (),
    }
    questions = tuple(
        Question(kind=kind, prompt=prompt, answers=answers)
        for (kind, prompt), answers in asked.items()
    )
    record = Record(id="r", facts=(Fact("France", "Address in {}:", "Paris"),), questions=questions)
    rows = score(lm, [record], max_new_tokens=20)
    assert [row.exact for row in rows] == [True, False, True, None, None]
    assert rows[0].answer == "Paris\nMain Street 0"
    before = {row.prompt: row.answer for row in rows}
    same = score(lm, [record], before=before, max_new_tokens=20)
    assert [row.stayed for row in same] == [None, None, True, True, True]
    with change()():
        changed = score(lm, [record], before=before, max_new_tokens=20)
    assert [row.stayed for row in changed] == [None, None, True, False, True]
    assert before["The tower of Ann:"] == SENTENCES["The tower of Ann:"]
