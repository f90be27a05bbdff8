"""GGUF files are loaded like folders: the same answers, converted once, refused in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer
from factsmith.core.cache import read_cache
from factsmith.core.errors import FactsmithError, InputError, ModelError, ModelNotFoundError
from factsmith.model import gguf as module
from factsmith.model import gguf_reading
from factsmith.model.load import load, wrap
from gguf_files import TEMPLATE, write_gguf

PROMPTS = ["Paris is the capital of", "The official religion of Edwin is"]


class Notes:
    """Collects the notes of a call."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Take no notice of progress."""

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Keep a note."""
        self.notes.append(text)


def kept(cache: Path) -> list[Path]:
    """Return the conversions in a cache, and all hidden leftovers."""
    return sorted((cache / "gguf").iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_file_answers_as_its_model(family: str, tmp_path: Path, fresh_cache: Path) -> None:
    """Every number is where it belongs: permuted heads, transposed matrices, tied embeddings."""
    made = write_gguf(tmp_path / "tiny.gguf", family)
    lm, notes = load(tmp_path / "tiny.gguf"), Notes()
    expected = wrap(made, byte_tokenizer())
    for prompt in PROMPTS:
        ids = expected.prompt_ids(prompt)
        assert lm.prompt_ids(prompt) == ids
        logits = [x.module(torch.tensor([ids])).logits for x in (lm, expected)]
        assert torch.allclose(*logits, atol=2e-5), (logits[0] - logits[1]).abs().max()
    other = wrap(write_gguf(tmp_path / "other.gguf", family, seed=1), byte_tokenizer())
    assert not torch.allclose(other.module(torch.tensor([ids])).logits, logits[0], atol=1e-2)
    assert lm.gguf is not None and lm.gguf.path == tmp_path / "tiny.gguf" and lm.gguf.type == "F32"
    again = load(tmp_path / "tiny.gguf", progress=notes)
    assert again.fingerprint == lm.fingerprint and notes.notes == []
    assert lm.tokenizer.chat_template == TEMPLATE == again.tokenizer.chat_template
    assert lm.end_ids == {0}


def test_the_fingerprint_is_of_what_decides_answers(tmp_path: Path, fresh_cache: Path) -> None:
    """A tensor and an end token count; the name of the file and a note in it do not."""
    write_gguf(tmp_path / "a.gguf")
    first = load(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert load(tmp_path / "b.gguf").fingerprint == first.fingerprint
    write_gguf(tmp_path / "noted.gguf", general__author="Somebody")
    assert load(tmp_path / "noted.gguf").fingerprint == first.fingerprint
    write_gguf(tmp_path / "weight.gguf", seed=1)
    write_gguf(tmp_path / "ends.gguf", tokenizer__ggml__eot_token_id=7)
    write_gguf(tmp_path / "split.gguf", tokenizer__ggml__pre="smollm")
    changed = {load(tmp_path / f"{x}.gguf").fingerprint for x in ("weight", "ends", "split")}
    assert len(changed | {first.fingerprint}) == 4
    assert load(tmp_path / "ends.gguf").end_ids == {0, 7}


def test_a_quantised_file_is_dequantised_once_and_said(tmp_path: Path, fresh_cache: Path) -> None:
    write_gguf(tmp_path / "q8.gguf", kind="Q8_0")
    notes = Notes()
    lm = load(tmp_path / "q8.gguf", progress=notes)
    assert len(notes.notes) == 1 and "was dequantised to float32" in notes.notes[0]
    made = write_gguf(tmp_path / "f32.gguf")
    down = [
        x.module.model.layers[1].mlp.down_proj.weight for x in (lm, wrap(made, byte_tokenizer()))
    ]
    error = (down[0] - down[1]).abs().max()
    assert 0 < error < 0.02 * down[1].abs().max()
    narrow = load(tmp_path / "q8.gguf", dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and len(kept(fresh_cache)) == 1, "float32 serves it"
    assert torch.equal(narrow.module.model.layers[1].mlp.down_proj.weight, down[0].bfloat16())


def test_digits_are_split_as_the_file_says(tmp_path: Path, fresh_cache: Path) -> None:
    """With control: a way that is not known is remarked on."""
    write_gguf(tmp_path / "digits.gguf", tokenizer__ggml__pre="smollm")
    lm = load(tmp_path / "digits.gguf")
    split = lm.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [text for text, _ in split("in 1984")] == ["in", "Ġ", "1", "9", "8", "4"]
    write_gguf(tmp_path / "strange.gguf", tokenizer__ggml__pre="strange")
    notes = Notes()
    load(tmp_path / "strange.gguf", progress=notes)
    assert any("'strange'" in text for text in notes.notes)


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every conversion."""
    calls: list[str] = []

    def convert(source: Any, *rest: Any) -> Any:
        calls.append(source.name)
        return gguf_reading.convert(source, *rest)

    monkeypatch.setattr(module, "convert", convert)
    return calls


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, fresh_cache: Path, counted: list[str]
) -> None:
    write_gguf(tmp_path / "a.gguf")
    fingerprint = load(tmp_path / "a.gguf").fingerprint
    (place,) = kept(fresh_cache)
    weights = place / "model.safetensors"
    content = bytearray(weights.read_bytes())
    os.utime(weights)
    load(tmp_path / "a.gguf")
    assert len(counted) == 1, "another time alone is no damage"
    content[-5] ^= 1
    weights.write_bytes(content)
    assert load(tmp_path / "a.gguf").fingerprint == fingerprint and len(counted) == 2
    weights.write_bytes(content[:-9])
    assert load(tmp_path / "a.gguf").fingerprint == fingerprint and len(counted) == 3
    (place / "tokenizer.json").unlink()
    assert load(tmp_path / "a.gguf").fingerprint == fingerprint and len(counted) == 4
    (place / "factsmith-gguf.json").write_text("[]")
    assert load(tmp_path / "a.gguf").fingerprint == fingerprint and len(counted) == 5
    record = json.loads((place / "factsmith-gguf.json").read_bytes())
    for part in ("type", "remarks"):
        rest = {key: value for key, value in record.items() if key != part}
        (place / "factsmith-gguf.json").write_text(json.dumps(rest))
        assert load(tmp_path / "a.gguf").fingerprint == fingerprint
    assert len(counted) == 7
    shutil.rmtree(place)
    place.write_text("a file in its place")
    assert load(tmp_path / "a.gguf").fingerprint == fingerprint and len(counted) == 8
    assert load(tmp_path / "a.gguf").fingerprint == fingerprint and len(counted) == 8
    assert kept(fresh_cache) == [place], "nothing is left over"


def test_another_version_of_transformers_reads_the_file_again(
    tmp_path: Path, fresh_cache: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf")
    load(tmp_path / "a.gguf")
    monkeypatch.setattr(module, "_VERSION", "5.99.0")
    load(tmp_path / "a.gguf")
    assert len(counted) == 2 and [each.name.rpartition("-")[2] for each in kept(fresh_cache)] == [
        "5.99.0"
    ]


def test_a_cache_that_cannot_be_written_is_a_note(
    tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "file").write_text("a file where a folder is expected")
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "file"))
    notes = Notes()
    lm = load(tmp_path / "a.gguf", progress=notes)
    assert lm.answer(PROMPTS) == load(tmp_path / "a.gguf").answer(PROMPTS) and len(counted) == 2
    assert "cannot be kept" in notes.notes[0] and "FACTSMITH_CACHE" in notes.notes[0]


def test_a_full_disk_is_a_note(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    notes = Notes()
    load(tmp_path / "a.gguf", progress=notes)
    assert "only 0 MB are free" in notes.notes[0] and kept(fresh_cache) == []


_LOAD = """
import sys
from factsmith.model.load import load
print(load(sys.argv[1]).fingerprint)
"""


@pytest.mark.slow
def test_two_processes_make_one_conversion(tmp_path: Path, fresh_cache: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "a.gguf")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert printed == {load(tmp_path / "a.gguf").fingerprint + "\n"} and len(kept(fresh_cache)) == 1


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


def refused(path: Path, error: type[FactsmithError] = ModelError) -> str:
    """Return the words with which a file is refused."""
    with pytest.raises(error) as caught:
        load(path)
    return str(caught.value)


def test_damaged_files_are_refused_before_any_work(
    tmp_path: Path, fresh_cache: Path, counted: list[str]
) -> None:
    write_gguf(tmp_path / "a.gguf")
    content, file = (tmp_path / "a.gguf").read_bytes(), tmp_path / "damaged.gguf"
    for cut in (0, 3, 10, 40, 500, 4000, len(content) // 2, len(content) - 32):
        file.write_bytes(content[:cut])
        assert re_download(refused(file)), cut
    huge = bytearray(content)
    huge[16:24] = (2**62).to_bytes(8, "little")
    file.write_bytes(huge)
    assert "ends too early" in refused(file)
    file.write_bytes(b"PK\x03\x04" + content[4:])
    assert "not a GGUF file" in refused(file)
    file.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    assert "of version 1" in refused(file)
    file.write_bytes(content[:4] + (3).to_bytes(4, "big") + content[8:])
    assert "big-endian" in refused(file)
    assert not (fresh_cache / "gguf").exists()


def re_download(words: str) -> bool:
    """Return whether an error says that a file is damaged, and what to do."""
    return ("damaged" in words or "empty" in words or "not a GGUF" in words) and (
        "copy or download it again" in words or "give a GGUF file" in words
    )


def test_other_files_are_refused_in_words(tmp_path: Path, fresh_cache: Path) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file, general__architecture="martian")
    words = refused(file)
    assert "'martian'" in words and "llama" in words and "gpt2" in words
    write_gguf(file, split__count=3)
    assert "--merge" in refused(file, InputError)
    write_gguf(file, general__type="adapter")
    assert "holds an adapter, not a model" in refused(file)
    write_gguf(file, llama__block_count=10**8)
    assert "100000000 layers" in refused(file)
    write_gguf(file, llama__feed_forward_length=10**8)
    assert "intermediate_size = 100,000,000" in refused(file)
    write_gguf(file, llama__block_count=4)
    assert "lacks" in refused(file)
    assert "there is no file" in refused(tmp_path / "none.gguf", ModelNotFoundError)


def test_a_folder_may_hold_one_file(tmp_path: Path, fresh_cache: Path) -> None:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "a.gguf")
    lm = load(tmp_path / "model")
    assert lm.gguf is not None and lm.name == str(tmp_path / "model" / "a.gguf")
    write_gguf(tmp_path / "model" / "b.gguf")
    assert "2 GGUF files (a.gguf, b.gguf)" in refused(tmp_path / "model", InputError)
    with pytest.raises(InputError, match="is a file, which has no revisions"):
        load(tmp_path / "model" / "a.gguf", revision="main")


def test_without_the_library_one_sentence_says_how_to_install_it(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf")
    find = gguf_reading.importlib.util.find_spec
    monkeypatch.setattr(
        gguf_reading.importlib.util,
        "find_spec",
        lambda name: None if name == "gguf" else find(name),
    )
    assert 'pip install "factsmith[gguf]"' in refused(tmp_path / "a.gguf")
    monkeypatch.undo()


def test_nothing_of_a_conversion_is_code(tmp_path: Path, fresh_cache: Path) -> None:
    """The cache holds JSON, text and safetensors, so nothing in it is ever run."""
    write_gguf(tmp_path / "a.gguf")
    load(tmp_path / "a.gguf")
    (place,) = kept(fresh_cache)
    suffixes = {each.suffix for each in place.iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}
    (row,) = read_cache().entries
    assert (row.kind, row.model) == ("gguf", "a.gguf") and row.n_bytes > 100_000
    assert "auto_map" not in json.loads((place / "config.json").read_text())
