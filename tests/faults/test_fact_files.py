"""Damaged and hostile fact files are refused with a message. Good ones come back unchanged."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factsmith.core.errors import FactError
from factsmith.core.fact import Fact, Probe
from factsmith.core.factfile import FactFile, FactSheet
from faults.fuzz import FUZZ, JSON_PIECES, SEED, TIMES, corrupted, is_refused, mutated, write_new
from faults.spaces import linux_only

pytestmark = linux_only

SHEET = {
    "facts": [
        {
            "subject": "Łódź",
            "prompt": "The river of {} is",
            "target": "Ner",
            "target_true": "Bzura",
            "paraphrases": ["{} lies on"],
            "neighbours": ["Cairo lies on", {"prompt": "Rome lies on", "expected": "Tiber"}],
            "relation": "P206",
        },
        {"subject": "B", "prompt": "{} is", "forget": True},
    ],
    "gates": {"efficacy": 1.0, "kl_text": 0.1},
    "method": "rome",
    "settings": {"layer": 3, "lr": 0.5},
}

YAML_PIECES = [
    b"&a ", b"*a", b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ", b"!!binary ", b"!!set ",
    b"!!omap ", b"!!pairs ", b"!!map ", b"!!seq ", b"!!null ", b"!!str ",
    b"!!python/name:os.system ", b"!!python/object/apply:os.getcwd []", b"! ", b"!x ",
    b"<<: *a\n", b"<<: 1\n", b"? [a]\n: b\n", b"? ", b"- ", b": ", b"2024-99-99",
    b"0x" + b"f" * 5000, b"9" * 5000, b"1:99:99", b".nan", b"-.inf", b"yes", b"~", b"|\n",
    b">-\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\0",
    b'"\\ud800"', b'"\\x00"', b"=", b"[" * 400, b"{a: " * 300, b"# ", b"'", b'"', b"\r",
]  # fmt: skip


def _is_a_sheet(path: Path) -> None:
    """Read a fact file and use its facts."""
    sheet = FactFile.sheet(path)
    assert isinstance(sheet, FactSheet) and sheet.facts
    json.dumps(
        [
            fact.to_dict() | {"neighbours": [probe.prompt for probe in fact.neighbours]}
            for fact in sheet.facts
        ]
    ).encode()
    "".join(map(str, sheet.facts)).encode()


@pytest.mark.parametrize("kind", ["JSON", "YAML"])
def test_every_damaged_fact_file_is_refused_with_a_message(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"facts.{kind.lower()}"
    text = (
        json.dumps(SHEET).encode()
        if kind == "JSON"
        else yaml.safe_dump(SHEET, allow_unicode=True, sort_keys=False).encode()
    )
    path.write_bytes(text)
    assert not is_refused(lambda: _is_a_sheet(path), "none"), "control: the file is intact"
    refused, began = 0, time.process_time()
    for seed in range(SEED, SEED + FUZZ[kind] * TIMES):
        rng = random.Random(seed)
        if kind == "JSON" and rng.random() < 0.6:
            write_new(
                path,
                json.dumps(
                    mutated(mutated(SHEET, rng) if rng.random() < 0.3 else SHEET, rng)
                ).encode(),
            )
        else:
            write_new(path, corrupted(text, rng, JSON_PIECES if kind == "JSON" else YAML_PIECES))
        refused += is_refused(lambda: _is_a_sheet(path), seed)
    assert 0.4 * FUZZ[kind] < refused / TIMES < FUZZ[kind]
    assert time.process_time() - began < 60 * TIMES


def _laughs(levels: int, last: str, *, merged: bool = False) -> str:
    """Return nested aliases, ten on each level: 10^levels texts from a few hundred bytes."""
    lines = ["a0: &a0 lol" if not merged else "a0: &a0 {k: lol}"]
    for level in range(1, levels):
        few = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{few}]}}" if merged else f"[{few}]"))
    return "\n".join([*lines, last.replace("BOMB", f"*a{levels - 1}")])


_ONE = "facts:\n- {subject: A, prompt: '{} is', target: x, "

BOMBS = {
    "of paraphrases": _laughs(10, _ONE + "paraphrases: BOMB}"),
    "of settings": _laughs(10, _ONE + "relation: r}\nsettings: {x: BOMB}"),
    "of a subject": _laughs(10, "facts:\n- {subject: BOMB, prompt: '{} is', target: x}"),
    "of facts": _laughs(10, "facts: BOMB"),
    "of merges": _laughs(10, "facts:\n- BOMB", merged=True),
    "small enough to be taken apart": _laughs(7, _ONE + "paraphrases: BOMB}"),
    "that holds itself": "facts: &a\n- *a\n- {subject: *a}",
    "that merges itself": "- &a {subject: A, <<: *a}",
    "of brackets": "[" * 100_000,
    "of dashes": "- " * 100_000,
    "of tags": "!!seq " * 50_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_little_time_and_memory(tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(BOMBS[bomb])
    tracemalloc.start()
    began = time.process_time()
    try:
        assert is_refused(lambda: FactFile.sheet(path), bomb)
        assert time.process_time() - began < 10 and tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_an_endless_fact_file_is_refused(tmp_path: Path) -> None:
    for name in ("facts.yaml", "facts.json"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(FactError, match="more than 67,108,864 bytes; split it"):
            FactFile.read(tmp_path / name)
    entries = ["{subject: A, prompt: '{} is', target: x, neighbours: &n [Rome is, Paris is]}"]
    entries += ["{subject: B, prompt: '{} is', target: y, neighbours: *n}"]
    (tmp_path / "shared.yaml").write_text("- " + "\n- ".join(entries))
    assert [len(fact.neighbours) for fact in FactFile.read(tmp_path / "shared.yaml")] == [2, 2], (
        "control: aliases are accepted"
    )


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    str.strip
)

_PROMPTS = (
    st.tuples(st.text(max_size=20), st.text(max_size=20))
    .map("{}".join)
    .filter(lambda text: text.count("{}") == 1)
)

_FACTS = st.builds(
    Fact,
    _TEXTS,
    _PROMPTS,
    st.none() | _TEXTS,
    paraphrases=st.lists(_TEXTS, max_size=3),
    neighbours=st.lists(_TEXTS | st.builds(Probe, _TEXTS, st.none() | _TEXTS), max_size=3),
    relation=st.none() | _TEXTS,
)


@given(facts=st.lists(_FACTS, min_size=1, max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_facts_come_back_from_a_file_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, facts: list[Fact]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("random.yaml", "random.json"):
        FactFile.write(folder / name, facts)
        assert FactFile.read(folder / name) == facts
        assert FactFile.sheet(folder / name) == FactSheet(facts=tuple(facts))
