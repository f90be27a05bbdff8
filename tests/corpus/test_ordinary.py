"""The bundled corpus: what it is made of, its recorded digest, and the tool that makes it."""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import itertools
from pathlib import Path

import pytest

from conftest import shared_dir
from factsmith import atlas
from factsmith.atlas.texts import BUNDLED_PROSE, bundled_prose, read_prose
from factsmith.corpus.ordinary import DIGEST, NAME, PASSAGE, OrdinaryTexts, ordinary_texts


def test_its_digest_is_the_recorded_one() -> None:
    digest = hashlib.sha256("\n".join(ordinary_texts()).encode()).hexdigest()
    assert f"{NAME}-{digest}" == DIGEST, "the corpus has changed: it needs another name and digest"
    assert DIGEST.isascii() and DIGEST.isprintable() and len(DIGEST) <= 128
    others = hashlib.sha256("\n".join([*ordinary_texts()][1:]).encode()).hexdigest()
    assert f"{NAME}-{others}" != DIGEST


def test_it_is_the_same_each_time() -> None:
    assert list(ordinary_texts()) == list(OrdinaryTexts()) and len(ordinary_texts()) > 2000
    assert all(PASSAGE <= len(text) < 2 * PASSAGE for text in ordinary_texts())


def share_of_prose(passages: list[str]) -> float:
    """Return which share of the characters is prose."""
    text = " ".join(passages)
    prose = sum(len(sentence) for sentence in bundled_prose() if sentence in text)
    return prose / len(text)


def test_any_beginning_has_facts_and_prose_in_proportion() -> None:
    passages = list(ordinary_texts())
    shares = [share_of_prose(passages[:n]) for n in (20, 60, 200)]
    assert all(abs(share - 0.55) < 0.1 for share in shares), shares
    # All prose first would not be a mixture.
    sentences = bundled_prose()[:100]
    assert share_of_prose(sentences) > 0.9


def test_the_statements_are_of_bundled_facts() -> None:
    objects = {fact.object for fact in atlas.facts()}
    passages = list(itertools.islice(ordinary_texts(), 50))
    prose = set(bundled_prose())
    for passage in passages:
        for sentence in prose:
            passage = passage.replace(sentence, "\n") if sentence in passage else passage
        for statement in filter(str.strip, passage.split("\n")):
            assert any(f" {name}." in statement for name in objects), statement


def test_the_prose_names_its_books() -> None:
    lines = bz2.decompress(BUNDLED_PROSE.read_bytes()).decode().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header and "public-domain" in header[0]
    assert sum("Chesterton" in line for line in header) == 3
    assert len(bundled_prose()) == len(lines) - len(header) == 5400
    assert BUNDLED_PROSE.stat().st_size < 250_000


def test_the_tool_makes_the_bundled_file() -> None:
    books = shared_dir() / "data" / "text"
    path = Path(__file__).resolve().parents[2] / "tools" / "prose.py"
    spec = importlib.util.spec_from_file_location("prose", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    bundled = bz2.decompress(BUNDLED_PROSE.read_bytes())
    assert bz2.decompress(tool.packed_prose(books)) == bundled
    assert bz2.decompress(tool.packed_prose(books, seed=1)) != bundled
    assert set(bundled_prose()) < set(read_prose(books))
    with pytest.raises(FileNotFoundError):
        tool.packed_prose(books / "elsewhere")
