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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .errors import InputError
from .judge.evaluate import BASE, INTERVALS, LOWEST, Evaluation, Row, Share
from .judge.suites import Suite
from .pages import check_page, keep_page, render
from .tables import Shown, Table, as_text, counted, visible

MEANINGS = {
    "success": "The papers' measure: of two candidates, the new object and the old one, the wanted one is the likelier. It is kind: the "
    "model need not say either.",
    "magnitude": "By how much: the probability of the wanted one minus that of the other, each the mean a token; from -100 to 100.",
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
    "text": "What the model writes by itself, going on from a few prompts about the subject.",
    "entropy": "How little that text repeats itself: n-gram entropy in bits, times 100 as papers print it. It falls when a model breaks.",
    "consistency": "How much that text resembles texts about things of which the new fact is true (tf-idf cosine).",
    "kl_text": "How far the distribution of the next token has moved on prose, in nats: 0.01 is hardly seen, at 1 it is another model.",
    "perplexity": "Of the same prose, after the edit divided by before.",
    "kl_facts": "The same divergence where the answers of facts are due that nothing was written about.",
    "changed_share": "Share of those facts that are answered otherwise than before.",
    "broken": "Edits behind which the model no longer computes finite numbers. What it is asked then counts as wrong, and drift cannot be "
    "measured.",
    "seconds": "Time to solve an edit, without what is computed once for a model.",
}
"""What each number means, in a line."""

_PAIRS = (("prompt", "exact"), ("paraphrase", "exact"), ("neighbour", "stayed"), ("multihop", "exact"))
_DRIFT_NAMES = {
    "kl_text": "KL on prose",
    "perplexity": "perplexity, times",
    "kl_facts": "KL on other facts",
    "changed_share": "other facts changed",
}
_MOST_ROUNDS = 16  # rows and columns of a heat
_FEW = 8  # rounds of a table
_FAILURES = 48  # of a report, shared among kinds and runs


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report(Shown):
    """Runs of the same records at several sizes, with what they were made from.

    runs      one for each size, at least one, all finished; kept in the order of their sizes, those in sequence last
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
        object.__setattr__(self, "runs", sorted(self.runs, key=lambda run: (run.sequence, run.size)))
        if not self.runs or len({run.fingerprint for run in self.runs}) > 1:
            raise InputError(f"a report is of one model's runs, at least one; got {len(self.runs)} of several models or none")
        if len({(run.size, run.sequence) for run in self.runs}) < len(self.runs):
            raise InputError("a report has one run of a size; got two of the same")
        for run in self.runs:
            for editor, there in run.unfinished.items():
                raise InputError(
                    f"{editor}, {run.pace}: {there:,} of {run.units:,} edits are there; run it again to finish it, or leave out what is "
                    "not finished: run.finished()"
                )

    @property
    def summaries(self) -> list[Mapping[str, Mapping[str, Share]]]:
        """For each run {editor: {measure: Share}}."""
        return [run.summaries for run in self.runs]

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
            found.append(Table(_title(run), columns, measures, INTERVALS))
            if run.sequence:
                found.append(_left_table(run))
            found.append(_probe_table(run))
            found += _measured_tables(run)
        return [table for table in found if table.rows]

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
            "edits that could not be made": _failed(self.runs),
            "malformed, left out": self.suite.left_out or "nothing",
            "records an edit": ", ".join(f"{run.size:,}{' in sequence' if run.sequence else ''}" for run in self.runs),
            **self._settings(),
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
                place = {"run": self.runs[at].pace, "editor": editor, "kind": kind, "record": row.record}
                found.append({**place, "prompt": row.prompt, "wanted": should, "said": row.answer})
        return found[: 2 * _FAILURES]

    def _settings(self) -> dict[str, str]:
        """{"settings of memit": what they are}; by run where they are not the same in all."""
        found: dict[str, dict[str, str]] = {}
        for run in self.runs:
            for editor, told in run.settings.items():
                if editor in run.editors:
                    found.setdefault(editor, {})[run.pace] = told
        return {
            f"settings of {editor}{'' if len(set(own.values())) == 1 else f', {pace}'}": told
            for editor, own in found.items()
            for pace, told in own.items()
        }

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
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_markdown(self) -> str:
        """The report as Markdown; `report_markdown` writes it to a file."""
        return report_markdown(self)


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
                "short": run.pace,
                "editors": list(summary),
                "rows": [(name, [own.get(name) for own in summary.values()]) for name in names],
                "bars": _bars(summary),
                "tables": [table for table in (_probe_table(run), *_measured_tables(run)) if table.rows],
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
        intervals=INTERVALS,
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
    lines = [f"# Edits of {as_text(found.runs[0].model)}, judged", ""]
    for table in found.tables():
        lines += table.as_markdown()
    for run in found.runs:
        for editor in run.editors if run.sequence else ():
            if editor != BASE:
                marks, rows = _heat(run, editor)
                lines += [
                    f"### What is left of earlier rounds: {as_text(editor)}",
                    "",
                    "Prompts answered right, per cent, after round …",
                    "",
                ]
                cells = [(f"written in {at + 1}", *("" if x is None else f"{100 * x:.0f}" for x in own)) for at, own in rows]
                lines += Table("", {"": "<", **{str(mark + 1): ">" for mark in marks}}, cells).as_markdown()
    if failures := found.failures():
        names = ("run", "editor", "kind", "prompt", "wanted", "said")
        rows_said = [tuple(f[name] for name in names) for f in failures]
        lines += Table("Worst failures", dict.fromkeys(names, "<"), rows_said).as_markdown()
    lines += ["## What each number means", "", *(f"- **{name}**: {as_text(text)}" for name, text in _meanings(found).items()), ""]
    lines += ["## Made from", "", *(f"- {as_text(name)}: {as_text(value)}" for name, value in found.facts().items())]
    text = "\n".join(lines) + "\n"
    return keep_page(text, path)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(found: object) -> None:
    if not isinstance(found, Report):
        raise InputError(f"a report is made from a Report; got a {type(found).__name__}: Report(runs=[...], suite=suite)")


def _title(run: Evaluation) -> str:
    how = f"rounds of {counted(run.size, 'record')}, one upon another" if run.sequence else f"{counted(run.size, 'record')} at a time"
    return f"{how}; per cent, beside the model as it was"


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


_COSTS = {
    "edits": "edits",
    "failed": "failed",
    "broken": "broken",
    "seconds": "seconds an edit",
    "seconds_a_record": "seconds a record",
    "norm": "‖ΔW‖/‖W‖",
}


def _measured_tables(run: Evaluation) -> list[Table]:
    """The same in words: what edits cost, and what they did to the rest."""
    told = {editor: run.measured(editor) for editor in run.editors if editor != BASE}
    tables = []
    for title, names, note in (
        ("what it cost", _COSTS, "means over edits; ‖ΔW‖/‖W‖: the largest"),
        ("what it did to the rest", _DRIFT_NAMES, "KL in nats; perplexity after divided by before"),
    ):
        seldom = {name for name in ("failed", "broken") if not any(name in own for own in told.values())}
        names = {name: told_as for name, told_as in names.items() if name not in seldom}
        rows = [(editor, *(_number(name, own.get(name)) for name in names)) for editor, own in told.items() if set(own) & set(names)]
        tables.append(Table(title, {"editor": "<", **dict.fromkeys(names.values(), ">")}, rows, note))
    return tables


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %" if name == "changed_share" else f"{value:.3g}"


def _failed(runs: Sequence[Evaluation]) -> str:
    """How many edits failed, and why the first did; "" when none."""
    failed = [f"{editor}: {why}" for run in runs for (editor, _), why in run.failed.items()]
    return f"{len(failed):,}, the first of {failed[0]}" if failed else ""


def _probe_table(run: Evaluation) -> Table:
    """What a probe measured, a column an editor."""
    told = {editor: run.probed(editor) for editor in run.editors}
    names = dict.fromkeys(name for own in told.values() for name in own)
    rows = [(name, *(f"{own[name]:.4g}" if name in own else "" for own in told.values())) for name in names]
    return Table("general ability", {"": "<", **dict.fromkeys(told, ">")}, rows, "behind the last edit; base: before any")


def _left_table(run: Evaluation) -> Table:
    """What is left of a sequence, behind a few rounds."""
    told = {editor: run.remaining(editor) for editor in run.editors if editor != BASE}
    rounds = sorted({at for own in told.values() for at in own})
    shown = rounds if len(rounds) <= _FEW else sorted({rounds[round(i * (len(rounds) - 1) / (_FEW - 1))] for i in range(_FEW)})
    rows = [
        (editor, *(f"{100 * own[at][0]:.0f} · {100 * own[at][1]:.0f}" if at in own else "" for at in shown)) for editor, own in told.items()
    ]
    columns = {"behind round": "<", **{str(at + 1): ">" for at in shown}}
    return Table("what is left", columns, rows, "prompts answered right, per cent: those of the first round · of all rounds so far")


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


_Dots: TypeAlias = "Mapping[str, Sequence[tuple[int, float, str]]]"
"""Of a chart's lines, {editor: [(x, y, what it says)]}."""


def _charts(found: Report) -> list[dict[str, Any]]:
    """Quality and drift against the number of edits, and what is left of a sequence after each round."""
    charts = []
    apart = [at for at, run in enumerate(found.runs) if not run.sequence]
    if len({found.runs[at].size for at in apart}) > 1:
        for kind, measure in _PAIRS:
            name = f"{kind} {measure}"
            shares = {e: [(found.runs[at].size, found.summaries[at].get(e, {}).get(name)) for at in apart] for e in found.editors}
            dots = {e: [(size, share.value, _cell(share)) for size, share in own if share] for e, own in shares.items()}
            charts.append(_chart(f"{name} against the number of edits", dots, "records an edit", top=1.0, logarithmic=True))
        told = {e: [(run.size, run.drift(e)) for run in found.runs if not run.sequence] for e in found.editors if e != BASE}
        charts += [_drift_chart(name, "against the number of edits", told, "records an edit", logarithmic=True) for name in _DRIFT_NAMES]
    for run in found.runs:
        if run.sequence:
            left = {e: run.remaining(e) for e in run.editors if e != BASE}
            for at, of in enumerate(("the first round", "all rounds so far")):
                dots = {e: [(k + 1, own[at], f"{100 * own[at]:.0f} %") for k, own in each.items()] for e, each in left.items()}
                charts.append(_chart(f"prompts of {of} answered right, {run.pace}", dots, "rounds", top=1.0))
            told = {e: [(k + 1, run.drift(e, k)) for name, k in run.notes if name == e] for e in left}
            charts += [_drift_chart(name, run.pace, told, "rounds") for name in _DRIFT_NAMES]
    return [chart for chart in charts if chart["lines"]]


def _drift_chart(
    name: str, of: str, told: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]], unit: str, *, logarithmic: bool = False
) -> dict[str, Any]:
    dots = {e: [(x, own[name], f"{own[name]:.3g}") for x, own in each if name in own] for e, each in told.items()}
    return _chart(f"{_DRIFT_NAMES[name]}, {of}", dots, unit, top=1.0 if name == "changed_share" else None, logarithmic=logarithmic)


def _chart(title: str, lines: _Dots, unit: str, *, top: float | None = None, logarithmic: bool = False) -> dict[str, Any]:
    """Lines in a box of 100 x 60 right of `left`, over a grid with its values, y from 0 to `top`, which is 100 %; None: to the largest."""
    most = top
    xs = [x for dots in lines.values() for x, *_ in dots]
    top = max((y for dots in lines.values() for _, y, _ in dots), default=1.0) or 1.0 if most is None else most
    low, high = (math.log(end(xs)) if logarithmic else end(xs) for end in (min, max)) if xs else (0.0, 1.0)
    found = []
    for editor, dots in lines.items():
        places = [
            (
                round(_LEFT + 2 + (96 - _LEFT) * ((math.log(x) if logarithmic else x) - low) / max(high - low, 1e-9), 2),
                _height(y / top),
                f"{editor}, {x:,} {unit}: {text}",
            )
            for x, y, text in sorted(dots)
        ]
        if places:
            found.append({"editor": editor, "dots": places, "points": " ".join(f"{x},{y}" for x, y, _ in places)})
    ends = [f"{x:,}" for x in (min(xs), max(xs))] if xs else ["", ""]
    grid = [(_height(y / top), f"{100 * y:.0f} %" if most else f"{y:.3g}") for y in _round_values(top)]
    told = {"first": ends[0], "last": ends[1], "unit": unit, "top": "100 %" if most else f"{top:.3g}"}
    return {"title": title, "lines": found, "grid": grid, "left": _LEFT, **told}


_LEFT = 10  # of a chart's 100, where the values of its grid stand


def _round_values(top: float) -> list[float]:
    """Round numbers from 0 to the largest, three to six of them."""
    power = 10.0 ** math.floor(math.log10(top / 2))
    step = next(n * power for n in (1, 2, 5, 10) if top / (n * power) <= 5)
    return [k * step for k in range(math.floor(top / step * (1 + 1e-9)) + 1)]


def _height(share: float) -> float:
    """Where a share of what a chart reaches up to is drawn."""
    return round(58 - 56 * share, 2)


def _margin(row: Row) -> float:
    """How far an answer is from what was wanted: the smaller, the worse."""
    if row.broken:
        return LOWEST
    if row.log_wanted is None:
        return 0.0
    return row.log_wanted - (row.log_against if row.log_against is not None else 0.0)


def _meanings(found: Report) -> dict[str, str]:
    """Those of what the report shows."""
    words = {word for summary in found.summaries for own in summary.values() for name in own for word in name.split()}
    words |= {name for run in found.runs for editor in run.editors if editor != BASE for name in run.measured(editor)}
    return {name: text for name, text in MEANINGS.items() if name in words}
