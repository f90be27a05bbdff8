"""Claim: 10,000 facts through append and MEMIT are judged by two local workers at near twice the
speed of one process, with the same rows.

    python benchmarks/scale_campaign.py --facts 10000 --json benchmarks/results/scale_campaign.json
    python benchmarks/scale_campaign.py --facts 300 --size 50            # a trial

A campaign writes `--size` facts at a time, asks each in its prompt, in other phrasings, and about
its neighbours, and takes them back. The same campaign runs in one process with one thread, in one
process with two threads, and on one and two workers of Ray with one thread each. `--one FACTS` does
the runs in one process and on one worker for fewer facts: they only give the rate. Every finished
run keeps its folder and is not repeated. The rows of all runs must be the same, apart from the
seconds.

The overhead of the engine is 1 - rate on n workers / (n · rate of one process with one thread).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith.judge.campaign import Campaign
from factsmith.judge.records import Suite
from factsmith.judge.schedule import Schedule
from factsmith.judge.suites import load_suite
from factsmith.patch.editors import editors


def suite_of(n_facts: int, n_questions: int) -> Suite:
    """Return facts of the atlas, each with the first of its questions of every kind."""
    suite = load_suite("atlas", limit=n_facts, seed=0)
    records = []
    for record in suite.records:
        kinds: dict[str, int] = {}
        asked = []
        for question in record.questions:
            kinds[question.kind] = kinds.get(question.kind, 0) + 1
            if kinds[question.kind] <= n_questions:
                asked.append(question)
        records.append(replace(record, questions=tuple(asked)))
    return replace(suite, records=tuple(records))


def run(
    lm: fs.LanguageModel, suite: Suite, options: argparse.Namespace, name: str, workers: int
) -> dict[str, Any]:
    """Run the campaign, or what is left of it, and return its times and figures."""
    folder = Path(options.folder) / f"{name.replace(' ', '-')}-{len(suite.records)}"
    record = folder / "seconds.json"
    if record.is_file():
        return dict(json.loads(record.read_text()))
    if any(folder.glob("size-*/rows.jsonl")):
        raise SystemExit(f"{folder} holds a run that was interrupted, so its rate is not known")
    campaign = Campaign(
        lm,
        suite,
        options.methods,
        [options.size],
        folder,
        editors=editors,
        known_only=False,
        schedule=Schedule(drift_tokens=0, continued=0, seed=0),
    )
    with ExitStack() as stack:
        began = time.perf_counter()
        if workers:
            stack.enter_context(fs.Ray(workers=workers))
        started = time.perf_counter() - began
        began = time.perf_counter()
        judged = campaign.run(progress=_printed(name))
        seconds = time.perf_counter() - began
    (evaluation,) = judged.evaluations
    n_facts = len(suite.records) * len(options.methods)
    result = {
        "seconds": seconds,
        "start": started,
        "facts_a_second": n_facts / seconds,
        "figures": {name: evaluation.summary(name) for name in evaluation.editors},
    }
    record.write_text(json.dumps(result, default=str))
    return result


def _printed(name: str) -> Any:
    last = [0.0]

    def report(step: str, done: int, total: int | None) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            print(f"    {name}: {step} {done}/{total}", flush=True)

    return report


def rows(folder: Path) -> list[str]:
    """Return the lines of a run that do not hold seconds, nor the file's digest of them."""
    lines = next(folder.glob("size-*/rows.jsonl")).read_text().splitlines()
    return [re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', line) for line in lines[1:]]


def same_rows(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two runs have the same rows. Their checksums cover the seconds, too."""
    plain = [[re.sub(r'"sha256": "\w+"', "", line) for line in each] for each in (first, second)]
    return plain[0] == plain[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=300)
    parser.add_argument("--size", type=int, default=1000, help="facts written at a time")
    parser.add_argument("--one", type=int, help="facts of the runs in one process and one worker")
    parser.add_argument("--questions", type=int, default=2, help="questions of a kind, a fact")
    parser.add_argument("--methods", nargs="+", default=["append", "memit"])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--folder", default="runs/scale_campaign")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lm = fs.load(options.model)
    lm.answer(["The capital of France is"])
    full = suite_of(options.facts, options.questions)
    part = full if options.one is None else suite_of(options.one, options.questions)
    results: dict[str, Any] = {}
    for name, threads, workers, suite in (
        ("one process", 1, 0, part),
        ("two threads", 2, 0, part),
        ("1 worker", 1, 1, part),
        ("2 workers", 1, 2, full),
    ):
        torch.set_num_threads(threads)
        results[name] = run(lm, suite, options, name, workers)
        line = results[name]
        print(f"{name:12} {len(suite.records):6,} facts  {line['seconds']:8.1f} s", end="  ")
        print(f"{line['facts_a_second']:6.2f} facts/s  (start {line['start']:.1f} s)", flush=True)
    base = results["one process"]["facts_a_second"]
    for n, name in ((1, "1 worker"), (2, "2 workers")):
        rate = results[name]["facts_a_second"]
        results[name]["overhead"] = 1 - rate / (n * base)
        print(f"{name}: {rate / base:.2f} times one process, overhead {1 - rate / (n * base):.1%}")
    folder = Path(options.folder)
    first, second = (
        rows(folder / f"{name}-{len(suite.records)}")
        for name, suite in (("one-process", part), ("1-worker", part))
    )
    results["same_rows"] = same_rows(first, second)
    print(f"rows of one process and of one worker are the same: {results['same_rows']}")
    record = {
        "model": options.model,
        "facts": options.facts,
        "facts_in_one_process": len(part.records),
        "facts_at_a_time": options.size,
        "methods": options.methods,
        "results": results,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
