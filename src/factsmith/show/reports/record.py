"""What a report of an evaluation holds, as tables."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import InputError
from ...core.tables import Shown, Table, as_text, counted
from ...judge.evaluation import INTERVALS, Evaluation
from ...judge.records import Suite
from ...judge.rows import BASE, LOWEST, Row, Share
from ..pages.page import write_page

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

PAIRS = (
    ("prompt", "exact"),
    ("paraphrase", "exact"),
    ("neighbour", "stayed"),
    ("multihop", "exact"),
)

DRIFT_NAMES = {
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
        object.__setattr__(
            self, "runs", sorted(self.runs, key=lambda run: (run.sequence, run.size))
        )
        if not self.runs or len({run.fingerprint for run in self.runs}) > 1:
            raise InputError(
                f"a report is of one model's runs, at least one; got {len(self.runs)} of several models or none"
            )
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
            measures = [
                (name, *(cell(own.get(name)) for own in summary.values()))
                for name in editor_names(summary)
            ]
            columns = {"per cent": "<", **dict.fromkeys(summary, ">")}
            found.append(Table(run_title(run), columns, measures, INTERVALS))
            if run.sequence:
                found.append(_left_table(run))
            found.append(probe_table(run))
            found += measured_tables(run)
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
            "records an edit": ", ".join(
                f"{run.size:,}{' in sequence' if run.sequence else ''}" for run in self.runs
            ),
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
                should = (
                    before.get(row.prompt, "")
                    if row.stayed is not None
                    else wanted.get((row.record, row.prompt), "")
                )
                place = {
                    "run": self.runs[at].pace,
                    "editor": editor,
                    "kind": kind,
                    "record": row.record,
                }
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


def report_markdown(found: Report, path: str | os.PathLike[str] | None = None) -> str:
    """A report as Markdown; written to `path` if given, in one step. Raises WorkspaceError for a file that cannot be written."""
    check_report(found)
    lines = [f"# Edits of {as_text(found.runs[0].model)}, judged", ""]
    for table in found.tables():
        lines += table.as_markdown()
    for run in found.runs:
        for editor in run.editors if run.sequence else ():
            if editor != BASE:
                marks, rows = heat(run, editor)
                lines += [
                    f"### What is left of earlier rounds: {as_text(editor)}",
                    "",
                    "Prompts answered right, per cent, after round …",
                    "",
                ]
                cells = [
                    (f"written in {at + 1}", *("" if x is None else f"{100 * x:.0f}" for x in own))
                    for at, own in rows
                ]
                lines += Table(
                    "", {"": "<", **{str(mark + 1): ">" for mark in marks}}, cells
                ).as_markdown()
    if failures := found.failures():
        names = ("run", "editor", "kind", "prompt", "wanted", "said")
        rows_said = [tuple(f[name] for name in names) for f in failures]
        lines += Table("Worst failures", dict.fromkeys(names, "<"), rows_said).as_markdown()
    lines += [
        "## What each number means",
        "",
        *(f"- **{name}**: {as_text(text)}" for name, text in meanings(found).items()),
        "",
    ]
    lines += [
        "## Made from",
        "",
        *(f"- {as_text(name)}: {as_text(value)}" for name, value in found.facts().items()),
    ]
    text = "\n".join(lines) + "\n"
    return write_page(text, path)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_report(found: object) -> None:
    if not isinstance(found, Report):
        raise InputError(
            f"a report is made from a Report; got a {type(found).__name__}: Report(runs=[...], suite=suite)"
        )


def run_title(run: Evaluation) -> str:
    how = (
        f"rounds of {counted(run.size, 'record')}, one upon another"
        if run.sequence
        else f"{counted(run.size, 'record')} at a time"
    )
    return f"{how}; per cent, beside the model as it was"


def editor_names(summary: Mapping[str, Mapping[str, Share]]) -> list[str]:
    """The measures of a run; a question's next to one another, the scores first."""
    names = dict.fromkeys(name for own in summary.values() for name in own)
    kinds = list(
        dict.fromkeys(name.partition(" ")[0] for name in names if not name.startswith("score"))
    )
    return sorted(
        names,
        key=lambda name: -1 if name.startswith("score") else kinds.index(name.partition(" ")[0]),
    )


def cell(share: Share | None) -> str:
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


def measured_tables(run: Evaluation) -> list[Table]:
    """The same in words: what edits cost, and what they did to the rest."""
    told = {editor: run.measured(editor) for editor in run.editors if editor != BASE}
    tables = []
    for title, names, note in (
        ("what it cost", _COSTS, "means over edits; ‖ΔW‖/‖W‖: the largest"),
        ("what it did to the rest", DRIFT_NAMES, "KL in nats; perplexity after divided by before"),
    ):
        seldom = {
            name for name in ("failed", "broken") if not any(name in own for own in told.values())
        }
        names = {name: told_as for name, told_as in names.items() if name not in seldom}
        rows = [
            (editor, *(_number(name, own.get(name)) for name in names))
            for editor, own in told.items()
            if set(own) & set(names)
        ]
        tables.append(
            Table(title, {"editor": "<", **dict.fromkeys(names.values(), ">")}, rows, note)
        )
    return tables


def _number(name: str, value: float | None) -> str:
    return (
        ""
        if value is None
        else f"{100 * value:.1f} %"
        if name == "changed_share"
        else f"{value:.3g}"
    )


def _failed(runs: Sequence[Evaluation]) -> str:
    """How many edits failed, and why the first did; "" when none."""
    failed = [f"{editor}: {why}" for run in runs for (editor, _), why in run.failed.items()]
    return f"{len(failed):,}, the first of {failed[0]}" if failed else ""


def probe_table(run: Evaluation) -> Table:
    """What a probe measured, a column an editor."""
    told = {editor: run.probed(editor) for editor in run.editors}
    names = dict.fromkeys(name for own in told.values() for name in own)
    rows = [
        (name, *(f"{own[name]:.4g}" if name in own else "" for own in told.values()))
        for name in names
    ]
    return Table(
        "general ability",
        {"": "<", **dict.fromkeys(told, ">")},
        rows,
        "behind the last edit; base: before any",
    )


def _left_table(run: Evaluation) -> Table:
    """What is left of a sequence, behind a few rounds."""
    told = {editor: run.remaining(editor) for editor in run.editors if editor != BASE}
    rounds = sorted({at for own in told.values() for at in own})
    shown = (
        rounds
        if len(rounds) <= _FEW
        else sorted({rounds[round(i * (len(rounds) - 1) / (_FEW - 1))] for i in range(_FEW)})
    )
    rows = [
        (
            editor,
            *(
                f"{100 * own[at][0]:.0f} · {100 * own[at][1]:.0f}" if at in own else ""
                for at in shown
            ),
        )
        for editor, own in told.items()
    ]
    columns = {"behind round": "<", **{str(at + 1): ">" for at in shown}}
    return Table(
        "what is left",
        columns,
        rows,
        "prompts answered right, per cent: those of the first round · of all rounds so far",
    )


def heat(run: Evaluation, editor: str) -> tuple[list[int], list[tuple[int, list[float | None]]]]:
    """Retention as (rounds asked, [(round written, share behind each)]), of at most so many rounds, spread evenly."""
    told = run.retention(editor)
    rounds = sorted({asked for own in told.values() for asked in own})
    if len(rounds) > _MOST_ROUNDS:
        rounds = sorted(
            {
                rounds[round(at * (len(rounds) - 1) / (_MOST_ROUNDS - 1))]
                for at in range(_MOST_ROUNDS)
            }
        )
    return rounds, [(at, [told.get(at, {}).get(asked) for asked in rounds]) for at in rounds]


def _margin(row: Row) -> float:
    """How far an answer is from what was wanted: the smaller, the worse."""
    if row.broken:
        return LOWEST
    if row.log_wanted is None:
        return 0.0
    return row.log_wanted - (row.log_against if row.log_against is not None else 0.0)


def meanings(found: Report) -> dict[str, str]:
    """Those of what the report shows."""
    words = {
        word
        for summary in found.summaries
        for own in summary.values()
        for name in own
        for word in name.split()
    }
    words |= {
        name
        for run in found.runs
        for editor in run.editors
        if editor != BASE
        for name in run.measured(editor)
    }
    return {name: text for name, text in MEANINGS.items() if name in words}
