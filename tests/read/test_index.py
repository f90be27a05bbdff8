"""Searching what a memory matches and promotes, against looking through everything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import TEXTS
from factsmith.core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from factsmith.model.language_model import LanguageModel
from factsmith.read import index as module
from factsmith.read import index_store
from factsmith.read.index import Index, build_index
from factsmith.read.index_store import find_index
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import Triggers
from factsmith.read.values import ValueTokens, value_tokens

CORPUS = [
    *TEXTS,
    *[" ".join(text.split()[n:]) for n in range(1, 7) for text in TEXTS],
    'He said "Zürich" and NOT Paris OR *',
]


@pytest.fixture(scope="module")
def index(tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    build_index(tiny_gpt2, CORPUS, folder, top=6, tokens=8)
    return Index.open(folder, tiny_gpt2)


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
        found = index.promoting(word, k=10_000, demoted=demoted)
        assert {p.neuron: p.rank for p in reversed(found)} == expected != {}
        assert [p.rank for p in found] == sorted(p.rank for p in found)
        for p in found[:5]:
            assert index.values.of(p.neuron, bottom=demoted)[p.rank] == (p.token, p.score)
        assert index.promoting(word, k=3, demoted=demoted) == found[:3]
    assert index.promoting("no such word") == []


@pytest.mark.parametrize("words", ["Paris", "capital OF", "são paulo", '"Zürich" and', "king"])
def test_triggered_by_finds_every_neuron_that_fires_behind_the_words(
    index: Index, words: str
) -> None:
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


def test_an_index_that_is_not_whole(
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


def brute_force(found: Index, pattern: str) -> dict[tuple[int, int], float]:
    """For each neuron the share of its triggers at or behind the first place of a pattern in their text."""
    expected = {}
    for layer in range(3):
        for i in range(128):
            own = found.triggers.of((layer, i))
            first = [re.search(pattern, trigger.text, re.IGNORECASE) for trigger in own]
            hits = [
                place is not None and trigger.stop >= place.end()
                for place, trigger in zip(first, own, strict=True)
            ]
            if any(hits):
                expected[layer, i] = sum(hits) / len(hits)
    return expected


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
    found = build_index(tiny_gpt2, texts, tmp_path / "a? b#c%20", top=25)
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
        firing = found.triggered_by(words, 10_000)
        assert (
            {f.neuron: pytest.approx(f.share) for f in firing} == brute_force(found, pattern) != {}
        ), words
        assert all(re.search(pattern, f.trigger.text, re.IGNORECASE) for f in firing)
    for words in ("Pari", "nearParis", "lan", "strass"):
        assert found.triggered_by(words) == []
    with pytest.raises(InputError, match="'mid'"):
        found.triggered_by("Paris", sign="mid")  # type: ignore[arg-type]


def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every scan."""
    done: list[int] = []
    scan = module.find_triggers
    monkeypatch.setattr(
        module, "find_triggers", lambda *args, **kwargs: (done.append(1), scan(*args, **kwargs))[1]
    )
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "lost", [("values.safetensors", "texts.sqlite"), ("texts.sqlite",), ("values.safetensors",)]
)
def test_triggers_that_are_there_are_completed(
    tiny_gpt2: LanguageModel, tmp_path: Path, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(lost) == 2:
        find_triggers(tiny_gpt2, CORPUS, top=3, folder=tmp_path)
    else:
        build_index(tiny_gpt2, CORPUS, tmp_path, top=3)
        for name in lost:
            (tmp_path / name).unlink()
    before, done = (tmp_path / "triggers.safetensors").read_bytes(), scans(monkeypatch)
    found = find_index(tiny_gpt2, tmp_path)
    assert (tmp_path / "triggers.safetensors").read_bytes() == before and not done
    assert sorted(contents(tmp_path)) == [
        "texts.sqlite",
        "triggers.safetensors",
        "values.safetensors",
    ]
    assert (
        found.triggered_by("Paris") == Index.open(tmp_path, tiny_gpt2).triggered_by("Paris") != []
    )
    assert found.values.of((1, 2)) == value_tokens(tiny_gpt2).of((1, 2))


def test_an_index_of_other_texts_is_not_replaced(
    index: Index,
    tiny_gpt2: LanguageModel,
    tiny_llama: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "index"
    shutil.copytree(index.folder, place)
    before, done = contents(place), scans(monkeypatch)
    assert (
        find_index(tiny_gpt2, place, texts=iter(CORPUS)).triggers.corpus == index.triggers.corpus
    ), "the same texts open it"
    assert find_index(tiny_gpt2, place, max_tokens=index.triggers.n_tokens).triggers.n_texts == len(
        CORPUS
    )
    for arguments, words in (
        ({"texts": CORPUS[:5]}, "other than the texts"),
        ({"texts": CORPUS, "max_tokens": 20}, "other than the texts"),
        ({"max_tokens": 20}, "not of 20 tokens"),
    ):
        with pytest.raises(
            InputError, match=rf"holds an index of {len(CORPUS)} texts.*{words}.*or delete it"
        ):
            find_index(tiny_gpt2, place, **arguments)  # type: ignore[arg-type]
    for make in (find_index, build_index):
        for texts in (CORPUS, iter(CORPUS)):
            with pytest.raises(FingerprintError):
                make(tiny_llama, folder=place, texts=texts)
    (place / "triggers.safetensors").unlink()
    with pytest.raises(FingerprintError, match="the values in"):
        find_index(tiny_llama, place, texts=CORPUS)
    with pytest.raises(DamagedError, match="without its triggers"):
        find_index(tiny_gpt2, place)
    assert (
        contents(place)
        == {name: held for name, held in before.items() if name != "triggers.safetensors"}
        and not done
    )
    for wrong in (
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": "x"},
        {"texts": 5},
        {"folder": 5},
    ):
        with pytest.raises(InputError):
            find_index(tiny_gpt2, **{"folder": tmp_path / "new", **wrong})  # type: ignore[arg-type]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkspaceError, match="a file of that name"):
        find_index(tiny_gpt2, tmp_path / "file" / "below")
    assert not (tmp_path / "new").exists() and not done


def test_each_corpus_has_an_index_of_its_own_in_the_cache(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path))
    done = scans(monkeypatch)
    own = find_index(tiny_gpt2, max_tokens=150)
    assert own.triggers.n_tokens == 150
    given = find_index(tiny_gpt2, texts=iter(CORPUS))
    assert given.triggers.n_texts == len(CORPUS) and given.folder != own.folder and len(done) == 2
    assert (
        given.triggers.texts
        and given.triggers.corpus == find_triggers(tiny_gpt2, CORPUS, [0], top=1).corpus
    )
    assert (
        find_index(tiny_gpt2).triggers.corpus
        == own.triggers.corpus
        == find_index(tiny_gpt2, max_tokens=150).triggers.corpus
    )
    assert find_index(tiny_gpt2, texts=CORPUS).folder == given.folder and len(done) == 2
    part = find_index(tiny_gpt2, texts=iter(CORPUS), max_tokens=50)
    assert part.triggers.n_tokens == 50 and part.folder != given.folder and len(done) == 3
    more = find_index(tiny_gpt2, max_tokens=250)
    assert more.folder == own.folder and more.triggers.n_tokens == 250 and len(done) == 4, (
        "the model's own words can be read again"
    )


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
        found = Index.open(tmp_path / "one")
        assert found.triggered_by("London") == [] and found.triggered_by("Paris") == expected != []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_leaves_the_old_the_new_or_one_that_is_completed(
    tiny_gpt2: LanguageModel, tmp_path: Path, at: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first, second and third file is in its place."""
    if old:
        build_index(tiny_gpt2, CORPUS[:6], tmp_path, top=2, tokens=4)
    new = ["Edwin is in Paris.", *CORPUS[3:]]
    replaced: list[str] = []
    replace = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if len(replaced) == at:
            raise Killed
        replaced.append(target.name)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", stop)
        build_index(tiny_gpt2, new, tmp_path, top=3)
    assert replaced == ["triggers.safetensors", "values.safetensors", "texts.sqlite"][:at]
    if not (at or old):
        with pytest.raises(DamagedError):
            Index.open(tmp_path)
        return
    found = find_index(tiny_gpt2, tmp_path)
    assert found.triggers.n_texts == (len(new) if at else 6)
    expected = find_triggers(tiny_gpt2, new if at else CORPUS[:6], top=3 if at else 2)
    assert found.triggers.of((1, 5)) == expected.of((1, 5))
    share = {f.neuron: f.share for f in found.triggered_by("Paris", 10_000)}
    assert share == pytest.approx(brute_force(found, r"\bparis\b")) and share
    Triggers.load(tmp_path, tiny_gpt2)


def test_where_it_cannot_write_nothing_is_read(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[str]:
        pytest.fail("a text was asked for")
        yield ""

    monkeypatch.setattr(module, "value_tokens", lambda *_, **__: pytest.fail("values were read"))
    monkeypatch.setattr(index_store, "own_text", lambda *_, **__: pytest.fail("text was sampled"))
    (tmp_path / "file").write_text("mine")
    make: Callable[..., Index]
    for make in (find_index, build_index):
        with pytest.raises(WorkspaceError, match="cannot write"):
            make(tiny_gpt2, folder=tmp_path / "file", texts=never())
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "file"))
    with pytest.raises(WorkspaceError, match="cannot write"):
        find_index(tiny_gpt2)
