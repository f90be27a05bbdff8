"""GGUF files with appended neurons: everything else stays, and zeros follow in the other layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import LLAMA, byte_tokenizer, tiny_model
from exports import appending, dense_sum, names, some_delta
from factsmith.core.errors import NumericsError, UnsupportedModelError
from factsmith.edit.delta import applied
from factsmith.keep.export import gguf_file, gguf_width
from factsmith.keep.export.gguf_file import export_gguf
from factsmith.keep.export.gguf_names import readers
from factsmith.keep.export.gguf_padding import Padding, is_padded
from factsmith.keep.export.gguf_writing import check_replaced, write_replaced
from factsmith.model.gguf_header import TensorEntry, read_header
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from gguf_files import gguf, write_gguf

PROMPTS = ["The mother tongue of Paris is", "Edwin of Northumbria"]
READERS = {
    "llama": {"ffn_gate.weight": "gate_keys", "ffn_up.weight": "up_keys"},
    "gpt2": {"ffn_up.weight": "keys", "ffn_up.bias": "biases"},
}


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a tiny GGUF file of each family, its down-projections in Q8_0."""
    write_gguf(tmp_path / "base.gguf", request.param, kind="Q8_0")
    return tmp_path / "base.gguf"


def tensors(file: Path) -> dict[str, Any]:
    """Return the tensors of a file, as the library gguf reads them."""
    return {each.name: each for each in gguf.GGUFReader(file).tensors}


def numbers(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


def fields(file: Path) -> dict[str, Any]:
    read = gguf.GGUFReader(file).fields
    return {key: field.contents() for key, field in read.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "F32"])
def test_the_file_is_the_widened_model(base: Path, tmp_path: Path, kind: str) -> None:
    """Layer 0 has a low-rank change, layer 1 two kinds, and layer 2 none."""
    lm, new = load(base), tmp_path / "wide.gguf"
    family = lm.config.model_type
    low, rows = some_delta(lm, 1, (0, 1), scale=0.1), appending(lm, 2, {1: 5})
    made = export_gguf(lm, [low, rows], new, tensor_type=kind)
    width = lm.ffn[1].d_ff
    after = -(-(width + 5) // 64) * 64
    entry = f"{family}.feed_forward_length"
    assert fields(new) == {**fields(base), entry: after} and fields(base)[entry] == width
    assert str(made.width) == f"{entry} is {after} instead of {width}" and made.neurons == 5
    old, written = tensors(base), tensors(new)
    assert list(old) == list(written)
    error = {"F16": 1e-3, "Q8_0": 1e-2, "F32": 1e-6}[kind]
    for name, tensor in written.items():
        before, numbers_now = numbers(old[name]), numbers(tensor)
        if ".ffn_" not in name or "norm" in name or name.endswith("ffn_down.bias"):
            assert tensor.data.tobytes() == old[name].data.tobytes(), name
            continue
        layer, part = int(name.split(".")[1]), name.split(".", 2)[2]
        if part == "ffn_down.weight":
            expected = torch.zeros(lm.d_model, after)
            expected[:, :width] = before
            if layer in low.layers:
                expected[:, :width] += torch.from_numpy(dense_sum([low], layer)).float()
            if layer == 1:
                expected[:, width : width + 5] = rows.appended[1].values.T
        else:
            expected = torch.zeros(after, *before.shape[1:])
            expected[:width] = before
            if layer == 1:
                expected[width : width + 5] = getattr(rows.appended[1], READERS[family][part])
        changes = layer == 1 or (layer == 0 and part == "ffn_down.weight")
        same = "bias" in name or not changes
        assert (tensor.tensor_type == old[name].tensor_type) or not same, name
        assert numbers_now.shape == expected.shape
        allowed = 0.0 if same else error * float(expected.abs().max())
        assert (numbers_now - expected).abs().max() <= allowed, name
    again = load(new)
    with applied(lm, [low, rows]):
        assert again.answer(PROMPTS) == lm.answer(PROMPTS)
    assert again.answer(PROMPTS) != lm.answer(PROMPTS), "the control: it was patched"


def test_low_rank_patches_change_no_width(base: Path, tmp_path: Path) -> None:
    lm = load(base)
    made = export_gguf(lm, some_delta(lm, 1), tmp_path / "out.gguf")
    assert made.width is None and fields(tmp_path / "out.gguf") == fields(base)


def test_a_list_of_widths(tmp_path: Path) -> None:
    """Only the layer with new neurons grows."""
    listed = {"llama__feed_forward_length": [64, 64, 64]}
    module = write_gguf(tmp_path / "base.gguf", "llama", kind="Q8_0", **listed)
    lm = wrap(module, byte_tokenizer())
    new = tmp_path / "wide.gguf"
    made = export_gguf(lm, appending(lm, 2, {1: 5}), new, base=tmp_path / "base.gguf")
    assert fields(new)["llama.feed_forward_length"] == [64, 128, 64]
    old, written = tensors(tmp_path / "base.gguf"), tensors(new)
    changed = {name for name in old if old[name].data.tobytes() != written[name].data.tobytes()}
    assert changed == {f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")}
    assert str(made.width).endswith("is 64, 128, 64 instead of 64, 64, 64")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"llama__feed_forward_length": 128}, "has 128 as llama.feed_forward_length"),
        ({"llama__feed_forward_length": None}, "has None as llama.feed_forward_length"),
    ],
)
def test_a_field_that_says_something_else(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    module = write_gguf(tmp_path / "base.gguf", "llama", **wrong)
    lm = wrap(module, byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match=f"{words}.*Export a checkpoint"):
        export_gguf(lm, appending(lm), tmp_path / "new.gguf", base=tmp_path / "base.gguf")
    assert names(tmp_path) == ["base.gguf"]


def test_a_number_for_each_neuron_is_refused(tmp_path: Path) -> None:
    """Some files scale the neurons; these scales would have to grow, too."""
    lm = wrap(write_gguf(tmp_path / "base.gguf", "llama"), byte_tokenizer())
    header = read_header(tmp_path / "base.gguf")
    extra = TensorEntry("blk.1.ffn_act.scales", (64,), 0, 0, 0, 0)
    wrong = dataclasses.replace(header, tensors=(*header.tensors, extra))
    assert set(gguf_width._places(lm, header)) == {0, 1, 2}
    with pytest.raises(UnsupportedModelError, match=r"has blk\.1\.ffn_act\.scales, with a number"):
        gguf_width._places(lm, wrong)


def test_one_linear_for_gate_and_up() -> None:
    """llama.cpp calls it ffn_up: the gate lies before the up-projection."""
    lm = wrap(tiny_model("phi3", **{**LLAMA, "pad_token_id": 0}), byte_tokenizer())
    (reader,) = readers(lm, "phi3", 1)
    assert reader.name == "blk.1.ffn_up"
    assert [half.keys for half in reader.halves] == ["gate_keys", "up_keys"]
    whole = lm.module.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(reader.matrix(), whole)


def test_files_that_were_written_wrongly(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, write = load(base), gguf_file.write_replaced
    delta = appending(lm, 1, {1: 5})

    def at(place: Callable[[Any], int]) -> None:
        def wrongly(header: Any, target: Path, *rest: Any) -> None:
            write(header, target, *rest)
            content = bytearray(target.read_bytes())
            content[place(read_header(target))] ^= 4
            target.write_bytes(content)

        with monkeypatch.context() as patch:
            patch.setattr(gguf_file, "write_replaced", wrongly)
            export_gguf(lm, delta, tmp_path / "new.gguf")

    def end_of(name: str) -> Callable[[Any], int]:
        def last(header: Any) -> int:
            each = next(entry for entry in header.tensors if entry.name == name)
            return int(header.data_start + each.offset + 4 * each.n_numbers - 3)

        return last

    with pytest.raises(NumericsError, match=r"differs from its base: blk\.2\.ffn_up\.weight"):
        at(end_of("blk.2.ffn_up.weight"))  # a number that must be zero
    with pytest.raises(NumericsError, match="differs from its base: a field"):
        at(lambda header: header.spans["general.name"][1] - 1)
    assert names(tmp_path) == ["base.gguf"]


def test_neurons_in_another_order_are_noticed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(base)
    extended = gguf_width._extended
    monkeypatch.setattr(
        gguf_width, "_extended", lambda whole, new: extended(whole, [x.flip(0) for x in new])
    )
    with pytest.raises(NumericsError, match="not the patched model"):
        export_gguf(lm, appending(lm, 1, {1: 64}), tmp_path / "new.gguf")


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q4_1", "IQ4_NL", "BF16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_padding_in_every_type(tmp_path: Path, kind: str, parts: int) -> None:
    """The numbers stay, and what follows them is zero, as the library gguf reads it."""
    type_ = getattr(gguf.GGMLQuantizationType, kind)
    block, n_bytes = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(0)
    columns = 512
    raw = rng.integers(0, 60, (6, columns // block * n_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_tensor("other", np.arange(6, dtype=np.float32))
    writer.add_tensor("table", raw, raw_dtype=type_)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    header = read_header(tmp_path / "base.gguf")
    (entry,) = (each for each in header.tensors if each.name == "table")
    change = Padding.of(entry, (10, columns + 256), parts)
    write_replaced(header, tmp_path / "new.gguf", {"table": change})
    new = check_replaced(header, tmp_path / "new.gguf", {"table": change})
    before = numbers(tensors(tmp_path / "base.gguf")["table"])
    after = numbers(tensors(tmp_path / "new.gguf")["table"])
    expected = torch.zeros(parts, 10 // parts, columns + 256)
    expected[:, : 6 // parts, :columns] = before.reshape(parts, 6 // parts, columns)
    assert torch.equal(after.nan_to_num(), expected.reshape(10, -1).nan_to_num())
    other = tensors(tmp_path / "new.gguf")["other"]
    assert other.data.tolist() == [0, 1, 2, 3, 4, 5]
    (placed,) = (each for each in new.tensors if each.name == "table")
    starts = (header.data_start + entry.offset, new.data_start + placed.offset)
    content = bytearray((tmp_path / "new.gguf").read_bytes())
    content[starts[1]] ^= 1
    (tmp_path / "wrong.gguf").write_bytes(content)
    for file, same in (("new.gguf", True), ("wrong.gguf", False)):
        with (tmp_path / "base.gguf").open("rb") as old, (tmp_path / file).open("rb") as other:
            assert is_padded(old, other, starts, entry, change) is same


def test_a_type_without_known_zeros() -> None:
    entry = TensorEntry("blk.0.ffn_up.weight", (64, 32), 24, 0, 0, 0)
    with pytest.raises(UnsupportedModelError, match="is in I8, in which the library gguf cannot"):
        Padding.of(entry, (128, 32))


def test_a_loaded_file_is_a_base_again(base: Path, tmp_path: Path) -> None:
    lm = load(base)
    export_gguf(lm, appending(lm, 1, {1: 5}), tmp_path / "first.gguf")
    second = load(tmp_path / "first.gguf")
    rows = appending(second, 2, {2: 3})
    export_gguf(second, rows, tmp_path / "second.gguf")
    third = load(tmp_path / "second.gguf")
    assert third.ffn[0].d_ff == second.ffn[0].d_ff + 64
    with applied(second, rows):
        assert _near(third, second)
    assert not _near(third, second)


def _near(one: LanguageModel, other: LanguageModel) -> bool:
    ids = torch.tensor([[5, 9, 17, 30]])
    with torch.no_grad():
        pair = [lm.module(input_ids=ids).logits for lm in (one, other)]
    return bool((pair[0] - pair[1]).abs().max() < 1e-2)
