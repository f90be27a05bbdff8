"""Texts in Parquet, lines of JSON and plain text, compared with the texts that were written."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from conftest import TEXTS
from factsmith.core.errors import InputError
from factsmith.corpus.own import texts_of
from factsmith.corpus.paragraphs import Paragraphs
from factsmith.corpus.text import pieces
from factsmith.corpus.text_files import TextFiles, read_texts
from factsmith.model.language_model import LanguageModel

parquet = pytest.importorskip("pyarrow.parquet", reason="install it: pip install pyarrow")
import pyarrow  # noqa: E402

MANY = [f"{text} {n} «ünï»" for n in range(10) for text in TEXTS]


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    parquet.write_table(table, path, row_group_size=3)


def write_json(path: Path, texts: list[str | None]) -> None:
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts))
    raw = lines.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_every_format_gives_the_texts_in_order_as_often_as_asked(
    name: str, tmp_path: Path, tiny_llama: LanguageModel
) -> None:
    path = tmp_path / name
    if "parquet" in name:
        write_parquet(path, [*MANY[:5], None, *MANY[5:]])
    elif "json" in name:
        write_json(path, [*MANY[:5], None, *MANY[5:]])
    else:
        raw = "\n\n".join(MANY).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    texts = read_texts(path)
    assert list(texts) == MANY == list(texts)
    for limit in (1, 7, 333, float("inf")):
        assert list(pieces(tiny_llama, texts, limit)) == list(pieces(tiny_llama, MANY, limit))
    assert sum(len(p.ids) for p in pieces(tiny_llama, texts, 333)) == 333


def test_folders_patterns_and_lists_are_read_by_name_and_in_the_order_given(tmp_path: Path) -> None:
    for n in (2, 0, 1):
        write_parquet(tmp_path / f"part-{n}.parquet", MANY[n * 4 : n * 4 + 4])
    write_json(tmp_path / "later.jsonl", MANY[12:14])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "README.md").write_text("not a text of the corpus")
    assert list(read_texts(f"{tmp_path}/*.parquet")) == MANY[:12]
    assert list(read_texts(tmp_path)) == [*MANY[12:14], *MANY[:12]]
    two = read_texts([tmp_path / "part-1.parquet", tmp_path / "part-0.parquet"])
    assert list(two) == [*MANY[4:8], *MANY[:4]]
    assert two.identity() == read_texts(two.paths).identity() != read_texts(tmp_path).identity()


def test_other_filesystems_and_columns_are_read(tmp_path: Path) -> None:
    with fsspec.open("memory://corpus/one.jsonl", "wt") as file:
        file.write('{"content": "in memory"}\n\n{"content": "and more"}\n')
    assert list(read_texts("memory://corpus/*.jsonl", column="content")) == [
        "in memory",
        "and more",
    ]
    write_json(tmp_path / "table.data", MANY[:3])
    assert list(read_texts(f"file://{tmp_path}/table.data", format="jsonl")) == MANY[:3]


def test_the_command_line_takes_addresses_and_plain_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", MANY[:3])
    (tmp_path / "a.txt").write_text("plain text")
    with fsspec.open("memory://cli/one.jsonl", "wt") as file:
        file.write('{"text": "in memory"}\n')
    assert isinstance(texts_of([tmp_path / "a.txt"]), Paragraphs)
    for files, expected in (
        ([tmp_path / "a.jsonl", tmp_path / "a.txt"], [*MANY[:3], "plain text"]),
        ([Path("memory://cli/one.jsonl")], ["in memory"]),
        ([Path(f"file://{tmp_path}/a.jsonl")], MANY[:3]),
    ):
        texts = texts_of(files)
        assert isinstance(texts, TextFiles) and list(texts) == expected


def test_what_cannot_be_read_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*args: object, **options: object) -> str:
        with pytest.raises(InputError) as caught:
            list(read_texts(*args, **options))  # type: ignore[arg-type]
        return str(caught.value)

    write_parquet(tmp_path / "a.parquet", list(MANY[:3]), column="body")
    assert "has no column 'text'; its columns are 'id', 'body'" in refusal(tmp_path / "a.parquet")
    assert "there is no file at" in refusal(tmp_path / "missing.parquet")
    assert "there is no file at" in refusal(f"{tmp_path}/*.nothing")
    assert "does not say what it holds" in refusal(_written(tmp_path / "a.bin", "x"))
    assert "format is 'csv'" in refusal(tmp_path / "a.parquet", format="csv")
    assert "cannot be read" in refusal(_written(tmp_path / "torn.parquet", "PAR1 and no more"))
    assert "cannot be read" in refusal(_written(tmp_path / "torn.jsonl.gz", "no gzip"))
    assert "paths is empty" in refusal([])
    assert "files, folders or patterns" in refusal(3)
    assert "paths holds 3" in refusal([tmp_path / "a.parquet", 3])
    bad = _written(tmp_path / "bad.jsonl", '{"text": "one"}\n{"text": 2}\n')
    assert "line 2: 'text' holds a int" in refusal(bad)
    assert "line 2: " in refusal(_written(tmp_path / "b.jsonl", '{"text": "one"}\n{broken\n'))
    array = refusal(_written(tmp_path / "b.json", '["one"]\n'))
    assert "it holds a list; expected one JSON object a line" in array
    half = refusal(_written(tmp_path / "d.jsonl", '{"text": "a \\ud800"}\n'))
    assert "d.jsonl, line 1: 'text' holds half a character at position 2" in half
    assert "no field 'text'; its fields are 'body'" in refusal(
        _written(tmp_path / "c.jsonl", '{"body": "one"}\n')
    )
    assert "nosuchscheme" in refusal("nosuchscheme://bucket/a.parquet")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "is not in UTF-8" in refusal(tmp_path / "latin.txt")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal(tmp_path / "a.parquet")


def test_only_the_first_files_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factsmith.corpus.text_files._LOOKED_INTO", 2)
    for n in range(4):
        write_parquet(tmp_path / f"{n}.parquet", list(MANY[n * 5 : n * 5 + 5]))
    texts = read_texts(tmp_path)
    assert list(texts) == MANY[:20]
    assert [unit.group for unit in texts.units] == [0, 1, 0, 1, None, None]
    write_parquet(tmp_path / "3.parquet", list(MANY[:2]), column="body")
    texts = read_texts(tmp_path)
    with pytest.raises(InputError, match=r"3\.parquet has no column 'text'"):
        list(texts)
    write_parquet(tmp_path / "0.parquet", list(MANY[:2]), column="body")
    with pytest.raises(InputError, match=r"0\.parquet has no column 'text'"):
        read_texts(tmp_path)


def test_marks_of_encodings_and_odd_names_are_understood(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path = tmp_path / f"data[1]-{encoding}.txt.gz"
        path.write_bytes(gzip.compress("Één\r\n\r\nzwei".encode(encoding)))
        assert list(read_texts(path)) == ["Één", "zwei"]
    empty = tmp_path / "empty.parquet"
    write_parquet(empty, [])
    assert list(read_texts(empty)) == [] and "0 files" in repr(TextFiles([], []))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_long_file_in_one_row_group_is_read_in_flat_memory(tmp_path: Path) -> None:
    words = [f"a text of some length {n} " * 20 for n in range(200)]
    path = tmp_path / "long.parquet"
    table = pyarrow.table({"text": [f"{n} {words[n % 200]}" for n in range(200_000)]})
    parquet.write_table(
        table, path, row_group_size=200_000, use_dictionary=False, compression="none"
    )
    del table
    grown = []
    for held in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), "held" * held],
            capture_output=True,
            text=True,
            check=True,
        )
        n_rows, kilobytes = map(int, run.stdout.split())
        assert n_rows == 200_000
        grown.append(kilobytes)
    assert grown[0] < 30_000 < 90_000 < grown[1], "control: a row group that is held"


PEAK = """
import re, sys
from pathlib import Path
import pyarrow.parquet as parquet
from factsmith.corpus.text_files import read_texts

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Holding(parquet.ParquetFile):
    def __init__(self, source, **options):
        super().__init__(source, pre_buffer=True)

if sys.argv[2]:
    parquet.ParquetFile = Holding
texts = read_texts(sys.argv[1])
before = peak()
print(sum(1 for _ in texts), peak() - before)
"""
"""Prints the number of texts, and how many kilobytes more than before reading takes at most."""
