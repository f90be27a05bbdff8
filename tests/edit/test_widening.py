"""Appended neurons in the linears of every family, and the parameters that come back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.model.test_families import DENSE, EXPERTS, families
from torch import Tensor

from factsmith.core.errors import InputError, LayerError, NumericsError, UnsupportedModelError
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta, applied
from factsmith.edit.widening import parameters_of, put_back, widen
from factsmith.model.appended import AppendedRows
from factsmith.model.ffn import FeedForward
from factsmith.model.language_model import LanguageModel
from factsmith.model.trace import recording

COPIED = [0, 3, 5]


def copies(ffn: FeedForward, factor: float = 1.0) -> AppendedRows:
    """Return rows that are copies of three neurons of a layer, their values times a factor."""

    def bias(matrix: Any) -> Tensor | None:
        stored = getattr(matrix.module, "bias", None)
        if stored is None:
            return None
        biases: Tensor = dataclasses.replace(matrix, name="bias", transposed=False).read()
        return biases[COPIED].clone()

    values = factor * ffn.values[COPIED].clone()
    facts = tuple(range(len(COPIED)))
    if not ffn.is_gated:
        return AppendedRows(
            keys=ffn.keys[COPIED].clone(), biases=bias(ffn._up), values=values, facts=facts
        )
    return AppendedRows(
        gate_keys=ffn.gate_keys[COPIED].clone(),
        up_keys=ffn.up_keys[COPIED].clone(),
        gate_biases=bias(ffn._gate),
        up_biases=bias(ffn._up),
        values=values,
        facts=facts,
    )


def delta_of(lm: LanguageModel, layer: int, rows: AppendedRows) -> Delta:
    """Return a delta with these rows."""
    facts = tuple(Fact(f"S{i}", "{} is", "x") for i in range(len(COPIED)))
    return Delta(
        layers={},
        k_star={},
        v_star=torch.zeros(len(facts), lm.d_model),
        facts=facts,
        method="append",
        config={},
        fingerprint=lm.fingerprint,
        appended={layer: rows},
    )


def down_call(lm: LanguageModel, layer: int) -> tuple[Tensor, Tensor]:
    """Return what a down-projection reads and writes on some tokens."""
    batch = lm.align([[5, 6, 7, 8, 9]], [0])
    with torch.no_grad(), recording({"down": lm.ffn[layer].down}) as calls:
        lm.forward(batch)
    (call,) = calls["down"]
    return call.input.flatten(0, -2), call.output.flatten(0, -2)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.filterwarnings("ignore")
def test_copied_neurons_fire_as_the_originals_do(family: str) -> None:
    lm = families.wrap(families.tiny_model(family), families.letters())
    ffn, parameters = lm.ffn[1], dict(lm.module.named_parameters())
    fingerprint, d_ff = lm.fingerprint, ffn.d_ff
    coefficients, output = down_call(lm, 1)
    with applied(lm, delta_of(lm, 1, copies(ffn))):
        assert (ffn.d_ff, ffn.n_original, ffn.n_appended) == (d_ff + 3, d_ff, 3)
        wide, more = down_call(lm, 1)
        torch.testing.assert_close(wide[:, :d_ff], coefficients)
        torch.testing.assert_close(wide[:, d_ff:], coefficients[:, COPIED])
        expected = coefficients[:, COPIED] @ ffn.values[COPIED]
        torch.testing.assert_close(more - output, expected, rtol=1e-4, atol=1e-4)
        assert float(expected.abs().max()) > 1e-3
        # Other keys fire otherwise.
        assert not torch.allclose(wide[:, d_ff:], coefficients[:, [7, 8, 9]])
        if ffn.is_gated:
            torch.testing.assert_close(ffn.gate_keys[d_ff:], ffn.gate_keys[COPIED])
            torch.testing.assert_close(ffn.up_keys[d_ff:], ffn.up_keys[COPIED])
    after = dict(lm.module.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert lm.fingerprint == fingerprint
    again, same = down_call(lm, 1)
    assert torch.equal(again, coefficients) and torch.equal(same, output)


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"])
def test_blocks_can_be_nested_with_updates(name: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(name)
    ffn = lm.ffn[1]
    update = Delta(
        layers={1: (torch.randn(lm.d_model, 1), torch.randn(1, ffn.d_ff))},
        k_star={1: torch.zeros(0, ffn.d_ff)},
        v_star=torch.zeros(0, lm.d_model),
        facts=(),
        method="rome",
        config={},
        fingerprint="",
    )
    base, d_ff, parameter = ffn.weight().clone(), ffn.d_ff, ffn.down.weight
    rows = copies(ffn, -1.0)
    with applied(lm, delta_of(lm, 1, rows)):
        widened = ffn.down.weight
        with applied(lm, [update, delta_of(lm, 1, rows)]):
            assert ffn.n_appended == 6
            assert torch.equal(ffn.original_weight(), base + update.dense(1))
            assert torch.equal(ffn.weight()[:, d_ff:], torch.cat([rows.values.T] * 2, 1))
        assert ffn.down.weight is widened and torch.equal(ffn.original_weight(), base)
    assert ffn.down.weight is parameter and torch.equal(ffn.weight(), base)


def test_an_exception_inside_a_block_puts_the_parameters_back(tiny_llama: LanguageModel) -> None:
    parameter = tiny_llama.ffn[0].down.weight
    with (
        pytest.raises(KeyError),
        applied(tiny_llama, delta_of(tiny_llama, 0, copies(tiny_llama.ffn[0]))),
    ):
        raise KeyError
    assert tiny_llama.ffn[0].down.weight is parameter and not tiny_llama.ffn[0].n_appended


def test_rows_that_do_not_fit_are_refused(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    rows = copies(tiny_gpt2.ffn[0])
    for lm, layer, error, words in (
        (tiny_llama, 0, InputError, "has gated neurons"),
        (tiny_gpt2, 99, LayerError, "does not exist"),
    ):
        before = lm.fingerprint
        with pytest.raises(error, match=words), applied(lm, delta_of(tiny_gpt2, layer, rows)):
            pass
        assert lm.fingerprint == before
    with pytest.raises(NumericsError, match="NaN"):
        dataclasses.replace(rows, values=rows.values * float("nan"))
    with pytest.raises(InputError, match="expected"):
        dataclasses.replace(rows, values=rows.values[:, :3])


def test_numbers_too_large_for_the_dtype_are_refused_before_anything_changes() -> None:
    module = families.tiny_model("llama").half()
    lm = families.wrap(module, families.letters())
    held, n = parameters_of(lm.ffn[0]), len(COPIED)
    keys = torch.zeros(n, lm.d_model)
    rows = AppendedRows(gate_keys=keys, up_keys=keys, values=keys + 1e9, facts=tuple(range(n)))
    with pytest.raises(NumericsError, match="too large"):
        widen(lm.ffn[0], rows)
    assert all(linear._parameters[name] is p for linear, name, p in held.parameters)
    widen(lm.ffn[0], dataclasses.replace(rows, values=keys + 1))
    assert lm.ffn[0].n_appended == n
    put_back(held)
    assert all(linear._parameters[name] is p for linear, name, p in held.parameters)


@pytest.mark.filterwarnings("ignore")
def test_a_norm_of_the_coefficients_is_refused(tiny_llama: LanguageModel) -> None:
    """It has a weight for each neuron, and its mean would be over other neurons."""
    lm = families.wrap(families.tiny_model("bitnet"), families.letters())
    with pytest.raises(UnsupportedModelError, match=r"has ffn_sub_norm\.weight, with a number for"):
        parameters_of(lm.ffn[0])
    parameters_of(tiny_llama.ffn[0])


@pytest.mark.parametrize("family", EXPERTS[:1])
@pytest.mark.filterwarnings("ignore")
def test_experts_are_refused(family: str, tiny_llama: LanguageModel) -> None:
    lm = families.wrap(families.tiny_model(family), families.letters())
    rows = copies(tiny_llama.ffn[0])
    with pytest.raises(UnsupportedModelError, match="experts"), applied(lm, delta_of(lm, 1, rows)):
        pass
