"""Fact files: what is read, what is refused, and that nothing is lost on the way to disk."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import jsonschema
import pytest

from factsmith.core.errors import FactError, WorkspaceError
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactFile, FactSheet
from factsmith.core.gates import Gates
from full_fact import FULL

FACT = {"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}


@pytest.mark.parametrize("name", ["facts.yaml", "facts.json"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, name: str) -> None:
    facts = [FULL, Fact("b", "{}", "yes")]
    FactFile.write(tmp_path / name, facts)
    assert FactFile.read(tmp_path / name) == facts
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no temporary file stays


def test_a_sheet_as_text_is_read_back_as_the_same(tmp_path: Path) -> None:
    file = tmp_path / "facts.yaml"
    facts = (FULL, Fact("b", "{}", None))
    whole = FactSheet(
        facts=facts,
        gates=Gates(neighbours=None, kl_text=0.5),
        method="memit",
        settings={"steps": 4, "layers": (0, 1)},
        names_gates=True,
    )
    for sheet in (whole, FactSheet(facts=facts)):
        file.write_text(FactFile.text(sheet), encoding="utf-8")
        again = FactFile.sheet(file)
        assert again.facts == sheet.facts and again.named_gates == sheet.named_gates
        assert again.method == sheet.method and set(again.settings) == set(sheet.settings)
    assert "forget: true" in file.read_text(encoding="utf-8")


def test_a_bare_list_is_a_fact_file_too(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([FULL.to_dict()]), encoding="utf-8")
    assert FactFile.read(path) == [FULL]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("facts: [", "not valid YAML"),
        ("- subject: A\n  - x", "not valid YAML: line 2, column 3: expected <block end>"),
        ("", "holds no facts"),
        ("facts: []", "holds no facts"),
        ("just text", "holds no facts"),
        ("facts:\n- subject: a\n  prompt: '{} is'\n  target: b\n- subject: c\n", "entry 2"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("- {[subject]: A, prompt: '{} is', target: x}", "not valid YAML"),
        ("- {subject: A, prompt: '{} is', target: x, target: y}", "'target' is given twice"),
        (
            "- {subject: A, prompt: '{} is', target: yes}",
            "target is True; expected text .in quotes",
        ),
        (
            "- {subject: A, prompt: '{} is', neighbors: [x]}",
            "unknown 'neighbors', no target; expected",
        ),
        (
            "- {subject: A, prompt: '{} is', target: x, paraphrases: abc}",
            "paraphrases is 'abc'; expected a list",
        ),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FactError, match=words) as error:
        FactFile.read(path)
    assert "facts.yaml" in str(error.value)


def test_forgetting_is_a_word_and_not_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    forgotten = Fact("Ann", "{} lives in", forget=True, target_true="Oslo")
    FactFile.write(path, [forgotten, FULL])
    text = path.read_text()
    assert "forget: true" in text and "target: null" not in text
    assert FactFile.read(path) == [forgotten, FULL] and forgotten.forget and not FULL.forget
    for line in ("target:", "target: null", "target: ''", "target: ~\n  forget: false"):
        path.write_text(f"- subject: Ann\n  prompt: '{{}} lives in'\n  {line}\n")
        with pytest.raises(FactError, match="forget: true"):
            FactFile.read(path)


FILES = {
    "facts.json": '{"facts": [%s, %s]}',
    "lines.json": "%s\n%s\n",
    "facts.jsonl": "%s\n\n%s",
    "facts.ndjson": "%s\r\n%s\r\n",
    "facts.yaml": "facts:\r\n- %s\r\n- %s\r\n",
    "lines.yaml": "%s\n%s\n",
}
CELLS = [
    ["Fiat 127", "The maker of {} is", "Toyota", "Fiat", "{} comes from|Who made {}?", "", ""],
    ["Zoé, the", 'The "home" of {} is', "", "", '["a | b {}"]', "x is", "true"],
]
TWO = [
    Fact(
        "Fiat 127",
        "The maker of {} is",
        "Toyota",
        target_true="Fiat",
        paraphrases=["{} comes from", "Who made {}?"],
    ),
    Fact("Zoé, the", 'The "home" of {} is', None, paraphrases=["a | b {}"], neighbours=["x is"]),
]
COLUMNS = ["subject", "prompt", "target", "target_true", "paraphrases", "neighbours", "forget"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_other_programs_are_read(tmp_path: Path, name: str, encoding: str) -> None:
    entries = [{"subject": s, "prompt": "{} is", "target": "é"} for s in ("Zoé", "Bo")]
    text = FILES[name] % tuple(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert FactFile.read(tmp_path / name) == [Fact(**entry) for entry in entries]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read(tmp_path: Path, encoding: str, delimiter: str, end: str) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end)
    writer.writerows([COLUMNS, CELLS[0], [], CELLS[1], [""] * 7])
    for name, start in (("facts.csv", ""), ("facts.tsv", ""), ("sep.csv", f"sep={delimiter}{end}")):
        path = tmp_path / name
        path.write_bytes(f"{start}{stream.getvalue()}".encode(encoding))
        assert FactFile.read(path) == TWO


def test_lists_of_a_table_may_have_a_column_each(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "Subject,Prompt,Target,Paraphrase 1,paraphrase_2,neighbour\na,{} is,b,{} x,,n\n"
    )
    (fact,) = FactFile.read(path)
    assert fact.paraphrases == ("{} x",) and [p.prompt for p in fact.neighbours] == ["n"]


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.yaml", "facts: [é]".encode("latin-1"), "save the file as UTF-8"),
        ("a.yaml", "facts: []".encode("utf-16-le"), "save the file as UTF-8"),
        ("a.csv", b"name,prompt,target\na,{} is,b\n", "unknown column 'name', no column subject"),
        ("a.csv", b"subject,Subject,prompt,target\na,b,{} is,c\n", "'subject' is there twice"),
        ("a.csv", b"subject,prompt\na,{} is\n", "no column target"),
        ("a.csv", b"subject,prompt,target\na,{} is,\n", "line 2: .*forget: true"),
        ("a.csv", b"subject,prompt,target\na,{} is,b,c\n", "line 2: it has 4 cells and 3 col"),
        ("a.csv", b"subject,prompt,target,forget\na,{} is,,maybe\n", "forget is 'maybe'"),
        ("a.csv", b"subject,prompt,target\n", "holds no facts"),
        ("a.csv", b"", "no column subject"),
        ("a.csv", b'subject,prompt,target\n"a', "line 2"),
        (
            "a.jsonl",
            b'{"subject": "a", "prompt": "{} is", "target": "b"}\n{"x',
            "line 2: no JSON: Unterminated string starting at column 2",
        ),
        ("a.json", b'{"facts": [}', "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(
    tmp_path: Path, name: str, raw: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FactError, match=words):
        FactFile.read(tmp_path / name)


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl", "facts.csv"])
def test_all_wrong_entries_are_named(tmp_path: Path, name: str) -> None:
    entries = [{"subject": f"s{i}", "prompt": "no slot", "target": "x"} for i in range(8)]
    entries.insert(1, {"subject": "good", "prompt": "{} is", "target": "x"})
    texts = [json.dumps(entry) for entry in entries]
    rows = ["subject,prompt,target", *(",".join(entry.values()) for entry in entries)]
    text = {"facts.json": f"[{','.join(texts)}]", "facts.jsonl": "\n".join(texts)}
    (tmp_path / name).write_text(text.get(name, "\n".join(rows)))
    with pytest.raises(FactError, match="8 of 9 facts cannot be used") as error:
        FactFile.read(tmp_path / name)
    first = {"facts.json": "entry 1", "facts.jsonl": "line 1", "facts.csv": "line 2"}[name]
    message = str(error.value)
    assert f"{name}, {first}: fact: prompt has 0 slots" in message
    assert message.count("has 0 slots") == 5 and ", and 3 more." in message


def test_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="cannot read"):
        FactFile.read(tmp_path / "none.yaml")
    with pytest.raises(WorkspaceError, match="cannot write"):
        FactFile.write(tmp_path / "none" / "facts.yaml", [FULL])


def test_a_file_names_gates_method_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "facts.yaml"
    fact = "facts:\n- {subject: Ann, prompt: '{} lives in', target: Oslo}\n"
    file.write_text(
        "gates: {paraphrases: 0.9, kl_text: null}\nmethod: memit\nsettings: {steps: 40}\n" + fact
    )
    sheet = FactFile.sheet(file)
    assert (
        sheet.facts == (Fact("Ann", "{} lives in", "Oslo"),)
        and sheet.method == "memit"
        and sheet.settings == {"steps": 40}
    )
    assert sheet.gates == dataclasses.replace(Gates(), paraphrases=0.9, kl_text=None)
    for text, word in (
        ("gatez: {}\n", "gatez"),
        ("gates: {paraphrase: 1}\n", "paraphrase"),
        ("gates: {efficacy: 1.1}\n", "efficacy"),
        ("gates: {kl_text: -1}\n", "kl_text"),
        ("gates: {kl_text: .nan}\n", "kl_text"),
        ("gates: 3\n", "gates"),
        ("method: [a]\n", "method"),
        ("settings: 3\n", "settings"),
    ):
        file.write_text(text + fact)
        with pytest.raises(FactError, match=word):
            FactFile.sheet(file)


def test_the_schema_that_is_published_is_that_of_the_code() -> None:
    published = Path(__file__).parents[2] / "docs/facts.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == FactFile.schema()
    whole, bare = FactFile.schema()["anyOf"]
    assert set(whole["properties"]) == {"facts", "gates", "method", "settings"} and whole[
        "required"
    ] == ["facts"]
    assert (
        whole["additionalProperties"] is False
        and bare["items"] == whole["properties"]["facts"]["items"]
    )


@pytest.mark.parametrize(
    ("content", "valid"),
    [
        ({"facts": [FACT]}, True),
        ([FACT], True),
        (
            {
                "facts": [
                    FACT
                    | {
                        "neighbours": [
                            "Blake Mills was born in",
                            {"prompt": "Rome is", "expected": "old"},
                        ]
                    }
                ]
            },
            True,
        ),
        (
            {
                "facts": [{"subject": "Ann", "prompt": "{} lives in", "forget": True}],
                "gates": {"efficacy": 1, "kl_text": None},
                "method": "memit",
                "settings": {"steps": 4},
            },
            True,
        ),
        ({"facts": [FACT | {"forget": False}]}, True),
        ({"facts": [FACT | {"forget": True}]}, False),
        ({"facts": [FACT | {"forget": 1}]}, False),
        ({"facts": [FACT | {"target": None}]}, False),
        ({"facts": [FACT | {"target": " "}]}, False),
        ({"facts": [{"subject": "Ann", "prompt": "{} lives in"}]}, False),
        ({"facts": [{"subject": "Ann", "prompt": "{} lives in", "forget": False}]}, False),
        ({"facts": [FACT | {"prompt": "{} and {{}}"}]}, True),
        ({"facts": [FACT | {"prompt": "{{}} and {{}}"}]}, False),
        ({"facts": []}, False),
        ([], False),
        ({"facts": [FACT], "more": 1}, False),
        ({"facts": [FACT | {"prompt": "no slot"}]}, False),
        ({"facts": [FACT | {"prompt": "{} and {}"}]}, False),
        ({"facts": [FACT | {"subject": " "}]}, False),
        ({"facts": [FACT | {"neighbours": [""]}]}, False),
        ({"facts": [FACT], "gates": {"efficacy": True}}, False),
        ({"facts": [FACT], "gates": {"efficacy": 1.5}}, False),
        ({"facts": [FACT], "gates": []}, False),
        ({"facts": [FACT], "gates": False}, False),
        ({"facts": [FACT], "method": ""}, False),
    ],
)
def test_schema_and_reader_agree(tmp_path: Path, content: object, valid: bool) -> None:
    """By the reference implementation of JSON Schema, which knows nothing of ours."""
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(content))
    assert jsonschema.Draft202012Validator(FactFile.schema()).is_valid(content) is valid
    if valid:
        assert FactFile.sheet(file).facts
    else:
        with pytest.raises(FactError, match=r"facts\.json"):
            FactFile.sheet(file)
