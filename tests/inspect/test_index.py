"""Searching what a memory matches and promotes, against looking through everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import TEXTS
from factsmith.errors import DamagedError, FingerprintError, InputError
from factsmith.inspect.index import Index, build_index
from factsmith.inspect.values import ValueTokens
from factsmith.model.load import LanguageModel

CORPUS = [*TEXTS, *[" ".join(text.split()[n:]) for n in range(1, 7) for text in TEXTS], 'He said "Zürich" and NOT Paris OR *']


@pytest.fixture(scope="module")
def index(tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    build_index(tiny_gpt2, CORPUS, folder, top=6, tokens=8)
    return Index.open(folder, tiny_gpt2)


@pytest.mark.parametrize("demoted", [False, True])
def test_promoting_finds_every_value_with_the_word(index: Index, tiny_gpt2: LanguageModel, demoted: bool) -> None:
    neurons = [(layer, i) for layer in range(3) for i in range(128)]
    for word in ("is", " THE ", "of"):
        expected = {
            neuron: rank
            for neuron in neurons
            for rank, (token, _) in reversed(list(enumerate(index.values.of(neuron, bottom=demoted))))
            if token.strip().casefold() == word.strip().casefold()
        }
        found = index.promoting(word, k=10_000, demoted=demoted)
        assert {p.neuron: p.rank for p in reversed(found)} == expected != {}
        assert [p.rank for p in found] == sorted(p.rank for p in found)
        for p in found[:5]:
            assert index.values.of(p.neuron, bottom=demoted)[p.rank] == (p.token, p.score)
        assert index.promoting(word, k=3, demoted=demoted) == found[:3]
    assert index.promoting("no such word") == []


@pytest.mark.parametrize("words", ["Paris", "capital OF", "são paulo", '"Zürich" and', "king"])
def test_triggered_by_finds_every_neuron_that_fires_behind_the_words(index: Index, words: str) -> None:
    expected = {}
    for layer in range(3):
        for i in range(128):
            own = index.triggers.of((layer, i))
            hits = [words.casefold() in trigger.prefix.casefold() for trigger in own]
            if any(hits):
                expected[layer, i] = sum(hits) / len(hits)
    found = index.triggered_by(words, k=10_000)
    assert {f.neuron: pytest.approx(f.share) for f in found} == expected != {}
    assert [f.share for f in found] == sorted((f.share for f in found), reverse=True)
    assert all(words.casefold() in f.trigger.prefix.casefold() for f in found)


def test_words_that_are_no_query_language(index: Index) -> None:
    """Whatever full-text search would take for an operator is only text."""
    for words in ('"', "*", "NOT", "a OR b", "col:x", "(", "near/2", "'; DROP TABLE texts; --"):
        index.triggered_by(words)
    assert index.triggered_by("no such words") == []
    for wrong in ("", "  ", 5):
        with pytest.raises(InputError):
            index.triggered_by(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            index.promoting(wrong)  # type: ignore[arg-type]


def test_an_index_that_is_not_whole(index: Index, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError):
        Index.open(index.folder, tiny_llama)
    with pytest.raises(DamagedError):
        Index.open(tmp_path)
    index.triggers.save(tmp_path)
    with pytest.raises(DamagedError, match="no values"):
        Index.open(tmp_path)
    index.values.save(tmp_path)
    with pytest.raises(DamagedError, match="build it again"):
        Index.open(tmp_path)
    (tmp_path / "texts.sqlite").write_bytes(b"not a database at all, but long enough to be looked at")
    with pytest.raises(DamagedError, match="cannot search"):
        Index.open(tmp_path).triggered_by("Paris")
    file = tmp_path / "values.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError):
        ValueTokens.load(tmp_path)
