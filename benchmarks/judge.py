"""Judging many records at once against record by record.

    python benchmarks/judge.py --json benchmarks/results/judge.json

The bundled suite's questions put to the bundled models, one thread: for every question the mean log-probability of its candidates, and the
greedy answer. All records at once, against two oracles that go record by record:

    plain    as the papers' scripts do it: one padded batch of a record's prompts with their candidates, logits everywhere, and the answers
             decoded prompt by prompt with a cache
    batched  the same batch, logits only where an answer's token is due, and the record's prompts decoded in one batch

Three rounds of all in turn, processor time; plain has a fifth of the records in each. Numbers and answers of both are compared with ours.
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
from factsmith import atlas
from factsmith.judge.records import Record
from factsmith.judge.rows import Row
from factsmith.judge.score import score

NEW = 9  # tokens of an answer
ROUNDS = 3


@torch.no_grad()
def plain_scores(lm: fs.LanguageModel, records: list[Record]) -> list[tuple[list[float], str]]:
    """For each question the mean log-probabilities of its candidates and the answer, record by record."""
    found = []
    for record in records:
        pairs = [
            (q.prompt, text)
            for q in record.questions
            for text in (*q.answers[:1], *([q.against] if q.against else []))
        ]
        asked = [lm.question(prompt, text) for prompt, text in pairs]
        width = max(len(ids) for ids, _, _ in asked)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _, _ in asked])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _, _ in asked])
        logits = lm.module(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        logs = iter(
            [
                float(logits[i, columns].gather(1, torch.tensor(tail)[:, None]).mean())
                for i, (_, columns, tail) in enumerate(asked)
            ]
        )
        for q in record.questions:
            n = len(q.answers[:1]) + (q.against is not None)
            found.append(
                ([next(logs) for _ in range(n)], lm.answer([q.prompt], max_new_tokens=NEW)[0])
            )
    return found


@torch.no_grad()
def batched_scores(lm: fs.LanguageModel, records: list[Record]) -> list[tuple[list[float], str]]:
    """The same, with what a record allows: logits where they are due, and its answers decoded together."""
    found = []
    for record in records:
        pairs = [
            (q.prompt, text)
            for q in record.questions
            for text in (*q.answers[:1], *([q.against] if q.against else []))
        ]
        asked = [lm.question(prompt, text) for prompt, text in pairs]
        hidden = lm.last_hidden(lm.align([ids for ids, _, _ in asked], [0] * len(asked)))
        rows = torch.tensor([row for row, (_, columns, _) in enumerate(asked) for _ in columns])
        columns = torch.tensor([column for _, own, _ in asked for column in own])
        due = torch.tensor([token for _, _, tail in asked for token in tail])
        logs = lm.head(hidden[rows, columns]).log_softmax(-1).gather(1, due[:, None])[:, 0]
        means = iter([float(own.mean()) for own in logs.split([len(tail) for _, _, tail in asked])])
        answers = lm.continue_greedily([lm.prompt_ids(q.prompt) for q in record.questions], NEW)
        for q, ids in zip(record.questions, answers, strict=True):
            n = len(q.answers[:1]) + (q.against is not None)
            found.append(([next(means) for _ in range(n)], lm.as_answer(ids)))
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
    """Seconds a record of all three ways, and how far apart their numbers are."""
    lm = fs.load(name)
    records = list(fs.load_suite("atlas", limit=limit).records)
    ours: list[float] = []
    oracles: dict[str, list[float]] = {"batched": [], "plain": []}
    apart, same = 0.0, []
    for start in range(ROUNDS):
        seconds, rows = clock(lambda: score(lm, records, max_new_tokens=NEW))
        ours.append(seconds / len(records))
        told = {(row.record, row.kind, row.prompt): row for row in rows}
        for way, ask, some in (
            ("batched", batched_scores, records),
            ("plain", plain_scores, records[start::5]),
        ):
            seconds, expected = clock(lambda ask=ask, some=some: ask(lm, some))
            oracles[way].append(seconds / len(some))
            for (record, q), (logs, answer) in zip(
                [(r, q) for r in some for q in r.questions], expected, strict=True
            ):
                row = told[record.id, q.kind, q.prompt]
                apart = max([apart, *(abs(a - b) for a, b in zip(logs_of(row), logs, strict=True))])
                same.append(row.answer == answer)
    ratios = {
        way: statistics.median(b / a for a, b in zip(ours, own, strict=True))
        for way, own in oracles.items()
    }
    words = "; ".join(
        f"{way}, record by record, {statistics.median(own):.3f} s: {ratios[way]:.1f} times"
        for way, own in oracles.items()
    )
    print(f"{name}: {statistics.median(ours):.3f} s a record; {words}", flush=True)
    return {
        "records": len(records),
        "questions": sum(len(record.questions) for record in records),
        "seconds": {
            "ours": statistics.median(ours),
            **{way: statistics.median(own) for way, own in oracles.items()},
        },
        "times_faster": ratios,
        "largest_difference": apart,
        "same_answers": statistics.fmean(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measured(name, given.records) for name in atlas.names()}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
