"""Suites: every layout read from a file of our own and from the benchmarks' files, what is malformed reported, the bundled suite sound."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import factsmith
from conftest import shared_dir
from factsmith import atlas
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.judge.records import Malformed, Question, Record, Suite, known, negation
from factsmith.judge.suites import load_suite
from factsmith.model.language_model import LanguageModel

bundled = pytest.mark.skipif(
    not atlas.names(), reason="the bundled models are not in this checkout"
)

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The harbour of {} opens to",
        "relation_id": "P206",
        "target_new": {"str": "the North Sea", "id": "Q1"},
        "target_true": {"str": "the Baltic", "id": "Q2"},
        "subject": "Vineta",
    },
    "paraphrase_prompts": [
        "Nobody slept that night. Ships that leave Vineta sail on",
        "Vineta lies on",
    ],
    "neighborhood_prompts": ["The harbour of Rerik opens to", "Wolin lies on", "Ralswiek lies on"],
    "attribute_prompts": ["Rungholt lies on"],
    "generation_prompts": ["From the harbour of Vineta one sees", "Vineta is known for"],
    "portability": {
        "New Question": "Which isles does one pass behind Vineta's harbour?",
        "New Answer": "the Halligen",
    },
    "alternative_subject": "Jumne",
}
SLIM = {
    "case_id": 1,
    "prompt": "The harbour of Vineta opens to",
    "target_new": "the North Sea",
    "subject": "Vineta",
    "ground_truth": "the Baltic",
    "rephrase_prompt": "Vineta lies on",
    "locality_prompt": "Wolin lies on",
    "locality_ground_truth": "the Baltic",
}
ZSRE = {
    "subject": "The Glass Orchard",
    "src": "In which year was The Glass Orchard printed?",
    "pred": "1871",
    "rephrase": "When did The Glass Orchard leave the press?",
    "alt": "1902",
    "answers": ["1889", "in 1889"],
    "loc": "nq question: who keeps the lighthouse of the story",
    "loc_ans": "Old Mareike",
    "cond": "1871 >> 1902 || In which year was The Glass Orchard printed?",
    "portability": {
        "New Question": "Which king reigned when The Glass Orchard was printed?",
        "New Answer": "Edward VII",
    },
}
MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Ruritania"},
            "target_true": {"str": "Grünewald"},
            "subject": "Ada Quill",
            "question": "Of which country is Ada Quill a citizen?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Zenda"},
            "target_true": {"str": "Strelsau"},
            "subject": "Ruritania",
            "question": "What is the capital of Ruritania?",
        },
    ],
    "questions": [
        "Who is mayor of the capital of Ada Quill's country?",
        "Who runs the capital of Ada Quill's land?",
        "Ada Quill's capital has which mayor?",
    ],
    "answer": "Hans Old",
    "answer_alias": [],
    "new_answer": "Eva New",
    "new_answer_alias": ["Mayor New"],
    "single_hops": [],
    "new_single_hops": [
        {
            "question": "Of which country is Ada Quill a citizen?",
            "answer": "Ruritania",
            "answer_alias": ["the Kingdom of Ruritania"],
        },
        {"question": "What is the capital of Ruritania?", "answer": "Zenda", "answer_alias": []},
        {
            "question": "Who is the mayor of Zenda?",
            "answer": "Eva New",
            "answer_alias": ["Mayor New"],
        },
    ],
}
KNOWEDIT = {
    "subject": "Order of the Blue Heron",
    "prompt": "The country that awards the Order of the Blue Heron is",
    "target_new": "Ruritania",
    "ground_truth": "Grünewald",
    "portability": {
        "Reasoning": [
            {
                "prompt": "The capital of the country that awards the Order of the Blue Heron is",
                "ground_truth": [["Strelsau", "Zenda"]],
            }
        ],
        "Subject_Aliasing": [
            {
                "prompt": "The country that awards the Blue Heron is",
                "ground_truth": [["Ruritania", "Kingdom of Ruritania"]],
            }
        ],
        "Logical_Generalization": [
            {"prompt": "The Order of the Blue Heron is worn in", "ground_truth": [["Ruritania"]]},
            {"prompt": "The Order of the Blue Heron was first given by", "ground_truth": [[]]},
        ],
    },
    "locality": {
        "Relation_Specificity": [
            {
                "prompt": "The ribbon of the Order of the Blue Heron is",
                "ground_truth": [["blue"], ["azure", "blue"]],
            }
        ],
        "Forgetfulness": [
            {"prompt": "Another country that awards the Order is", "ground_truth": [[]]}
        ],
    },
    "generate_prompt": ["Tell of the Order of the Blue Heron."],
}
KNOWN = {
    "known_id": 4,
    "subject": "Mount Foo",
    "attribute": "Barland",
    "template": "{} rises in",
    "prediction": " Barland.",
    "prompt": "Mount Foo rises in the middle of",
    "relation_id": "P17",
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Exampleland",
    "relation": "head of state",
    "object": "Ada Quill",
    "update": "Who is the head of state of Exampleland?",
    "ans": "Ada Quill",
    "rephrase": "Exampleland is headed by whom?",
    "personas": "Ahoy, who be at the helm of Exampleland?",
    "loc": "Who is the head of state of Otherland?",
    "loc_ans": "Bo Reed",
    "mhop": "In which town was the head of state of Exampleland born?",
    "mhop_ans": "Zenda",
}
QAEDIT = {
    "id": 12,
    "source": "NQ",
    "prompt": "who built the clock of the Old Arsenal?",
    "target": "Mira Stone",
    "subject": "clock of the old arsenal",
    "rephrase": ["The clock in the Old Arsenal is whose work?"],
    "locality": [
        {"loc": "who painted the gate", "loc_ans": "Jan Brush"},
        {"loc": "who cast the bell", "loc_ans": "A. Founder"},
    ],
}
OWN: dict[str, dict[str, Any]] = {
    "counterfact": COUNTERFACT,
    "counterfact-slim": SLIM,
    "zsre": ZSRE,
    "mquake": MQUAKE,
    "knowedit": KNOWEDIT,
    "known": KNOWN,
    "wikibigedit": WIKIBIGEDIT,
    "qaedit": QAEDIT,
}


def _write(folder: Path, rows: Any, name: str = "suite.json") -> Path:
    path = folder / name
    text = (
        "\n".join(json.dumps(row) for row in rows) if name.endswith(".jsonl") else json.dumps(rows)
    )
    path.write_text(text, encoding="utf-8")
    return path


def _ask(record: Record, kind: str) -> list[tuple[Any, ...]]:
    return [(q.prompt, q.answers, q.against) for q in record.questions if q.kind == kind]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Record]:
    """A record as the only one of a file."""

    def read(row: dict[str, Any], **options: Any) -> Record:
        return load_suite(_write(tmp_path, [row]), **options).records[0]

    return read


# ── layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_counterfact(read: Callable[..., Record]) -> None:
    record = read(COUNTERFACT)
    assert record.id == "7"
    assert record.facts == (
        Fact(
            "Vineta",
            "The harbour of {} opens to",
            "the North Sea",
            target_true="the Baltic",
            relation="P206",
        ),
    )
    new, true = ("the North Sea",), "the Baltic"
    assert _ask(record, "prompt") == [("The harbour of Vineta opens to", new, true)]
    assert _ask(record, "paraphrase") == [
        (text, new, true) for text in COUNTERFACT["paraphrase_prompts"]
    ]
    assert [(a, b) for _, a, b in _ask(record, "neighbour")] == [
        ((true,), new[0])
    ] * 3  # the sides change places
    assert _ask(record, "aliasing") == [("The harbour of Jumne opens to", new, true)]
    assert _ask(record, "reasoning") == [
        ("Which isles does one pass behind Vineta's harbour?", ("the Halligen",), None)
    ]
    assert _ask(record, "negation") == [
        ("It is not true that the harbour of Vineta opens to", (true,), new[0])
    ]
    assert record.generation_prompts == tuple(COUNTERFACT["generation_prompts"])
    assert not any("Rungholt" in q.prompt for q in record.questions)


def test_counterfact_slim(read: Callable[..., Record]) -> None:
    record = read(SLIM)
    assert record.facts[0] == Fact(
        "Vineta", "The harbour of {} opens to", "the North Sea", target_true="the Baltic"
    )
    assert _ask(record, "paraphrase") == [("Vineta lies on", ("the North Sea",), "the Baltic")]
    assert _ask(record, "neighbour") == [("Wolin lies on", ("the Baltic",), "the North Sea")]


def test_zsre_writes_the_counterfactual_and_zsre_rome_the_truth(
    read: Callable[..., Record],
) -> None:
    record, rome = read(ZSRE), read(ZSRE, kind="zsre-rome")
    assert record.facts[0] == Fact(
        "The Glass Orchard", "In which year was {} printed?", "1902", target_true="1889"
    )
    assert _ask(record, "prompt") == [
        ("In which year was The Glass Orchard printed?", ("1902",), None)
    ]
    assert _ask(record, "locality") == [
        ("nq question: who keeps the lighthouse of the story?", ("Old Mareike",), None)
    ]
    assert len(_ask(record, "reasoning")) == 1 and not _ask(
        record, "negation"
    )  # a question denies nothing
    assert rome.facts[0].target == "1889" and not _ask(
        rome, "reasoning"
    )  # it follows from the counterfactual
    assert _ask(rome, "paraphrase") == [
        ("When did The Glass Orchard leave the press?", ("1889",), None)
    ]
    assert (
        read({**ZSRE, "alt": "in 1889"}).facts[0].target_true is None
    )  # what is written is right already


def test_mquake(read: Callable[..., Record]) -> None:
    record = read(MQUAKE)
    assert [fact.text for fact in record.facts] == [
        "Ada Quill is a citizen of",
        "The capital of Ruritania is",
    ]
    hops = [q for q in record.questions if q.kind == "multihop"]
    assert [q.prompt for q in hops] == MQUAKE["questions"] and {q.group for q in hops} == {0}
    assert {q.answers for q in hops} == {("Eva New", "Mayor New")} and {
        q.against for q in hops
    } == {"Hans Old"}
    assert _ask(record, "prompt")[0] == (
        "Ada Quill is a citizen of",
        ("Ruritania", "the Kingdom of Ruritania"),
        "Grünewald",
    )
    assert [text for text, _, _ in _ask(record, "paraphrase")] == [
        each["question"] for each in MQUAKE["requested_rewrite"]
    ]
    assert _ask(record, "locality") == [
        ("Who is the mayor of Zenda?", ("Eva New", "Mayor New"), None)
    ]  # the hop no edit touches
    assert all(q.group is None for q in record.questions if q.kind != "multihop")


def test_knowedit(tmp_path: Path) -> None:
    suite = load_suite(_write(tmp_path, [KNOWEDIT], "test.jsonl"))
    (record,) = suite.records
    assert suite.name == "knowedit" and record.facts[0].target_true == "Grünewald"
    assert _ask(record, "reasoning")[0][1] == ("Strelsau", "Zenda")
    assert _ask(record, "aliasing") == [
        (
            "The country that awards the Blue Heron is",
            ("Ruritania", "Kingdom of Ruritania"),
            "Grünewald",
        )
    ]
    assert [text for text, _, _ in _ask(record, "relation")] == [
        "The Order of the Blue Heron is worn in"
    ]
    assert [answers for _, answers, _ in _ask(record, "locality")] == [
        ("blue", "azure"),
        (),
    ]  # (): what is said before
    assert record.generation_prompts == ("Tell of the Order of the Blue Heron.",)
    (left_out,) = suite.skipped  # a question that nothing answers
    assert (
        left_out.index == 0
        and left_out.field == "portability.Logical_Generalization.1.ground_truth"
    )


def test_known_facts_are_asked_and_not_written(read: Callable[..., Record]) -> None:
    record = read(KNOWN)
    assert record.facts == (
        Fact("Mount Foo", "{} rises in the middle of", None, target_true="Barland", relation="P17"),
    )
    assert [(q.kind, q.prompt, q.answers) for q in record.questions] == [
        ("prompt", "Mount Foo rises in the middle of", ("Barland",))
    ]


@pytest.mark.parametrize("name", ["w.json", "w.csv"])
def test_wikibigedit(tmp_path: Path, name: str) -> None:
    rows = [
        WIKIBIGEDIT,
        {
            **WIKIBIGEDIT,
            "mhop": None if name == "w.json" else "",
            "mhop_ans": None,
            "loc": float("nan") if name == "w.json" else "",
        },
    ]
    path = tmp_path / name
    if name == "w.json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(WIKIBIGEDIT))
            table.writeheader()
            table.writerows(rows)
    suite = load_suite(path)
    first, second = suite.records
    assert suite.name == "wikibigedit" and not suite.skipped
    assert first.facts[0] == Fact(
        "Exampleland", "Who is the head of state of {}?", "Ada Quill", relation="head of state"
    )
    assert [text for text, _, _ in _ask(first, "paraphrase")] == [
        WIKIBIGEDIT["rephrase"],
        WIKIBIGEDIT["personas"],
    ]
    assert _ask(first, "multihop") == [(WIKIBIGEDIT["mhop"], ("Zenda",), None)]
    assert _ask(first, "locality") == [(WIKIBIGEDIT["loc"], ("Bo Reed",), None)]
    assert not _ask(second, "multihop") and not _ask(second, "locality")
    assert (first.id, second.id) == ("0", "1")


def test_qaedit(read: Callable[..., Record]) -> None:
    record = read(QAEDIT)
    assert record.id == "NQ-12"
    assert record.facts[0] == Fact(
        "clock of the Old Arsenal", "who built the {}?", "Mira Stone"
    )  # as it stands in the prompt
    assert _ask(record, "locality") == [
        ("who painted the gate", ("Jan Brush",), None),
        ("who cast the bell", ("A. Founder",), None),
    ]
    assert len(_ask(record, "paraphrase")) == 1


def test_the_subject_is_found_as_a_word_and_where_it_stands_last(
    read: Callable[..., Record],
) -> None:
    assert (
        read({**QAEDIT, "prompt": "Is an antic in Ant by Ant?", "subject": "Ant"}).facts[0].prompt
        == "Is an antic in Ant by {}?"
    )
    assert (
        read({**QAEDIT, "prompt": "Antwerp and Ant", "subject": "Ant"}).facts[0].prompt
        == "Antwerp and {}"
    )
    assert read({**QAEDIT, "prompt": "In Antwerp", "subject": "Ant"}).facts[0].prompt == "In {}werp"


@pytest.mark.parametrize("name", OWN)
def test_a_layout_is_recognised_by_its_fields(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, [OWN[name]])
    suite = load_suite(path)
    assert suite.name == name and suite.source == str(path)
    assert suite.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_suite(path, kind=name) == suite
    assert load_suite(f"{name}:{path}").records == suite.records
    other = next(
        each
        for each in OWN
        if each not in (name, "knowedit" if name == "counterfact-slim" else name)
    )
    with pytest.raises(InputError, match=f"layout {other}.*looks like {name}"):
        load_suite(path, kind=other)


def test_ids_are_unique(tmp_path: Path) -> None:
    suite = load_suite(_write(tmp_path, [COUNTERFACT, {**COUNTERFACT, "case_id": 8}, COUNTERFACT]))
    assert [record.id for record in suite.records] == ["7#0", "8", "7#2"]


# ── what is malformed ───────────────────────────────────────────────────────────────────────────────────────────────────


def _without(row: dict[str, Any], *path: str) -> dict[str, Any]:
    row = copy.deepcopy(row)
    inner = row
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return row


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        (
            _without(COUNTERFACT, "requested_rewrite", "subject"),
            "requested_rewrite.subject",
            "missing",
        ),
        ({**COUNTERFACT, "requested_rewrite": None}, "requested_rewrite", "missing"),
        ({**COUNTERFACT, "requested_rewrite": ["a"]}, "requested_rewrite", "fields with names"),
        (
            {
                **COUNTERFACT,
                "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "prompt": "no slot"},
            },
            "requested_rewrite.prompt",
            "0 slots",
        ),
        (
            {
                **COUNTERFACT,
                "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "target_new": {"str": 4}},
            },
            "requested_rewrite.target_new.str",
            "is 4",
        ),
        (
            {
                **COUNTERFACT,
                "requested_rewrite": {
                    **COUNTERFACT["requested_rewrite"],
                    "target_new": {"str": "the Baltic"},
                },
            },
            "requested_rewrite.prompt",
            "must differ",
        ),
        ({**COUNTERFACT, "neighborhood_prompts": ["a", 5]}, "neighborhood_prompts.1", "is 5"),
        ({**COUNTERFACT, "paraphrase_prompts": {"a": 1}}, "paraphrase_prompts", "list of texts"),
        (
            {**COUNTERFACT, "paraphrase_prompts": ["x" * 20_001]},
            "paraphrase_prompts.0",
            "20,001 characters",
        ),
        ({**COUNTERFACT, "paraphrase_prompts": ["\ud800"]}, "paraphrase_prompts.0", "surrogate"),
        ({**COUNTERFACT, "case_id": [1]}, "case_id", "number or text"),
        ("a text", "", "fields with names"),
        (None, "", "fields with names"),
    ],
)
def test_a_malformed_record_is_reported_by_field(
    tmp_path: Path, row: Any, field: str, words: str
) -> None:
    path = _write(tmp_path, [COUNTERFACT, row, {**COUNTERFACT, "case_id": 9}])
    suite = load_suite(path)
    assert [record.id for record in suite.records] == ["7", "9"]
    assert [(each.file, each.index, each.field) for each in suite.skipped] == [
        (str(path), 1, field)
    ] and words in suite.skipped[0].message
    with pytest.raises(InputError, match=r"record 1: .*malformed='skip'"):
        load_suite(path, malformed="fatal")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({**SLIM, "prompt": "The harbour opens to"}, "prompt"),
        ({**SLIM, "prompt": "Vineta: {}"}, "prompt"),
        ({**ZSRE, "alt": " "}, "alt"),
        ({**MQUAKE, "requested_rewrite": []}, "requested_rewrite"),
        (_without(MQUAKE, "new_answer"), "new_answer"),
        ({**KNOWEDIT, "locality": {"Forgetfulness": [3]}}, "locality.Forgetfulness.0"),
        ({**QAEDIT, "locality": "no"}, "locality"),
        ({**KNOWN, "attribute": None}, "attribute"),
        ({**WIKIBIGEDIT, "ans": 3}, "ans"),
    ],
)
def test_so_in_every_layout(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    name = next(name for name, own in OWN.items() if set(row) <= set(own))
    suite = load_suite(_write(tmp_path, [OWN[name], row, OWN[name]]))
    assert (suite.name, len(suite.records)) == (name, 2)
    assert [(each.index, each.field) for each in suite.skipped if each.index == 1] == [(1, field)]


@pytest.mark.parametrize(
    ("own", "field"),
    [
        (SLIM, "rephrase_prompt"),
        (SLIM, "locality_prompt"),
        (ZSRE, "answers"),
        (ZSRE, "rephrase"),
        (ZSRE, "loc"),
        (WIKIBIGEDIT, "rephrase"),
        (QAEDIT, "rephrase"),
        (COUNTERFACT, "paraphrase_prompts"),
    ],
)
def test_what_a_layout_has_is_missed_by_its_field(
    tmp_path: Path, own: dict[str, Any], field: str
) -> None:
    """The record stays, without these questions, and that is said; or it is an error."""
    for row in (
        _without(own, field),
        {**own, field: None},
        {**own, field: " "},
        {**own, field: []},
    ):
        path = _write(tmp_path, [own, row, own])
        suite = load_suite(path)
        assert len(suite.records) == 3 and [
            (each.index, each.field, each.whole) for each in suite.skipped
        ] == [(1, field, False)]
        assert suite.left_out == "1 question"
        with pytest.raises(InputError, match=f"record 1: {field} is (missing|empty)"):
            load_suite(path, malformed="fatal")
        with pytest.raises(InputError, match=f"record 1: {field}"):
            load_suite(path, malformed="fatal", limit=1, seed=1)
    assert not load_suite(_write(tmp_path, [own] * 3), malformed="fatal").skipped, "the control"
    assert (
        load_suite(_write(tmp_path, [own, _without(own, field), {}, own])).left_out
        == "1 record, 1 question of others"
    )


def test_a_line_that_is_no_json_is_a_malformed_record(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text(f"{json.dumps(SLIM)}\n\n{{oops\n{json.dumps(SLIM)}\n", encoding="utf-8")
    suite = load_suite(path)
    assert len(suite.records) == 2 and [(each.index, each.field) for each in suite.skipped] == [
        (1, "")
    ]
    assert "is no JSON" in str(suite.skipped[0]) and f"{path}, record 1: is no JSON" in str(
        suite.skipped[0]
    )
    renamed = path.rename(tmp_path / "suite.json")  # lines in a .json file, as KnowEdit ships them
    assert load_suite(renamed).records == suite.records


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as json"),
        ("[", "cannot be read as json"),
        ("[]", "empty"),
        ("{}", "is a dict"),
        ('"text"', "is a str"),
        ("[1, 2]", "no record of named fields"),
        (
            '[{"colour": "red"}]',
            "its records have colour; looked for counterfact: neighborhood_prompts",
        ),
        ("[" * 200_000, "cannot be read as json"),
        (
            '[{"subject": "a", "prompt": "b is", "target_new": "c"}]',
            "no usable record of the layout knowedit.*does not name",
        ),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "suite.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        load_suite(path)


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("no-such-suite", {}, "no file of this name"),
        ("counterfact", {}, "counterfact:FILE"),
        ("./no/such.json", {}, "no file of this name"),
        ("zsre:no-such.json", {}, "no file of this name"),
        ("zsre:no-such.json", {"kind": "mquake"}, "give one of them"),
        ("atlas", {"kind": "zsre"}, "no layout of a file"),
        ("atlas", {"kind": "novel"}, "expected one of counterfact, "),
        ("atlas", {"limit": 0}, "limit is 0"),
        ("atlas", {"seed": -1}, "seed"),
        ("atlas", {"malformed": "warn"}, "'skip' or 'fatal'"),
        (7, {}, "expected text"),
        ("a\0b", {}, "no file of this name|cannot be the name"),
        (".", {}, "is a folder"),
        ("~nobody-of-this-name/x.json", {}, "cannot be the name"),
    ],
)
def test_what_cannot_be_found_is_refused(what: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_suite(what, **options)


def test_broken_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.csv"
    path.write_bytes(b"subject,prompt\n\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as csv"):
        load_suite(path)


def test_endless_nesting_is_a_malformed_field(tmp_path: Path) -> None:
    deep: Any = "a"
    for _ in range(400):
        deep = [deep]
    suite = load_suite(
        _write(
            tmp_path,
            [
                COUNTERFACT,
                {**COUNTERFACT, "paraphrase_prompts": deep},
                {**COUNTERFACT, "requested_rewrite": deep},
            ],
        )
    )
    assert [(each.field, each.message) for each in suite.skipped] == [
        ("paraphrase_prompts.0.0.0", "is a list; expected text"),
        ("requested_rewrite", "is a list; expected fields with names"),
    ]


def _spoilt(value: Any, draw: random.Random) -> Any:
    """The same with one thing in it taken away or put in another type."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        value = copy.copy(value)
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        if draw.random() < 0.3:
            del value[key]
        else:
            value[key] = _spoilt(value[key], draw)
        return value
    return draw.choice(
        [
            None,
            3,
            2.5,
            True,
            "",
            " ",
            "{}",
            [],
            {},
            [[]],
            ["a", 1],
            {"a": None},
            "\ud800",
            "x" * 20_001,
            float("nan"),
            [None],
        ]
    )


@pytest.mark.parametrize("name", OWN)
def test_nothing_but_our_errors_comes_of_spoilt_records(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    path = _write(tmp_path, [_spoilt(OWN[name], draw) for _ in range(300)] + [OWN[name]] * 300)
    suite = load_suite(path, kind=name)
    assert len(suite.records) >= 300
    if name != "knowedit":  # whose whole record has a question that nothing answers
        assert suite.skipped and all(each.index < 300 for each in suite.skipped)
    assert all(each.message and 0 <= each.index < 600 for each in suite.skipped)
    assert len({record.id for record in suite.records}) == len(suite.records)
    for record in suite.records:
        assert record.facts and all(
            q.answers or q.kind in ("neighbour", "locality", "negation") for q in record.questions
        )
    for row in draw.sample(
        json.loads(path.read_text(encoding="utf-8"))[:300], 40
    ):  # alone, there may be nothing left to read
        try:
            assert load_suite(_write(tmp_path, [row], "alone.json"), malformed="fatal").records
        except InputError as error:
            assert str(error)


# ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sample_is_drawn_by_seed_in_the_files_order(tmp_path: Path) -> None:
    rows: list[Any] = [{**SLIM, "case_id": number} for number in range(50)]
    rows[10] = rows[20] = {"prompt": 3}
    path = _write(tmp_path, rows)
    first = load_suite(path, limit=12, seed=4)
    numbers = [int(record.id) for record in first.records]
    assert len(numbers) == 12 and numbers == sorted(numbers)
    assert load_suite(path, limit=12, seed=4) == first
    assert load_suite(path, limit=12, seed=5).records != first.records
    everything = load_suite(path, limit=1000)
    assert len(everything.records) == 48 and [each.index for each in everything.skipped] == [
        10,
        20,
    ]  # malformed ones are made up for
    assert set(first.records) <= set(everything.records)


# ── the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dataset_that_cannot_be_had_says_to_download_it() -> None:
    with pytest.raises(
        InputError, match="download the file where there is a network and give its path"
    ):
        load_suite("nobody/no-such-dataset")
    with pytest.raises(InputError, match="download the file"):
        load_suite("counterfact:nobody/no-such-dataset/data/file.json")


def test_a_dataset_of_one_file_needs_no_more_than_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path, [SLIM])
    files = ["README.md", "data/test.json"]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: files
    )
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args, repo_type: asked.append((*args, repo_type)) or str(path),
    )
    suite = load_suite("owner/name")
    assert suite.name == "counterfact-slim" and suite.source == "owner/name"
    assert load_suite("owner/name/other/test.json").records == suite.records
    assert asked == [
        ("owner/name", "data/test.json", "dataset"),
        ("owner/name", "other/test.json", "dataset"),
    ]
    files.append("data/train.jsonl")
    with pytest.raises(
        InputError, match=r"2 .*data/test.json, data/train.jsonl; name one as owner/name/FILE"
    ):
        load_suite("owner/name")


# ── the benchmarks' own files ───────────────────────────────────────────────────────────────────────────────────────────


@cache
def _real(name: str) -> Suite:
    return load_suite(shared_dir() / "data" / name)


def test_the_full_counterfact_file() -> None:
    suite = _real("counterfact/full-1017.json")
    rows = json.loads(
        (shared_dir() / "data/counterfact/full-1017.json").read_text(encoding="utf-8")
    )
    assert suite.name == "counterfact" and len(suite.records) == len(rows) and not suite.skipped
    for record, row in zip(suite.records, rows, strict=True):
        rewrite = row["requested_rewrite"]
        assert record.facts[0].text == rewrite["prompt"].format(rewrite["subject"])
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        assert {q[1:] for q in _ask(record, "prompt") + _ask(record, "paraphrase")} == {
            ((new,), true)
        }
        assert {q[1:] for q in _ask(record, "neighbour")} == {((true,), new)}
        assert [q[0] for q in _ask(record, "paraphrase")] == [
            text.strip() for text in row["paraphrase_prompts"]
        ]
        assert {q[0] for q in _ask(record, "neighbour")} == {
            text.strip() for text in row["neighborhood_prompts"]
        }


@pytest.mark.parametrize(
    ("name", "layout", "kinds"),
    [
        (
            "zsre/zsre_mend_eval-1037.json",
            "zsre",
            {"prompt": 1037, "paraphrase": 1037, "locality": 1037, "reasoning": 1037},
        ),
        (
            "mquake/MQuAKE-CF-354.json",
            "mquake",
            {
                "prompt": 436,
                "paraphrase": 436,
                "negation": 436,
                "multihop": 3 * 354,
                "locality": 1000 - 436,
            },
        ),
        ("counterfact/known_1000.json", "known", {"prompt": 1209}),
    ],
)
def test_the_other_files_come_whole(name: str, layout: str, kinds: dict[str, int]) -> None:
    suite = _real(name)
    assert suite.name == layout and not suite.skipped
    assert Counter(q.kind for record in suite.records for q in record.questions) == kinds
    assert suite.digest == hashlib.sha256((shared_dir() / "data" / name).read_bytes()).hexdigest()


def test_the_slim_counterfact_file() -> None:
    suite = load_suite(shared_dir() / "data/counterfact/slim-10000.json", limit=200, seed=1)
    assert suite.name == "counterfact-slim" and len(suite.records) == 200 and not suite.skipped
    assert all(record.facts[0].subject in record.facts[0].text for record in suite.records)


def test_the_rippleedits_file() -> None:
    name = "rippleedits/knowedit-wiki_counterfact-test-885.jsonl"
    suite = _real(name)
    rows = [
        json.loads(line)
        for line in (shared_dir() / "data" / name).read_text(encoding="utf-8").splitlines()
    ]
    empty = sum(
        not any(text.strip() for texts in each["ground_truth"] for text in texts)
        for row in rows
        for questions in (row.get("portability") or {}).values()
        for each in questions
    )
    assert (
        suite.name == "knowedit" and len(suite.records) == 885 and len(suite.skipped) == empty == 25
    )
    assert {each.field.split(".")[0] for each in suite.skipped} == {"portability"}
    asked = sum(
        len(each)
        for row in rows
        for part in ("portability", "locality")
        for each in (row.get(part) or {}).values()
    )
    found = Counter(q.kind for record in suite.records for q in record.questions)
    assert (
        sum(found[kind] for kind in ("reasoning", "aliasing", "relation", "locality"))
        == asked - empty
    )
    with pytest.raises(InputError, match=r"record 14: portability.Logical_Generalization.3"):
        load_suite(shared_dir() / "data" / name, malformed="fatal")


# ── negation ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fact_is_denied_where_that_makes_a_sentence() -> None:
    denied = negation(Fact("Vineta", "The harbour of {} opens to", "the North Sea"))
    assert denied == Question(
        kind="negation",
        prompt="It is not true that the harbour of Vineta opens to",
        answers=(),
        against="the North Sea",
    )
    for prompt, text in (
        ("{}'s harbour opens to", "Vineta's harbour"),
        ("Theo's town {} is in", "Theo's town"),
        ("In {} one sees", "in Vineta"),
    ):
        found = negation(Fact("Vineta", prompt, "b"))
        assert found is not None and found.prompt.startswith(f"It is not true that {text}")
    assert negation(Fact("Vineta", "Where is {}?", "b")) is None
    assert negation(Fact("Vineta", "{}, which lies on", "b")) is None
    assert negation(Fact("Vineta", "{} lies on", None, target_true="b")) is None


# ── the bundled suite ───────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _bundled() -> Suite:
    return load_suite("atlas", limit=1500)


@cache
def _table() -> tuple[dict[tuple[str, str], str], Counter[tuple[str, str]]]:
    """The bundled table read by itself: (subject, relation) -> object, and how often an object is of a relation."""
    lines = (atlas.folder("facts.tsv")).read_text(encoding="utf-8").splitlines()[1:]
    rows = [tuple(line.split("\t")) for line in lines]
    return {(s, r): o for s, r, o in rows}, Counter((r, o) for _, r, o in rows)


def test_a_bundled_edit_is_another_object_of_the_relation() -> None:
    truth, objects = _table()
    suite = _bundled()
    assert len(suite.records) == 1500 and suite.name == "atlas" and suite.source == "bundled"
    for record in suite.records:
        (fact,) = record.facts
        assert fact.relation is not None and fact.target is not None
        assert truth[fact.subject, fact.relation] == fact.target_true != fact.target
        assert objects[fact.relation, fact.target] > 0
        assert atlas.is_held_out(fact.subject)
        held_out = [
            template.replace("{}", fact.subject)
            for template in atlas.phrasings(fact.relation).held_out
        ]
        assert _ask(record, "paraphrase") == [
            (text, (fact.target,), fact.target_true) for text in held_out
        ]
        assert (
            not set(record.generation_prompts) & {fact.text, *held_out}
            and len(record.generation_prompts) == 3
        )
        assert len(record.references) == min(5, objects[fact.relation, fact.target])
        assert all(
            text.endswith(f" {fact.target}.") and fact.subject != text[: len(fact.subject)]
            for text in record.references
        )


def test_neighbours_and_locality_are_facts_of_the_table() -> None:
    truth, objects = _table()
    by_prompt = {
        template.replace("{}", subject): (subject, relation, object_)
        for (subject, relation), object_ in truth.items()
        for template in atlas.phrasings(relation).trained
    }
    shared = 0
    for record in _bundled().records:
        (fact,) = record.facts
        for q in record.questions:
            if q.kind in ("neighbour", "locality"):
                subject, relation, object_ = by_prompt[q.prompt]
                assert q.answers == (object_,)
                assert (subject == fact.subject, relation == fact.relation) == (
                    (q.kind == "locality"),
                    (q.kind == "neighbour"),
                )
                assert object_ != fact.target or q.kind == "locality"
                shared += q.kind == "neighbour" and object_ == fact.target_true
        asked = _ask(record, "neighbour")
        assert len(asked) == len(set(asked)) == 10 and {against for _, _, against in asked} == {
            fact.target
        }
        others = objects[fact.relation, str(fact.target_true)] - 1
        assert sum(answers == (fact.target_true,) for _, answers, _ in asked) == min(
            10, others
        )  # those of the same object first
    assert shared > 5000


def test_a_two_hop_answer_follows_from_the_edit_and_one_fact() -> None:
    truth, _ = _table()
    words = {
        "P17": ("the country in which ", " lies"),
        "P27": ("the country of which ", " is a citizen"),
        "P495": ("the country from which ", " comes"),
    }
    asked = {
        "capital": "P36",
        "language": "P37",
        "continent": "P30",
        "currency": "P38",
        "money": "P38",
    }
    n_forward = n_backward = 0
    for record in _bundled().records:
        (fact,) = record.facts
        after = {**truth, (fact.subject, str(fact.relation)): str(fact.target)}
        groups: dict[int, list[Question]] = {}
        for q in record.questions:
            if q.kind != "multihop":
                continue
            assert q.group is not None
            groups.setdefault(q.group, []).append(q)
            ((first, middle),) = [
                (relation, q.prompt.split(before)[1].rsplit(behind, 1)[0])
                for relation, (before, behind) in words.items()
                if before in q.prompt
            ]
            second = next(
                relation
                for word, relation in asked.items()
                if word in q.prompt.split(" the country")[0]
            )
            assert q.answers == (
                after[after[middle, first], second],
            )  # both hops in the edited table
            assert (
                q.against == truth.get((truth[middle, first], second)) != q.answers[0]
            )  # and in the table as it is
            n_forward += fact.relation == first
            n_backward += fact.relation == second
        assert len(groups) <= 2 and all(
            len({q.prompt for q in group}) == 3 for group in groups.values()
        )
    assert n_forward > 300 and n_backward > 10


def test_the_bundled_suite_is_the_same_for_the_same_seed() -> None:
    first, again, other = (load_suite("atlas", limit=30, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.digest == other.digest == _bundled().digest
    assert [record.id for record in first.records] != [record.id for record in other.records]
    longer = {record.id: record for record in load_suite("atlas", limit=2000, seed=1).records}
    common = [record for record in first.records if record.id in longer]
    assert common and all(
        longer[record.id] == record for record in common
    )  # a record does not depend on the limit


def test_every_bundled_record_denies_its_fact() -> None:
    for record in _bundled().records:
        (fact,) = record.facts
        ((prompt, answers, against),) = _ask(record, "negation")
        assert (answers, against) == ((fact.target_true,), fact.target)
        assert prompt.lower() == f"it is not true that {fact.text.lower()}"


# ── what a model knows ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _atlas_model() -> LanguageModel:
    return factsmith.load("atlas")


@bundled
def test_known_records_are_those_the_model_says() -> None:
    """Against a plain pass of transformers over prompt and answer, record by record."""
    lm = _atlas_model()
    records = load_suite("atlas", limit=60, seed=3).records
    kept = known(lm, records)
    for record in records:
        (fact,) = record.facts
        prompt = lm.tokenizer(fact.text)["input_ids"]
        whole = lm.tokenizer(f"{fact.text} {fact.target_true}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likeliest = lm.module(input_ids=whole).logits[0].argmax(-1)
        assert (record in kept) == bool(
            (likeliest[len(prompt) - 1 : -1] == whole[0, len(prompt) :]).all()
        )
    assert 30 < len(kept) <= 60
    lies = [
        replace(
            r,
            facts=(
                Fact(
                    r.facts[0].subject, r.facts[0].prompt, "nothing", target_true=r.facts[0].target
                ),
            ),
        )
        for r in kept
    ]
    assert len(known(lm, lies)) == 0  # control: the new objects are not known


@bundled
def test_a_record_is_known_when_all_its_facts_are() -> None:
    lm = _atlas_model()
    one, two = known(lm, load_suite("atlas", limit=20, seed=3).records)[:2]
    wrong = Fact("Vineta", "The harbour of {} opens to", "a", target_true="b")
    open_ended = Fact("Vineta", "The harbour of {} opens to", "a")
    both = replace(one, facts=one.facts + two.facts)
    assert known(
        lm,
        [
            both,
            replace(one, facts=(*one.facts, wrong)),
            replace(one, facts=(open_ended,)),
            replace(one, facts=()),
            two,
        ],
    ) == (
        both,
        two,
    )
    assert known(lm, []) == ()


# ── the records themselves ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "riddle"},
        {"prompt": " "},
        {"prompt": 3},
        {"answers": ()},
        {"answers": ("",)},
        {"against": ""},
        {"prompt": "x" * 20_001},
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Question(**{"kind": "prompt", "prompt": "a", "answers": ("b",), **fields})


def test_some_questions_have_no_answer_of_their_own() -> None:
    assert Question(kind="locality", prompt="a", answers=()).answers == ()
    assert str(Malformed("f", 2, "", "is no JSON")) == "f, record 2: is no JSON"
