"""Claim: turns make a model safe to ask from several threads, and cost one thread almost nothing.

    python benchmarks/threads.py --json benchmarks/results/threads.json

The bundled models answer prompts one at a time, on one torch thread:

    without    one thread, and turns do nothing
    with       one thread, and each ask takes a turn
    threads    four threads share one model, and each ask takes a turn

Rounds run all ways in turn; the medians count. The first two take processor time, the last takes
real time, because it may use several cores. All answers must be those of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith.model.turns import Turns

PROMPTS = [
    "The maker of Fiat 127 is",
    "The currency of Bulgaria is the",
    "The seat of government of Bulgaria is",
    "The first language of Danielle Darrieux is",
]
ASKS, ROUNDS, THREADS = 5, 5, 4


@contextmanager
def no_turns() -> Iterator[None]:
    """Let turns do nothing while the block runs."""
    take, give = Turns.take, Turns.give
    Turns.take = Turns.give = lambda self, turn: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Turns.take, Turns.give = take, give  # type: ignore[method-assign]


def ask(lm: fs.LanguageModel, prompts: list[str], answers: list[str]) -> None:
    """Ask one prompt at a time."""
    answers.extend(lm.answer([prompt])[0] for prompt in prompts)


def in_threads(lm: fs.LanguageModel) -> list[str]:
    """Ask in four threads, each its own prompt; return the answers in the order of one thread."""
    answers: list[list[str]] = [[] for _ in range(THREADS)]
    threads = [
        threading.Thread(target=ask, args=(lm, [prompt] * ASKS, each))
        for prompt, each in zip(PROMPTS, answers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for row in zip(*answers, strict=True) for answer in row]


def seconds(clock: Callable[[], float], work: Callable[[], object]) -> float:
    """Return how long some work takes by a clock."""
    began = clock()
    work()
    return clock() - began


def measure(name: str) -> dict[str, Any]:
    """Return the times of one model, and how many answers differ from those of one thread."""
    lm = fs.load(name)
    prompts = PROMPTS * ASKS
    expected: list[str] = []
    ask(lm, prompts, expected)
    times: dict[str, list[float]] = {"without": [], "with": [], "one": [], "threads": []}
    wrong = 0
    for _ in range(ROUNDS):
        with no_turns():
            times["without"].append(seconds(time.process_time, lambda: ask(lm, prompts, [])))
        times["with"].append(seconds(time.process_time, lambda: ask(lm, prompts, [])))
        times["one"].append(seconds(time.perf_counter, lambda: ask(lm, prompts, [])))
        began = time.perf_counter()
        answers = in_threads(lm)
        times["threads"].append(time.perf_counter() - began)
        wrong += sum(a != b for a, b in zip(answers, expected, strict=True))
    median = {way: statistics.median(each) / len(prompts) for way, each in times.items()}
    return {
        "model": name,
        "ms_without": round(1e3 * median["without"], 3),
        "ms_with": round(1e3 * median["with"], 3),
        "cost": round(median["with"] / median["without"] - 1, 4),
        "asks_a_second_one_thread": round(1 / median["one"], 1),
        "asks_a_second_four_threads": round(1 / median["threads"], 1),
        "wrong": wrong,
    }


def main() -> None:
    """Measure the bundled models and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name) for name in ("atlas", "atlas-llama")]
    print(f"{'model':<12} {'without':>9} {'with':>9} {'cost':>7} {'1 thread':>9} {'4 threads':>10}")
    for row in rows:
        print(
            f"{row['model']:<12} {row['ms_without']:>6.2f} ms {row['ms_with']:>6.2f} ms "
            f"{row['cost']:>7.1%} {row['asks_a_second_one_thread']:>7.1f}/s "
            f"{row['asks_a_second_four_threads']:>8.1f}/s"
        )
    print(f"wrong answers in four threads: {sum(row['wrong'] for row in rows)}")
    if options.json:
        result = {"cores": os.cpu_count(), "rounds": ROUNDS, "asks": ASKS * THREADS, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
