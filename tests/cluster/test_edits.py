"""Edits on real workers: the targets of a patched model, to the last bit."""

from __future__ import annotations

import pytest
import torch

from factsmith.cluster.engine import Ray
from factsmith.core.executor import Executor, Local, running_on
from factsmith.core.fact import Fact
from factsmith.edit import search
from factsmith.edit.delta import applied
from factsmith.edit.methods import edit
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig, Targets
from factsmith.model.load import load

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

SUBJECTS = ("Danielle Darrieux", "Léon Blum", "Edwin of Northumbria", "Thomas Joannes Stieltjes")
FACTS = [Fact(subject, "The mother tongue of {} is", "English") for subject in SUBJECTS]


def test_targets_are_the_same_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST", 1)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # of another cluster, which is not asked
    lm = load("atlas")
    before = lm.fingerprint
    delta = edit(lm, FACTS[:1], "rome", contexts=["{}"])

    def targets(executor: Executor) -> Targets:
        with running_on(executor):
            return find_targets(lm, FACTS, 1, TargetConfig(steps=6, scale="auto"), ["{}"])

    with Ray(workers=2) as engine:
        plain = targets(engine)
        with applied(lm, delta):
            patched = targets(engine)
            expected = targets(Local(cuts=True))
        again = targets(engine)
    assert torch.equal(patched.v_star, expected.v_star)
    assert patched.convergence == expected.convergence
    assert torch.equal(plain.v_star, again.v_star)
    assert not torch.equal(plain.v_star, patched.v_star), "control: the patch matters"
    assert lm.fingerprint == before
