"""How fast is studio? Its start, its pages while a job runs, its memory, and its end.

    python benchmarks/studio.py [--rate 50] [--seconds 20] [--json FILE]

It starts `factsmith studio` on a new workspace of the bundled model, as a user would. Claims:

- the first useful page is there within 10 seconds of the start;
- at 50 requests a second for pages, while a job keeps the model busy, no request fails. The latency
  of each is counted from the moment at which it was due, so that a queue would show;
- the memory is the same before and after 1,000 requests;
- Ctrl-C ends the process within seconds, while a job runs and a stream of events is open.

The load comes from the same machine, which has the cores to share.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx

PAGES = (
    "/",
    "/ask/ask",
    "/trace/trace",
    "/lens/lens",
    "/memory/find",
    "/patch/plan",
    "/ledger/log",
    "/judge/evaluate",
    "/export/export",
    "/jobs",
    "/jobs/indicator",
    "/api",
)
"""Pages that a user has open, none of which waits for the model."""

QUESTION = {"prompt": "The currency of Bulgaria is the", "subject": "Bulgaria"}

WARM = 300
"""Requests before the memory is measured: caches and pools are filled by then."""

MANY = 1_000
"""Requests between the two measurements of the memory."""


class Running:
    """A studio in a process of its own."""

    def __init__(self, folder: Path) -> None:
        """Start it, and wait for its first page."""
        command = [sys.executable, "-m", "factsmith", "studio", "--port", "0", "--json"]
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        printed = json.loads(self.process.stdout.readline())
        self.to_link = time.perf_counter() - begin
        self.url, self.token = printed["url"], printed["token"]
        headers = {"authorization": f"Bearer {self.token}"}
        self.api = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        with httpx.Client(follow_redirects=True, timeout=30) as client:
            client.get(printed["link"]).raise_for_status()
            self.to_page = time.perf_counter() - begin
            client.get(f"{self.url}/view/ask.json", params={"prompt": QUESTION["prompt"]})
            self.to_answer = time.perf_counter() - begin
            self.cookies = dict(client.cookies)

    def client(self) -> httpx.AsyncClient:
        """Return a client that has a session."""
        limits = httpx.Limits(max_connections=40, max_keepalive_connections=40)
        return httpx.AsyncClient(base_url=self.url, cookies=self.cookies, timeout=30, limits=limits)

    def memory(self) -> float:
        """Return the resident memory in megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def keep_busy(self, seeds: range) -> list[str]:
        """Start a job for each seed, which takes seconds; return their ids."""
        jobs = []
        for seed in seeds:
            asked = {**QUESTION, "samples": 200, "seed": seed, "kind": "mlp"}
            answer = self.api.post("/api/v1/trace?wait=0", json=asked).raise_for_status()
            jobs.append(answer.json()["job"]["id"])
        return jobs

    def busy(self, jobs: list[str]) -> int:
        """Return how many of these jobs run or wait."""
        listed = self.api.get("/api/v1/jobs").raise_for_status().json()["jobs"]
        return sum(job["state"] in ("running", "waiting") for job in listed if job["id"] in jobs)

    def cancel(self, jobs: list[str]) -> None:
        """Cancel jobs, and wait until none runs."""
        for job in jobs:
            self.api.post(f"/api/v1/jobs/{job}/cancel").raise_for_status()
        while self.busy(jobs):
            time.sleep(0.1)


async def load(running: Running, rate: float, seconds: float) -> dict[str, Any]:
    """Ask for pages at a rate; return latencies in milliseconds, by status."""
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    async with running.client() as client:
        begin = time.perf_counter()

        async def ask(path: str, due: float) -> None:
            try:
                status = str((await client.get(path)).status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            statuses[status] += 1
            latencies.append(1000 * (time.perf_counter() - due))

        tasks = []
        for number, path in zip(range(int(rate * seconds)), itertools.cycle(PAGES), strict=False):
            due = begin + number / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(ask(path, due)))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - begin
    latencies.sort()
    return {
        "requests": len(latencies),
        "a_second": len(latencies) / took,
        "statuses": dict(statuses),
        "failed": len(latencies) - statuses["200"],
        "median_ms": statistics.median(latencies),
        "p95_ms": latencies[int(0.95 * len(latencies))],
        "most_ms": latencies[-1],
    }


async def many(running: Running, count: int) -> dict[str, int]:
    """Ask for pages and answers, eight at a time; return how many answers had each status."""
    statuses: Counter[str] = Counter()
    async with running.client() as client:
        turns = iter(range(count))

        async def ask() -> None:
            for number in turns:
                path = PAGES[number % len(PAGES)]
                if number % 10 == 0:
                    path = f"/view/ask.json?prompt=Paris+is&lines={1 + number % 3}"
                statuses[str((await client.get(path)).status_code)] += 1

        await asyncio.gather(*(ask() for _ in range(8)))
    return dict(statuses)


def ended(running: Running) -> dict[str, Any]:
    """End studio while a job runs and a stream is open; return how long it takes."""
    jobs = running.keep_busy(range(100, 105))
    with (
        httpx.Client(cookies=running.cookies, timeout=30) as client,
        client.stream("GET", f"{running.url}/events") as stream,
    ):
        next(stream.iter_lines())
        busy = running.busy(jobs)
        begin = time.perf_counter()
        running.process.send_signal(signal.SIGINT)
        code = running.process.wait(60)
        seconds = time.perf_counter() - begin
    return {"jobs_left": busy, "seconds_to_end": seconds, "exit_code": code}


def measured(rate: float, seconds: float) -> dict[str, Any]:
    """Return all that is claimed."""
    others = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        running = Running(Path(folder))
        try:
            result: dict[str, Any] = {
                "start": {
                    "seconds_to_link": running.to_link,
                    "seconds_to_page": running.to_page,
                    "seconds_to_answer": running.to_answer,
                },
                "idle": asyncio.run(load(running, rate, seconds / 2)),
            }
            jobs = running.keep_busy(range(1, 41))
            result["busy"] = asyncio.run(load(running, rate, seconds))
            result["busy"]["jobs_left"] = running.busy(jobs)  # 0: the model was idle at the end
            running.cancel(jobs)
            asyncio.run(many(running, WARM))
            before = running.memory()
            statuses = asyncio.run(many(running, MANY))
            after = running.memory()
            result["memory"] = {
                "requests": MANY,
                "statuses": statuses,
                "megabytes_before": before,
                "megabytes_after": after,
                "megabytes_more": after - before,
            }
            result["end"] = ended(running)
        finally:
            running.api.close()
            running.process.kill()
            running.process.communicate()
    machine = {"cores": os.cpu_count(), "load_of_others": round(others, 1)}
    return {"rate": rate, "seconds": seconds, "machine": machine, **result}


def main() -> None:
    """Read the arguments, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long, with a job")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    result = measured(options.rate, options.seconds)
    for part, numbers in result.items():
        if isinstance(numbers, dict):
            for name, value in numbers.items():
                shown = f"{value:.2f}" if isinstance(value, float) else value
                print(f"{part:8} {name:20} {shown}")
    if options.json is not None:
        text = json.dumps(result, indent=1) + "\n"
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
