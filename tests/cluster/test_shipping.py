"""Tasks and results in pickles: tensors to the bit, models by their names."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from conftest import TEXTS
from factsmith.cluster.shipping import Names, Packed, UnknownModelError, pack, unpack
from factsmith.model.language_model import LanguageModel

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

TENSORS = {
    "float64": torch.randn(3, 4, dtype=torch.float64),
    "bfloat16": torch.randn(5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "int32": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 7),
    "transposed": torch.randn(3, 4).T,
    "part": torch.randn(1000, 1000)[3:5, ::2],
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_to_the_bit_and_can_be_written(name: str) -> None:
    tensor = TENSORS[name]
    packed = pack({"tensor": tensor})
    there: Tensor = unpack(packed, {})["tensor"]
    assert there.dtype == tensor.dtype and there.shape == tensor.shape
    if name != "part":  # whose rows have gaps
        assert there.stride() == tensor.stride()
    raw = [each.contiguous().reshape(-1).view(torch.uint8) for each in (there, tensor)]
    assert torch.equal(*raw)
    there.zero_()
    assert packed.n_bytes < tensor.numel() * tensor.itemsize + 1000, "a part of a tensor alone"


def test_what_tensors_are_beyond_their_numbers_arrives() -> None:
    grad = torch.randn(3, requires_grad=True)
    linear = nn.Linear(2, 2)
    twice = torch.randn(4)
    there = unpack(pack([grad, linear, twice, twice]), {})
    assert there[0].requires_grad and there[1].weight.requires_grad
    assert isinstance(there[1].weight, nn.Parameter)
    assert there[2] is there[3], "one tensor stays one"
    odd = [torch.randn(2, dtype=torch.complex64).conj(), torch.empty(2, device="meta")]
    plain, meta = unpack(pack(odd), {})
    assert torch.equal(plain, odd[0]) and meta.device.type == "meta"
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(unpack(pack(sparse), {}).to_dense(), torch.eye(3))


def test_a_model_is_named_and_its_parts_come_back_as_themselves(tiny_lm: LanguageModel) -> None:
    names = Names()
    with pytest.raises(UnknownModelError) as caught:
        pack({"lm": tiny_lm}, names)
    assert caught.value.lm is tiny_lm
    names.add("key", tiny_lm)
    weights = [next(tiny_lm.module.parameters()), tiny_lm.layers[0].state_dict(keep_vars=True)]
    parts = [tiny_lm, tiny_lm.ffn[1], tiny_lm.layers[2], tiny_lm.tokenizer, tiny_lm.module]
    parts += [weights[0], *weights[1].values()]
    packed = pack(parts, names)
    assert packed.n_bytes < 3000
    assert all(a is b for a, b in zip(unpack(packed, {"key": tiny_lm}), parts, strict=True))
    with pytest.raises(KeyError):
        unpack(packed, {})


def test_a_whole_model_arrives_with_the_same_answers(tiny_lm: LanguageModel) -> None:
    packed = pack(tiny_lm)
    there: LanguageModel = unpack(Packed(bytes(packed.data), packed.buffers), {})
    assert there.fingerprint == tiny_lm.fingerprint and there is not tiny_lm
    assert there.answer(TEXTS) == tiny_lm.answer(TEXTS)
    assert torch.equal(there.coefficients(TEXTS[0]), tiny_lm.coefficients(TEXTS[0]))
    with torch.no_grad():
        next(there.module.parameters()).zero_()
    assert there.fingerprint != tiny_lm.fingerprint, "control: they share nothing"
    assert pickle.loads(pickle.dumps(tiny_lm)).fingerprint == tiny_lm.fingerprint
