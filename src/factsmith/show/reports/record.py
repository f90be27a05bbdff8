"""The record of a report: runs of an evaluation, and what they were made from.

runs = [fs.evaluate(lm, records, writers, size=n) for n in (1, 100)]
report = Report(runs=runs, suite=suite)
report                        # the tables, in a terminal or a notebook
report.failures()             # the worst answers
report.to_dict()              # the numbers, for JSON
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import InputError
from ...core.identity import present_fingerprint
from ...core.tables import Shown, Table, as_text, visible
from ...judge.evaluation import Evaluation
from ...judge.records import Suite
from ...judge.rows import BASE, LOWEST, Row, Share
from .meanings import meanings
from .tables import retention_heat, run_tables

_FAILURES = 48
"""About how many failures a report shows. The kinds of question and the runs share them."""

_UNMEASURED = "success, magnitude, tokens and score: the server does not say how likely a target is"

_FAILURE_COLUMNS = {
    "run": "run",
    "editor": "editor",
    "kind": "kind",
    "prompt": "prompt",
    "wanted": "expected",
    "said": "said",
}
"""The fields of a failure, and what a table calls them."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report(Shown):
    """Runs of the same records at several sizes, with what they were made from.

    Attributes:
        runs: One run for each size, at least one, all finished. They are kept in the order of their
            sizes, those in sequence last.
        suite: The suite of the records.
        seed: Seed of the sample of records and of the editors.
        left_out: {reason: how many records were not judged}.
        version: The version of factsmith.

    Raises:
        InputError: when there is no run, when runs are of several models or of the same size, or
            when one is not finished.
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
        models = {present_fingerprint(run.fingerprint) for run in self.runs}
        if len(models) != 1:
            raise InputError(
                f"runs holds {len(self.runs)} runs of {len(models)} models; "
                "expected at least one run, and all of one model",
                argument="runs",
            )
        if len({(run.size, run.sequence) for run in self.runs}) < len(self.runs):
            raise InputError(
                "runs holds two runs of the same size; expected one run for each size",
                argument="runs",
            )
        for run in self.runs:
            for editor, done in run.unfinished.items():
                raise InputError(
                    f"{editor}, {run.pace}: {done:,} of {run.units:,} edits are done; run it again "
                    "to finish it, or leave out what is not finished with run.finished()",
                    argument="runs",
                )

    @property
    def summaries(self) -> list[Mapping[str, Mapping[str, Share]]]:
        """For each run {editor: {measure: Share}}."""
        return [run.summaries for run in self.runs]

    @property
    def editors(self) -> tuple[str, ...]:
        """The editors of all runs, the base model first."""
        return tuple(dict.fromkeys(editor for run in self.runs for editor in run.editors))

    @property
    def title(self) -> str:
        """The title of the report."""
        first = self.runs[0]
        what = f"What {first.model} says" if first.served else f"Edits of {first.model}"
        return f"{visible(what)}, judged"

    def tables(self) -> list[Table]:
        """Return for each run its measures, and what its edits cost."""
        return [table for run in self.runs for table in run_tables(run)]

    def facts(self) -> dict[str, str]:
        """Return what the report was made from, by name."""
        first = self.runs[0]
        records = len({row.record for row in first.rows})
        facts = {
            "model": first.model,
            "server": first.served,
            "not measured": _UNMEASURED if first.served and not first.gives_log_probs else "",
            "fingerprint": first.fingerprint,
            "suite": self.suite.name,
            "source": self.suite.source,
            "its sha256": self.suite.digest,
            "records judged": f"{records:,}",
            **{f"left out: {why}": f"{n:,}" for why, n in self.left_out.items()},
            "edits that could not be made": _first_failure(self.runs),
            "records that could not be used": _first_unusable(self.runs),
            "malformed, left out": self.suite.left_out or "nothing",
            "records an edit": "" if first.served else _sizes(self.runs),
            **self._settings(),
            "seed": str(self.seed),
            "factsmith": self.version,
        }
        return {name: value for name, value in facts.items() if value}

    def _settings(self) -> dict[str, str]:
        """Return {"settings of memit": text}; if runs differ, the name says which run."""
        settings: dict[str, dict[str, str]] = {}
        for run in self.runs:
            for editor, text in run.settings.items():
                if editor in run.editors:
                    settings.setdefault(editor, {})[run.pace] = text
        return {
            f"settings of {editor}{'' if len(set(texts.values())) == 1 else f', {pace}'}": text
            for editor, texts in settings.items()
            for pace, text in texts.items()
        }

    def failures(self) -> list[dict[str, Any]]:
        """Return the worst answers: for each kind and editor those furthest from the right one.

        Returns:
            A few dozen dicts with "run", "editor", "kind", "record", "prompt", "wanted" and "said".
        """
        groups: dict[tuple[int, str, str], list[Row]] = {}
        for at, editor, row in self._edited_rows():
            if (row.stayed if row.stayed is not None else row.exact) is False:
                groups.setdefault((at, editor, row.kind), []).append(row)
        n_each = max(1, _FAILURES // max(1, len(groups)))
        failures = []
        for (at, editor, kind), rows in groups.items():
            run = self.runs[at]
            before = {row.prompt: row.answer for row in run.asked(BASE)}
            for row in sorted(rows, key=_margin)[:n_each]:
                right = self._right_answers.get((row.record, row.prompt), "")
                failures.append(
                    {
                        "run": run.pace,
                        "editor": editor,
                        "kind": kind,
                        "record": row.record,
                        "prompt": row.prompt,
                        "wanted": right if row.stayed is None else before.get(row.prompt, ""),
                        "said": row.answer,
                    }
                )
        return failures[: 2 * _FAILURES]

    def _edited_rows(self) -> Iterator[tuple[int, str, Row]]:
        """Yield (number of the run, editor, row) of every answer after an edit."""
        for at, run in enumerate(self.runs):
            for editor in run.editors:
                if editor != BASE:
                    yield from ((at, editor, row) for row in run.asked(editor))

    @functools.cached_property
    def _right_answers(self) -> dict[tuple[str, str], str]:
        """The right answers in words, by record and prompt."""
        return {
            (record.id, q.prompt): f"not {q.against}" if q.kind == "negation" else q.answers[0]
            for record in self.suite.records
            for q in record.questions
            if (q.against if q.kind == "negation" else q.answers)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain fields for JSON."""
        return {
            "facts": self.facts(),
            "left_out": dict(self.left_out),
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_markdown(self) -> str:
        """Return the report as Markdown; `report_markdown` writes it to a file."""
        lines = [f"# {as_text(self.title)}", ""]
        for table in self.tables():
            lines += table.as_markdown()
        for run in self.runs:
            for editor in run.editors if run.sequence else ():
                if editor != BASE:
                    lines += _heat_lines(run, editor)
        if failures := self.failures():
            rows = [tuple(failure[name] for name in _FAILURE_COLUMNS) for failure in failures]
            columns = dict.fromkeys(_FAILURE_COLUMNS.values(), "<")
            lines += Table("Worst failures", columns, rows).as_markdown()
        lines += ["## What each number means", ""]
        lines += [
            f"- **{as_text(name)}**: {as_text(text)}" for name, text in meanings(self.runs).items()
        ]
        lines += ["", "## Made from", ""]
        lines += [f"- {as_text(name)}: {as_text(value)}" for name, value in self.facts().items()]
        return "\n".join(lines) + "\n"


def _sizes(runs: Sequence[Evaluation]) -> str:
    """Return how many records each run wrote at a time, in words."""
    return ", ".join(f"{run.size:,}{' in sequence' if run.sequence else ''}" for run in runs)


def _first_failure(runs: Sequence[Evaluation]) -> str:
    """Return how many edits failed, and why the first one did; "" when none failed."""
    failed = [f"{editor}: {why}" for run in runs for (editor, _), why in run.failed.items()]
    return f"{len(failed):,}, the first of {failed[0]}" if failed else ""


def _first_unusable(runs: Sequence[Evaluation]) -> str:
    """Return how many records could not be used, and why the first one could not; "" for none."""
    reasons = {
        record: why
        for run in runs
        for by_record in run.unusable.values()
        for record, why in by_record.items()
    }
    first = next(iter(reasons.items()), None)
    return "" if first is None else f"{len(reasons):,}, the first is {first[0]}: {first[1]}"


def _heat_lines(run: Evaluation, editor: str) -> list[str]:
    """Return what is left of earlier rounds as lines of Markdown."""
    rounds, rows = retention_heat(run, editor)
    cells = [
        (
            f"written in {at + 1}",
            *("" if share is None else f"{100 * share:.0f}" for share in shares),
        )
        for at, shares in rows
    ]
    columns = {"": "<", **{str(at + 1): ">" for at in rounds}}
    return [
        f"### What is left of earlier rounds: {as_text(editor)}",
        "",
        "Prompts answered right, per cent, after round …",
        "",
        *Table("", columns, cells).as_markdown(),
    ]


def _margin(row: Row) -> float:
    """Return how much likelier the right answer was than the other side; low is bad."""
    if row.broken:
        return LOWEST
    if row.log_wanted is None:
        return 0.0
    return row.log_wanted - (row.log_against if row.log_against is not None else 0.0)
