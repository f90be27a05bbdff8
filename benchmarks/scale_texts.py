"""Claim: Ray Data reads and tokenizes files next to the workers, and gives the same pieces.

    python benchmarks/scale_texts.py --json benchmarks/results/scale_texts.json

Parquet files of ordinary text are cut into pieces in one process, and by Ray Data with one and two
processes, in the same run. The ids and spans must be equal. The first run on Ray is left out: it
starts the processes. Two figures are shown: tokens per second of wall time, and of the processor
time that the calling thread needs. The second is the limit that a cluster cannot pass, because one
process puts the pieces together. Another process that uses the same cores lowers the first figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

import factsmith as fs
from factsmith.core.executor import Executor
from factsmith.corpus.text import pieces


def write(folder: Path, rounds: int, n_files: int) -> int:
    """Write the bundled text several times as Parquet files; return its number of characters."""
    texts = [f"{n}. {text}" for n in range(rounds) for text in fs.ordinary_texts()]
    for n in range(n_files):
        table = pyarrow.table({"text": texts[n::n_files]})
        pyarrow.parquet.write_table(table, folder / f"{n:03}.parquet")
    return sum(map(len, texts))


def measure(model: str, rounds: int, n_files: int, repeats: int) -> dict[str, Any]:
    """Return tokens per second of each way, after checking that they give the same pieces."""
    lm = fs.load(model)
    seconds: dict[str, list[float]] = {}
    in_caller: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        n_characters = write(Path(folder), rounds, n_files)
        texts = fs.read_texts(folder)
        expected = list(pieces(lm, texts))

        def run(name: str, executor: Executor) -> None:
            with fs.running_on(executor):
                assert list(pieces(lm, texts)) == expected, name
                for _ in range(repeats):
                    began, worked = time.perf_counter(), time.thread_time()
                    for _piece in pieces(lm, texts):
                        pass
                    seconds.setdefault(name, []).append(time.perf_counter() - began)
                    in_caller.setdefault(name, []).append(time.thread_time() - worked)

        run("one process", fs.Local())
        for workers in (1, 2):
            with fs.Ray(workers=workers) as ray:
                run(f"Ray Data, {workers} at once", ray)
    n_tokens = sum(len(piece.ids) for piece in expected)
    return {
        "model": model,
        "files": n_files,
        "characters": n_characters,
        "tokens": n_tokens,
        "seconds": seconds,
        "seconds_of_caller": in_caller,
        "tokens_per_second": {
            name: n_tokens / statistics.median(times) for name, times in seconds.items()
        },
        "tokens_per_second_of_caller": {
            name: n_tokens / statistics.median(times) for name, times in in_caller.items()
        },
        "equal_pieces": True,
    }


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--rounds", type=int, default=8, help="how often the bundled text is read")
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    record = measure(options.model, options.rounds, options.files, options.repeats)
    print(f"{record['tokens']:,} tokens in {record['files']} Parquet files, {record['model']}")
    print(f"{'tokens a second':24} {'of wall time':>14} {'of the caller':>14}")
    for name, rate in record["tokens_per_second"].items():
        print(f"{name:24} {rate:14,.0f} {record['tokens_per_second_of_caller'][name]:14,.0f}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
