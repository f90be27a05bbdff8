"""The options that say how a model is loaded."""

from __future__ import annotations

import gc
import inspect
import json
import shutil
from pathlib import Path

import pytest

from commands import Run
from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.cli import COMMANDS
from factsmith.cli.loading import with_loading_options
from factsmith.cli.models import load_model
from factsmith.core.errors import InputError

WORKSPACE_ALONE = {"diff", "revert", "checkout", "status", "verify", "recover", "capacity"}
WORKSPACE_ALONE |= {"plan", "apply", "export", "import_", "push"}
NO_MODEL = {"demo", "cache", "log", "show", "gc", "schema", "served"}


@pytest.fixture
def brought(tmp_path: Path) -> Path:
    """A model whose config brings code of its own, which leaves a marker."""
    folder = tmp_path / "own"
    tiny_model("gpt2", **GPT2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    marker = tmp_path / "marker"
    (folder / "code_of_it.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own-gpt2'\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    file = folder / "config.json"
    names = {
        "AutoConfig": "code_of_it.OwnConfig",
        "AutoModelForCausalLM": "code_of_it.OwnModel",
    }
    config = {**json.loads(file.read_text()), "model_type": "own-gpt2", "auto_map": names}
    file.write_text(json.dumps(config))
    return folder


def test_every_command_that_loads_a_model_has_the_options() -> None:
    for command in (each for commands in COMMANDS.values() for each in commands):
        name = command.__name__
        options = set(inspect.signature(with_loading_options(command)).parameters)
        for option in ("trust_remote_code", "attn_implementation"):
            assert (option in options) == (name not in NO_MODEL), name
        if name not in NO_MODEL | WORKSPACE_ALONE:
            assert {"dtype", "revision"} <= options, name


def test_code_of_a_model_runs_when_it_is_trusted_alone(
    run: Run, brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    refused = run("ask", brought, "Paris is")
    assert refused.code == 3
    assert "(option: --trust-remote-code)" in refused.err
    assert "code of its own, which was not run" in refused.err
    assert not marker.exists()
    assert run("init", brought, "space", "--trust-remote-code").code == 0
    assert marker.exists()
    marker.unlink()
    shutil.rmtree(Path.home() / ".cache/huggingface/modules/transformers_modules/own", True)
    refused = run("ask", "Paris is", "-w", "space")
    assert refused.code == 3 and "--trust-remote-code" in refused.err
    assert not marker.exists(), "a workspace does not trust by itself"
    assert run("ask", "Paris is", "-w", "space", "--trust-remote-code").code == 0


def test_a_dtype_is_recorded_and_kept(run: Run, model: Path) -> None:
    made = run("init", model, "space", "--dtype", "bfloat16", "--json")
    assert made.json["dtype"] == "bfloat16"
    assert run("ask", "Paris is", "-w", "space").code == 0
    assert run("ask", "Paris is", "-w", "space", "--dtype", "bfloat16").code == 0
    refused = run("ask", "Paris is", "-w", "space", "--dtype", "float32")
    assert refused.code == 2
    assert "was made for" in refused.err
    assert "another workspace with `" in refused.err and "--dtype float32`" in refused.err
    assert run("ask", "Paris is", "-w", "space", "--dtype", "auto").code == 0, "the recorded one"
    refused = run("ask", model, "Paris is", "--dtype", "int8")
    assert refused.code == 2 and "float32, float16, bfloat16, float64" in refused.err


def test_a_revision_is_of_a_hub_id(run: Run, model: Path) -> None:
    refused = run("ask", model, "Paris is", "--revision", "v1")
    assert refused.code == 2 and "no revisions" in refused.err
    run("init", model, "space")
    refused = run("ask", "Paris is", "-w", "space", "--revision", "v1")
    assert refused.code == 2 and "(option: --revision)" in refused.err


def test_a_name_without_a_slash_is_a_hub_id(run: Run) -> None:
    refused = run("ask", "model-of-nobody", "Paris is")
    assert refused.code == 3
    assert "As a hub id it was not found, or the hub cannot be reached" in refused.err


def test_devices_and_attention_are_options_of_every_load(run: Run, model: Path) -> None:
    plain = run("ask", model, "Paris is", "--json").json
    run("init", model, "space", "--device", "auto", "--attn", "eager")
    for words in (
        [model, "Paris is", "--device", "auto"],
        [model, "Paris is", "--attn", "eager", "--dtype", "auto"],
        ["Paris is", "-w", "space", "--attn-implementation", "sdpa"],
    ):
        assert run("ask", *words, "--json").json["answer"] == plain["answer"], words
    refused = run("ask", model, "Paris is", "--attn", "warp")
    assert refused.code == 2 and "'warp' (transformers has none of that name)" in refused.err
    assert "(option: --attn" in refused.err
    refused = run("verify", "-w", "space", "--device", "cuda:77")
    assert refused.code == 2 and "or auto to spread the model" in refused.err


def test_the_collector_rests_while_a_model_is_loaded_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(*args: object, **options: object) -> object:
        seen.append(gc.isenabled())
        if len(seen) == 2:
            raise InputError("no")
        return None

    monkeypatch.setattr("factsmith.model.load.load", spy)
    load_model(str(model), None, None, lambda *_: None)
    assert gc.isenabled()
    with pytest.raises(InputError, match="no"):
        load_model(str(model), None, None, lambda *_: None)
    assert gc.isenabled() and seen == [False, False]
