"""Appended neurons on the command line: their statistics, their patches, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import FACT, Run
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.model.load import load
from workbenches import TEXTS

FILE = """
method: append
facts:
- {subject: Bulgaria, prompt: "The capital of {} is", target: Oslo}
- {subject: Peru, prompt: "The capital of {} is", target: Rome}
gates: {paraphrases: 0, neighbours: 0}
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    return file


def test_input_statistics_are_computed_kept_and_used(
    run: Run, model: Path, tmp_path: Path, texts: Path
) -> None:
    options = ("--layer", 0, "--texts", texts, "--out", "kept")
    done = run("moments", model, "--inputs", *options, "--max-tokens", "inf")
    assert done.code == 0 and "of what enters the layer" in done.out
    assert "wrote kept/inputs0.safetensors" in " ".join(done.out.split())
    lm = load(str(model))
    kept = SecondMoment.load(tmp_path / "kept" / "inputs0.safetensors", lm, 0)
    expected = second_moments(lm, TEXTS, [0], max_tokens=1e9, site="inputs")[0]
    assert kept.site == "inputs" and kept.matrix.allclose(expected.matrix)
    assert run("moments", model, *options, "--max-tokens", "inf", "--json").json["moments"][0][
        "site"
    ] == ("coefficients")
    names = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert names == ["inputs0.safetensors", "layer0.safetensors"]

    patch = ("patch", model, *FACT, "--set", "steps=2", "--layer", 0, "--json", "--force")
    given = run(*patch, "--method", "append", "--moments", "kept").json
    assert given["delta"]["appended"] >= 1 and given["delta"]["rank"] == 0
    assert given["delta"]["method"] == "append" and given["delta"]["layers"] == [0]
    other = run(*patch, "--method", "rome", "--moments", "kept").json
    assert other["delta"]["appended"] == 0 and other["moments"] != given["moments"]
    (tmp_path / "kept" / "inputs0.safetensors").unlink()
    missing = run(*patch, "--method", "append", "--moments", "kept")
    assert missing.code != 0 and "no input statistics in kept" in missing.err
    assert "moments --inputs" in missing.err


def test_one_layer_is_asked_for_in_words(run: Run, model: Path) -> None:
    done = run("patch", model, *FACT, "--method", "append", "--layer", 0, "--layer", 1)
    assert done.code == 2 and "append edits one layer; got (0, 1)" in done.err
    assert "(option: --layer)" in done.err and "Traceback" not in done.err
    unknown = run("patch", model, *FACT, "--method", "append", "--set", "ridge=1")
    assert unknown.code == 2 and "append has no setting ridge" in unknown.err


def test_a_fact_file_names_the_method(run: Run, tmp_path: Path, texts: Path) -> None:
    """From the plan to the log, to one fact less, and to the base."""
    (tmp_path / "facts.yaml").write_text(FILE)
    run("init", "atlas", "space")
    planned = run("plan", "facts.yaml", "-w", "space", "--json").json
    assert planned["method"] == "append" and planned["recommended"] == "memit"
    methods = [option["method"] for option in planned["outlook"]["options"]]
    assert methods == ["rome", "memit", "append"]
    text = run("plan", "facts.yaml", "-w", "space").out
    assert "memit is recommended" in text and "false firing" in text
    force = ("--texts", texts, "--force")  # the text is too little to be kept otherwise
    done = run("apply", "facts.yaml", "-w", "space", *force)
    assert done.code == 0 and " neurons, " in done.out and "rank" not in done.out
    shown = run("show", "latest", "-w", "space")
    assert "append, layer 1, " in " ".join(shown.out.split()) and "neurons" in shown.out
    record = run("show", "latest", "-w", "space", "--json").json
    assert sum(record["appended"].values()) >= 2
    full = run("capacity", "-w", "space", "--texts", texts, "--no-verify")
    assert full.code == 0 and "appended neurons" in full.out and "load" not in full.out
    less = run("revert", "latest", "--fact", 2, "-w", "space", "--force")
    assert less.code == 0 and "solved again" not in less.out
    assert "Sofia" not in run("ask", "-w", "space", "The capital of Bulgaria is").out
    assert "Lima" in run("ask", "-w", "space", "The capital of Peru is").out
    change = run("diff", "base", "latest", "-w", "space", "--json").json
    assert change["norms"] == {} and change["neurons"]["1"][0] == 0
    run("revert", record["id"], "-w", "space", "--force")
    assert "the base model, bit for bit" in run("status", "-w", "space", "--verify").out
