"""What an evaluation found, for people: one HTML page that needs no network, and the same as Markdown.

    found = Report(runs=[evaluate(lm, records, writers, size=n) for n in (1, 100)], suite=suite)
    report_page(found, "report.html")
    report_markdown(found, "report.md")

Success by comparison and what the model really says always stand side by side. Prompts and answers come from files and models: the page
escapes them and runs no script, the Markdown has nothing of theirs that would be read as such.
"""

from __future__ import annotations

import os

from ...core.tables import visible
from ...judge.evaluation import INTERVALS
from ...judge.rows import BASE
from ..pages.page import check_page, write_page, render
from .charts import bars, report_charts
from .record import (
    Report,
    check_report,
    editor_names,
    heat,
    meanings,
    measured_tables,
    probe_table,
    run_title,
)


def report_page(found: Report, path: str | os.PathLike[str] | None = None) -> str:
    """A report as one HTML page; written to `path` (.html) if given, in one step.

    Raises InputError for another suffix, or a file there that is none of ours, WorkspaceError for a folder that cannot be written.
    """
    check_report(found)
    if path is not None:
        check_page(path)
    runs = []
    for run, summary in zip(found.runs, found.summaries, strict=True):
        names = editor_names(summary)
        runs.append(
            {
                "title": run_title(run),
                "short": run.pace,
                "editors": list(summary),
                "rows": [(name, [own.get(name) for own in summary.values()]) for name in names],
                "bars": bars(summary),
                "tables": [
                    table for table in (probe_table(run), *measured_tables(run)) if table.rows
                ],
                "heats": [(e, heat(run, e)) for e in run.editors if run.sequence and e != BASE],
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
        charts=report_charts(found),
        colours={editor: at for at, editor in enumerate(found.editors)},
        failures=failures,
        kinds=list(dict.fromkeys(f["kind"] for f in failures)),
        meanings=meanings(found),
        facts=found.facts(),
    )
    return write_page(html, path)
