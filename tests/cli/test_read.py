"""Asking a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import PROMPT, Run


def test_a_model_cannot_steer_the_terminal(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factsmith.model.load.LanguageModel.answer", lambda self, prompts, max_new_tokens: ["\x1b[2J[bold]x[/bold]"])
    done = run("ask", model, PROMPT)
    assert "\x1b" not in done.out and "[bold]x[/bold]" in done.out


def test_a_prediction_is_explained(run: Run, model: Path) -> None:
    found = run("explain", model, PROMPT, "--top", "3", "--json").json
    assert sum(part["logit"] for part in found["parts"]) == pytest.approx(found["logit"], abs=1e-3)
    assert len(found["neurons"]) == 6 and all(len(neuron["writes"]) == 5 for neuron in found["neurons"])
    assert [neuron["logit"] > 0 for neuron in found["neurons"]] == [True] * 3 + [False] * 3
    assert found["parts"][-2]["rank"] == 0, "it is what the model says"
    said = run("ask", model, PROMPT, "--json").json
    assert found["target"] == said["next_tokens"][0]["token"]
    assert found["parts"][-2]["probability"] == pytest.approx(said["next_tokens"][0]["probability"], abs=1e-4)
    text = run("explain", model, PROMPT, "--instead-of", "Paris").out
    assert "above that of 'Paris'" in text and "neurons carry half" in text
    other = run("explain", model, PROMPT, "--instead-of", "Paris", "--json").json
    assert other["logit"] != pytest.approx(found["logit"])


def test_a_prediction_that_cannot_be_explained(run: Run, model: Path) -> None:
    for arguments in (("explain", model, ""), ("explain", model, PROMPT, "--target", ""), ("explain", "a", "b", "c")):
        done = run(*arguments)
        assert done.code == 2 and done.err.startswith("error: ") and "Traceback" not in done.err
