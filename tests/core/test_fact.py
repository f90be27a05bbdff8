"""Facts and fact files: what is taken, what is refused, and that nothing is lost on the way to disk and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import FactError, WorkspaceError
from factsmith.core.fact import Fact, Probe
from factsmith.core.factfile import FactFile
from factsmith.core.files import write_file

FULL = Fact(
    "N'Djamena",
    "The river of {} is",
    "Łódź",
    target_true="Chari",
    paraphrases=["{} lies on", "Q: Which river? A: N'Djamena's is"],
    neighbours=[
        "Cairo lies on",
        Probe("Paris lies on", "Seine"),
        {"prompt": "Rome lies on", "expected": "Tiber"},
    ],
    relation="P206",
)


def test_prompts_are_filled_in() -> None:
    assert FULL.text == "The river of N'Djamena is"
    assert FULL.paraphrase_texts == ("N'Djamena lies on", "Q: Which river? A: N'Djamena's is")
    assert FULL.neighbours == (
        Probe("Cairo lies on"),
        Probe("Paris lies on", "Seine"),
        Probe("Rome lies on", "Tiber"),
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"subject": "  "}, "subject is empty"),
        ({"target": ""}, "target is empty"),
        ({"prompt": "no slot"}, "prompt has 0 slots"),
        ({"prompt": "{} and {}"}, "prompt has 2 slots"),
        ({"prompt": 3}, "prompt is 3; expected text"),
        ({"target_true": " b "}, "must differ"),
        ({"paraphrases": "one text"}, "paraphrases"),
        ({"neighbours": [{"prompt": "x", "answer": "y"}]}, "neighbours.0.answer"),
        ({"neighbours": [7]}, "neighbours.0"),
    ],
)
def test_unusable_facts_are_refused_by_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FactError, match=words):
        Fact(**{"subject": "a", "prompt": "{} is", "target": "b", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"subject": "a"},
        {"subject": "a", "prompt": "{}", "target": "b", "colour": "red"},
        ["a"],
        None,
    ],
)
def test_only_known_fields_make_a_fact(fields: Any) -> None:
    with pytest.raises(FactError):
        Fact.from_dict(fields)


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


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_gets_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_file(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
