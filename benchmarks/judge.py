"""Claim: judging many records at once is faster than record by record, with the same numbers.

    python benchmarks/judge.py --json benchmarks/results/judge.json

The bundled suite's questions are put to the bundled models, on one thread: for every question the
mean log-probability of its candidates, and the greedy answer. factsmith asks all records at once.
Two oracles go record by record:

    plain    as the papers' scripts do: one padded batch of a record's prompts with their
             candidates, logits at every position, and the answers decoded prompt by prompt with a
             cache
    batched  the same batch, logits only at the tokens of an answer, and the record's prompts
             decoded in one batch

Each of three rounds runs all ways in turn and takes processor time; plain gets a fifth of the
records in each round. The numbers and answers of both oracles are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith import atlas
from factsmith.judge.records import Question, Record
from factsmith.judge.rows import Row
from factsmith.judge.score import score

ANSWER_TOKENS = 9
ROUNDS = 3


def candidates_of(record: Record) -> list[tuple[str, str]]:
    """Return (prompt, candidate) of all candidates of a record, in the order of its questions."""
    return [
        (q.prompt, text)
        for q in record.questions
        for text in (*q.answers[:1], *([q.against] if q.against else []))
    ]


def by_question(record: Record, logs: list[float]) -> Iterator[tuple[Question, list[float]]]:
    """Yield each question of a record with the numbers of its candidates."""
    left = iter(logs)
    for q in record.questions:
        n_candidates = len(q.answers[:1]) + (q.against is not None)
        yield q, [next(left) for _ in range(n_candidates)]


@torch.no_grad()
def plain_scores(lm: fs.LanguageModel, records: list[Record]) -> list[tuple[list[float], str]]:
    """Return the candidates' mean log-probabilities and the answer of each question."""
    scores = []
    for record in records:
        asked = [lm.question(prompt, text) for prompt, text in candidates_of(record)]
        width = max(len(ids) for ids, _, _ in asked)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _, _ in asked])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _, _ in asked])
        logits = lm.module(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        logs = [
            float(logits[i, columns].gather(1, torch.tensor(tail)[:, None]).mean())
            for i, (_, columns, tail) in enumerate(asked)
        ]
        for q, of_question in by_question(record, logs):
            scores.append((of_question, lm.answer([q.prompt], max_new_tokens=ANSWER_TOKENS)[0]))
    return scores


@torch.no_grad()
def batched_scores(lm: fs.LanguageModel, records: list[Record]) -> list[tuple[list[float], str]]:
    """Return the same; logits only where they are needed, answers decoded together."""
    scores = []
    for record in records:
        asked = [lm.question(prompt, text) for prompt, text in candidates_of(record)]
        hidden = lm.last_hidden(lm.align([ids for ids, _, _ in asked], [0] * len(asked)))
        rows = torch.tensor([row for row, (_, columns, _) in enumerate(asked) for _ in columns])
        columns = torch.tensor([column for _, listed, _ in asked for column in listed])
        due = torch.tensor([token for _, _, tail in asked for token in tail])
        logs = lm.head(hidden[rows, columns]).log_softmax(-1).gather(1, due[:, None])[:, 0]
        means = [float(some.mean()) for some in logs.split([len(tail) for _, _, tail in asked])]
        prompts = [lm.prompt_ids(q.prompt) for q in record.questions]
        answers = lm.continue_greedily(prompts, ANSWER_TOKENS)
        for (_, of_question), ids in zip(by_question(record, means), answers, strict=True):
            scores.append((of_question, lm.as_answer(ids)))
    return scores


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of a call, and its result."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def logs_of(row: Row) -> list[float]:
    """Return a row's log-probabilities, as the oracles list them."""
    return [log for log in (row.log_wanted, row.log_against) if log is not None]


def measure(name: str, limit: int) -> dict[str, Any]:
    """Return the seconds a record of all three ways, and how far their numbers differ."""
    lm = fs.load(name)
    records = list(fs.load_suite("atlas", limit=limit).records)
    ours: list[float] = []
    oracles: dict[str, list[float]] = {"batched": [], "plain": []}
    difference, same = 0.0, []
    for start in range(ROUNDS):
        seconds, rows = clock(lambda: score(lm, records, max_new_tokens=ANSWER_TOKENS))
        ours.append(seconds / len(records))
        row_of = {(row.record, row.kind, row.prompt): row for row in rows}
        for way, ask, some in (
            ("batched", batched_scores, records),
            ("plain", plain_scores, records[start % len(records) :: 5]),
        ):
            seconds, expected = clock(lambda ask=ask, some=some: ask(lm, some))
            oracles[way].append(seconds / len(some))
            questions = [(record, q) for record in some for q in record.questions]
            for (record, q), (logs, answer) in zip(questions, expected, strict=True):
                row = row_of[record.id, q.kind, q.prompt]
                differences = (abs(a - b) for a, b in zip(logs_of(row), logs, strict=True))
                difference = max([difference, *differences])
                same.append(row.answer == answer)
    ratios = {
        way: statistics.median(oracle / our for our, oracle in zip(ours, listed, strict=True))
        for way, listed in oracles.items()
    }
    medians = {way: statistics.median(listed) for way, listed in oracles.items()}
    words = "; ".join(
        f"{way}, record by record, {medians[way]:.3f} s: {ratios[way]:.1f} times" for way in oracles
    )
    print(f"{name}: {statistics.median(ours):.3f} s a record; {words}", flush=True)
    return {
        "records": len(records),
        "questions": sum(len(record.questions) for record in records),
        "seconds": {"ours": statistics.median(ours), **medians},
        "times_faster": ratios,
        "largest_difference": difference,
        "same_answers": statistics.fmean(same),
    }


def main() -> None:
    """Measure every bundled model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, given.records) for name in atlas.names()}
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
