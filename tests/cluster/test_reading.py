"""Texts that Ray Data reads and tokenizes, compared with the same texts in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from factsmith.cluster.engine import Ray
from factsmith.core.errors import InputError
from factsmith.core.executor import Local, running_on
from factsmith.corpus.moments import second_moments
from factsmith.corpus.text import pieces
from factsmith.corpus.text_files import read_texts
from factsmith.model.language_model import LanguageModel

ray = pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
pytest.importorskip("ray.data", reason="install it: pip install 'factsmith[ray]'")

MANY = [f"{text} {n}" for n in range(30) for text in TEXTS]


@pytest.fixture(scope="module")
def engine() -> Iterator[Ray]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Ray(workers=2, part_tokens=400) as started, running_on(Local()):
        yield started


def write(folder: Path, n_files: int) -> None:
    for n in range(n_files):
        part = MANY[n * len(MANY) // n_files : (n + 1) * len(MANY) // n_files]
        (folder / f"{n}.txt").write_text("\n\n".join(part))


def test_pieces_and_second_moments_are_the_same_to_the_last_bit(
    engine: Ray, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    write(tmp_path, 5)
    texts = read_texts(tmp_path)
    for limit in (100, 1234, float("inf")):
        expected = list(pieces(tiny_llama, MANY, limit))
        with running_on(engine):
            assert list(pieces(tiny_llama, texts, limit)) == expected
    with running_on(engine):
        read = second_moments(tiny_llama, texts, [1], max_tokens=3000)[1]
    with running_on(Local(cuts=True, part_tokens=400)):
        expected_moment = second_moments(tiny_llama, MANY, [1], max_tokens=3000)[1]
    assert torch.equal(read.matrix, expected_moment.matrix)
    assert read.corpus == expected_moment.corpus and read.count == 3000


def test_an_error_of_a_row_arrives_after_the_rows_before_it(engine: Ray, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    texts = read_texts(tmp_path / "a.jsonl")
    rows = engine.stream(iter, texts.units)
    assert [next(rows), next(rows)] == ["one", "two"]
    with pytest.raises(InputError, match=r"line 3: 'text' holds a int"):
        next(rows)
