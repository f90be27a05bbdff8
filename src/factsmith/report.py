"""What an evaluation found, for people: one HTML page that needs no network, and the same as Markdown.

    found = Report(runs=[evaluate(lm, records, writers, size=n) for n in (1, 100)], suite=suite)
    report_page(found, "report.html")
    report_markdown(found, "report.md")

Success by comparison and what the model really says always stand side by side. Prompts and answers come from files and models: the page
escapes them and runs no script, the Markdown has nothing of theirs that would be read as such.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .judge.evaluate import BASE, Evaluation, Row, Share
from .judge.suites import Suite
from .pages import check_page, keep_page, render
from .tables import Shown, Table, counted, visible

MEANINGS = {
    "success": "The papers' measure: of two candidates, the new object and the old one, the wanted one is the likelier. It is kind: the "
    "model need not say either.",
    "tokens": "Share of the right answer's tokens that come out when all tokens before them are given away (teacher forcing).",
    "exact": "What the model says by itself, greedily, begins with a right answer. For a negation: it does not begin with the new object.",
    "stayed": "Of what must not change: the model says what it said before the edit, right or wrong.",
    "score": "Harmonic mean of prompt, paraphrase and neighbour: low where any of them is.",
    "prompt": "The prompt that was edited.",
    "paraphrase": "The same fact, asked in other words.",
    "neighbour": "Another subject in the same relation, which the edit must leave alone.",
    "locality": "Something else that must stay, such as another fact of the same subject.",
    "multihop": "A chain of two facts, one of them edited: whether the new fact is used, and not only repeated.",
    "reasoning": "What follows from the new fact with a further one.",
    "aliasing": "The same fact about the subject by another name.",
    "relation": "What follows from the new fact in another relation.",
    "negation": '"It is not true that …" before the prompt: a model that understood says something other than what was written.',
    "norm": "‖ΔW‖ / ‖W‖ of the layer that changed most, earlier rounds included: what grows before a model breaks.",
    "seconds": "Time to solve an edit, without what is computed once for a model.",
}
"""What each number means, in a line."""

_PAIRS = (("prompt", "exact"), ("paraphrase", "exact"), ("neighbour", "stayed"), ("multihop", "exact"))
_MOST_ROUNDS = 16  # rows and columns of a heat
_FAILURES = 48  # of a report, shared among kinds and runs


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report(Shown):
    """Runs of the same records at several sizes, with what they were made from.

    runs      one for each size, at least one
    suite     the records' suite
    seed      of the sample and of the editors
    left_out  {why: how many records were not judged}
    version   of factsmith
    """

    runs: Sequence[Evaluation]
    suite: Suite
    seed: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    version: str = ""

    def __post_init__(self) -> None:
        if not self.runs or len({run.fingerprint for run in self.runs}) > 1:
            raise InputError(f"a report is of one model's runs, at least one; got {len(self.runs)} of several models or none")
        if len({(run.size, run.sequence) for run in self.runs}) < len(self.runs):
            raise InputError("a report has one run of a size; got two of the same")

    @functools.cached_property
    def summaries(self) -> list[dict[str, dict[str, Share]]]:
        """For each run {editor: {measure: Share}}, but for magnitudes."""
        return [
            {editor: {k: v for k, v in run.summary(editor).items() if not k.endswith("magnitude")} for editor in run.editors}
            for run in self.runs
        ]

    @property
    def editors(self) -> tuple[str, ...]:
        """Those of all runs, base first."""
        return tuple(dict.fromkeys(editor for run in self.runs for editor in run.editors))

    def tables(self) -> list[Table]:
        """For each run the measures, and what its edits cost."""
        found = []
        for run, summary in zip(self.runs, self.summaries, strict=True):
            measures = [(name, *(_cell(own.get(name)) for own in summary.values())) for name in _names(summary)]
            columns = {"per cent": "<", **dict.fromkeys(summary, ">")}
            found.append(Table(_title(run), columns, measures, "± half of the 95 % interval over records"))
            costs = _costs(run)
            rows = [(c["editor"], f"{c['edits']:,}", f"{c['seconds']:.3g}", f"{c['each']:.3g}", f"{c['norm']:.3g}") for c in costs]
            columns = {"editor": "<", "edits": ">", "seconds an edit": ">", "seconds a record": ">", "largest ‖ΔW‖/‖W‖": ">"}
            if rows:
                found.append(Table("", columns, rows))
        return found

    def facts(self) -> dict[str, str]:
        """What the report is of, by name."""
        first = self.runs[0]
        records = len({row.record for row in first.rows})
        found = {
            "model": first.model,
            "fingerprint": first.fingerprint,
            "suite": self.suite.name,
            "source": self.suite.source,
            "its sha256": self.suite.digest,
            "records judged": f"{records:,}",
            **{f"left out: {why}": f"{n:,}" for why, n in self.left_out.items()},
            "malformed": f"{len(self.suite.skipped):,}",
            "records an edit": ", ".join(f"{run.size:,}{' in sequence' if run.sequence else ''}" for run in self.runs),
            "seed": str(self.seed),
            "factsmith": self.version,
        }
        return {name: value for name, value in found.items() if value}

    def failures(self) -> list[dict[str, Any]]:
        """The worst answers: of every kind and editor those furthest from what was wanted, a few dozen in all."""
        groups: dict[tuple[int, str, str], list[Row]] = {}
        for at, run in enumerate(self.runs):
            for editor in run.editors:
                for row in run.asked(editor) if editor != BASE else ():
                    if (row.stayed if row.stayed is not None else row.exact) is False:
                        groups.setdefault((at, editor, row.kind), []).append(row)
        each = max(1, _FAILURES // max(1, len(groups)))
        found = []
        for (at, editor, kind), rows in groups.items():
            wanted = self._wanted
            before = {row.prompt: row.answer for row in self.runs[at].asked(BASE)}
            for row in sorted(rows, key=_margin)[:each]:
                should = before.get(row.prompt, "") if row.stayed is not None else wanted.get((row.record, row.prompt), "")
                place = {"run": _short(self.runs[at]), "editor": editor, "kind": kind, "record": row.record}
                found.append({**place, "prompt": row.prompt, "wanted": should, "said": row.answer})
        return found[: 2 * _FAILURES]

    @functools.cached_property
    def _wanted(self) -> dict[tuple[str, str], str]:
        """What is right, in words, by record and prompt."""
        return {
            (record.id, q.prompt): f"not {q.against}" if q.kind == "negation" else q.answers[0]
            for record in self.suite.records
            for q in record.questions
            if (q.against if q.kind == "negation" else q.answers)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {
            "facts": self.facts(),
            "left_out": dict(self.left_out),
            "runs": [
                {
                    "size": run.size,
                    "sequence": run.sequence,
                    "measures": {e: {name: _plain(share) for name, share in own.items()} for e, own in summary.items()},
                    "costs": _costs(run),
                    "retention": {e: run.retention(e) for e in run.editors if run.sequence and e != BASE},
                }
                for run, summary in zip(self.runs, self.summaries, strict=True)
            ],
        }


def report_page(found: Report, path: str | os.PathLike[str] | None = None) -> str:
    """A report as one HTML page; written to `path` (.html) if given, in one step.

    Raises InputError for another suffix, or a file there that is none of ours, WorkspaceError for a folder that cannot be written.
    """
    _check(found)
    if path is not None:
        check_page(path)
    runs = []
    for run, summary in zip(found.runs, found.summaries, strict=True):
        names = _names(summary)
        runs.append(
            {
                "title": _title(run),
                "short": _short(run),
                "editors": list(summary),
                "rows": [(name, [own.get(name) for own in summary.values()]) for name in names],
                "bars": _bars(summary),
                "costs": _costs(run),
                "heats": [(e, _heat(run, e)) for e in run.editors if run.sequence and e != BASE],
            }
        )
    failures = found.failures()
    html = render(
        "report.html",
        None,
        title=f"Edits of {visible(found.runs[0].model)}, judged",
        model=found.runs[0].model,
        suite=found.suite.name,
        runs=runs,
        charts=_charts(found),
        colours={editor: at for at, editor in enumerate(found.editors)},
        failures=failures,
        kinds=list(dict.fromkeys(f["kind"] for f in failures)),
        meanings=_meanings(found),
        facts=found.facts(),
    )
    return keep_page(html, path)


def report_markdown(found: Report, path: str | os.PathLike[str] | None = None) -> str:
    """A report as Markdown; written to `path` if given, in one step. Raises WorkspaceError for a file that cannot be written."""
    _check(found)
    lines = [f"# Edits of {_md(found.runs[0].model)}, judged", ""]
    for table in found.tables():
        lines += [f"## {_md(table.title)}", ""] if table.title else []
        lines += _md_table(list(table.columns), table.rows, list(table.columns.values()))
        lines += [_md(table.note), ""] if table.note else []
    for run in found.runs:
        for editor in run.editors if run.sequence else ():
            if editor != BASE:
                marks, rows = _heat(run, editor)
                lines += [f"### What is left of earlier rounds: {_md(editor)}", "", "Prompts answered right, per cent, after round …", ""]
                cells = [(f"written in {at + 1}", *("" if x is None else f"{100 * x:.0f}" for x in own)) for at, own in rows]
                lines += _md_table(["", *(str(m + 1) for m in marks)], cells, ["<", *(">" for _ in marks)])
    if failures := found.failures():
        lines += ["## Worst failures", ""]
        names = ["run", "editor", "kind", "prompt", "wanted", "said"]
        lines += _md_table(names, [tuple(f[name] for name in names) for f in failures], ["<"] * len(names))
    lines += ["## What each number means", "", *(f"- **{name}**: {_md(text)}" for name, text in _meanings(found).items()), ""]
    lines += ["## Made from", "", *(f"- {_md(name)}: {_md(value)}" for name, value in found.facts().items())]
    text = "\n".join(lines) + "\n"
    return keep_page(text, path)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(found: object) -> None:
    if not isinstance(found, Report):
        raise InputError(f"a report is made from a Report; got a {type(found).__name__}: Report(runs=[...], suite=suite)")


def _title(run: Evaluation) -> str:
    how = f"rounds of {counted(run.size, 'record')}, one upon another" if run.sequence else f"{counted(run.size, 'record')} at a time"
    return f"{how}; per cent, beside the model as it was"


def _short(run: Evaluation) -> str:
    return f"{run.size:,} {'a round' if run.sequence else 'at a time'}"


def _names(summary: Mapping[str, Mapping[str, Share]]) -> list[str]:
    """The measures of a run; a question's next to one another, the scores first."""
    names = dict.fromkeys(name for own in summary.values() for name in own)
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name in names if not name.startswith("score")))
    return sorted(names, key=lambda name: -1 if name.startswith("score") else kinds.index(name.partition(" ")[0]))


def _cell(share: Share | None) -> str:
    if share is None:
        return ""
    spread = 50 * (share.high - share.low)
    return f"{100 * share.value:.1f}" + (f" ± {spread:.1f}" if math.isfinite(spread) else "")


def _plain(share: Share) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in vars(share).items()}


def _costs(run: Evaluation) -> list[dict[str, Any]]:
    """For each editor its edits, mean seconds and the largest norm."""
    found = []
    for editor in run.editors:
        notes = [own for (name, _), own in run.notes.items() if name == editor and {"seconds", "norm"} <= set(own)]
        if notes:
            seconds = sum(own["seconds"] for own in notes)
            records = len({row.record for row in run.rows if row.editor == editor})
            cost = {"editor": editor, "edits": len(notes), "seconds": seconds / len(notes), "each": seconds / max(1, records)}
            found.append({**cost, "norm": max(own["norm"] for own in notes)})
    return found


def _bars(summary: Mapping[str, Mapping[str, Share]]) -> list[dict[str, Any]]:
    """For each editor and kind of question, success by comparison against exact match."""
    return [
        {"editor": editor, "kind": kind, "success": own[f"{kind} success"], "exact": own[f"{kind} exact"]}
        for kind in dict.fromkeys(name.rpartition(" ")[0] for own in summary.values() for name in own)
        for editor, own in summary.items()
        if kind and {f"{kind} success", f"{kind} exact"} <= set(own)
    ]


def _heat(run: Evaluation, editor: str) -> tuple[list[int], list[tuple[int, list[float | None]]]]:
    """Retention as (rounds asked, [(round written, share behind each)]), of at most so many rounds, spread evenly."""
    told = run.retention(editor)
    rounds = sorted({asked for own in told.values() for asked in own})
    if len(rounds) > _MOST_ROUNDS:
        rounds = sorted({rounds[round(at * (len(rounds) - 1) / (_MOST_ROUNDS - 1))] for at in range(_MOST_ROUNDS)})
    return rounds, [(at, [told.get(at, {}).get(asked) for asked in rounds]) for at in rounds]


def _charts(found: Report) -> list[dict[str, Any]]:
    """Quality against the number of edits, a chart a measure, in a box of 100 x 60; none for a single size."""
    order = sorted(range(len(found.runs)), key=lambda at: (found.runs[at].sequence, found.runs[at].size))
    sizes = [found.runs[at].size for at in order]
    if len(set(sizes)) < 2:
        return []
    low, high = math.log(min(sizes)), math.log(max(sizes))
    charts = []
    for kind, measure in _PAIRS:
        name, lines = f"{kind} {measure}", []
        for editor in found.editors:
            dots = []
            for at, size in zip(order, sizes, strict=True):
                share = found.summaries[at].get(editor, {}).get(name)
                if share is not None:
                    x = 4 + 92 * (math.log(size) - low) / (high - low)
                    dots.append((round(x, 2), round(58 - 56 * share.value, 2), f"{editor}, {size:,} at a time: {_cell(share)}"))
            if dots:
                lines.append({"editor": editor, "dots": dots, "points": " ".join(f"{x},{y}" for x, y, _ in dots)})
        if lines:
            charts.append({"title": name, "lines": lines, "first": f"{min(sizes):,}", "last": f"{max(sizes):,}"})
    return charts


def _margin(row: Row) -> float:
    """How far an answer is from what was wanted: the smaller, the worse."""
    if row.log_wanted is None:
        return 0.0
    return row.log_wanted - (row.log_against if row.log_against is not None else 0.0)


def _meanings(found: Report) -> dict[str, str]:
    """Those of what the report shows."""
    words = {word for summary in found.summaries for own in summary.values() for name in own for word in name.split()}
    words |= {"norm", "seconds"} if any(_costs(run) for run in found.runs) else set()
    return {name: text for name, text in MEANINGS.items() if name in words}


def _md(text: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!])", r"\\\1", visible(text))


def _md_table(names: Sequence[str], rows: Sequence[Sequence[str]], sides: Sequence[str]) -> list[str]:
    body = [names, *rows]
    lines = ["| " + " | ".join(_md(str(cell)) for cell in row) + " |" for row in body]
    return [lines[0], "|" + "|".join("---:" if side == ">" else "---" for side in sides) + "|", *lines[1:], ""]
