"""`factsmith capacity` without patches, with some, and with input that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import FACT, Run
from factsmith.corpus.moments_store import load_moments
from factsmith.edit.delta import Delta
from factsmith.keep.ledger import Ledger
from factsmith.model.load import load
from factsmith.patch.forecast import FITTED


def test_a_workspace_without_patches(run: Run, model: Path) -> None:
    run("init", model, "space")
    done = run("capacity", "-w", "space", "--next", 2, "--json")
    assert done.code == 0 and done.err == ""
    record = done.json
    assert (
        record["full"],
        record["facts"],
        record["loss"],
        record["retention"],
        record["next_facts"],
    ) == (0, 0, 0, None, 2)
    neurons = sum(layer["d_ff"] for layer in record["layers"])
    assert neurons and record["loss_next"] == pytest.approx(
        FITTED.loss(FITTED.disturbance_at(2 / neurons), 2 / neurons)
    )
    assert not (Path("space") / "moments").exists(), (
        "nothing is stored, so nothing need be computed"
    )
    far = run("capacity", "-w", "space", "--next", 10_000)
    assert "outside of what was measured" in far.out and "warning: 10,000 facts" in far.err


@pytest.mark.usefixtures("quick")
def test_a_workspace_with_patches(run: Run, model: Path) -> None:
    run("init", model, "space")
    run("patch", "-w", "space", *FACT)
    run("patch", "-w", "space", "--subject", "Edwin", "--prompt", "{} is a", "--target", "king")
    record = run("capacity", "-w", "space", "--next", 0, "--json").json
    with Ledger("space") as ledger:
        deltas = [Delta.load(ledger.delta_folder(revision)) for revision in ledger.active()]
    (layer,) = record["layers"]
    lm, moment = load(model), load_moments("space/moments")[1]
    weight, update = lm.ffn[1].weight().detach(), sum(delta.dense(1) for delta in deltas)
    assert (layer["layer"], layer["facts"], record["facts"]) == (1, 2, 2)
    assert layer["norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(update) / torch.linalg.matrix_norm(weight)), rel=1e-5
    )
    keys = torch.cat([delta.k_star[1] for delta in deltas]).double().T
    hat = keys.T @ torch.linalg.inv(keys @ keys.T + 10 * moment.factor @ moment.factor.T) @ keys
    assert layer["directions"] == pytest.approx(float(hat.trace()), rel=1e-4)
    said = [
        lm_says(run, "space", fact.text, fact.target or "")
        for delta in deltas
        for fact in delta.facts
    ]
    assert (record["asked"], record["kept"]) == (2, sum(said)) and record["retention"] == sum(
        said
    ) / 2
    quiet = run("capacity", "-w", "space", "--no-verify", "--json").json
    assert quiet["asked"] is None and quiet["full"] == record["full"] and quiet["next_facts"] == 100

    before = run("log", "-w", "space").out
    shown = run("capacity", "-w", "space", "--no-verify").out
    assert "2 facts stored" in shown and "breaking point" in shown and "with 100 more" in shown
    assert run("log", "-w", "space").out == before, "it only reads"

    run("checkout", "base", "-w", "space")
    assert run("capacity", "-w", "space", "--json").json["facts"] == 0, (
        "what is not in effect takes no room"
    )


def lm_says(run: Run, space: str, prompt: str, target: str) -> bool:
    answer: str = run("ask", "-w", space, prompt, "--json").json["answer"]
    return answer.strip().startswith(target)


def test_what_cannot_be_used(run: Run, model: Path) -> None:
    run("init", model, "space")
    for arguments, code, words in (
        (["-w", "space", "--next", "-1"], 2, "--next"),
        (["-w", "space", "--limit", "0"], 2, "limit"),
        (["-w", "space", "--limit", "100"], 2, "limit"),
        (["-w", "space", "--texts", "nowhere.txt"], 2, "nowhere.txt"),
        (["-w", "nowhere"], 5, "factsmith init"),
        ([], 5, "factsmith init"),
    ):
        done = run("capacity", *arguments)
        assert (
            (done.code, done.out) == (code, "")
            and words in done.err
            and "Traceback" not in done.err
        ), (arguments, done)
