"""Suite files: layouts that are recognised, malformed records, samples, and the hub."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from factsmith.core.errors import InputError
from factsmith.judge.suites import load_suite
from suite_files import (
    COUNTERFACT,
    KNOWEDIT,
    KNOWN,
    MQUAKE,
    OWN,
    QAEDIT,
    SLIM,
    WIKIBIGEDIT,
    ZSRE,
    write_suite,
)


@pytest.mark.parametrize("name", OWN)
def test_a_layout_is_recognised_by_its_fields(tmp_path: Path, name: str) -> None:
    path = write_suite(tmp_path, [OWN[name]])
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
    suite = load_suite(
        write_suite(tmp_path, [COUNTERFACT, {**COUNTERFACT, "case_id": 8}, COUNTERFACT])
    )
    assert [record.id for record in suite.records] == ["7#0", "8", "7#2"]


# ── what is malformed ─────────────────────────────────────────────────────────────────────────────


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
    path = write_suite(tmp_path, [COUNTERFACT, row, {**COUNTERFACT, "case_id": 9}])
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
    name = next(name for name, fields in OWN.items() if set(row) <= set(fields))
    suite = load_suite(write_suite(tmp_path, [OWN[name], row, OWN[name]]))
    assert (suite.name, len(suite.records)) == (name, 2)
    assert [(each.index, each.field) for each in suite.skipped if each.index == 1] == [(1, field)]


@pytest.mark.parametrize(
    ("row_of_layout", "field"),
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
    tmp_path: Path, row_of_layout: dict[str, Any], field: str
) -> None:
    """The record stays, without these questions, and that is said; or it is an error."""
    for row in (
        _without(row_of_layout, field),
        {**row_of_layout, field: None},
        {**row_of_layout, field: " "},
        {**row_of_layout, field: []},
    ):
        path = write_suite(tmp_path, [row_of_layout, row, row_of_layout])
        suite = load_suite(path)
        assert len(suite.records) == 3 and [
            (each.index, each.field, each.whole) for each in suite.skipped
        ] == [(1, field, False)]
        assert suite.left_out == "1 question"
        with pytest.raises(InputError, match=f"record 1: {field} is (missing|empty)"):
            load_suite(path, malformed="fatal")
        with pytest.raises(InputError, match=f"record 1: {field}"):
            load_suite(path, malformed="fatal", limit=1, seed=1)
    assert not load_suite(write_suite(tmp_path, [row_of_layout] * 3), malformed="fatal").skipped, (
        "the control"
    )
    assert (
        load_suite(
            write_suite(
                tmp_path, [row_of_layout, _without(row_of_layout, field), {}, row_of_layout]
            )
        ).left_out
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
            "its records have colour; give records .* counterfact: neighborhood_prompts",
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
        ("atlas", {"kind": "zsre"}, "it has no layout"),
        ("atlas", {"kind": "novel"}, "must be one of counterfact, "),
        ("atlas", {"limit": 0}, "limit is 0"),
        ("atlas", {"seed": -1}, "seed"),
        ("atlas", {"malformed": "warn"}, "'skip' or 'fatal'"),
        (7, {}, "it must be text"),
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
        write_suite(
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
    path = write_suite(tmp_path, [_spoilt(OWN[name], draw) for _ in range(300)] + [OWN[name]] * 300)
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
            assert load_suite(write_suite(tmp_path, [row], "alone.json"), malformed="fatal").records
        except InputError as error:
            assert str(error)


# ── samples ───────────────────────────────────────────────────────────────────────────────────────


def test_a_sample_is_drawn_by_seed_in_the_files_order(tmp_path: Path) -> None:
    rows: list[Any] = [{**SLIM, "case_id": number} for number in range(50)]
    rows[10] = rows[20] = {"prompt": 3}
    path = write_suite(tmp_path, rows)
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


# ── the hub ───────────────────────────────────────────────────────────────────────────────────────


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
    path = write_suite(tmp_path, [SLIM])
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_other_programs_are_read(tmp_path: Path, encoding: str) -> None:
    """A byte order mark, UTF-16, and a table with semicolons."""
    path = tmp_path / "suite.json"
    path.write_bytes(json.dumps([ZSRE], ensure_ascii=False).encode(encoding))
    assert len(load_suite(path).records) == 1
    lines = tmp_path / "suite.jsonl"
    lines.write_bytes(f"{json.dumps(ZSRE)}\r\n{json.dumps(ZSRE)}\r\n".encode(encoding))
    assert len(load_suite(lines).records) == 2
    for delimiter in ",;\t":
        rows = [
            delimiter.join(texts)
            for texts in (("subject", "update", "ans"), ("Ada", "Ada lives in", "Oslo"))
        ]
        table = tmp_path / "suite.csv"
        table.write_bytes("\r\n".join(rows).encode(encoding))
        (record,) = load_suite(table).records
        assert record.facts[0].text == "Ada lives in"


def test_a_prompt_and_a_subject_may_differ_in_their_unicode_form(tmp_path: Path) -> None:
    row = {
        **ZSRE,
        "subject": "Andre\u0301 Malraux",
        "src": "What does André\u00a0Malraux speak?",
    }
    (record,) = load_suite(write_suite(tmp_path, [row])).records
    assert record.facts[0].subject == "André\u00a0Malraux"
    assert record.facts[0].prompt == "What does {} speak?"
