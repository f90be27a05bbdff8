"""Where indices are kept: opened, completed, made, and never replaced by mistake."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from factsmith.core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from factsmith.corpus.ordinary import ordinary_texts
from factsmith.corpus.sweep import corpus_digest
from factsmith.model.language_model import LanguageModel
from factsmith.read import index as index_module
from factsmith.read import index_store
from factsmith.read.index import Index, build_index
from factsmith.read.index_store import find_index
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import Triggers
from factsmith.read.values import value_tokens
from indices import CORPUS, shares_by_pattern


def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every scan."""
    done: list[int] = []
    scan = index_module.find_triggers
    monkeypatch.setattr(
        index_module,
        "find_triggers",
        lambda *args, **kwargs: (done.append(1), scan(*args, **kwargs))[1],
    )
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "lost", [("values.safetensors", "texts.sqlite"), ("texts.sqlite",), ("values.safetensors",)]
)
def test_kept_triggers_are_completed_to_an_index(
    tiny_gpt2: LanguageModel, tmp_path: Path, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(lost) == 2:
        find_triggers(tiny_gpt2, CORPUS, top=3, folder=tmp_path)
    else:
        build_index(tiny_gpt2, CORPUS, tmp_path, top=3)
        for name in lost:
            (tmp_path / name).unlink()
    before, done = (tmp_path / "triggers.safetensors").read_bytes(), scans(monkeypatch)
    completed = find_index(tiny_gpt2, tmp_path)
    assert (tmp_path / "triggers.safetensors").read_bytes() == before and not done
    assert sorted(contents(tmp_path)) == [
        "texts.sqlite",
        "triggers.safetensors",
        "values.safetensors",
    ]
    assert (
        completed.triggered_by("Paris")
        == Index.open(tmp_path, tiny_gpt2).triggered_by("Paris")
        != []
    )
    assert completed.values.of((1, 2)) == value_tokens(tiny_gpt2).of((1, 2))


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
    own_words = find_index(tiny_gpt2, max_tokens=150)
    assert own_words.triggers.n_tokens == 150
    given = find_index(tiny_gpt2, texts=iter(CORPUS))
    assert (
        given.triggers.n_texts == len(CORPUS)
        and given.folder != own_words.folder
        and len(done) == 2
    )
    assert (
        given.triggers.texts
        and given.triggers.corpus == find_triggers(tiny_gpt2, CORPUS, [0], top=1).corpus
    )
    assert (
        find_index(tiny_gpt2).triggers.corpus
        == own_words.triggers.corpus
        == find_index(tiny_gpt2, max_tokens=150).triggers.corpus
    )
    assert find_index(tiny_gpt2, texts=CORPUS).folder == given.folder and len(done) == 2
    part = find_index(tiny_gpt2, texts=iter(CORPUS), max_tokens=50)
    assert part.triggers.n_tokens == 50 and part.folder != given.folder and len(done) == 3
    more = find_index(tiny_gpt2, max_tokens=250)
    assert more.folder == own_words.folder and more.triggers.n_tokens == 250 and len(done) == 4, (
        "the model's own_words words can be read again"
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_leaves_the_old_the_new_or_one_that_is_completed(
    tiny_gpt2: LanguageModel, tmp_path: Path, at: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build is killed before the first, second or third file is in its place."""
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
    completed = find_index(tiny_gpt2, tmp_path)
    assert completed.triggers.n_texts == (len(new) if at else 6)
    expected = find_triggers(tiny_gpt2, new if at else CORPUS[:6], top=3 if at else 2)
    assert completed.triggers.of((1, 5)) == expected.of((1, 5))
    share = {f.neuron: f.share for f in completed.triggered_by("Paris", 10_000)}
    assert share == pytest.approx(shares_by_pattern(completed, r"\bparis\b")) and share
    Triggers.load(tmp_path, tiny_gpt2)


def test_where_it_cannot_write_nothing_is_read(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[str]:
        pytest.fail("a text was asked for")
        yield ""

    monkeypatch.setattr(
        index_module, "value_tokens", lambda *_, **__: pytest.fail("values were read")
    )
    monkeypatch.setattr(index_store, "own_text", lambda *_, **__: pytest.fail("text was sampled"))
    (tmp_path / "file").write_text("mine")
    make: Callable[..., Index]
    for make in (find_index, build_index):
        with pytest.raises(WorkspaceError, match="cannot write"):
            make(tiny_gpt2, folder=tmp_path / "file", texts=never())
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "file"))
    with pytest.raises(WorkspaceError, match="cannot write"):
        find_index(tiny_gpt2)


def test_a_large_model_reads_the_bundled_text_unless_its_own_is_asked_for(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    sample = index_store.own_text
    monkeypatch.setattr(
        index_store, "own_text", lambda *a, **k: (written.append(1), sample(*a, **k))[1]
    )
    small = find_index(tiny_gpt2, tmp_path / "small", max_tokens=200)
    assert written  # a small model writes its text itself
    monkeypatch.setattr(index_store, "_SMALL", 0)
    written.clear()
    large = find_index(tiny_gpt2, tmp_path / "large", max_tokens=200)
    assert not written and large.triggers.n_tokens == 200
    expected = corpus_digest(tiny_gpt2, ordinary_texts(), 200)
    assert large.triggers.corpus == expected != small.triggers.corpus
    find_index(tiny_gpt2, tmp_path / "own", texts="own", max_tokens=200)
    assert written
    # An index that is there counts, whatever it is of.
    assert find_index(tiny_gpt2, tmp_path / "small").triggers.corpus == small.triggers.corpus
