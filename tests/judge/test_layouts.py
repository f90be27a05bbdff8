"""Every layout, read from one record and from the benchmarks' files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conftest import shared_dir
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.judge.records import Record, Suite
from factsmith.judge.suites import load_suite
from suite_files import (
    COUNTERFACT,
    KNOWEDIT,
    KNOWN,
    MQUAKE,
    QAEDIT,
    SLIM,
    WIKIBIGEDIT,
    ZSRE,
    asked,
    write_suite,
)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Record]:
    """A record as the only one of a file."""

    def read(row: dict[str, Any], **options: Any) -> Record:
        return load_suite(write_suite(tmp_path, [row]), **options).records[0]

    return read


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
    assert asked(record, "prompt") == [("The harbour of Vineta opens to", new, true)]
    assert asked(record, "paraphrase") == [
        (text, new, true) for text in COUNTERFACT["paraphrase_prompts"]
    ]
    assert [(a, b) for _, a, b in asked(record, "neighbour")] == [
        ((true,), new[0])
    ] * 3  # the sides change places
    assert asked(record, "aliasing") == [("The harbour of Jumne opens to", new, true)]
    assert asked(record, "reasoning") == [
        ("Which isles does one pass behind Vineta's harbour?", ("the Halligen",), None)
    ]
    assert asked(record, "negation") == [
        ("It is not true that the harbour of Vineta opens to", (true,), new[0])
    ]
    assert record.generation_prompts == tuple(COUNTERFACT["generation_prompts"])
    assert not any("Rungholt" in q.prompt for q in record.questions)


def test_counterfact_slim(read: Callable[..., Record]) -> None:
    record = read(SLIM)
    assert record.facts[0] == Fact(
        "Vineta", "The harbour of {} opens to", "the North Sea", target_true="the Baltic"
    )
    assert asked(record, "paraphrase") == [("Vineta lies on", ("the North Sea",), "the Baltic")]
    assert asked(record, "neighbour") == [("Wolin lies on", ("the Baltic",), "the North Sea")]


def test_zsre_writes_the_counterfactual_and_zsre_rome_the_truth(
    read: Callable[..., Record],
) -> None:
    record, rome = read(ZSRE), read(ZSRE, kind="zsre-rome")
    assert record.facts[0] == Fact(
        "The Glass Orchard", "In which year was {} printed?", "1902", target_true="1889"
    )
    assert asked(record, "prompt") == [
        ("In which year was The Glass Orchard printed?", ("1902",), None)
    ]
    assert asked(record, "locality") == [
        ("nq question: who keeps the lighthouse of the story?", ("Old Mareike",), None)
    ]
    assert len(asked(record, "reasoning")) == 1 and not asked(
        record, "negation"
    )  # a question denies nothing
    assert rome.facts[0].target == "1889" and not asked(
        rome, "reasoning"
    )  # it follows from the counterfactual
    assert asked(rome, "paraphrase") == [
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
    assert asked(record, "prompt")[0] == (
        "Ada Quill is a citizen of",
        ("Ruritania", "the Kingdom of Ruritania"),
        "Grünewald",
    )
    assert [text for text, _, _ in asked(record, "paraphrase")] == [
        each["question"] for each in MQUAKE["requested_rewrite"]
    ]
    assert asked(record, "locality") == [
        ("Who is the mayor of Zenda?", ("Eva New", "Mayor New"), None)
    ]  # the hop no edit touches
    assert all(q.group is None for q in record.questions if q.kind != "multihop")


def test_knowedit(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, [KNOWEDIT], "test.jsonl"))
    (record,) = suite.records
    assert suite.name == "knowedit" and record.facts[0].target_true == "Grünewald"
    assert asked(record, "reasoning")[0][1] == ("Strelsau", "Zenda")
    assert asked(record, "aliasing") == [
        (
            "The country that awards the Blue Heron is",
            ("Ruritania", "Kingdom of Ruritania"),
            "Grünewald",
        )
    ]
    assert [text for text, _, _ in asked(record, "relation")] == [
        "The Order of the Blue Heron is worn in"
    ]
    assert [answers for _, answers, _ in asked(record, "locality")] == [
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
    assert [text for text, _, _ in asked(first, "paraphrase")] == [
        WIKIBIGEDIT["rephrase"],
        WIKIBIGEDIT["personas"],
    ]
    assert asked(first, "multihop") == [(WIKIBIGEDIT["mhop"], ("Zenda",), None)]
    assert asked(first, "locality") == [(WIKIBIGEDIT["loc"], ("Bo Reed",), None)]
    assert not asked(second, "multihop") and not asked(second, "locality")
    assert (first.id, second.id) == ("0", "1")


def test_qaedit(read: Callable[..., Record]) -> None:
    record = read(QAEDIT)
    assert record.id == "NQ-12"
    assert record.facts[0] == Fact(
        "clock of the Old Arsenal", "who built the {}?", "Mira Stone"
    )  # as it stands in the prompt
    assert asked(record, "locality") == [
        ("who painted the gate", ("Jan Brush",), None),
        ("who cast the bell", ("A. Founder",), None),
    ]
    assert len(asked(record, "paraphrase")) == 1


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


# ── the benchmarks' own files ─────────────────────────────────────────────────────────────────────


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
        assert {q[1:] for q in asked(record, "prompt") + asked(record, "paraphrase")} == {
            ((new,), true)
        }
        assert {q[1:] for q in asked(record, "neighbour")} == {((true,), new)}
        assert [q[0] for q in asked(record, "paraphrase")] == [
            text.strip() for text in row["paraphrase_prompts"]
        ]
        assert {q[0] for q in asked(record, "neighbour")} == {
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
    kinds_asked = Counter(q.kind for record in suite.records for q in record.questions)
    assert (
        sum(kinds_asked[kind] for kind in ("reasoning", "aliasing", "relation", "locality"))
        == asked - empty
    )
    with pytest.raises(InputError, match=r"record 14: portability.Logical_Generalization.3"):
        load_suite(shared_dir() / "data" / name, malformed="fatal")
