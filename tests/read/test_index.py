"""Searching an index, compared with looking through everything in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from factsmith.core.errors import DamagedError, FingerprintError, InputError
from factsmith.model.language_model import LanguageModel
from factsmith.read.index import Index, build_index
from factsmith.read.values import ValueTokens
from indices import CORPUS, shares_by_pattern


@pytest.mark.parametrize("demoted", [False, True])
def test_promoting_finds_every_value_with_the_word(
    index: Index, tiny_gpt2: LanguageModel, demoted: bool
) -> None:
    neurons = [(layer, i) for layer in range(3) for i in range(128)]
    for word in ("is", " THE ", "of"):
        expected = {
            neuron: rank
            for neuron in neurons
            for rank, (token, _) in reversed(
                list(enumerate(index.values.of(neuron, bottom=demoted)))
            )
            if token.strip().casefold() == word.strip().casefold()
        }
        promotions = index.promoting(word, k=10_000, demoted=demoted)
        assert {p.neuron: p.rank for p in reversed(promotions)} == expected != {}
        assert [p.rank for p in promotions] == sorted(p.rank for p in promotions)
        for p in promotions[:5]:
            assert index.values.of(p.neuron, bottom=demoted)[p.rank] == (p.token, p.score)
        assert index.promoting(word, k=3, demoted=demoted) == promotions[:3]
    assert index.promoting("no such word") == []


@pytest.mark.parametrize("words", ["Paris", "capital OF", "são paulo", '"Zürich" and', "king"])
def test_triggered_by_finds_every_neuron_that_fires_after_the_words(
    index: Index, words: str
) -> None:
    expected = {}
    for layer in range(3):
        for i in range(128):
            triggers = index.triggers.of((layer, i))
            hits = [words.casefold() in trigger.prefix.casefold() for trigger in triggers]
            if any(hits):
                expected[layer, i] = sum(hits) / len(hits)
    firings = index.triggered_by(words, k=10_000)
    assert {f.neuron: pytest.approx(f.share) for f in firings} == expected != {}
    assert [f.share for f in firings] == sorted((f.share for f in firings), reverse=True)
    assert all(words.casefold() in f.trigger.prefix.casefold() for f in firings)


def test_words_are_never_a_query_language(index: Index) -> None:
    """Operators of full-text search are searched as plain text."""
    for words in ('"', "*", "NOT", "a OR b", "col:x", "(", "near/2", "'; DROP TABLE texts; --"):
        index.triggered_by(words)
    assert index.triggered_by("no such words") == []
    for wrong in ("", "  ", 5):
        with pytest.raises(InputError):
            index.triggered_by(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            index.promoting(wrong)  # type: ignore[arg-type]


def test_an_index_that_lacks_a_part_or_is_damaged(
    index: Index, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(FingerprintError):
        Index.open(index.folder, tiny_llama)
    with pytest.raises(DamagedError):
        Index.open(tmp_path)
    index.triggers.save(tmp_path)
    with pytest.raises(DamagedError, match="no values"):
        Index.open(tmp_path)
    index.values.save(tmp_path)
    expected = index.triggered_by("Paris")
    assert Index.open(tmp_path).triggered_by("Paris") == expected != []
    (tmp_path / "texts.sqlite").write_bytes(
        b"not a database at all, but long enough to be looked at"
    )
    opened = Index.open(tmp_path)
    assert opened.triggered_by("Paris") == expected
    (tmp_path / "texts.sqlite").write_bytes(
        b"not a database at all, but long enough to be looked at"
    )
    with pytest.raises(DamagedError, match=r"cannot search .* Delete it"):
        opened.triggered_by("Paris")
    file = tmp_path / "values.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError):
        ValueTokens.load(tmp_path)


def test_a_phrase_is_whole_words_in_any_script(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    texts = [
        "A Parish priest near Paris was in Parish and Paris.",
        "Parish and nothing else",
        "東京は日本の首都です",
        "Die Straße ist lang",
        "in İstanbul now",
        "A B near\0 it",
        'Saint "Paris" town? (#%20)',
    ]
    built = build_index(tiny_gpt2, texts, tmp_path / "a? b#c%20", top=25)
    for words, pattern in (
        ("Paris", r"\bparis\b"),
        ("parish", r"\bparish\b"),
        ("東京", "東京"),
        ("日本の首都", "日本の首都"),
        ("都", "都"),
        ("straße", "straße"),
        ("STRASSE", "straße"),
        ("İSTANBUL", "İstanbul"),
        ("A B", r"\bA B\b"),
        ("near\0 it", "near\0 it"),
        ("it", r"\bit\b"),
        ('"paris', '"paris'),
        ("?", r"\?"),
        ("(#%20)", r"\(#%20\)"),
    ):
        firing = built.triggered_by(words, 10_000)
        assert (
            {f.neuron: pytest.approx(f.share) for f in firing}
            == shares_by_pattern(built, pattern)
            != {}
        ), words
        assert all(re.search(pattern, f.trigger.text, re.IGNORECASE) for f in firing)
    for words in ("Pari", "nearParis", "lan", "strass"):
        assert built.triggered_by(words) == []
    with pytest.raises(InputError, match="'mid'"):
        built.triggered_by("Paris", sign="mid")  # type: ignore[arg-type]


def test_texts_of_other_triggers_are_not_searched(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    one = build_index(tiny_gpt2, CORPUS, tmp_path / "one", top=3)
    build_index(
        tiny_gpt2, [f"Paris is number {i} of London" for i in range(60)], tmp_path / "two", top=25
    )
    build_index(
        tiny_gpt2, CORPUS, tmp_path / "three", top=1
    )  # of the same corpus, but fewer texts of it
    expected = one.triggered_by("Paris")
    for other in ("two", "three"):
        shutil.copy(tmp_path / other / "texts.sqlite", tmp_path / "one")
        opened = Index.open(tmp_path / "one")
        assert (
            opened.triggered_by("London") == [] and opened.triggered_by("Paris") == expected != []
        )
