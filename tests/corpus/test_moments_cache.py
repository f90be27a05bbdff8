"""Second moments without a text: from the bundled corpus, and once a model."""

from __future__ import annotations

import dataclasses
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import GPT2, TEXTS, merging_tokenizer, tiny_model
from factsmith.core.cache import MODEL_FILE, cache_folders
from factsmith.corpus import moments_store, ordinary
from factsmith.corpus.measuring import ENOUGH_EXCESS
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_cache import cache_file, cache_moments, cached_moments
from factsmith.corpus.moments_store import (
    find_moments,
    kept_moments,
    moments_digest,
    moments_file,
)
from factsmith.corpus.ordinary import DIGEST, ordinary_texts
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap


class Heard(list[str]):
    """A progress that keeps notes and steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int | None]] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        self.steps.append((step, done, total))

    def note(self, text: str, **_: object) -> None:
        self.append(text)


def test_the_second_workspace_computes_nothing(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(moments_store, "own_text", lambda *_, **__: pytest.fail("text was sampled"))
    heard = Heard()
    first = find_moments(tiny_gpt2, [0, 1], folder=one, progress=heard)
    assert {step for step, _, _ in heard.steps} == {"second moments"} and not heard
    assert all(m.corpus == DIGEST and m.excess <= ENOUGH_EXCESS for m in first.values())
    monkeypatch.setattr(
        moments_store, "moments_with_total", lambda *_, **__: pytest.fail("computed again")
    )
    second = find_moments(tiny_gpt2, [0, 1], folder=two)
    alone = find_moments(tiny_gpt2, [0, 1])
    again = find_moments(tiny_gpt2, [0, 1], folder=one)
    for moments in (second, alone, again, kept_moments(tiny_gpt2, [0, 1])):
        assert moments_digest(moments, [0, 1]) == moments_digest(first, [0, 1])
    for layer in (0, 1):
        files = [moments_file(folder, layer) for folder in (one, two)]
        files.append(cache_file(tiny_gpt2, layer))
        assert len({file.stat().st_size for file in files}) == 1
        assert all(torch.equal(SecondMoment.load(f).matrix, first[layer].matrix) for f in files)
    with pytest.raises(pytest.fail.Exception, match="computed again"):  # the control
        find_moments(tiny_gpt2, [2])


def test_layers_of_different_calls_go_together(tiny_gpt2: LanguageModel) -> None:
    lower = find_moments(tiny_gpt2, [0])
    both = find_moments(tiny_gpt2, [0, 1])
    assert moments_digest(both, [0]) == moments_digest(lower, [0])
    assert both[0].corpus == both[1].corpus


def test_the_cache_holds_the_matrix_of_the_bundled_text(tiny_gpt2: LanguageModel) -> None:
    moment = find_moments(tiny_gpt2, [1])[1]
    count = moment.count
    plain = second_moments(tiny_gpt2, list(ordinary_texts()), [1], max_tokens=count)[1]
    assert plain.count == count
    assert torch.allclose(moment.matrix.double(), plain.matrix, rtol=1e-4, atol=1e-6)
    assert moment.matrix.dtype == torch.float32 and torch.equal(moment.matrix, moment.matrix.T)
    other = second_moments(tiny_gpt2, TEXTS * 20, [1], max_tokens=count)[1]
    assert not torch.allclose(moment.matrix.double(), other.matrix, rtol=1e-2)
    file = cache_file(tiny_gpt2, 1)
    d_ff = moment.d_ff
    assert 0 < file.stat().st_size - 2 * d_ff * (d_ff + 1) < 2000
    assert (file.parents[1] / MODEL_FILE).read_text().strip() == tiny_gpt2.name
    assert cache_folders()[0] in file.parents


BAD = {
    "cut": lambda file, _: file.write_bytes(file.read_bytes()[:-40]),
    "changed": lambda file, _: file.write_bytes(file.read_bytes()[:-1] + b"?"),
    "empty": lambda file, _: file.write_bytes(b""),
    "text": lambda file, _: file.write_text("no tensors"),
    "another layer": lambda file, m: _with(m, layer=0).save(file),
    "another model": lambda file, m: _with(m, fingerprint="0" * 64).save(file),
    "another corpus": lambda file, m: _with(m, corpus="0" * 64).save(file),
    "unknown model": lambda file, m: _with(m, fingerprint="").save(file),
    "another size": lambda file, m: _with(m, matrix=torch.eye(5)).save(file),
}


def _with(moment: SecondMoment, **changes: object) -> SecondMoment:
    fields = ("matrix", "count", "fingerprint", "corpus", "layer")
    return SecondMoment(**{name: getattr(moment, name) for name in fields} | changes)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_passed_over(kind: str, tiny_gpt2: LanguageModel) -> None:
    moment = find_moments(tiny_gpt2, [1])[1]
    file = cache_file(tiny_gpt2, 1)
    BAD[kind](file, moment)
    heard = Heard()
    again = find_moments(tiny_gpt2, [1], progress=heard)[1]
    assert torch.equal(again.matrix, moment.matrix)
    assert len(heard) == 1 and str(file) in heard[0] and "computed again" in heard[0]
    silent = Heard()  # the file was put right
    assert find_moments(tiny_gpt2, [1], progress=silent) and not silent and not silent.steps


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_folder_that_cannot_be_written_is_a_note(
    tiny_gpt2: LanguageModel, fresh_cache: Path
) -> None:
    fresh_cache.chmod(0o500)
    heard = Heard()
    try:
        assert find_moments(tiny_gpt2, [1], progress=heard)[1].corpus == DIGEST
    finally:
        fresh_cache.chmod(0o700)
    assert len(heard) == 1 and "not kept in the cache" in heard[0]


def test_a_file_in_place_of_the_folder_is_a_note(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "file"))
    heard = Heard()
    moment = find_moments(tiny_gpt2, [1], folder=tmp_path / "kept", progress=heard)[1]
    assert len(heard) == 1 and "not kept in the cache" in heard[0] and str(tmp_path) in heard[0]
    assert SecondMoment.load(moments_file(tmp_path / "kept", 1)).count == moment.count


def test_numbers_of_tokens_and_other_dtypes_stay_out(tiny_gpt2: LanguageModel) -> None:
    few = find_moments(tiny_gpt2, [1], max_tokens=700)[1]
    assert few.count == 700 and few.corpus == DIGEST
    find_moments(tiny_gpt2, [1], dtype=torch.bfloat16)
    find_moments(tiny_gpt2, [1], texts=TEXTS * 20)
    assert not cached_moments(tiny_gpt2, [1])
    usual = find_moments(tiny_gpt2, [1])[1]
    assert cached_moments(tiny_gpt2, [1]).keys() == {1}
    assert find_moments(tiny_gpt2, [1], max_tokens=700)[1].count == usual.count > 700
    more = find_moments(tiny_gpt2, [1], max_tokens=2 * usual.count)[1]
    assert more.count == 2 * usual.count and find_moments(tiny_gpt2, [1])[1].count == usual.count


def test_own_text_is_sampled_only_where_it_is_asked_for(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    real = moments_store.own_text
    monkeypatch.setattr(moments_store, "own_text", lambda *a, **k: drawn.append(a) or real(*a, **k))
    assert find_moments(tiny_gpt2, [1])[1].corpus == DIGEST and not drawn
    moment = find_moments(tiny_gpt2, [1], texts="own", max_tokens=300)[1]
    assert len(drawn) == 1 and moment.corpus != DIGEST and moment.count <= 300


def test_a_note_says_where_the_bundled_text_was_not_enough(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = Heard()
    find_moments(tiny_gpt2, [0], progress=enough)
    few = ordinary._passages()[:2]
    monkeypatch.setattr(ordinary, "_passages", lambda: few)
    short = Heard()
    moment = find_moments(tiny_gpt2, [1], progress=short)[1]
    assert moment.excess is None or moment.excess > ENOUGH_EXCESS
    assert not enough and len(short) == 1
    assert "bundled text ended" in short[0] and "layer 1" in short[0] and "of your own" in short[0]


def test_a_note_says_where_the_tokenizer_does_not_know_the_text() -> None:
    words = ["<unk>", "<s>", "The", "name", "of", "the", "place", "is", "α", "β", "γ"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    greek = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    )
    heard = Heard()
    find_moments(wrap(tiny_model("gpt2", **GPT2), greek), [1], max_tokens=500, progress=heard)
    assert len(heard) == 1 and "its language" in heard[0]
    assert re.search(r"does not know [7-9]\d %", heard[0])
    knows = Heard()
    known = wrap(tiny_model("gpt2", **GPT2), merging_tokenizer())
    assert known.tokenizer.unk_token_id is not None
    find_moments(known, [1], max_tokens=500, progress=knows)
    assert not knows


def test_two_processes_at_once_leave_a_whole_file(tiny_gpt2: LanguageModel) -> None:
    moment = find_moments(tiny_gpt2, [1])[1]
    file = cache_file(tiny_gpt2, 1)
    with ThreadPoolExecutor(8) as pool:
        saved = [pool.submit(moment.save, file, triangle=True) for _ in range(40)]
        read = [pool.submit(cached_moments, tiny_gpt2, [1]) for _ in range(40)]
        assert all(one.result() is None for one in saved)
        assert all(torch.equal(one.result()[1].matrix, moment.matrix) for one in read)
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name]


def test_where_another_process_was_faster_its_numbers_are_used(tiny_gpt2: LanguageModel) -> None:
    moment = find_moments(tiny_gpt2, [1])[1]
    slower = dataclasses.replace(moment, matrix=2 * moment.matrix)
    assert torch.equal(cache_moments(tiny_gpt2, {1: slower})[1].matrix, moment.matrix)
