"""GGUF exports: all but the patched tensors stays, and the adapter adds what the patches add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import LLAMA, byte_tokenizer, tiny_model
from exports import dense_sum as summed
from exports import names, some_delta, two_deltas
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    NumericsError,
    UnsupportedModelError,
)
from factsmith.keep.export import gguf_file
from factsmith.keep.export.formats import check_export, export
from factsmith.keep.export.gguf_adapter import export_gguf_adapter
from factsmith.keep.export.gguf_file import export_gguf
from factsmith.keep.export.gguf_names import architecture
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from gguf_files import gguf, write_gguf

FAMILIES = ["llama", "gpt2"]


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a tiny GGUF file of each family, its down-projections in Q8_0."""
    write_gguf(tmp_path / "base.gguf", request.param, kind="Q8_0")
    return tmp_path / "base.gguf"


def raw_fields(file: Path) -> dict[str, bytes]:
    """Return the bytes of each field, as the library gguf reads them."""
    fields = gguf.GGUFReader(file).fields
    return {key: b"".join(part.tobytes() for part in field.parts) for key, field in fields.items()}


def raw_tensors(file: Path) -> dict[str, tuple[int, bytes]]:
    """Return the type and the bytes of each tensor."""
    return {
        each.name: (int(each.tensor_type), each.data.tobytes())
        for each in gguf.GGUFReader(file).tensors
    }


def dense_sum(deltas: list[Any], layer: int) -> torch.Tensor:
    """Return the sum of the updates of a layer."""
    return torch.from_numpy(summed(deltas, layer)).float()


def numbers(file: Path, name: str) -> torch.Tensor:
    """Return a tensor, dequantised by the library gguf."""
    (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name == name)
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "BF16", "F32"])
def test_all_but_the_patched_tensors_stays(base: Path, tmp_path: Path, kind: str) -> None:
    lm, new = load(base), tmp_path / "patched.gguf"
    deltas = two_deltas(lm)
    made = export_gguf(lm, deltas, new, tensor_type=kind)
    patched_names = {f"blk.{layer}.ffn_down.weight" for layer in (0, 1, 2)}
    assert raw_fields(base) == raw_fields(new) and len(raw_fields(new)) > 15
    before, after = raw_tensors(base), raw_tensors(new)
    assert list(before) == list(after), "the order stays"
    assert {name for name in before if before[name] != after[name]} == patched_names
    for layer in (0, 1, 2):
        name = f"blk.{layer}.ffn_down.weight"
        assert after[name][0] == getattr(gguf.GGMLQuantizationType, kind)
        expected = numbers(base, name) + dense_sum(deltas, layer)
        error = (numbers(new, name) - expected).abs().max() / expected.abs().max()
        assert error < {"F16": 1e-3, "Q8_0": 5e-3, "BF16": 5e-3, "F32": 1e-6}[kind]
        assert (numbers(base, name) - expected).abs().max() > 0.1, "the control: it was patched"
    assert (made.format, made.dtype, set(made.files)) == (
        "gguf",
        kind,
        {"patched.gguf", "patched.gguf.factsmith.json"},
    )
    assert made.read_back is not None and made.read_back.moved > 0.1
    again = load(new)
    assert again.answer(["The mother tongue of Paris is"]) == _answers(lm, deltas)


def _answers(lm: LanguageModel, deltas: list[Any]) -> list[str]:
    from factsmith.edit.delta import applied

    with applied(lm, deltas):
        return lm.answer(["The mother tongue of Paris is"])


def test_the_manifest_names_the_base_file(base: Path, tmp_path: Path) -> None:
    lm = load(base)
    export(lm, some_delta(lm, 1), tmp_path / "out" / "patched.gguf", "gguf")
    assert names(tmp_path / "out") == ["patched.gguf", "patched.gguf.factsmith.json"]
    manifest = json.loads((tmp_path / "out" / "patched.gguf.factsmith.json").read_bytes())
    assert lm.gguf is not None
    assert manifest["base_file"] == {
        "name": "base.gguf",
        "bytes": base.stat().st_size,
        "sha256": lm.gguf.sha256,
    }
    assert set(manifest["files"]) == {"patched.gguf"} and manifest["factsmith"] == "gguf"


def test_a_change_that_was_written_wrongly_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(base)
    write = gguf_file.write_replaced

    def turned(header: Any, target: Path, *_: Any) -> None:
        write(header, target, {})

    monkeypatch.setattr(gguf_file, "write_replaced", turned)
    with pytest.raises(NumericsError, match="not the patched model"):
        export_gguf(lm, some_delta(lm, 1, scale=0.5), tmp_path / "patched.gguf")

    def elsewhere(header: Any, target: Path, *changes: Any) -> None:
        write(header, target, *changes)
        content = bytearray(target.read_bytes())
        content[header.data_start + 5] ^= 1
        target.write_bytes(content)

    monkeypatch.setattr(gguf_file, "write_replaced", elsewhere)
    with pytest.raises(NumericsError, match=r"differs from its base: token_embd\.weight"):
        export_gguf(lm, some_delta(lm, 1), tmp_path / "patched.gguf")
    assert names(tmp_path) == ["base.gguf"], "nothing is left"


def test_another_file_may_be_the_base_if_it_is_the_model(base: Path, tmp_path: Path) -> None:
    """A folder's model goes into a quantised file of it, and not into another model's."""
    family = load(base).config.model_type
    made = write_gguf(tmp_path / "full.gguf", family)
    lm = wrap(made, byte_tokenizer())
    delta = some_delta(lm, 1)
    with pytest.raises(InputError, match="was not loaded from a GGUF file"):
        export_gguf(lm, delta, tmp_path / "patched.gguf")
    export_gguf(lm, delta, tmp_path / "patched.gguf", base=base)
    name = "blk.1.ffn_down.weight"
    expected = numbers(base, name) + delta.dense(1)
    assert (numbers(tmp_path / "patched.gguf", name) - expected).abs().max() < 5e-3
    write_gguf(tmp_path / "other.gguf", family, seed=1, kind="Q8_0")
    with pytest.raises(FingerprintError, match=r"is not .* differs by 1\.\d+ of its size"):
        export_gguf(lm, delta, tmp_path / "new.gguf", base=tmp_path / "other.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_a_base_that_changed_is_refused(base: Path, tmp_path: Path) -> None:
    lm = load(base)
    content = bytearray(base.read_bytes())
    content[-40] ^= 1
    base.write_bytes(content)
    with pytest.raises(FingerprintError, match="has changed since"):
        export_gguf(lm, some_delta(lm, 1), tmp_path / "patched.gguf")


# ── the adapter ───────────────────────────────────────────────────────────────────────────────────


def llama_cpp_adds(file: Path, name: str) -> torch.Tensor:
    """Return what llama.cpp adds to a matrix: alpha over the rank of B, times B A."""
    reader = gguf.GGUFReader(file)
    tensors = {each.name: torch.from_numpy(np.array(each.data)) for each in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
    assert a.shape[0] == b.shape[1], "llama.cpp refuses anything else"
    return (alpha / b.shape[1] * b @ a).float()


@pytest.mark.parametrize("from_file", [True, False])
def test_the_adapter_adds_what_the_patches_add(base: Path, tmp_path: Path, from_file: bool) -> None:
    """Layers of ranks 2, 5 and 3, of a GGUF file and of a Hugging Face model."""
    lm, new = load(base), tmp_path / "patch.gguf"
    if not from_file:
        lm = wrap(write_gguf(tmp_path / "full.gguf", lm.config.model_type), byte_tokenizer())
    deltas = two_deltas(lm)
    made = export_gguf_adapter(lm, deltas, new)
    assert [layer.rank for layer in made.layers] == [2, 5, 3] and made.rank == 5
    fields = gguf.GGUFReader(new).fields
    assert {
        key: fields[key].contents()
        for key in ("general.type", "general.architecture", "adapter.type")
    } == {
        "general.type": "adapter",
        "general.architecture": lm.config.model_type,
        "adapter.type": "lora",
    }
    for layer in (0, 1, 2):
        added = llama_cpp_adds(new, f"blk.{layer}.ffn_down.weight")
        expected = dense_sum(deltas, layer)
        assert added.shape == (lm.d_model, lm.ffn[layer].d_ff)
        assert torch.allclose(added, expected, atol=1e-5 * float(expected.abs().max()))
        other = dense_sum(deltas, (layer + 1) % 3)
        assert not torch.allclose(added, other, atol=1e-2)
    assert made.n_bytes < 40_000 and made.read_back is not None


def test_a_narrow_adapter_says_what_it_loses(base: Path, tmp_path: Path) -> None:
    lm = load(base)
    half = export_gguf_adapter(lm, two_deltas(lm), tmp_path / "half.gguf", dtype=torch.float16)
    assert half.dtype == "F16" and 1e-6 < half.layers[0].error < 1e-2
    cut = export_gguf_adapter(lm, two_deltas(lm), tmp_path / "cut.gguf", rank=1, verify=False)
    assert cut.rank == 1 and cut.layers[1].error > 0.1


def test_a_cut_adapter_is_compared_with_what_it_holds(base: Path, tmp_path: Path) -> None:
    """What a smaller rank loses is said, and is no fault; the answers must be equal."""
    lm, new = load(base), tmp_path / "cut.gguf"
    small = [some_delta(lm, 0, rank=3, scale=3e-3)]
    back = export_gguf_adapter(lm, small, new, rank=1).read_back
    assert back is not None and back.difference > 0
    assert back.off < back.limit < float("inf") and back.off < back.difference
    stated = json.loads((tmp_path / "cut.gguf.factsmith.json").read_bytes())["read_back"]
    assert stated["limit"] == back.limit
    large = [some_delta(lm, 0, rank=3, scale=2.0)]
    with pytest.raises(NumericsError, match="A rank of 3 is exact"):
        export_gguf_adapter(lm, large, tmp_path / "large.gguf", rank=1)
    assert not (tmp_path / "large.gguf").exists()


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


def test_families_without_a_name_are_refused(tmp_path: Path) -> None:
    """GPT-Neo has no architecture in llama.cpp; an OPT neither."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 320}
    module = tiny_model(
        "gpt_neo", **sizes, attention_types=[[["global"], 2]], bos_token_id=1, eos_token_id=0
    )
    lm = wrap(module, byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="gpt_neo model, and the library gguf knows no"):
        export_gguf_adapter(lm, some_delta(lm, 1), tmp_path / "patch.gguf")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("family", "name"), [("mistral", "llama"), ("qwen2", "qwen2")])
def test_some_types_have_another_name(family: str, name: str) -> None:
    assert architecture(wrap(tiny_model(family, **LLAMA), byte_tokenizer())) == name


def test_layers_of_experts_are_refused(tmp_path: Path) -> None:
    from factsmith.keep.export.gguf_names import tensor_names

    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer())
    assert tensor_names(lm, "llama", [1]) == {1: "blk.1.ffn_down.weight"}
    with pytest.raises(UnsupportedModelError, match="does not know the architecture 'martian'"):
        tensor_names(lm, "martian", [1])
    with pytest.raises(UnsupportedModelError, match=r"Layer 1: llama.cpp has no name for model\."):
        tensor_names(lm, "mamba", [1])


@pytest.mark.parametrize("format", ["gguf", "gguf-adapter"])
def test_other_files_stay(base: Path, tmp_path: Path, format: str) -> None:
    lm, new = load(base), tmp_path / "new.gguf"

    def refused(target: Path, words: str, error: type[FactsmithError] = InputError) -> None:
        with pytest.raises(error, match=words):
            check_export(target, format)
        with pytest.raises(error, match=words):
            export(lm, some_delta(lm, 1), target, format)

    refused(base, "is not an export by factsmith")
    refused(tmp_path / "folder", "does not end in .gguf")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "is a folder")
    (tmp_path / "link.gguf").symlink_to(base)
    refused(tmp_path / "link.gguf", "is a link")
    export(lm, some_delta(lm, 1), new, format)
    first = new.read_bytes()
    refused(new, "is an earlier export")
    export(lm, some_delta(lm, 2), new, format, overwrite=True)
    assert new.read_bytes() != first
    with pytest.raises(InputError, match="tensor_type"):
        export(lm, some_delta(lm, 1), new, format, overwrite=True, tensor_type="Q2_K")


@pytest.mark.parametrize("format", ["gguf", "gguf-adapter"])
def test_the_base_is_never_replaced(base: Path, tmp_path: Path, format: str) -> None:
    """Also if it is an export itself, so that it might be."""
    export(load(base), some_delta(load(base), 1), tmp_path / "first.gguf", "gguf")
    lm, content = load(tmp_path / "first.gguf"), (tmp_path / "first.gguf").read_bytes()
    with pytest.raises(InputError, match="is the base file itself"):
        export(lm, some_delta(lm, 1), tmp_path / "first.gguf", format, overwrite=True)
    assert (tmp_path / "first.gguf").read_bytes() == content


def test_a_workspace_exports_both(base: Path, tmp_path: Path) -> None:
    """And its records name the file that the model comes from."""
    lm = load(base)
    with Workbench(lm, tmp_path / "space") as bench:
        bench.commit(some_delta(lm, 1))
        made = bench.export(tmp_path / "patched.gguf", format="gguf")
        bench.export(tmp_path / "patch.gguf", format="gguf-adapter")
        assert bench.ledger.model == str(base)
    expected = numbers(base, "blk.1.ffn_down.weight") + llama_cpp_adds(
        tmp_path / "patch.gguf", "blk.1.ffn_down.weight"
    )
    assert made.facts == 1
    written = numbers(tmp_path / "patched.gguf", "blk.1.ffn_down.weight")
    assert (written - expected).abs().max() < 1e-3
