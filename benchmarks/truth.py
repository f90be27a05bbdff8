"""What every editor is worth on the bundled models: one at a time, in batches, in sequence, with what the literature says goes wrong.

    python benchmarks/truth.py --model atlas --folder runs                                  # hours; killed, it goes on where it stood
    python benchmarks/truth.py --model atlas --suite counterfact.json --folder runs
    python benchmarks/truth.py --folder runs --json benchmarks/results/truth.json --pages docs     # tables, pictures, reports: seconds

Everything is the library's own runner and reports (`evaluate`, `Report`); what is here is which jobs there are. Edits are counted by load =
facts / (edited layers x d_ff), three layers for the methods that spread; ROME, r-ROME and FT-L write into one layer, its own load is three
times that. All methods with their recommended settings, but for loads above 0.11, rounds too, where repairs cost minutes and take little:
there MEMIT and its like get one pass of at most 40 steps (docs/patch.md has them repaired). ROME and r-ROME write a batch one fact after
another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections import Counter
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
MOST = 3200  # records of the bundled suite that are drawn


class Job(NamedTuple):
    """Records written `size` at a time, `records` of them in all."""

    how: str  # single, batch, sequence
    load: float  # of an edit; of a sequence, of all rounds
    size: int
    records: int
    methods: tuple[str, ...]


def jobs(neurons: int, available: int) -> list[Job]:
    """In the order in which they are worth having. A load of 1 is `neurons` facts."""

    def facts(load: float) -> int:
        return round(load * neurons)

    few, some, many, most = facts(0.003), facts(0.03), facts(0.1), facts(0.33)
    rounds = min(most, available)
    found = [
        Job("batch", 0.003, few, 10 * few, EVERY),
        Job("batch", 0.03, some, 2 * some, EVERY),
        Job("single", 1 / neurons, 1, 100, EVERY),
        Job("batch", 0.1, many, many, (*SPREAD, *TRAINED)),
        Job(
            "sequence",
            rounds / neurons,
            -(-rounds // 10),
            rounds,
            ("memit", "alphaedit", "ft-l", "emmet", "lora"),
        ),
        Job("batch", 1.0, facts(1), facts(1), (*SPREAD, *TRAINED)),
        Job("batch", 0.33, most, most, (*SPREAD, *TRAINED)),
        Job("batch", 0.1, many, many, SINGLE),
        Job("sequence", 0.1, -(-many // 10), many, SINGLE),
        Job("batch", 0.33, most, most, SINGLE),
    ]
    return [job for job in found if job.records <= available]


def drawn(lm: fs.LanguageModel, source: str) -> tuple[Suite, list[Record]]:
    """A suite, and those of its records whose fact the model knows, in random order."""
    suite = fs.load_suite(source, limit=MOST if source == "atlas" else None)
    records = list(usable(lm, suite.records)[0])
    random.Random(0).shuffle(records)
    return suite, records


def writers(lm: fs.LanguageModel, job: Job, folder: Path) -> dict[str, Editor]:
    """The job's editors."""
    config: dict[str, Any] = {}
    if job.load > 0.11:
        config = {
            name: dataclasses.replace(METHODS[name][1].recommended(lm), repair=0, steps=40)
            for name in job.methods
            if name in SPREAD
        }
    return fs.editors(lm, job.methods, config=config, folder=folder)


def place(folder: Path, model: str, suite: Suite, job: Job) -> Path:
    """Where a job's rows are kept; jobs that differ by methods only share it."""
    return folder / model / suite.name / f"{job.how}-{job.size}-of-{job.records}"


def run(
    lm: fs.LanguageModel, job: Job, records: list[Record], editors: dict[str, Editor], folder: Path
) -> Evaluation:
    """One job, or what is left of it."""
    continued = 30 if job.how != "sequence" else 100
    return fs.evaluate(
        lm,
        records[: job.records],
        editors,
        size=job.size,
        sequence=job.how == "sequence",
        continued=continued,
        folder=folder,
    )


def finished(folder: Path, job: Job) -> list[str]:
    """Methods whose every edit is in a folder."""
    path = folder / "rows.jsonl"
    if not path.is_file():
        return []
    ends = [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith('{"ends"')
    ]
    units = Counter(end["ends"] for end in ends)
    return [name for name in EVERY if units[name] == -(-job.records // job.size)]


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


def summarised(run: Evaluation) -> dict[str, Any]:
    """Numbers of one run: {editor: {measure: [value, low, high, n], ...}}, per cent where they are shares."""
    found = {}
    for editor in run.editors:
        shares = {
            name: [round(100 * x, 2) for x in (s.value, s.low, s.high)] + [s.n]
            for name, s in run.summary(editor).items()
        }
        notes = [note for (name, _), note in run.notes.items() if name == editor]
        norm = (
            {"norm": max(note["norm"] for note in notes)}
            if any("norm" in note for note in notes)
            else {}
        )
        found[editor] = {"measures": shares, **norm, **run.drift(editor)}
        if run.sequence and editor != BASE:
            found[editor]["rounds"] = round_by_round(run, editor)
    return found


def table(job: dict[str, Any], out: list[str]) -> None:
    """One run as Markdown: a row an editor, two-way success / what is really said or done."""
    told, size = job["found"], job["size"]
    how = {
        "single": "one record at a time",
        "batch": f"batches of {size:,}",
        "sequence": f"rounds of {size:,}, one upon another",
    }
    out += [f"### {how[job['how']]} (load {job['load']:.2g}; {job['judged']:,} records)", ""]
    heads = [
        kind
        for kind, measure in KINDS
        if any(f"{kind} {measure}" in own["measures"] for own in told.values())
    ]
    out.append(
        "| | score | " + " | ".join(heads) + " | entropy | KL prose | facts changed | ‖ΔW‖/‖W‖ |"
    )
    out.append("|---" + "|---:" * (len(heads) + 5) + "|")

    def share(own: dict[str, Any], name: str) -> str:
        return f"{own['measures'][name][0]:.0f}" if name in own["measures"] else "–"

    for editor, own in told.items():
        cells = [f"{share(own, 'score')} / {share(own, 'score exact')}"]
        cells += [
            f"{share(own, f'{kind} success')} / {share(own, f'{kind} {measure}')}"
            for kind, measure in KINDS
            if kind in heads
        ]
        cells.append(share(own, "text entropy"))
        cells += [
            f"{own['kl_text']:.3f}" if "kl_text" in own else "",
            f"{own['changed_share']:.1%}" if "changed_share" in own else "",
        ]
        cells.append(f"{own['norm']:.2f}" if "norm" in own else "")
        out.append(f"| {NAMES.get(editor, editor)} | " + " | ".join(cells) + " |")
    notes = []
    for editor, own in told.items():
        if left := {int(at): each for at, each in own.get("rounds", {}).items() if "first" in each}:
            some = [at for at in left if at in (1, 2, 5, 10) or at == max(left)]
            words = ", ".join(
                f"{100 * left[at]['first']:.0f} · {100 * left[at]['so far']:.0f} behind {at}"
                for at in some
            )
            notes.append(
                f"- {NAMES[editor]}, what is left of the first round · of all so far: {words}"
            )
    out += ["", *notes, ""] if notes else [""]


def collect(folder: Path, model: str) -> dict[str, list[tuple[Job, Evaluation]]]:
    """What has run for a model, by suite: of every job the editors that are done."""
    lm, found = fs.load(model), {}
    for home in sorted((folder / model).iterdir()):
        many: dict[Path, Job] = {}
        kept = sorted(home.glob("*-of-*"))
        most = max((int(each.name.rpartition("-")[2]) for each in kept), default=0)
        available = most if home.name != "atlas" else MOST
        for job in jobs(LAYERS * lm.ffn[0].d_ff, available):
            many.setdefault(home / f"{job.how}-{job.size}-of-{job.records}", job)
        runs = []
        for each, job in many.items():
            done = {BASE, *finished(each, job)}
            if len(done) > 1:
                run = Evaluation.load(each)
                rows = tuple(row for row in run.rows if row.editor in done)
                notes = {key: note for key, note in run.notes.items() if key[0] in done}
                runs.append((job, dataclasses.replace(run, rows=rows, notes=notes, model=model)))
        found[home.name] = runs
    return found


def gathered(folder: Path, models: list[str], told: dict[str, Any]) -> dict[str, Any]:
    """What is told already, with what has run in a folder since: {model: {suite: [job with its numbers]}}."""
    for model in models:
        for name, runs in collect(folder, model).items():
            kept = {_which(job): job for job in told.setdefault(model, {}).get(name, [])}
            for job, run in runs:
                fields = {**job._asdict(), "judged": len({row.record for row in run.rows})}
                found = {**kept.get(_which(fields), {"found": {}})["found"], **summarised(run)}
                kept[_which(fields)] = {
                    **fields,
                    "methods": [editor for editor in EVERY if editor in found],
                    "found": found,
                }
            order = ("single", "batch", "sequence")
            told[model][name] = sorted(
                kept.values(),
                key=lambda job: (order.index(job["how"]), job["size"], job["records"]),
            )
    return told


def _which(job: dict[str, Any]) -> tuple[str, int, int]:
    return job["how"], job["size"], job["records"]


def draw(told: dict[str, Any], pages: Path) -> None:
    """A picture for each model and suite, and a page of tables for each model."""
    for model, suites in told.items():
        out = [
            f"# Truth on {model}",
            "",
            "Written by `python benchmarks/truth.py`; [Judge](judge.md) says what each number means. In each cell: two-way success / what "
            "the model really says (neighbour: says what it said before), per cent; entropy in bits, times 100.",
            "",
        ]
        for name, kept in suites.items():
            jobs_done = [
                {**job, "found": {e: job["found"][e] for e in (BASE, *EVERY) if e in job["found"]}}
                for job in kept
            ]
            picture = pages / f"truth-{model}-{name}.png"
            out += [f"## Suite: {name}", ""]
            apart = [
                (
                    job["size"],
                    {
                        e: {k: v[0] / 100 for k, v in own["measures"].items()}
                        for e, own in job["found"].items()
                        if e != BASE
                    },
                )
                for job in jobs_done
                if job["how"] != "sequence"
            ]
            rounds = [
                (
                    job["size"],
                    {
                        e: {int(at): each for at, each in own["rounds"].items()}
                        for e, own in job["found"].items()
                        if "rounds" in own
                    },
                )
                for job in jobs_done
                if job["how"] == "sequence"
            ]
            if len(apart) > 1 or rounds:
                judged_chart(apart, rounds, names=NAMES, path=picture)
                out += [f"![{model}, {name}]({picture.name})", ""]
            for job in jobs_done:
                table(job, out)
        (pages / f"truth-{model}.md").write_text("\n".join(out).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    """Run what is asked for, or draw what has run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--suite", default="atlas")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="jobs by number, from 0")
    parser.add_argument(
        "--methods", nargs="+", choices=EVERY, default=EVERY, help="only these of each job's"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("benchmarks/results/truth.json"),
        help="with --pages: all numbers, added to",
    )
    parser.add_argument(
        "--pages", type=Path, help="run nothing; write pictures and tables into this folder"
    )
    given = parser.parse_args()
    if given.pages is not None:
        told = json.loads(given.json.read_text(encoding="utf-8")) if given.json.is_file() else {}
        told = gathered(
            given.folder,
            [model for model in ("atlas", "atlas-llama") if (given.folder / model).is_dir()],
            told,
        )
        given.json.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return draw(told, given.pages)
    lm = fs.load(given.model)
    suite, records = drawn(lm, given.suite)
    todo = jobs(LAYERS * lm.ffn[0].d_ff, len(records))
    print(f"{given.model}, {suite.name}: {len(records):,} records, {len(todo)} jobs", flush=True)
    for number, job in enumerate(todo):
        if given.only and str(number) not in given.only:
            continue
        began, folder = time.process_time(), place(given.folder, given.model, suite, job)
        missing = [
            name
            for name in job.methods
            if name in given.methods and name not in finished(folder, job)
        ]
        for name, editor in (
            writers(lm, job._replace(methods=tuple(missing)), given.folder).items()
            if missing
            else ()
        ):
            run(lm, job, records, {name: editor}, folder)
            print(
                f"{job.how} {job.load:.3g} {name}: {time.process_time() - began:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
