"""Fact files: what is read, what is refused, and that nothing is lost on the way to disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest

from factsmith.core.errors import FactError, WorkspaceError
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactFile
from factsmith.core.gates import Gates
from full_fact import FULL

FACT = {"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}


@pytest.mark.parametrize("name", ["facts.yaml", "facts.json"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, name: str) -> None:
    facts = [FULL, Fact("b", "{}", "yes")]
    FactFile.write(tmp_path / name, facts)
    assert FactFile.read(tmp_path / name) == facts
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no temporary file stays


def test_a_bare_list_is_a_fact_file_too(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([FULL.to_dict()]), encoding="utf-8")
    assert FactFile.read(path) == [FULL]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("facts: [", "not valid YAML"),
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
                "facts": [FACT | {"target": None}],
                "gates": {"efficacy": 1, "kl_text": None},
                "method": "memit",
                "settings": {"steps": 4},
            },
            True,
        ),
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
