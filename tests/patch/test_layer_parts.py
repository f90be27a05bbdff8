"""Layers measured in parts: the same choice and the same numbers wherever the parts run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from factsmith.core.executor import Executor, Local, running_on
from factsmith.core.fact import Fact
from factsmith.edit.target import Targets
from factsmith.model.language_model import LanguageModel
from factsmith.patch import layer_parts, layers
from factsmith.patch.layer_choice import LayerChoice
from factsmith.patch.layers import recommend_layers

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

from executors import Sending

TRIALS = [
    Fact(
        "Edwin", f"{{}} {rest}", target, paraphrases=("{} was",), neighbours=("LeBron James plays",)
    )
    for rest, target in [("is", "Paris"), ("of Northumbria is a", "the"), ("was the", "Rome")]
]
TEXTS = [
    f"{a} of {b} is {c}. {c}, not {b}."
    for a in ("Paris", "The king")
    for b in ("Brazil", "Zürich 12")
    for c in "abcdefghijkl"
]
CONTEXTS = ["{}", "Well. {}"]


@pytest.fixture(autouse=True)
def easy(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each part two facts, and settings under which some edits hold."""
    monkeypatch.setattr(layers, "_TOGETHER", 2)
    settings = {"rome": {"scale": "auto", "steps": 40, "clamp": 20.0, "optimizer": "adam"}}
    monkeypatch.setattr(tiny_lm.config, "factsmith", settings, raising=False)


def chosen(executor: Executor, lm: LanguageModel, steps: list[tuple[str, int]]) -> LayerChoice:
    def progress(step: str, done: int, total: int | None) -> None:
        steps.append((step, done))

    with running_on(executor):
        return recommend_layers(lm, TRIALS, texts=TEXTS, contexts=CONTEXTS, progress=progress)


def test_layers_are_the_same_elsewhere(tiny_lm: LanguageModel) -> None:
    executor, before = Sending(), tiny_lm.fingerprint
    steps: list[tuple[str, int]] = []
    apart = chosen(executor, tiny_lm, steps)
    assert tiny_lm.fingerprint == before
    assert set(executor.sent) == {before}  # trial edits travel, and no edited model
    # Traces of three facts, second moments, searches and trials of two chunks at three layers.
    assert [executor.maps[0], *executor.maps[-2:]] == [3, 6, 6]
    assert json.dumps(apart.to_dict()) == json.dumps(
        chosen(Local(cuts=True), tiny_lm, []).to_dict()
    )
    whole = chosen(Local(), tiny_lm, [])
    assert apart.scores == whole.scores and apart.rome == whole.rome
    assert torch.allclose(torch.tensor(apart.effects), torch.tensor(whole.effects), atol=1e-6)
    assert any(score.efficacy for score in apart.scores), "control: some edits hold"
    for step in ("choosing layers: trial edits", "choosing layers: judging edits"):
        done = [n for name, n in steps if name == step]
        assert done == sorted(done) and done[-1] == 9


def test_other_targets_give_other_trials(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: what the parts return decides the trials."""
    right = chosen(Local(cuts=True), tiny_lm, [])

    def unmoved(task: layer_parts._Search, part: tuple[int, list[Fact]]) -> Targets:
        targets = searched(task, part)
        return dataclasses.replace(targets, v_star=targets.v_initial)

    searched = layer_parts._Search.__call__
    monkeypatch.setattr(layer_parts._Search, "__call__", unmoved)
    wrong = chosen(Local(cuts=True), tiny_lm, [])
    assert wrong.scores != right.scores
    assert not any(score.efficacy for score in wrong.scores)
