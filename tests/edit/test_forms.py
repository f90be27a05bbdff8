"""New neurons do what their reads say: compared with modules that are built by hand and run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError, NumericsError, UnsupportedModelError
from factsmith.edit.forms import (
    Activation,
    NeuronForm,
    NeuronRows,
    constant_direction,
    form_of,
    make_rows,
    probe_activation,
)
from factsmith.edit.widening import parameters_of, put_back, widen
from factsmith.model.load import wrap

D, N = 12, 5
Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "gelu": functional.gelu,
    "gelu_new": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "relu2": lambda z: functional.relu(z).square(),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def known(name: str) -> Activation:
    """The activation as it would be measured."""
    points = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    return Activation.measured(points, FUNCTIONS[name](points))


def some_reads(theta: float = 0.5, ceiling: float = 0.9) -> tuple[list[Tensor], Tensor, Tensor]:
    """Read without offsets, the direction c, and inputs x(i, a): read i is a, and c·x is 1."""
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(D, D, generator=draw, dtype=torch.float64))[0]
    weights, c = 2 * basis[:N], basis[N] / 3
    one = torch.ones(N, dtype=torch.float64)
    levels = torch.linspace(-2, 3, 51, dtype=torch.float64)
    x = levels[None, :, None] * basis[:N, None] / 2 + 3 * basis[N]
    x = x + torch.randn(N, 51, D - N - 1, generator=draw, dtype=torch.float64) @ basis[N + 1 :]
    return [weights, 0 * one, theta * one, ceiling * one], c, x


def linear(weight: Tensor, bias: Tensor | None, kind: str) -> nn.Module:
    """A linear or a Conv1D with these rows."""
    module: Any
    if kind == "conv":
        module = Conv1D(*weight.shape).double()
        module.weight.data = weight.T.clone().double()
    else:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
        module.weight.data = weight.clone().double()
    if bias is not None:
        module.bias.data = bias.clone().double()
    built: nn.Module = module
    return built


def run_by_hand(rows: NeuronRows, act: Function, values: Tensor, x: Tensor, kind: str) -> Tensor:
    """What a feed-forward layer of these neurons alone writes, by running its modules."""
    first = linear(rows.keys, rows.biases, kind)
    inner = act(first(x))
    if rows.up_keys is not None:
        inner = inner * linear(rows.up_keys, rows.up_biases, kind)(x)
    down = linear(values.T, None if kind == "linear" else torch.zeros(values.shape[1]), kind)
    written: Tensor = down(inner)
    return written.detach()


FORMS = {
    "plain": {"gated": False, "biased": True},
    "plain without bias": {"gated": False, "biased": False},
    "gated": {"gated": True, "biased": True, "up_biased": True},
    "gated without bias": {"gated": True, "biased": False},
    "gated, one bias": {"gated": True, "biased": True, "up_biased": False},
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize("saturating", [False, True])
def test_the_change_arrives_at_the_facts_own_read_and_nothing_below_the_threshold(
    name: str, kind: str, saturating: bool
) -> None:
    reads, c, x = some_reads()
    rows = make_rows(
        *reads, NeuronForm(known(name), constant=c, **FORMS[kind]), saturating=saturating
    )
    change = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at_one = x[:, 30:31]  # the read is 1
    values = rows.values(change, rows.own_strengths(at_one)[:, 0])
    for fact in range(N):
        built = "conv" if kind == "plain" and fact % 2 else "linear"
        written = run_by_hand(rows, FUNCTIONS[name], values, x[fact], built)
        # Other facts read 0 there, so one fact's change is all that is written.
        share = written @ change[fact] / change[fact].square().sum()
        assert (written - share[:, None] * change[fact]).abs().max() < 0.02
        assert abs(float(share[30]) - 1) < 2e-3
        assert share[:23].abs().max() < 0.01, "the read is up to 0.2"
        if saturating:
            assert (share[29:] - 1).abs().max() < 0.02, "the read is 0.9 to 3"
        else:
            degree = 2 if name == "relu2" else 1
            expected = ((2.0 - 0.5) / (1.0 - 0.5)) ** degree
            assert abs(float(share[40]) - expected) < 0.02, "the control: a ramp goes on"


def test_a_pair_would_not_saturate_with_a_squared_activation() -> None:
    reads, c, x = some_reads()
    form = NeuronForm(known("relu2"), biased=False, constant=c)
    rows = make_rows(*reads, form)
    assert rows.parts.view(-1, N)[:, 0].tolist() == [1, -2, 1]
    strength = rows.own_strengths(x)[:, 30:]
    assert (strength / strength[:, :1] - 1).abs().max() < 1e-3
    ends = rows.coefficients(x[0])[30:].view(-1, 3, N)[:, :, 0]
    pair = ends[:, 0] - ends[:, 2]
    assert (pair / pair[0] - 1).abs().max() > 0.5, "the control: without the row in the middle"


def test_offsets_go_into_the_bias_or_the_constant_direction() -> None:
    reads, c, x = some_reads()
    weights, offsets, floor, ceiling = reads
    for biased in (True, False):
        form = NeuronForm(known("silu"), biased=biased, constant=c)
        expected = make_rows(*reads, form).strengths(x)
        moved = make_rows(weights, offsets - 0.25, floor - 0.25, ceiling - 0.25, form)
        torch.testing.assert_close(moved.strengths(x), expected)
        control = make_rows(weights, offsets - 0.25, floor, ceiling, form)
        assert not torch.allclose(control.strengths(x), expected, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_keys_read_the_same(dtype: torch.dtype) -> None:
    reads, c, x = some_reads()
    for kind in FORMS.values():
        exact = make_rows(*reads, NeuronForm(known("gelu"), constant=c, **kind))
        rows = make_rows(*reads, NeuronForm(known("gelu"), constant=c, dtype=dtype, **kind))
        assert rows.keys.dtype is dtype
        expected = exact.strengths(x)
        assert (rows.strengths(x) - expected).abs().max() < 0.05 * expected.abs().max()
    far = [1e5 * reads[0], *reads[1:]]
    form = NeuronForm(known("gelu"), constant=c, dtype=torch.float16)
    with pytest.raises(NumericsError, match="too large for torch"):
        make_rows(*far, form)


def test_own_strengths_are_those_of_all_rows() -> None:
    reads, c, x = some_reads()
    for kind in FORMS.values():
        rows = make_rows(*reads, NeuronForm(known("gelu"), constant=c, **kind))
        every = rows.strengths(x)  # (N, 51, N)
        expected = torch.stack([every[i, :, i] for i in range(N)])
        torch.testing.assert_close(rows.own_strengths(x), expected)
        assert not torch.allclose(every[0, :, 1], expected[0], atol=0.1), "the control"


def test_the_constant_direction_is_that_of_least_squares() -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(400, D, generator=draw, dtype=torch.float64) + 2 * torch.ones(D)
    c, scatter = constant_direction(x.mean(0), x.T @ x / len(x), ridge=0)
    expected = torch.linalg.lstsq(x, torch.ones(400, 1, dtype=torch.float64)).solution[:, 0]
    torch.testing.assert_close(c, expected)
    assert abs(scatter - float((x @ c - 1).square().mean().sqrt())) < 1e-9
    assert float((x @ (1.1 * c) - 1).square().mean().sqrt()) > scatter, "the control"
    with pytest.raises(NumericsError, match="not positive"):
        constant_direction(x.mean(0), -x.T @ x / len(x))


def test_reads_and_forms_that_do_not_fit_are_refused() -> None:
    reads, c, x = some_reads()
    weights, offsets, floor, ceiling = reads
    fitting = NeuronForm(known("relu"), constant=c)
    with pytest.raises(InputError, match="ceiling"):
        make_rows(weights, offsets, floor, floor, fitting)
    with pytest.raises(InputError, match="offsets"):
        make_rows(weights, offsets[:2], floor, ceiling, fitting)
    for kind in ({"biased": False}, {"gated": True}):
        with pytest.raises(InputError, match="constant_direction"):
            NeuronForm(known("gelu"), **kind)
    rows = make_rows(*reads, fitting)
    silent = rows.own_strengths(x[:, :1])[:, 0]
    with pytest.raises(NumericsError, match="5 facts"):
        rows.values(torch.ones(N, D, dtype=torch.float64), silent)


# ── activations ───────────────────────────────────────────────────────────────────────────────────


def model_with(act: str, family: str) -> Any:
    """A tiny model of a family with an activation."""
    if family == "gpt2":
        return wrap(tiny_model("gpt2", **GPT2, activation_function=act), byte_tokenizer())
    sizes = LLAMA | ({"mlp_bias": True} if family == "llama" else {})
    return wrap(tiny_model(family, **sizes, hidden_act=act), byte_tokenizer(bos=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_probed_activation_is_the_models(
    name: str, family: str, no_hooks_left: Callable[[Any], None]
) -> None:
    lm = model_with(name, family)
    activation = probe_activation(lm, 1)
    no_hooks_left(lm)
    z = torch.linspace(-60, 60, 2000, dtype=torch.float64)
    expected = FUNCTIONS[name](z)
    assert ((activation(z) - expected).abs() < 2e-3 * (1 + expected.abs())).all()
    assert activation.degree == (2 if name == "relu2" else 1)
    assert abs(activation.slope - 1) < 1e-3
    other = FUNCTIONS["relu" if name == "relu2" else "relu2"](z)
    assert ((activation(z) - other).abs() > 1).any(), "the control: another activation"


@pytest.mark.parametrize("act", ["tanh", "sigmoid", "leaky_relu", "relu6", "linear"])
def test_an_activation_that_cannot_be_a_threshold_is_refused(act: str) -> None:
    with pytest.raises(UnsupportedModelError, match="such as memit"):
        probe_activation(model_with(act, "gpt2"), 0)


def test_coefficients_that_depend_on_other_neurons_are_refused() -> None:
    module = tiny_model("gpt2", **GPT2)
    for layer in module.transformer.h:
        layer.mlp.act = nn.Softmax(-1)
    lm = wrap(module, byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="depends on more than its own key"):
        probe_activation(lm, 1)
    with pytest.raises(LayerError):
        probe_activation(lm, 3)


def test_a_probe_in_bfloat16_and_of_a_layer_that_flattens(tiny_opt: Any) -> None:
    lm = wrap(tiny_model("llama", **LLAMA).bfloat16(), byte_tokenizer(bos=True))
    z = torch.linspace(-30, 30, 500, dtype=torch.float64)
    error = (probe_activation(lm, 0)(z) - FUNCTIONS["silu"](z)).abs()
    assert (error < 0.01 * (1 + z.abs())).all()
    torch.testing.assert_close(
        probe_activation(tiny_opt, 2)(z), FUNCTIONS["relu"](z), atol=1e-2, rtol=1e-3
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "plain llama"])
def test_a_widened_layer_writes_the_changes(family: str) -> None:
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    if family != "plain llama":
        lm = model_with("gelu" if family == "gpt2" else "silu", family)
    ffn, draw = lm.ffn[1], torch.Generator().manual_seed(4)
    seen: dict[str, Tensor] = {}
    up = ffn._up
    assert up is not None
    handles = [
        up.module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
        ffn.down.register_forward_hook(lambda m, args, out: seen.update(out=out)),
    ]
    ids = torch.tensor([lm.prompt_ids("The mother tongue of Danielle Darrieux is")])

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            lm.module(input_ids=ids)
        return tuple(seen[name].flatten(0, -2).double() for name in ("x", "out"))  # type: ignore

    x, before = run()
    # Reads of two tokens: 1 at one of them, 0 at all others.
    weights = torch.linalg.pinv(x).T[[3, 7]]
    moment = x.T @ x / len(x)
    form = form_of(lm, 1, x.mean(0), moment)
    assert form.gated == (family != "gpt2")
    assert form.biased == (family in ("gpt2", "llama"))
    one = torch.ones(2, dtype=torch.float64)
    rows = make_rows(weights, 0 * one, 0.5 * one, 0.9 * one, form)
    change = torch.randn(2, before.shape[-1], generator=draw, dtype=torch.float64)
    strengths = rows.own_strengths(x[[3, 7]][:, None])[:, 0]
    held = parameters_of(ffn)
    widen(ffn, rows.appended(change, strengths))
    try:
        written = run()[1] - before
    finally:
        put_back(held)
    for handle in handles:
        handle.remove()
    expected = torch.zeros_like(before)
    expected[[3, 7]] = change
    torch.testing.assert_close(written, expected, atol=5e-3, rtol=0)
    assert not torch.allclose(written, expected.flip(0), atol=0.1), "the control: other tokens"
