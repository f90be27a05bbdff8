"""A patch there and back: workspaces, the log, and taking patches back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands import FACT, PROMPT, Run
from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.model.load import load


@pytest.mark.usefixtures("quick")
def test_a_patch_there_and_back(run: Run, model: Path, tmp_path: Path) -> None:
    made = run("init", model, "space", "--json").json
    assert (
        made["model"] == str(model)
        and made["dtype"] == "float32"
        and made["fingerprint"] == load(model).fingerprint
    )

    asked = run("ask", model, PROMPT, "--top", 3, "--json").json
    assert (
        asked["answer"] == load(model).answer([PROMPT])[0]
        and len(asked["next_tokens"]) == 3
        and asked["revision"] is None
    )

    patched = run(
        "patch",
        "-w",
        "space",
        *FACT,
        "--neighbour",
        "Paris is",
        "--paraphrase",
        "{} speaks",
        "-m",
        "as asked",
        "--json",
    ).json
    identity = patched["revision"]["id"]
    assert patched["revision"]["message"] == "as asked" and patched["delta"]["layers"] == [1]
    assert [check["role"] for check in patched["verification"]["checks"]] == [
        "prompt",
        "paraphrase",
        "neighbour",
    ]

    changed = run("ask", "-w", "space", PROMPT, "--json").json
    assert changed["revision"] == identity and changed["next_tokens"] != asked["next_tokens"]
    assert run("ask", "space", PROMPT, "--json").json == changed, (
        "a workspace may stand where a model does"
    )
    assert [r["id"] for r in run("log", "-w", "space", "--json").json["revisions"]] == [identity]
    assert (
        run("show", identity[:8], "-w", "space", "--json").json["facts"][0]["target"] == "English"
    )

    proof = run("status", "--verify", "-w", "space", "--json").json
    assert proof["active"] == [identity] and proof["fingerprint_now"] != proof["fingerprint"]

    undone = run("revert", "latest", "-w", "space", "--json").json
    assert undone["reverts"] == identity and undone["active"] == 0
    proof = run("status", "--verify", "-w", "space", "--json").json
    assert proof["active"] == [] and proof["fingerprint_now"] == proof["fingerprint"]
    again = run("ask", "-w", "space", PROMPT, "--top", 3, "--json").json
    assert again["next_tokens"] == asked["next_tokens"]

    assert run("checkout", identity[:8], "-w", "space", "--json").json["active"] == 1
    assert run("ask", "-w", "space", PROMPT, "--json").json["next_tokens"] == changed["next_tokens"]
    assert run("checkout", "base", "-w", "space", "--json").json == {
        "format_version": 1,
        "current": "base",
        "head": undone["id"],
        "active": 0,
    }


@pytest.mark.usefixtures("quick")
def test_text_for_people(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "next: factsmith patch" in run("init", model, "space").out
    monkeypatch.chdir(tmp_path / "space")  # from here on, the workspace is where we are
    done = run("patch", *FACT, "--neighbour", "Paris is")
    (identity,) = re.findall(r"factsmith revert ([0-9a-f]{10})", done.out)
    assert "layer 1, rank 1" in done.out and "neighbour" in done.out
    assert identity in run("log").out and "active" in run("log").out
    shown = run("show", identity).out
    assert "rome, layer 1" in shown and "steps=2" in shown
    assert "1 patch" in run("status", "--verify").out
    assert f"reverted {identity}" in run("revert", identity).out
    assert "the base model, bit for bit" in run("status", "--verify").out
    assert "checkout latest" in run("checkout", "base").out
    assert "later" in run("log").out
    assert run("ask", PROMPT).out.startswith(PROMPT)


def test_another_model_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model("gpt2", seed=5, **GPT2).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    run("init", model, "space")
    done = run("patch", other, "-w", "space", *FACT)
    assert done.code == 5 and "was made for" in done.err
