"""Checkpoints with appended neurons: plain transformers loads them, and they are the same model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from exports import appending, names, saved_model, some_delta
from factsmith.core.errors import NumericsError, UnsupportedModelError
from factsmith.edit.delta import applied
from factsmith.keep.export import checkpoint, widths
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.widths import find_widths
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap

NEW: dict[str, Any] = {name: value for name, value in LLAMA.items() if name != "pad_token_id"}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (GPT2, "n_inner"),
    "gptj": ({**GPT2, "rotary_dim": 4, "tie_word_embeddings": False}, "n_inner"),
    "qwen2": (NEW, "intermediate_size"),
    "qwen3": ({**NEW, "head_dim": 8}, "intermediate_size"),
    "gemma2": ({**NEW, "head_dim": 8}, "intermediate_size"),
    "gemma3_text": ({**NEW, "head_dim": 8}, "intermediate_size"),
    "phi3": ({**NEW, "pad_token_id": 0}, "intermediate_size"),  # one linear for gate and up
    "gpt_neox": (NEW, "intermediate_size"),
    "opt": (
        {
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": 320,
        },
        "ffn_dim",
    ),
}


def logits(module: Any, ids: list[list[int]]) -> torch.Tensor:
    """Return the logits of a plain model."""
    with torch.no_grad():
        return torch.as_tensor(module(input_ids=torch.tensor(ids)).logits)


def by_hand(state: dict[str, torch.Tensor], deltas: list[Any], width: int) -> None:
    """Widen a GPT-2's or Llama's weights, without the library."""
    for layer in range(3):
        rows = [delta.appended[layer] for delta in deltas if layer in delta.appended]
        for name in [name for name in state if f".{layer}.mlp." in name]:
            old = state[name]
            conv = "c_" in name
            if name.endswith(("c_fc.bias",)):
                pieces = [old, *(each.biases for each in rows)]
                joined = torch.cat(pieces)
                state[name] = torch.cat([joined, torch.zeros(width - len(joined))])
            elif name.endswith("weight"):
                kind = {"gate": "gate_keys", "up_p": "up_keys", "c_fc": "keys"}
                field = next(
                    (kind[each] for each in kind if f".mlp.{each}" in name),
                    "values",
                )
                matrix = old.T if conv else old
                matrix = matrix.T if field == "values" else matrix  # (neurons, d_model)
                matrix = torch.cat([matrix, *(getattr(each, field) for each in rows)])
                matrix = torch.cat([matrix, torch.zeros(width - len(matrix), matrix.shape[1])])
                matrix = matrix.T if field == "values" else matrix
                state[name] = matrix.T if conv else matrix


def test_the_files_are_those_made_by_hand(lm: LanguageModel, tmp_path: Path) -> None:
    """Also of a mixed history: two patches that append, and a low-rank one."""
    deltas = [appending(lm, 1, {0: 3, 1: 7}), appending(lm, 2, {1: 60}, ["Zürich"])]
    low = some_delta(lm, 3, (1,))
    before = {name: x.clone() for name, x in lm.module.state_dict().items()}
    config = lm.config.to_dict()
    made = export_checkpoint(lm, [deltas[0], low, deltas[1]], tmp_path / "out")
    after = lm.module.state_dict()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert lm.config.to_dict() == config and lm.ffn[1].n_appended == 0
    expected = {name: x.clone() for name, x in before.items()}
    conv = "gpt2" in lm.name
    for name in expected:
        if ".1." in name and name.endswith(("mlp.c_proj.weight", "mlp.down_proj.weight")):
            expected[name] = expected[name] + (low.dense(1).T if conv else low.dense(1))
    width = 256 if conv else 128  # 128 + 67 and 48 + 67
    by_hand(expected, deltas, width)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert ("lm_head.weight" in stored) != conv, "tied weights are written once"
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name
    name = "transformer.h.2.mlp.c_fc.bias" if conv else "model.layers.2.mlp.up_proj.weight"
    assert len(stored[name]) == width, "layers without patches have zeros"
    assert made.read_back is not None and made.read_back.difference <= 1e-4


def test_only_the_width_differs_in_the_config(lm: LanguageModel, tmp_path: Path) -> None:
    export_checkpoint(lm, some_delta(lm, 1), tmp_path / "plain", verify=False)
    export_checkpoint(lm, appending(lm), tmp_path / "wide", verify=False)
    plain, wide = (
        json.loads((tmp_path / name / "config.json").read_bytes()) for name in ("plain", "wide")
    )
    entry = "n_inner" if "gpt2" in lm.name else "intermediate_size"
    differing = {name for name in {*plain, *wide} if plain.get(name) != wide.get(name)}
    assert differing == {entry}
    assert wide[entry] == (192 if "gpt2" in lm.name else 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_loaded_by_plain_transformers(family: str, tmp_path: Path) -> None:
    settings, entry = FAMILIES[family]
    lm = wrap(tiny_model(family, **settings), byte_tokenizer())
    delta = appending(lm, 1, {0: 3, 2: 5})
    export_checkpoint(lm, delta, tmp_path / "out", verify=False)
    assert find_widths(lm, {0: 3, 2: 5}).width.entry == entry
    module, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), "every weight has the shape of the config"
    ids = [lm.prompt_ids("The mother tongue of Paris is")]
    unpatched = logits(lm.module, ids)
    with applied(lm, delta):
        patched = logits(lm.module, ids)
    assert torch.allclose(logits(module.eval(), ids), patched, atol=1e-5)
    assert not torch.allclose(unpatched, patched, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints(lm: LanguageModel, tmp_path: Path, dtype: torch.dtype) -> None:
    delta = appending(lm, 1, {1: 5})
    export_checkpoint(lm, delta, tmp_path / "out", dtype=dtype, verify=False)
    with applied(lm, delta):
        wide = lm.ffn[1].values[-5:].to(dtype)
    again = load(tmp_path / "out", dtype=dtype)
    values = again.ffn[1].values
    assert torch.equal(values[lm.ffn[1].d_ff :][:5], wide)
    assert not values[lm.ffn[1].d_ff + 5 :].any() and values.dtype == dtype


def test_shards(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save_pretrained cuts a large model into several files."""
    save = lm.module.save_pretrained
    monkeypatch.setattr(
        lm.module, "save_pretrained", lambda *a, **k: save(*a, max_shard_size="50KB", **k)
    )
    export_checkpoint(lm, appending(lm), tmp_path / "out", verify=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_layer_that_is_too_narrow_is_not_taken(lm: LanguageModel) -> None:
    """All layers have the width of the widest."""
    (width,) = {ffn.d_ff for ffn in lm.ffn}
    for n in (1, 64, 65):
        wide = find_widths(lm, {1: n})
        assert isinstance(wide.value, int) and wide.value % 64 == 0
        assert width + n <= wide.value < width + n + 64
        assert wide.zeros == {layer: wide.value - width - n * (layer == 1) for layer in range(3)}


class SizedConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama whose layers have widths of their own."""

    model_type = "sized_llama"
    sizes: list[int] | None = None


class Sized(LlamaForCausalLM):  # type: ignore[misc]
    """The model of it."""

    config_class = SizedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer, size in zip(self.model.layers, config.sizes, strict=True):
            alone = copy.deepcopy(config)
            alone.intermediate_size = size
            layer.mlp = LlamaMLP(alone)


def test_widths_by_layer(tmp_path: Path) -> None:
    """Where a config has a width for each layer, the other layers stay as they are."""
    torch.manual_seed(0)
    lm = wrap(Sized(SizedConfig(**LLAMA, sizes=[48, 80, 40])).eval(), byte_tokenizer())
    delta = appending(lm, 1, {1: 5})
    export_checkpoint(lm, delta, tmp_path / "out", verify=False)
    assert lm.config.sizes == [48, 80, 40]
    again = Sized.from_pretrained(tmp_path / "out").eval()
    assert again.config.sizes == [48, 128, 40] and again.config.intermediate_size == 48
    ids = [[5, 9, 17, 30]]
    with applied(lm, delta):
        assert torch.allclose(logits(again, ids), logits(lm.module, ids), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bloom", {"n_layer": 3, "hidden_size": 32, "n_head": 4, "vocab_size": 320}),
        ("openai-gpt", GPT2),
    ],
)
def test_an_architecture_that_computes_its_width_is_refused(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is asked or written; a low-rank patch is exported as ever."""
    lm = wrap(tiny_model(family, **settings), byte_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "ask", None)
        with pytest.raises(UnsupportedModelError, match=r"5 neurons appended.*Export a patch, or"):
            export_checkpoint(lm, [some_delta(lm, 1), appending(lm)], tmp_path / "out")
    assert names(tmp_path) == []
    export_checkpoint(lm, some_delta(lm, 1), tmp_path / "out", verify=False)


def test_an_entry_that_changes_other_weights_is_not_taken() -> None:
    """A vocabulary of the layers' width is no width."""
    for entry in ("vocab_size", "max_position_embeddings"):
        settings = {**LLAMA, entry: 320, "intermediate_size": 320}
        lm = wrap(tiny_model("llama", **settings), byte_tokenizer())
        assert (entry,) in [path for path, _ in widths._candidates(lm, {1: 1})]
        assert find_widths(lm, {1: 1}).width.entry == "intermediate_size"


def test_a_wrong_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that write something are not zeros: the answers are compared."""
    lm = load(saved_model("llama", tmp_path / "base"))
    zeros = widths.zero_rows
    monkeypatch.setattr(widths, "zero_rows", lambda ffn, n: _drawn(zeros(ffn, n)))
    with pytest.raises(NumericsError, match="not the patched model"):
        export_checkpoint(lm, appending(lm), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _drawn(rows: Any) -> Any:
    return type(rows)(
        facts=rows.facts, **{name: torch.randn(x.shape) for name, x in rows.tensors().items()}
    )


def test_an_exported_checkpoint_is_a_base_again(tmp_path: Path) -> None:
    saved_model("llama", tmp_path / "base")
    first = load(tmp_path / "base")
    delta = appending(first, 1, {1: 5})
    export_checkpoint(first, delta, tmp_path / "first", verify=False)
    second = load(tmp_path / "first")
    assert second.ffn[1].d_ff == second.ffn[1].n_original == 64
    export_checkpoint(second, [appending(second, 2, {1: 3})], tmp_path / "second")
    third = load(tmp_path / "second")
    assert {ffn.d_ff for ffn in third.ffn} == {128}
    rows = delta.appended[1].values
    assert torch.equal(third.ffn[1].values[48:53], rows)
