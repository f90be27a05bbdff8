"""What the record of a causal trace says and shows."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from factsmith.locate.causal import causal_trace
from tracing import PROMPT, SUBJECT, model


def test_record_is_plain_json() -> None:
    trace = causal_trace(model("gpt2"), PROMPT, SUBJECT, kind="mlp", window=4, samples=2)
    read = json.loads(json.dumps(trace.to_dict()))
    assert torch.allclose(torch.tensor(read["scores"]), trace.scores)
    assert (
        read["window"] == 4
        and read["subject_span"] == list(trace.subject_span)
        and read["tokens"] == list(trace.tokens)
    )
    with pytest.raises(AttributeError):
        trace.clean = 1.0  # type: ignore[misc]


def test_rows_and_tables_say_what_the_scores_say() -> None:
    trace = causal_trace(model("gpt2"), PROMPT, SUBJECT, samples=2)
    rows = trace.rows()
    assert len(rows) == trace.scores.numel()
    best = max(rows, key=lambda row: row["effect"])
    assert (best["column"], best["layer"]) == trace.peak
    start, stop = trace.subject_span
    assert {row["column"] for row in rows if row["subject"]} == set(range(start, stop))
    (table,) = trace.tables()
    token, layer = trace.peak
    assert table.rows[token][1:] == (str(layer), f"{float(trace.scores.max()):.3f}")
    assert table.rows[start][0].endswith("*") and not table.rows[stop][0].endswith("*")
    assert trace.notes == ()


def test_a_corruption_that_takes_nothing_away_is_a_warning() -> None:
    trace = causal_trace(model("gpt2"), PROMPT, SUBJECT, samples=1)
    lost = dataclasses.replace(trace, clean=0.9, corrupted=0.1)
    assert lost.warnings == ()
    (text,) = dataclasses.replace(trace, clean=0.9, corrupted=0.87).warnings
    assert f"p({trace.answer.strip()}) is 0.900, and 0.870" in text and "shows nothing" in text
    assert dataclasses.replace(trace, clean=0.02, corrupted=0.009).warnings == ()
    assert dataclasses.replace(trace, clean=0.02, corrupted=0.011).warnings
