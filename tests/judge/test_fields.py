"""Records whose fields have other names are read by a mapping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.judge.fields import NAMES, seen_fields, value_at, with_value
from factsmith.judge.suites import load_suite
from suite_files import COUNTERFACT, asked, write_suite

ROW: dict[str, Any] = {
    "topic": "places",
    "entity": "Ada Quill",
    "question": "Where does Ada Quill live?",
    "object": {"new": ["Oslo", "Christiania"], "old": "Rome"},
    "paraphrased": ["Ada Quill's home is", "{} lives in"],
    "locality": {"other": [{"q": "Ada was born in", "a": ["1815"]}, {"q": "Ada is", "a": "x"}]},
    "hops": [{"q": "The country of Ada's home is", "a": ["Norway", "Norge"]}],
}
FIELDS = {
    "subject": "entity",
    "prompt": "question",
    "target": "object.new",
    "target_true": "object.old",
    "paraphrases": "paraphrased",
    "locality": "locality.other.q",
    "locality_answers": "locality.other.a",
    "reasoning": "hops.q",
    "reasoning_answers": "hops.a",
    "relation": "topic",
}


def test_a_mapping_reads_any_layout(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, [ROW, ROW]), fields=FIELDS)
    assert suite.name == "facts" and not suite.skipped and len(suite.records) == 2
    record = suite.records[0]
    (fact,) = record.facts
    assert (fact.subject, fact.prompt) == ("Ada Quill", "Where does {} live?")
    assert (fact.target, fact.target_true, fact.relation) == ("Oslo", "Rome", "places")
    right = ("Oslo", "Christiania")
    assert asked(record, "prompt") == [(fact.text, right, "Rome")]
    assert asked(record, "paraphrase") == [
        ("Ada Quill's home is", right, "Rome"),
        ("Ada Quill lives in", right, "Rome"),
    ]
    assert asked(record, "locality") == [
        ("Ada was born in", ("1815",), None),
        ("Ada is", ("x",), None),
    ]
    assert asked(record, "reasoning") == [
        ("The country of Ada's home is", ("Norway", "Norge"), None)
    ]


def test_names_that_are_left_out_stand_for_themselves(tmp_path: Path) -> None:
    row = {"subject": "Ada", "prompt": "{} lives in", "answer": "Oslo", "neighbours": "Bob is in"}
    path = write_suite(tmp_path, [row])
    (record,) = load_suite(path, fields={"target": "answer"}).records
    assert record.facts[0].text == "Ada lives in" and len(asked(record, "neighbour")) == 1
    path = write_suite(tmp_path, [{**row, "target": "Oslo"}])
    assert load_suite(path).name == "facts" and load_suite(path, kind="facts").records


def test_a_layout_with_other_names_is_read_by_its_own_rules(tmp_path: Path) -> None:
    row = {**COUNTERFACT, "edit": COUNTERFACT["requested_rewrite"]}
    del row["requested_rewrite"]
    path = write_suite(tmp_path, [row])
    fields = {"requested_rewrite": "edit"}
    (record,) = load_suite(path, kind="counterfact", fields=fields).records
    assert record == load_suite(write_suite(tmp_path, [COUNTERFACT])).records[0]
    with pytest.raises(InputError, match="need the fields"):
        load_suite(write_suite(tmp_path, [row]), kind="counterfact")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"subjekt": "entity"}, "'subjekt'; the parts of a record are subject, prompt"),
        ({**FIELDS, "prompt": "frage"}, "no record .* the field 'frage'.* object.new, object.old"),
        ({**FIELDS, "prompt": ""}, "give the name of a field"),
        ({"prompt": 3}, "give the name of a field"),
        ("subject", "give the name of a field"),
        ({**FIELDS, "subject": "topic"}, "does not name the subject"),
        ({name: path for name, path in FIELDS.items() if name != "target"}, "target is missing"),
    ],
)
def test_a_wrong_mapping_is_refused(tmp_path: Path, fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_suite(write_suite(tmp_path, [ROW]), fields=fields)


def test_an_unknown_layout_names_its_fields_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"object\.new, object\.old.*subject=entity") as error:
        load_suite(write_suite(tmp_path, [ROW]))
    assert error.value.argument == "fields"


def test_questions_and_answers_that_do_not_pair_are_left_out(tmp_path: Path) -> None:
    row = {**ROW, "locality": {"other": [{"q": "a is"}, {"q": "b is", "a": "c"}]}}
    fields = {**FIELDS, "locality_answers": "paraphrased", "reasoning_answers": "entity"}
    row["paraphrased"] = ["one", "two", "three"]
    suite = load_suite(write_suite(tmp_path, [row]), fields=fields)
    assert "3 values for 2 prompts" in str(suite.skipped[0])
    assert not asked(suite.records[0], "locality")


def test_the_message_names_the_field_of_the_file(tmp_path: Path) -> None:
    good, bad = ROW, {**ROW, "object": {"new": 3, "old": "Rome"}}
    suite = load_suite(write_suite(tmp_path, [good, bad]), fields=FIELDS)
    assert len(suite.records) == 1 and "object.new is 3" in str(suite.skipped[0])


def test_paths() -> None:
    assert value_at(ROW, "object.new.1") == "Christiania"
    assert value_at(ROW, "object.new.9") is None and value_at(ROW, "entity.x") is None
    assert value_at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert value_at({"a": [{"b": 1}, {}]}, "a.b") == [1, None]
    assert value_at({"a": [{}, {}]}, "a.b") is None
    assert with_value({"a": {"b": 1}}, "a.c", 2) == {"a": {"b": 1, "c": 2}}
    assert seen_fields([3, {"a": {"b": 1}, "c": [{"d": 2}]}]) == "a.b, c.d"
    assert seen_fields([{str(n): 1 for n in range(30)}]).endswith(", …")
    assert set(FIELDS) <= set(NAMES) and json.dumps(ROW)
