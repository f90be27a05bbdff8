"""Texts that Ray Data reads and tokenizes, compared with the same texts in this process."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from conftest import TEXTS
from factsmith.cluster.engine import Ray
from factsmith.core.errors import InputError
from factsmith.core.executor import Local, running_on
from factsmith.corpus import text as corpus_text
from factsmith.corpus.moments import second_moments
from factsmith.corpus.text import Piece, pieces
from factsmith.corpus.text_files import TextFiles, read_texts
from factsmith.model.language_model import LanguageModel
from factsmith.read.trigger_scan import TriggerRun, find_triggers
from factsmith.read.triggers import SIGNS

ray = pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
pytest.importorskip("ray.data", reason="install it: pip install 'factsmith[ray]'")
arrow = pytest.importorskip("pyarrow", reason="install it: pip install pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="install it: pip install pyarrow")

MANY = [f"{text} {n}" for n in range(30) for text in TEXTS]
MIXED = [f"{text} {n}" for n in range(40) for text in [*TEXTS, "word " * (n * 7)]]


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


@pytest.fixture
def corpus(tmp_path: Path) -> TextFiles:
    """Return three files that hold MIXED: Parquet in row groups, packed JSON, paragraphs."""
    table = arrow.table({"n": list(range(90)), "text": MIXED[:90]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in MIXED[90:150])
    (tmp_path / "c.txt").write_text("\n\n".join(MIXED[150:]), encoding="utf-8")
    return read_texts(tmp_path)


def read(lm: LanguageModel, texts: TextFiles | list[str], limit: float = 1e9) -> list[Piece]:
    return list(pieces(lm, texts, limit))


def test_ray_data_gives_the_pieces_of_one_process(
    engine: Ray, corpus: TextFiles, tiny_llama: LanguageModel
) -> None:
    texts = list(corpus)
    assert [text.strip() for text in texts] == [text.strip() for text in MIXED]
    expected = read(tiny_llama, texts)
    assert len(expected) > len(texts), "control: long texts are cut"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Data warns of its own defaults
        context = importlib.import_module("ray.data").DataContext.get_current()
    before = context.execution_options.preserve_order, context.target_max_block_size
    with running_on(engine):
        assert read(tiny_llama, corpus) == expected
        assert read(tiny_llama, corpus, 333) == read(tiny_llama, texts, 333)
        assert read(tiny_llama, corpus, 1) == read(tiny_llama, texts, 1)
    assert read(tiny_llama, corpus) == expected, "without Ray"
    after = context.execution_options.preserve_order, context.target_max_block_size
    assert before == after, "the user's own datasets keep their settings"
    assert read(tiny_llama, read_texts(corpus.paths[::-1])) != expected, "control: another order"


def test_a_file_that_another_process_cannot_see_is_named(
    engine: Ray, tmp_path: Path, tiny_gpt2: LanguageModel
) -> None:
    lines = [json.dumps({"text": text}) for text in MIXED[:50]]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    texts = read_texts([tmp_path / "b.jsonl"])
    (tmp_path / "b.jsonl").unlink()
    with running_on(engine), pytest.raises(InputError, match=r"b\.jsonl cannot be read"):
        read(tiny_gpt2, texts)


def test_a_file_in_memory_is_read_where_it_is(engine: Ray, tiny_gpt2: LanguageModel) -> None:
    with fsspec.open("memory://shared/a.jsonl", "wt") as stream:
        stream.write(json.dumps({"text": TEXTS[0]}))
    texts = read_texts("memory://shared/*.jsonl")
    with running_on(engine):
        assert read(tiny_gpt2, texts) == read(tiny_gpt2, TEXTS[:1])


def test_a_stream_that_is_left_early_leaves_nothing_at_work(
    engine: Ray, corpus: TextFiles, tiny_gpt2: LanguageModel
) -> None:
    with running_on(engine):
        stream = pieces(tiny_gpt2, corpus)
        first = next(stream)
        stream.close()
        assert first == read(tiny_gpt2, corpus, len(first.ids))[0]


class LateFirst:
    """Reads numbers; the first waits until the second was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, unit: int) -> Iterator[tuple[int, bool]]:
        deadline = time.monotonic() + 30
        while unit == 0 and not (self.folder / "1").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (self.folder / str(unit)).touch()
        yield unit, (self.folder / "1").exists()


def test_units_come_in_order_although_later_ones_are_read_first(
    engine: Ray, tmp_path: Path
) -> None:
    rows = list(engine.stream(LateFirst(tmp_path), range(6)))
    assert [unit for unit, _ in rows] == list(range(6))
    assert rows[0][1], "control: the second was read before the first"
    assert list(engine.stream(LateFirst(tmp_path), [])) == []


def test_a_run_over_files_that_was_killed_goes_on_on_other_workers(
    engine: Ray, corpus: TextFiles, tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    merge, merged = TriggerRun.merge, []

    def killed(run: TriggerRun, other: TriggerRun) -> None:
        if len(merged) == 3:
            raise KeyboardInterrupt
        merge(run, other)
        merged.append(other.n_tokens)

    folder = tmp_path / "triggers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factsmith.core.artefact._SECONDS", 0.0)
        patch.setattr(corpus_text, "WINDOW", 7)
        straight = find_triggers(tiny_gpt2, list(corpus), [0], top=3)
        patch.setattr(TriggerRun, "merge", killed)
        with running_on(engine), pytest.raises(KeyboardInterrupt):
            find_triggers(tiny_gpt2, corpus, [0], top=3, folder=folder)
        assert (folder / "unfinished.safetensors").is_file()
        done: list[int] = []
        with running_on(Local()):
            resumed = find_triggers(
                tiny_gpt2,
                corpus,
                [0],
                top=3,
                folder=folder,
                progress=lambda step, n, total: done.append(n),
            )
    assert done[0] in itertools.accumulate(merged), "it goes on after a part"
    assert resumed.texts == straight.texts
    for sign in SIGNS:
        texts, expected = resumed.banks[0,].texts[sign], straight.banks[0,].texts[sign]
        assert torch.equal(texts, expected)
    assert resumed.corpus == straight.corpus and resumed.n_tokens == straight.n_tokens
