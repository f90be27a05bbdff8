"""Claim: what every editor is worth on the bundled models: single edits, batches, and sequences.

    python benchmarks/truth.py --model atlas --folder runs            # hours; killed, it goes on
    python benchmarks/truth.py --model atlas --suite counterfact.json --folder runs
    python benchmarks/truth.py --folder runs --pages docs             # tables and pictures: seconds

The runs and reports are the library's own (`evaluate`, `Evaluation`); this script says which jobs
there are. Edits are counted by load = facts / (edited layers x d_ff), with three layers for the
methods that spread. ROME, r-ROME and FT-L write into one layer, so their own load is three times
that. All methods have their recommended settings, with one exception: above a load of 0.11, repairs
cost minutes and take little, so MEMIT and its like get one pass of at most 40 steps (docs/patch.md
has them repaired). ROME and r-ROME write a batch one fact after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import factsmith as fs
from factsmith.edit.methods import METHODS
from factsmith.judge.editor import Editor
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.records import Record, Suite
from factsmith.judge.rows import BASE
from factsmith.judge.usable import usable
from factsmith.show.plots.judging import judged_chart, round_by_round

SPREAD = ("memit", "emmet", "alphaedit")
TRAINED = ("ft-l", "lora")
SINGLE = ("rome", "r-rome")
EVERY = (*SINGLE, *SPREAD, *TRAINED)
LAYERS = 3
DRAWN = 3200
"""Records that are drawn from the bundled suite."""

NAMES = {
    "rome": "ROME",
    "r-rome": "r-ROME",
    "memit": "MEMIT",
    "emmet": "EMMET",
    "alphaedit": "AlphaEdit",
    "ft-l": "FT-L",
    "lora": "LoRA",
}
KINDS = (
    ("prompt", "exact"),
    ("paraphrase", "exact"),
    ("neighbour", "stayed"),
    ("multihop", "exact"),
    ("negation", "exact"),
)
HOWS = ("single", "batch", "sequence")


class Job(NamedTuple):
    """Records written `size` at a time, `records` of them in all."""

    how: str
    """One of `HOWS`."""
    load: float
    """The load of an edit; of a sequence, the load of all rounds."""
    size: int
    records: int
    methods: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of the folder of its rows. Jobs that differ by methods alone share it."""
        return f"{self.how}-{self.size}-of-{self.records}"


def jobs(neurons: int, available: int) -> list[Job]:
    """Return the jobs, the most useful first.

    Args:
        neurons: Number of facts at a load of 1.
        available: Number of records.
    """

    def facts(load: float) -> int:
        return round(load * neurons)

    few, some, many, most = facts(0.003), facts(0.03), facts(0.1), facts(0.33)
    rounds = min(most, available)
    in_sequence = ("memit", "alphaedit", "ft-l", "emmet", "lora")
    listed = [
        Job("batch", 0.003, few, 10 * few, EVERY),
        Job("batch", 0.03, some, 2 * some, EVERY),
        Job("single", 1 / neurons, 1, 100, EVERY),
        Job("batch", 0.1, many, many, (*SPREAD, *TRAINED)),
        Job("sequence", rounds / neurons, -(-rounds // 10), rounds, in_sequence),
        Job("batch", 1.0, facts(1), facts(1), (*SPREAD, *TRAINED)),
        Job("batch", 0.33, most, most, (*SPREAD, *TRAINED)),
        Job("batch", 0.1, many, many, SINGLE),
        Job("sequence", 0.1, -(-many // 10), many, SINGLE),
        Job("batch", 0.33, most, most, SINGLE),
    ]
    return [job for job in listed if job.records <= available]


# ── running ───────────────────────────────────────────────────────────────────────────────────────


def drawn(lm: fs.LanguageModel, source: str) -> tuple[Suite, list[Record]]:
    """Return a suite, and its records whose facts the model knows, in random order."""
    suite = fs.load_suite(source, limit=DRAWN if source == "atlas" else None)
    records = list(usable(lm, suite.records)[0])
    random.Random(0).shuffle(records)
    return suite, records


def make_editors(
    lm: fs.LanguageModel, job: Job, methods: Sequence[str], folder: Path
) -> Mapping[str, Editor]:
    """Return some of a job's editors."""
    config: dict[str, Any] = {}
    if job.load > 0.11:
        config = {
            name: dataclasses.replace(METHODS[name].config.recommended(lm), repair=0, steps=40)
            for name in methods
            if name in SPREAD
        }
    return fs.editors(lm, methods, config=config, folder=folder)


def finished_methods(folder: Path) -> set[str]:
    """Return the methods that have made all their edits in a folder."""
    if not (folder / "rows.jsonl").is_file():
        return set()
    return set(Evaluation.load(folder).finished().editors) - {BASE}


def run_jobs(given: argparse.Namespace) -> None:
    """Run the jobs of one model and suite, or what is left of them."""
    lm = fs.load(given.model)
    suite, records = drawn(lm, given.suite)
    listed = jobs(LAYERS * lm.ffn[0].d_ff, len(records))
    print(f"{given.model}, {suite.name}: {len(records):,} records, {len(listed)} jobs", flush=True)
    for number, job in enumerate(listed):
        if given.only and str(number) not in given.only:
            continue
        began = time.process_time()
        folder = given.folder / given.model / suite.name / job.folder
        done = finished_methods(folder)
        missing = [name for name in job.methods if name in given.methods and name not in done]
        editors = make_editors(lm, job, missing, given.folder) if missing else {}
        for name, editor in editors.items():
            fs.evaluate(
                lm,
                records[: job.records],
                {name: editor},
                size=job.size,
                sequence=job.how == "sequence",
                continued=100 if job.how == "sequence" else 30,
                folder=folder,
            )
            seconds = time.process_time() - began
            print(f"{job.how} {job.load:.3g} {name}: {seconds:.0f} s", flush=True)


# ── collecting ────────────────────────────────────────────────────────────────────────────────────


def collect(folder: Path, model: str) -> Iterator[tuple[str, list[tuple[Job, Evaluation]]]]:
    """Yield each suite of a model with its jobs, and of every job the editors that are done."""
    lm = fs.load(model)
    for of_suite in sorted((folder / model).iterdir()):
        sizes = [int(each.name.rpartition("-")[2]) for each in of_suite.glob("*-of-*")]
        available = DRAWN if of_suite.name == "atlas" else max(sizes, default=0)
        runs: dict[str, tuple[Job, Evaluation]] = {}
        for job in jobs(LAYERS * lm.ffn[0].d_ff, available):
            if job.folder not in runs and finished_methods(of_suite / job.folder):
                run = Evaluation.load(of_suite / job.folder).finished()
                runs[job.folder] = (job, dataclasses.replace(run, model=model))
        yield of_suite.name, list(runs.values())


def summarise(run: Evaluation) -> dict[str, Any]:
    """Return the numbers of a run: {editor: {"measures": {name: [value, low, high, n]}, ...}}.

    Shares are in per cent.
    """
    numbers: dict[str, Any] = {}
    for editor in run.editors:
        shares = {
            name: [round(100 * x, 2) for x in (s.value, s.low, s.high)] + [s.n]
            for name, s in run.summary(editor).items()
        }
        notes = [note for (name, _), note in run.notes.items() if name == editor]
        norms = [note["norm"] for note in notes if "norm" in note]
        norm = {"norm": max(norms)} if norms else {}
        numbers[editor] = {"measures": shares, **norm, **run.drift(editor)}
        if run.sequence and editor != BASE:
            numbers[editor]["rounds"] = round_by_round(run, editor)
    return numbers


def add_runs(folder: Path, models: Sequence[str], results: dict[str, Any]) -> None:
    """Add what has run in a folder to the results: {model: {suite: [job with its numbers]}}."""
    for model in models:
        for name, runs in collect(folder, model):
            kept = {_key(job): job for job in results.setdefault(model, {}).get(name, [])}
            for job, run in runs:
                fields = {**job._asdict(), "judged": len({row.record for row in run.rows})}
                earlier = kept.get(_key(fields), {"found": {}})["found"]
                numbers = {**earlier, **summarise(run)}
                methods = [editor for editor in EVERY if editor in numbers]
                kept[_key(fields)] = {**fields, "methods": methods, "found": numbers}
            results[model][name] = sorted(
                kept.values(), key=lambda job: (HOWS.index(job["how"]), *_key(job)[1:])
            )


def _key(job: Mapping[str, Any]) -> tuple[str, int, int]:
    return job["how"], job["size"], job["records"]


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────


def write_pages(results: Mapping[str, Any], pages: Path) -> None:
    """Write a picture for each model and suite, and a page of tables for each model."""
    for model, suites in results.items():
        lines = [
            f"# Truth on {model}",
            "",
            "Written by `python benchmarks/truth.py`; [Judge](judge.md) explains the numbers.",
            "",
            "- A cell holds two-way success / what the model really says, in per cent. For a",
            "  neighbour the second number is the share of answers that stayed.",
            "- Entropy is in bits, times 100.",
            "",
        ]
        for name, listed in suites.items():
            lines += [f"## Suite: {name}", ""]
            in_order = [
                {**job, "found": {e: job["found"][e] for e in (BASE, *EVERY) if e in job["found"]}}
                for job in listed
            ]
            picture = pages / f"truth-{model}-{name}.png"
            if draw(in_order, picture):
                lines += [f"![{model}, {name}]({picture.name})", ""]
            for job in in_order:
                lines += table(job)
        page = pages / f"truth-{model}.md"
        page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def draw(listed: Sequence[Mapping[str, Any]], picture: Path) -> bool:
    """Draw jobs, and return whether there was enough to draw."""
    apart = [
        (
            job["size"],
            {
                editor: {name: values[0] / 100 for name, values in numbers["measures"].items()}
                for editor, numbers in job["found"].items()
                if editor != BASE
            },
        )
        for job in listed
        if job["how"] != "sequence"
    ]
    rounds = [
        (
            job["size"],
            {
                editor: {int(at): each for at, each in numbers["rounds"].items()}
                for editor, numbers in job["found"].items()
                if "rounds" in numbers
            },
        )
        for job in listed
        if job["how"] == "sequence"
    ]
    if len(apart) < 2 and not rounds:
        return False
    judged_chart(apart, rounds, names=NAMES, path=picture)
    return True


def table(job: Mapping[str, Any]) -> list[str]:
    """Return one job as lines of Markdown, a row an editor."""
    numbers, size = job["found"], job["size"]
    how = {
        "single": "one record at a time",
        "batch": f"batches of {size:,}",
        "sequence": f"rounds of {size:,}, on top of one another",
    }
    kinds = [
        (kind, measure)
        for kind, measure in KINDS
        if any(f"{kind} {measure}" in each["measures"] for each in numbers.values())
    ]
    names = ["", "score", *(kind for kind, _ in kinds)]
    names += ["entropy", "KL prose", "facts changed", "‖ΔW‖/‖W‖"]
    lines = [
        f"### {how[job['how']]} (load {job['load']:.2g}; {job['judged']:,} records)",
        "",
        "| " + " | ".join(names).strip() + " |",
        "|---" + "|---:" * (len(names) - 1) + "|",
    ]
    for editor, each in numbers.items():
        cells = [NAMES.get(editor, editor), _pair(each, "score", "score exact")]
        cells += [_pair(each, f"{kind} success", f"{kind} {measure}") for kind, measure in kinds]
        cells.append(_share(each, "text entropy"))
        cells.append(f"{each['kl_text']:.3f}" if "kl_text" in each else "")
        cells.append(f"{each['changed_share']:.1%}" if "changed_share" in each else "")
        cells.append(f"{each['norm']:.2f}" if "norm" in each else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_remaining(numbers)]


def _share(numbers: Mapping[str, Any], name: str) -> str:
    return f"{numbers['measures'][name][0]:.0f}" if name in numbers["measures"] else "–"


def _pair(numbers: Mapping[str, Any], first: str, second: str) -> str:
    return f"{_share(numbers, first)} / {_share(numbers, second)}"


def _remaining(numbers: Mapping[str, Any]) -> list[str]:
    """Return lines that say what is left after a few rounds of a sequence."""
    lines = []
    for editor, each in numbers.items():
        left = {int(at): shares for at, shares in each.get("rounds", {}).items()}
        left = {at: shares for at, shares in left.items() if "first" in shares}
        if left:
            words = ", ".join(
                f"{100 * shares['first']:.0f} · {100 * shares['so far']:.0f} after {at}"
                for at, shares in left.items()
                if at in (1, 2, 5, 10, max(left))
            )
            title = "what is left of the first round · of all rounds so far"
            lines.append(f"- {NAMES[editor]}, {title}: {words}")
    return [*lines, ""] if lines else []


def main() -> None:
    """Run the jobs, or draw what has run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--suite", default="atlas")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="jobs by number, from 0")
    parser.add_argument(
        "--methods", nargs="+", choices=EVERY, default=EVERY, help="only these methods of each job"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("benchmarks/results/truth.json"),
        help="with --pages: all numbers, added to those that are there",
    )
    parser.add_argument(
        "--pages", type=Path, help="run nothing; write pictures and tables into this folder"
    )
    given = parser.parse_args()
    if given.pages is None:
        run_jobs(given)
        return
    results: dict[str, Any] = {}
    if given.json.is_file():
        results = json.loads(given.json.read_text(encoding="utf-8"))
    models = [name for name in ("atlas", "atlas-llama") if (given.folder / name).is_dir()]
    add_runs(given.folder, models, results)
    given.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_pages(results, given.pages)


if __name__ == "__main__":
    main()
