"""Judging many records at once against record by record.

    python benchmarks/judge.py --json benchmarks/results/judge.json

The bundled suite's questions put to the bundled models, one thread: for every question the mean log-probability of its candidates, whether
greedy decoding gives them, and the greedy answer. `plain_scores` is the oracle, as the papers' scripts do it: for each record one padded
batch of every prompt with every candidate, and the answers decoded prompt by prompt with a cache. Both in turn on five parts of the
records, processor time; the numbers are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith.judge.evaluate import Row, score
from factsmith.judge.suites import Record
from factsmith.model import atlas

NEW = 9  # tokens of an answer


@torch.no_grad()
def plain_scores(lm: fs.LanguageModel, records: list[Record]) -> list[tuple[list[float], str]]:
    """For each question the mean log-probabilities of its candidates and the answer, record by record."""
    found = []
    for record in records:
        pairs = [(q.prompt, text) for q in record.questions for text in (*q.answers[:1], *([q.against] if q.against else []))]
        asked = [lm.question(prompt, text) for prompt, text in pairs]
        width = max(len(ids) for ids, _, _ in asked)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _, _ in asked])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _, _ in asked])
        logits = lm.module(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        logs = iter([float(logits[i, columns].gather(1, torch.tensor(tail)[:, None]).mean()) for i, (_, columns, tail) in enumerate(asked)])
        for q in record.questions:
            n = len(q.answers[:1]) + (q.against is not None)
            found.append(([next(logs) for _ in range(n)], lm.answer([q.prompt], max_new_tokens=NEW)[0]))
    return found


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came out."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def logs_of(row: Row) -> list[float]:
    """A row's log-probabilities, as the oracle lists them."""
    return [log for log in (row.log_wanted, row.log_against) if log is not None]


def measured(name: str, limit: int) -> dict[str, Any]:
    """Seconds a record of both ways, and how far apart their numbers are."""
    lm = fs.load(name)
    records = list(fs.load_suite("atlas", limit=limit).records)
    parts = [records[start::5] for start in range(5)]
    ours, plain, apart, same = [], [], 0.0, []
    for part in parts:
        seconds, rows = clock(lambda part=part: score(lm, part, max_new_tokens=NEW))
        ours.append(seconds / len(part))
        seconds, expected = clock(lambda part=part: plain_scores(lm, part))
        plain.append(seconds / len(part))
        for row, (logs, answer) in zip(rows, expected, strict=True):
            apart = max([apart, *(abs(a - b) for a, b in zip(logs_of(row), logs, strict=True))])
            same.append(row.answer == answer)
    ratio = statistics.median(b / a for a, b in zip(ours, plain, strict=True))
    print(
        f"{name}: {statistics.median(ours):.3f} s a record, record by record {statistics.median(plain):.3f} s: {ratio:.1f} times",
        flush=True,
    )
    return {
        "records": len(records),
        "questions": sum(len(record.questions) for record in records),
        "seconds": {"ours": statistics.median(ours), "plain": statistics.median(plain)},
        "times_faster": ratio,
        "largest_difference": apart,
        "same_answers": statistics.fmean(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measured(name, given.records) for name in atlas.names()}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
