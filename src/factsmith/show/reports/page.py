"""A report as one HTML page, which needs no network, and as Markdown.

    report = Report(runs=[evaluate(lm, records, writers, size=n) for n in (1, 100)], suite=suite)
    report_page(report, "report.html")
    report_markdown(report, "report.md")

Success by comparison is always next to what the model really says. Prompts and answers come from
files and models: the page escapes them and runs no script, and the Markdown escapes its marks.
"""

from __future__ import annotations

import os

from ...core.errors import InputError
from ...judge.evaluation import INTERVALS
from ...judge.rows import BASE
from ..pages.page import check_page, render, write_page
from .charts import bars, report_charts
from .meanings import meanings
from .record import Report
from .tables import measure_names, other_tables, retention_heat, run_title

_BASE = {False: "the model before any edit", True: "the server's base model"}
"""What “base” is, if a model in memory answered, and if a server did."""


def report_page(
    found: Report,  # house: the promised name of the parameter
    path: str | os.PathLike[str] | None = None,
) -> str:
    """Return a report as one HTML page, and write it if there is a path.

    Args:
        found: The report.
        path: The file to write, in one step; its name ends in .html.

    Raises:
        InputError: for another suffix, or if the file exists and factsmith did not write it.
        WorkspaceError: when the file cannot be written.
    """
    _check_report(found)
    if path is not None:
        check_page(path)
    runs = [
        {
            "title": run_title(run),
            "short": run.pace,
            "editors": list(summaries),
            "rows": [
                (name, [summary.get(name) for summary in summaries.values()])
                for name in measure_names(summaries)
            ],
            "bars": bars(summaries),
            "tables": other_tables(run),
            "heats": [
                (editor, retention_heat(run, editor))
                for editor in run.editors
                if run.sequence and editor != BASE
            ],
        }
        for run, summaries in zip(found.runs, found.summaries, strict=True)
    ]
    failures = found.failures()
    html = render(
        "report.html",
        None,
        title=found.title,
        base=_BASE[bool(found.runs[0].served)],
        model=found.runs[0].model,
        suite=found.suite.name,
        runs=runs,
        intervals=INTERVALS,
        charts=report_charts(found),
        colours={editor: at for at, editor in enumerate(found.editors)},
        failures=failures,
        kinds=list(dict.fromkeys(failure["kind"] for failure in failures)),
        meanings=meanings(found.runs),
        facts=found.facts(),
    )
    return write_page(html, path)


def report_markdown(
    found: Report,  # house: the promised name of the parameter
    path: str | os.PathLike[str] | None = None,
) -> str:
    """Return a report as Markdown, and write it in one step if there is a path.

    Raises:
        WorkspaceError: when the file cannot be written.
    """
    _check_report(found)
    return write_page(found.to_markdown(), path)


def _check_report(report: object) -> None:
    if not isinstance(report, Report):
        raise InputError(
            f"a report is made from a Report; got a {type(report).__name__}: "
            "make one with Report(runs=[...], suite=suite)"
        )
