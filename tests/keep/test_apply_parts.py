"""Patches of a workspace in parts: the same delta wherever they run, and one process that keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.executor import Executor, Local, running_on
from factsmith.core.fact import Fact
from factsmith.edit import keys
from factsmith.edit import search as search_module
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.delta import Delta
from factsmith.keep.revision import LATEST
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from workbenches import ASKED, SPREADING, hashes

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

from executors import Sending

FACTS = [
    Fact(subject, "The home of {} is", target, relation="home")
    for subject, target in [("Entity1", " q"), ("Entity22", " z"), ("Entity333", " x")]
]
APPENDING = AppendConfig(layer=1, steps=6, scale="auto")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each part one fact."""
    monkeypatch.setattr(search_module, "_MOST", 1)


def tiny_gpt2() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def applied_on(
    executor: Executor, folder: Path, method: str, config: Any
) -> tuple[Delta, dict[str, str]]:
    """Apply the facts in a new workspace, and return the delta and what the weights are then."""
    lm = tiny_gpt2()
    base = hashes(lm)
    with Workbench(lm, folder) as bench, running_on(executor):
        outcome = bench.apply(FACTS, method, config, force=True, **ASKED)
        assert outcome.delta is not None and outcome.revision is not None
        assert [revision.id for revision in bench.log()] == [outcome.revision.id]
        weights = hashes(lm)
        assert weights != base
        bench.revert(LATEST)
        assert hashes(lm) == base
    return outcome.delta, weights


def tensors(delta: Delta) -> list[torch.Tensor]:
    """Return every number of a delta."""
    layers = [part for pair in delta.layers.values() for part in pair]
    rows = [
        value
        for each in delta.appended.values()
        for value in vars(each).values()
        if isinstance(value, torch.Tensor)
    ]
    return [delta.v_star, *delta.k_star.values(), *layers, *rows]


@pytest.mark.parametrize(("method", "config"), [("memit", SPREADING), ("append", APPENDING)])
def test_apply_gives_the_same_delta_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, config: Any
) -> None:
    executor = Sending()
    apart, sent_weights = applied_on(executor, tmp_path / "sent", method, config)
    cut, cut_weights = applied_on(Local(cuts=True), tmp_path / "cut", method, config)
    whole, _ = applied_on(Local(), tmp_path / "whole", method, config)
    assert max(executor.maps) >= 3
    assert sent_weights == cut_weights
    assert len(tensors(apart)) >= 3
    assert all(torch.equal(a, b) for a, b in zip(tensors(apart), tensors(cut), strict=True))
    assert apart.facts == whole.facts
    if method == "memit":
        for a, b in zip(tensors(apart), tensors(whole), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    # Other batches round differently, and each step of a search makes more of it. So the batches
    # are those of one process here.
    monkeypatch.setattr(search_module, "_MOST", 32)
    monkeypatch.setattr(keys, "_PART", 10**6)
    alike, _ = applied_on(Local(cuts=True), tmp_path / "alike", method, config)
    for a, b in zip(tensors(alike), tensors(whole), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def test_workers_open_no_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks hold no workbench and no ledger: they are pickled, and a workbench cannot be."""
    opened: list[object] = []
    start = Workbench.__init__

    def counted(self: Workbench, *given: Any, **options: Any) -> None:
        opened.append(self)
        start(self, *given, **options)

    monkeypatch.setattr(Workbench, "__init__", counted)
    applied_on(Sending(), tmp_path / "space", "memit", SPREADING)
    assert len(opened) == 1
    with Workbench(tiny_gpt2(), tmp_path / "b") as bench, pytest.raises(TypeError, match="pickle"):
        Sending().check(bench, "control")
