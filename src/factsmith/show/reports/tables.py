"""The tables of one run of an evaluation: measures, retention, cost and drift by editor."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...core.tables import Table, counted
from ...judge.evaluation import INTERVALS, Evaluation
from ...judge.rows import BASE, Share

PAIRS = (
    ("prompt", "exact"),
    ("paraphrase", "exact"),
    ("neighbour", "stayed"),
    ("multihop", "exact"),
)
"""The measures that a report draws: the kind of question, and what the model says."""

COSTS = {
    "edits": "edits",
    "failed": "failed",
    "unusable": "records left out",
    "broken": "broken",
    "seconds": "seconds per edit",
    "seconds_a_record": "seconds per record",
    "norm": "‖ΔW‖/‖W‖",
}
"""What an edit costs: the names of the numbers, and what tables call them."""

DRIFTS = {
    "kl_text": "KL on prose",
    "perplexity": "perplexity ratio",
    "kl_facts": "KL on other facts",
    "changed_share": "other facts changed",
}
"""What an edit changes besides: the names of the numbers, and what tables call them."""

_SELDOM = ("failed", "unusable", "broken")
"""Costs that a table leaves out if no editor has them."""

_ROUNDS_OF_TABLE = 8

_ROUNDS_OF_HEAT = 16


def run_tables(run: Evaluation) -> list[Table]:
    """Return the tables of a run, without those that have no rows."""
    summaries = run.summaries
    rows = [
        (name, *(cell(summary.get(name)) for summary in summaries.values()))
        for name in measure_names(summaries)
    ]
    columns = {"per cent": "<", **dict.fromkeys(summaries, ">")}
    tables = [Table(run_title(run), columns, rows, INTERVALS)]
    if run.sequence:
        tables.append(_retention_table(run))
    return [table for table in (*tables, *other_tables(run)) if table.rows]


def other_tables(run: Evaluation) -> list[Table]:
    """Return what a run measured besides answers: ability, cost and drift; empty ones left out."""
    measured = {editor: run.measured(editor) for editor in run.editors if editor != BASE}
    costs = {
        name: label
        for name, label in COSTS.items()
        if name not in _SELDOM or any(name in numbers for numbers in measured.values())
    }
    tables = (
        _ability_table(run),
        _number_table(
            "what it cost", costs, measured, "means over edits; ‖ΔW‖/‖W‖ is the largest of them"
        ),
        _number_table(
            "what it did to the rest",
            DRIFTS,
            measured,
            "KL in nats; perplexity ratio: after the edit divided by before",
        ),
    )
    return [table for table in tables if table.rows]


def run_title(run: Evaluation) -> str:
    """Return what a run did, as the title of its measures."""
    records = counted(run.size, "record")
    if run.served:
        return f"{records}, as served; base: the server's base model"
    how = f"rounds of {records}, one on top of another" if run.sequence else f"{records} at a time"
    return f"{how}; base: the model before any edit"


def measure_names(summaries: Mapping[str, Mapping[str, Share]]) -> list[str]:
    """Return the measures of a run: the scores first, then those of each kind of question."""
    names = dict.fromkeys(name for summary in summaries.values() for name in summary)
    kinds = list(dict.fromkeys(_kind(name) for name in names if not name.startswith("score")))
    return sorted(
        names, key=lambda name: -1 if name.startswith("score") else kinds.index(_kind(name))
    )


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def cell(share: Share | None) -> str:
    """Return a share in per cent, with half of its interval."""
    if share is None:
        return ""
    spread = 50 * (share.high - share.low)
    return f"{100 * share.value:z.1f}" + (f" ± {spread:z.1f}" if math.isfinite(spread) else "")


def retention_heat(
    run: Evaluation, editor: str
) -> tuple[list[int], list[tuple[int, list[float | None]]]]:
    """Return what is left of each round of a sequence after each round.

    Returns:
        The rounds, at most 16 of them, and for each of them (round, shares of its prompts that are
        answered right after each round; None before it was written).
    """
    retention = run.retention(editor)
    rounds = _spread({asked for shares in retention.values() for asked in shares}, _ROUNDS_OF_HEAT)
    return rounds, [(at, [retention.get(at, {}).get(asked) for asked in rounds]) for at in rounds]


def _retention_table(run: Evaluation) -> Table:
    """Return what is left of a sequence after a few rounds."""
    left = {editor: run.remaining(editor) for editor in run.editors if editor != BASE}
    rounds = _spread({at for shares in left.values() for at in shares}, _ROUNDS_OF_TABLE)

    def pair(shares: Mapping[int, tuple[float, float]], at: int) -> str:
        return " · ".join(f"{100 * share:z.0f}" for share in shares[at]) if at in shares else ""

    rows = [(editor, *(pair(shares, at) for at in rounds)) for editor, shares in left.items()]
    columns = {"after round": "<", **{str(at + 1): ">" for at in rounds}}
    note = "prompts answered right, per cent: those of the first round · those of all rounds so far"
    return Table("what is left", columns, rows, note)


def _spread(rounds: set[int], n: int) -> list[int]:
    """Return the rounds in order, or n of them, evenly spread, if there are more."""
    ordered = sorted(rounds)
    if len(ordered) <= n:
        return ordered
    return sorted({ordered[round(i * (len(ordered) - 1) / (n - 1))] for i in range(n)})


def _ability_table(run: Evaluation) -> Table:
    """Return what a probe measured of each model."""
    probed = {editor: run.probed(editor) for editor in run.editors}
    names = dict.fromkeys(name for numbers in probed.values() for name in numbers)
    rows = [
        (name, *(f"{numbers[name]:z.4g}" if name in numbers else "" for numbers in probed.values()))
        for name in names
    ]
    columns = {"": "<", **dict.fromkeys(probed, ">")}
    return Table("general ability", columns, rows, "after the last edit; base: before any edit")


def _number_table(
    title: str,
    names: Mapping[str, str],
    numbers: Mapping[str, Mapping[str, float]],
    note: str,
) -> Table:
    """Return a table of named numbers, a row for each editor that has one of them."""
    rows = [
        (editor, *(_number(name, measured.get(name)) for name in names))
        for editor, measured in numbers.items()
        if set(measured) & set(names)
    ]
    return Table(title, {"editor": "<", **dict.fromkeys(names.values(), ">")}, rows, note)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:z.1f} %" if name == "changed_share" else f"{value:z.3g}"
