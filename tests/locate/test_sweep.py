"""The sweep takes shortcuts only where they are allowed, and does the work the design counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factsmith.locate import batching, runs, sweep
from factsmith.locate.causal import causal_trace
from factsmith.locate.corruption import Corruption
from factsmith.locate.kinds import Restoration
from factsmith.locate.runs import record_runs
from factsmith.locate.sweep import trace_runs
from tracing import KINDS, PROMPT, SAMPLES, SUBJECT, model


def test_one_recording_serves_every_map() -> None:
    lm = model("llama")
    recorded = record_runs(lm, PROMPT, SUBJECT, Corruption(samples=SAMPLES), target="F")
    for kind, sever in [("state", None), ("mlp", None), ("attention", None), ("state", "mlp")]:
        alone = causal_trace(
            lm, PROMPT, SUBJECT, target="F", kind=kind, sever=sever, window=2, samples=SAMPLES
        )
        shared = trace_runs(recorded, Restoration(kind, 2, sever))
        assert torch.allclose(shared.scores, alone.scores, atol=1e-7)


def test_batches_cut_to_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {
        kind: causal_trace(model("llama"), PROMPT, SUBJECT, kind=kind, samples=SAMPLES)
        for kind in KINDS
    }
    monkeypatch.setattr(batching, "CPU_BATCH_BYTES", 1)
    monkeypatch.setattr(runs, "HEAD_ROWS", 1)
    monkeypatch.setattr(sweep, "HEAD_ROWS", 1)
    for kind, trace in whole.items():
        cut = causal_trace(model("llama"), PROMPT, SUBJECT, kind=kind, samples=SAMPLES)
        assert torch.allclose(cut.scores, trace.scores, rtol=1e-5, atol=1e-7)


def test_without_a_prefix_cache_the_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2")
    cached = {
        kind: causal_trace(lm, PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)
        for kind in KINDS
    }
    severed = causal_trace(lm, PROMPT, SUBJECT, sever="mlp", samples=SAMPLES)
    monkeypatch.setattr(lm, "caches_prefix", False)
    again = causal_trace(lm, PROMPT, SUBJECT, sever="mlp", samples=SAMPLES)
    assert torch.allclose(again.scores, severed.scores, rtol=1e-4, atol=1e-7)
    for kind, trace in cached.items():
        again = causal_trace(lm, PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)
        assert torch.allclose(again.scores, trace.scores, rtol=1e-4, atol=1e-7)


def test_shortcuts_that_a_layer_does_not_allow_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The long way gives the same numbers.

    It is taken where a layer's attention follows its MLP, and where a memory gets more than the
    hidden state.
    """
    lm = model("gpt2")
    recorded = record_runs(lm, PROMPT, SUBJECT, Corruption(samples=SAMPLES))
    maps = [
        Restoration("state", 2),
        Restoration("mlp", 2),
        Restoration("attention", 2),
        Restoration("state", 2, "mlp"),
    ]
    short = [trace_runs(recorded, restoration).scores for restoration in maps]
    ran: list[int] = []
    plain = type(lm.layers[0]).forward

    def counted(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        ran.append(hidden.shape[0] * hidden.shape[1])
        return plain(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(lm.layers[0]), "forward", counted)
    trace_runs(recorded, Restoration("mlp", 2))
    cells = sum(ran)
    monkeypatch.setattr(batching, "tensors", lambda value: iter((value, value)))
    long = dataclasses.replace(recorded, attention_last=(True,) * lm.n_layers)
    for restoration, scores in zip(maps, short, strict=True):
        ran.clear()
        again = trace_runs(long, restoration).scores
        assert torch.allclose(again, scores, rtol=1e-4, atol=1e-7)
        assert sum(ran) > cells or restoration.kind != "mlp"  # it was a longer way


def test_layers_are_run_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is counted in (row, column, layer) cells. It is a small part of the plain loop's."""
    lm = model("gpt2")
    ran = 0
    plain = type(lm.layers[0]).forward

    def counted(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += hidden.shape[0] * hidden.shape[1]
        return plain(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(lm.layers[0]), "forward", counted)
    trace = causal_trace(lm, PROMPT, SUBJECT, samples=SAMPLES)
    n_tokens, start, n = len(trace.tokens), trace.subject_span[0], lm.n_layers
    columns = sum(range(1, n_tokens - start + 1))  # live columns, summed over the traced tokens
    recorded = n_tokens * n * (1 + SAMPLES)  # clean and corrupted, in one pass
    assert ran == recorded + SAMPLES * columns * n * (n - 1) // 2
    assert ran < n_tokens * n * (SAMPLES + 1) * n_tokens * n / 5


def test_progress_counts_tokens() -> None:
    calls: list[tuple[int, int]] = []
    trace = causal_trace(
        model("gpt2"),
        PROMPT,
        SUBJECT,
        samples=1,
        progress=lambda done, of: calls.append((done, of)),
    )
    n = len(trace.tokens) - trace.subject_span[0]
    assert calls == [(i + 1, n) for i in range(n)]
