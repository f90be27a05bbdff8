"""What each layer says, which neurons fire at a token, and what silencing them does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import PROMPT, Run
from factsmith.model.load import load


def test_the_lens_ends_with_what_the_model_says(run: Run, model: Path) -> None:
    shown = run("lens", model, PROMPT, "--json").json
    said = run("ask", model, PROMPT, "--top", "1", "--json").json["next_tokens"][0]
    likeliest = shown["states"][-1][-1]["likeliest"][0]
    assert likeliest["token"] == said["token"]
    assert likeliest["probability"] == pytest.approx(said["probability"], abs=1e-5)
    assert len(shown["states"]) == load(str(model)).n_layers + 1
    text = run("lens", model, PROMPT, "--target", "Paris").out
    assert "rank of" in text
    assert run("lens", model, PROMPT, "--target", " ").code == 2


def test_the_neurons_at_a_token(run: Run, model: Path) -> None:
    shown = run("at", model, PROMPT, "--layer", "1", "--top", "3", "--json").json
    lm = load(str(model))
    coefficients = lm.coefficients(PROMPT, [1])[0, -1]
    norms = coefficients.abs() * torch.linalg.vector_norm(lm.ffn[1].values, dim=1)
    strongest = norms.argsort(descending=True)[:3].tolist()
    assert [neuron["neuron"][1] for neuron in shown["neurons"]] == strongest
    assert "(option: --layer)" in run("at", model, PROMPT, "--layer", "99").err
    assert run("at", model, PROMPT, "--layer", "1", "--token", "99").code == 2


def test_silencing_every_neuron_of_a_layer_changes_the_answer(run: Run, model: Path) -> None:
    lm = load(str(model))
    all_of_it = [word for i in range(len(lm.ffn[1].values)) for word in ("--neuron", f"1 {i}")]
    shown = run("intervene", model, PROMPT, *all_of_it, "--json").json
    assert shown["divergence"] > 0
    untouched = run("intervene", model, PROMPT, "--neuron", "1 2", "--factor", "1", "--json").json
    assert untouched["divergence"] == pytest.approx(0, abs=1e-6)
    refused = run("intervene", model, PROMPT, "--neuron", "one")
    assert refused.code == 2 and "is not a neuron; give its layer and number" in refused.err
    assert "(option: --neuron)" in refused.err
