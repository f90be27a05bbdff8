"""`factsmith export`: the bundled model end to end, and what is said when it cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from commands import FACT, Run
from exports import answers_of, appending, names, replace_read_back, some_delta
from factsmith.cli import export as cli_export
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load


@pytest.mark.slow
def test_the_bundled_model_as_an_adapter_read_back_in_a_process_of_its_own(
    run: Run, atlas: str
) -> None:
    pytest.importorskip("peft")
    run("init", atlas, "space")
    patched = run(
        "patch",
        "-w",
        "space",
        "--subject",
        "Fiat 127",
        "--prompt",
        "The maker of {} is",
        "--target",
        "Toyota",
        "--json",
    ).json
    made = run("export", "out", "-f", "adapter", "-w", "space", "--json").json
    assert made["format"] == "adapter" and made["rank"] == 1 and made["layers"][0]["error"] < 1e-6
    back = made["read_back"]
    assert back["prompts"] == back["facts"] == 1 and back["ties"] == 0
    assert back["difference"] <= back["limit"] < 0.01 < 1 < back["moved"]
    assert made["bytes"] < 20_000 < 20_000_000 < made["model_bytes"]
    config = json.loads(Path("out/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "atlas" and config["fan_in_fan_out"] is True
    layer = patched["delta"]["layers"][0]
    assert config["target_modules"] == [f"transformer.h.{layer}.mlp.c_proj"]
    manifest = json.loads(Path("out/factsmith.json").read_bytes())
    assert (
        manifest["patches"][0]["revision"] == patched["revision"]["id"]
        and manifest["read_back"] == back
    )


@pytest.mark.usefixtures("quick")
def test_every_format_and_what_is_printed(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    replace_read_back(monkeypatch, lambda jobs: [answers_of(jobs[0].questions)])
    run("init", model, "space")
    run("patch", "-w", "space", *FACT)
    shown = run("export", "one", "--format", "adapter", "-w", "space")
    assert shown.code == 0 and "instead of" in shown.out and "‖Δ−BA‖/‖Δ‖" in shown.out
    words = " ".join(shown.out.split())
    assert "verified: answers equal on 1 prompt" in words
    assert f"names the base model only {model.name!r}, because it was loaded from a folder" in words
    assert f"base model {model.name}: the model was loaded from it" in words
    shown = run("export", "two", "--dtype", "bfloat16", "--no-verify", "-w", "space")
    assert shown.code == 0 and "not verified" in shown.out and "model.safetensors" in shown.out
    assert (
        str(load_file("two/model.safetensors")["transformer.wte.weight"].dtype) == "torch.bfloat16"
    )
    shown = run("export", "three", "-f", "patch", "-w", "space")
    assert shown.code == 0 and "1 patch read back, every tensor equal bit for bit" in shown.out
    noted = run(
        "export",
        "four",
        "-f",
        "adapter",
        "--base",
        "owner/name",
        "--no-verify",
        "-w",
        "space",
        "--json",
    ).json
    assert (
        noted["read_back"] is None
        and json.loads(Path("four/adapter_config.json").read_bytes())["base_model_name_or_path"]
        == "owner/name"
    )


def test_revisions_are_exported_without_a_checkout(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(model)
    with Workbench(lm, "space") as bench:
        first = bench.commit(some_delta(lm, 1)).id
        second = bench.commit(some_delta(lm, 2)).id
    opened: list[str] = []
    open_workspace = cli_export.opened_workspace

    def noted(*arguments: Any) -> Any:
        opened.append("model")
        return open_workspace(*arguments)

    monkeypatch.setattr(cli_export, "opened_workspace", noted)
    options = ["-f", "adapter", "-w", "space", "--no-verify"]
    one = run("export", "one", *options, "--revision", first[:8], "--json").json
    assert one["revision"] == first and one["patches"] == 1
    both = ["--revision", first, "--revision", "latest"]
    many = run("export", "many", *options, *both, "--json").json["exports"]
    assert [(each["revision"], each["patches"]) for each in many] == [(first, 1), (second, 2)]
    assert [each["folder"] for each in many] == [
        str(Path("many", each[:12]).resolve()) for each in (first, second)
    ]
    assert opened == ["model"] * 2, "the model is loaded once in each call"
    again = run("export", "many", *options, *both)
    assert again.code == 2 and "--overwrite" in again.err
    shown = run("export", "many", *options, *both, "--overwrite")
    assert shown.code == 0 and shown.out.count("LoRA of rank") == 2 and first[:12] in shown.out
    cases = [(2, [first, first[:9]], "twice"), (5, [first, "ffff"], "ffff"), (2, ["base"], "patch")]
    for code, references, words in cases:
        del opened[:]
        chosen = [word for each in references for word in ("--revision", each)]
        done = run("export", "out", *options, *chosen)
        assert (done.code, opened) == (code, []) and words in done.err, done
    assert not Path("out").exists()
    assert run("status", "-w", "space", "--json").json["current"] == second


@pytest.mark.usefixtures("quick")
def test_what_goes_wrong_has_its_exit_code_and_leaves_nothing(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    run("init", model, "empty")
    run("init", model, "space")
    run("patch", "-w", "space", *FACT)
    run("export", "mine", "-f", "patch", "-w", "space")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    Path("file").write_text("x")
    before = names(tmp_path)
    replace_read_back(
        monkeypatch,
        lambda jobs: [answers_of(jobs[0].questions, logits=-jobs[0].questions.patched)],
    )
    cases: list[tuple[int, list[str], str]] = [
        (2, ["out", "-f", "onnx"], "checkpoint, adapter, patch, gguf or gguf-adapter"),
        (2, ["out", "--dtype", "int8"], "--dtype"),
        (2, ["out", "--rank", "3"], "It is an option of: adapter"),
        (2, ["mine", "-f", "patch"], "--overwrite"),
        (2, ["full", "-f", "patch", "--overwrite"], "not an export by factsmith"),
        (4, ["out", "-f", "adapter"], "not the patched model"),
        (4, ["out"], "not the patched model"),
        (5, ["file/out", "-f", "patch"], "annot write"),
    ]
    for code, arguments, words in cases:
        done = run("export", *arguments, "-w", "space")
        assert (done.code, done.out) == (code, ""), (arguments, done)
        assert words in done.err and "Traceback" not in done.err, (arguments, done.err)
        assert names(tmp_path) == before, arguments
    done = run("export", "out", "-w", "empty")
    assert done.code == 2 and "no patch to export" in done.err
    assert run("export", "out").code == 5, "no workspace"


@pytest.mark.parametrize("format", ["adapter", "gguf-adapter"])
def test_an_adapter_of_appended_neurons_is_refused_before_the_model_is_loaded(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    lm = load(model)
    with Workbench(lm, "space") as bench:
        bench.commit(some_delta(lm, 1))
        bench.commit(appending(lm))
    opened: list[str] = []
    open_workspace = cli_export.opened_workspace

    def noted(*arguments: Any) -> Any:
        opened.append("model")
        return open_workspace(*arguments)

    monkeypatch.setattr(cli_export, "opened_workspace", noted)
    done = run("export", "out.gguf", "-f", format, "-w", "space", "--no-verify")
    text = " ".join(done.err.split())
    assert done.code == 2 and "the patches append 5 neurons" in text, done
    assert "Export a" in text and "checkpoint" in text and not opened
    assert not Path("out.gguf").exists()
    done = run("export", "out", "-w", "space", "--no-verify")
    assert done.code == 0 and "5 neurons" in done.out and opened
    assert "n_inner is 192 instead of 128" in done.out
