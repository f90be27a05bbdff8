"""Where a model comes from: no code of it runs unasked, and absurd files are refused at once."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import LLAMA, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.errors import (
    FactsmithError,
    InputError,
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from factsmith.model.load import load, wrap
from factsmith.model.source import find_source, runs_remote_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", **LLAMA).save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_json(file: Path, **entries: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# ── code of the model ─────────────────────────────────────────────────────────────────────────────


CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder: Path, where: tuple[str, ...] = ("config", "model", "tokenizer")) -> Path:
    """Make a model need code of its own, which leaves a marker when it runs."""
    marker = folder.parent / "marker"
    (folder / "own_code.py").write_text(CODE.format(marker=str(marker)))
    brought = {"config": {"AutoConfig": "own_code.OwnConfig"}}
    brought["model"] = {"AutoModelForCausalLM": "own_code.OwnModel"}
    if "config" in where:
        names = {**brought["config"], **brought["model"]}
        change_json(folder / "config.json", auto_map=names, model_type="own-llama")
    if "tokenizer" in where:
        change_json(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [None, "own_code.OwnTokenizer"]},
            tokenizer_class="OwnTokenizer",
        )
    return marker


@pytest.mark.parametrize("where", [("config", "tokenizer"), ("config",), ("tokenizer",)])
def test_code_of_a_model_does_not_run_and_nobody_is_asked(
    where: tuple[str, ...], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = bring_code(copy, where)
    (copy / "custom_generate").mkdir()
    shutil.copy(copy / "own_code.py", copy / "custom_generate" / "generate.py")
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    try:
        load(copy)  # a fast tokenizer may be read without its own class
    except ModelError as error:
        assert error.argument == "trust_remote_code"
        assert "code of its own, which was not run" in str(error)
        assert "config" in where or "tokenizer" in where
    else:
        assert where == ("tokenizer",)
    assert not marker.exists()
    assert answers.tell() == 0


def test_code_runs_when_it_is_trusted(copy: Path) -> None:
    """The control: the code is run, and the model answers."""
    marker = bring_code(copy)
    lm = load(copy, trust_remote_code=True)
    assert marker.exists()
    assert type(lm.module).__name__ == "OwnModel"
    assert runs_remote_code(lm)
    assert lm.answer(["Paris is"])


@pytest.mark.parametrize("value", [None, "yes", 1])
def test_trust_is_yes_or_no(value: Any, saved: Path) -> None:
    with pytest.raises(InputError, match="give True or False"):
        load(saved, trust_remote_code=value)


def test_an_ordinary_model_runs_no_code_of_its_own(saved: Path) -> None:
    assert not runs_remote_code(load(saved, trust_remote_code=True))


LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForMaskedLM", "auto")


def untrusting_calls(text: str) -> list[int]:
    """Return the lines that call a loader of transformers without a word on remote code."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if not is_call or node.func.attr != "from_pretrained":  # type: ignore[attr-defined]
            continue
        name = getattr(node.func.value, "id", "")  # type: ignore[attr-defined]
        keywords = {word.arg for word in node.keywords}  # type: ignore[attr-defined]
        if name in LOADERS and not keywords & {"trust_remote_code", None}:
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


def test_every_call_of_a_loader_says_whether_code_may_run() -> None:
    assert untrusting_calls("AutoConfig.from_pretrained(place)") == [1]
    wrong = {}
    for part in ("src", "tools", "benchmarks"):
        for file in (ROOT / part).rglob("*.py"):
            if lines := untrusting_calls(file.read_text(encoding="utf-8")):
                wrong[str(file.relative_to(ROOT))] = lines
    assert wrong == {}


class Harm:
    """Unpickled, it writes a marker."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return Path.write_text, (Path(self.marker), "ran")  # type: ignore[return-value]


def test_weights_with_code_in_them_are_refused(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (copy / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm(str(marker))}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy)
    assert not marker.exists()
    with (copy / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Harm(str(marker))}, file)
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy)
    assert not marker.exists()


def test_weights_of_torch_save_are_read(copy: Path, saved: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    assert load(copy).fingerprint == load(saved).fingerprint


# ── absurd numbers and damaged files ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10_000_000},
        {"num_hidden_layers": 3_000},
        {"vocab_size": 10**8},
        {"vocab_size": 10**15},
        {"hidden_size": 10**7},
        {"intermediate_size": 10**10},
        {"max_position_embeddings": -(10**30), "num_hidden_layers": 10**30},
        {"num_attention_heads": 10**9},
        {"num_local_experts": 10**9},
    ],
)
def test_numbers_that_the_weights_cannot_have_are_refused_first(
    entries: dict[str, int], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(copy / "config.json", **entries)
    monkeypatch.setattr(
        "factsmith.model.load.AutoModelForCausalLM.from_pretrained",
        lambda *_, **__: pytest.fail("the model was built"),
    )
    with pytest.raises(ModelError, match=r"config\.json .* (says|cannot be used)"):
        load(copy)


def test_the_same_in_a_config_inside_the_config_and_without_safetensors(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    change_json(copy / "config.json", num_hidden_layers=10_000_000)
    with pytest.raises(ModelError, match="at most 10,000 layers"):
        load(copy)
    change_json(copy / "config.json", num_hidden_layers=3, text_config={"n_layer": 10_000_000})
    with pytest.raises(ModelError, match="n_layer = 10,000,000"):
        load(copy)


def test_ordinary_configs_pass(saved: Path) -> None:
    """The control: sizes that real models have, next to few weights."""
    from factsmith.model.source import check_sizes

    for family in ("llama4", "deepseek_v3", "gpt_oss", "gemma3", "qwen3_moe", "bloom", "gpt2"):
        from transformers import AutoConfig

        raw = AutoConfig.for_model(family).to_dict()
        check_sizes(find_source("owner/name"), raw)


@pytest.mark.parametrize("text", ["", "[]", "{", '"llama"', "null", '{"model_type": 3}', "[[[["])
def test_a_config_that_is_none(text: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load(copy)


def _truncate(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _wrong_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})


def _without(copy: Path) -> None:
    (copy / "model.safetensors").unlink()


def _no_header(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\xff" * 100)


def _a_folder(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()


@pytest.mark.parametrize("harm", [_truncate, _wrong_shape, _without, _no_header, _a_folder])
def test_damaged_weights_are_refused_in_words(harm: Callable[[Path], None], copy: Path) -> None:
    harm(copy)
    with pytest.raises(ModelError, match=r"cannot be read|lacks"):
        load(copy)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_without_a_slash_is_tried_on_the_hub() -> None:
    source = find_source("gpt2")
    assert (source.place, source.folder, source.revision) == ("gpt2", None, None)
    with pytest.raises(ModelNotFoundError) as caught:
        load("gpt2-of-nobody")
    for part in (
        "no folder of that name",
        "no bundled model (atlas",
        "hub id",
        "cannot be reached",
    ):
        assert part in str(caught.value)
    with pytest.raises(ModelNotFoundError, match="Perhaps 'atlas-llama' is meant"):
        load("atlas-lama")


def test_a_revision_is_part_of_the_name() -> None:
    source = find_source("owner/name", "v1.0")
    assert (source.name, source.place, source.revision) == ("owner/name@v1.0", "owner/name", "v1.0")
    assert find_source("owner/name@v1.0") == source
    assert source.options()["revision"] == "v1.0"
    assert find_source("owner/name").options() == {
        "local_files_only": False,
        "revision": "main",
        "trust_remote_code": False,
    }


def test_a_folder_has_no_revision(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which has no revisions"):
        load(saved, revision="main")
    with pytest.raises(InputError, match="which has no revisions"):
        load("atlas", revision="main")
    with pytest.raises(InputError, match="revision is empty"):
        load("owner/name", revision=" ")
    odd = Path(shutil.copytree(saved, tmp_path / "a@b"))
    assert load(odd).n_layers == 3


@pytest.mark.parametrize("name", ["", " ", "a b", "../up", "a/b/c", "a//b", "x" * 200, "a\0b", "é"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a bundled model"):
        load(name)


def test_an_adapters_folder_is_named(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"merge_and_unload\(\)"):
        load(copy)


# ── models in the hands of their users ────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_peft_are_refused_wherever_they_are() -> None:
    peft = pytest.importorskip("peft")

    def settings() -> Any:
        return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")

    tokenizer = byte_tokenizer(bos=True)
    outside = peft.get_peft_model(tiny_model("llama", **LLAMA), settings())
    inside = peft.get_peft_model(tiny_model("llama", **LLAMA), settings()).get_base_model()
    joined = tiny_model("llama", **LLAMA)
    joined.add_adapter(settings())
    prompts = peft.get_peft_model(
        tiny_model("llama", **LLAMA),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    for module in (outside, inside, joined, prompts):
        with pytest.raises(UnsupportedModelError, match=r"merge_and_unload\(\)"):
            wrap(module, tokenizer)
    merged = peft.get_peft_model(tiny_model("llama", **LLAMA), settings()).merge_and_unload()
    assert wrap(merged, tokenizer).answer(["Paris is"])


def test_a_compiled_model_is_the_model_inside() -> None:
    plain = tiny_model("llama", **LLAMA)
    lm = wrap(torch.compile(plain), byte_tokenizer(bos=True))
    assert lm.module is plain


def test_tokens_without_an_embedding_are_refused_by_name() -> None:
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.add_tokens(["<ent1>"])
    assert len(tokenizer) == VOCAB + 1
    lm = wrap(tiny_model("llama", **LLAMA), tokenizer)
    uses: dict[str, Callable[[], object]] = {
        "answer": lambda: lm.answer(["The mother tongue of <ent1> is"]),
        "next": lambda: lm.next_tokens("<ent1>"),
        "probability of": lambda: lm.log_prob(["Paris is"], ["<ent1>"]),
        "probability after": lambda: lm.log_prob(["<ent1> is"], ["Paris"]),
        "says": lambda: lm.says(["Paris is"], ["<ent1>"]),
        "coefficients": lambda: lm.coefficients("<ent1> is"),
    }
    for name, use in uses.items():
        with pytest.raises(InputError, match="'<ent1>' has id 320") as caught:
            use()
        assert "resize_token_embeddings" in str(caught.value), name
    assert lm.answer(["Paris is"])
    lm.module.resize_token_embeddings(len(tokenizer))
    assert lm.next_tokens("<ent1>")


def test_every_error_is_ours(copy: Path) -> None:
    """Whatever a config says, loading ends in an error of factsmith, or loads."""
    import random

    from faults.fuzz import mutated

    whole = json.loads((copy / "config.json").read_text())
    for seed in range(60):
        changed = mutated(whole, random.Random(seed))
        (copy / "config.json").write_text(json.dumps(changed))
        try:
            load(copy)
        except FactsmithError as error:
            assert str(error)
