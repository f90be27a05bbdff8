"""Hooks live for the length of a block, whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factsmith.core.errors import UnsupportedModelError
from factsmith.model import trace
from factsmith.model.language_model import LanguageModel
from factsmith.model.products import replacing_factors
from factsmith.model.trace import (
    first_tensor,
    hook_count,
    recording,
    replacing,
    standing_in,
    with_first_tensor,
)

IDS = [5, 90, 33, 61]


def test_recording_sees_what_goes_in_and_out(tiny_lm: LanguageModel) -> None:
    batch = tiny_lm.align([IDS], [3])
    with recording({layer: ffn.down for layer, ffn in enumerate(tiny_lm.ffn)}) as calls:
        tiny_lm.forward(batch)
    for layer, ffn in enumerate(tiny_lm.ffn):
        (call,) = calls[layer]
        torch.testing.assert_close(ffn.down(call.input), call.output)
        assert call.input.shape == (1, 4, ffn.d_ff)


def test_recorded_outputs_do_not_change_when_the_model_adds_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            out += 1
            return out

    model, x = InPlace(), torch.ones(1, 2)
    with torch.no_grad():
        with recording({"inner": model.inner}) as calls:
            model(x)
        torch.testing.assert_close(calls["inner"][0].output, model.inner(x))
        with recording({"inner": model.inner}, copy=False) as calls:
            model(x)
        torch.testing.assert_close(calls["inner"][0].output, model.inner(x) + 1)


def test_stop_ends_the_pass_above_the_last_module_asked_for(tiny_lm: LanguageModel) -> None:
    reached = []
    handle = tiny_lm.layers[2].register_forward_pre_hook(lambda m, args: reached.append(1))
    with recording({"first": tiny_lm.layers[1]}, stop=True) as calls:
        tiny_lm.forward(tiny_lm.align([IDS], [3]))
    assert len(calls["first"]) == 1 and not reached
    with recording({"first": tiny_lm.layers[1]}) as calls:
        tiny_lm.forward(tiny_lm.align([IDS], [3]))
    handle.remove()
    assert reached


@pytest.mark.parametrize("where", ["output", "input"])
def test_replacing_changes_an_activation_on_its_way(tiny_lm: LanguageModel, where: str) -> None:
    batch = tiny_lm.align([IDS], [3])
    plain = tiny_lm.forward(batch).logits
    down = tiny_lm.ffn[1].down
    with replacing({down: lambda x: x * 0}, where=where):  # type: ignore[arg-type]
        silent = tiny_lm.forward(batch).logits
    assert (plain - silent).abs().max() > 1e-3
    weight = down.weight.detach().clone()
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        down.weight.zero_()  # type: ignore[operator]
        bias = getattr(down, "bias", None)
        if where == "output" and isinstance(bias, Tensor):
            kept = bias.clone()
            bias.zero_()
        expected = tiny_lm.forward(batch).logits
        down.weight.copy_(weight)  # type: ignore[operator]
        if where == "output" and isinstance(bias, Tensor):
            bias.copy_(kept)
    torch.testing.assert_close(silent, expected)
    assert torch.equal(tiny_lm.forward(batch).logits, plain)


def test_nothing_stays_behind_after_an_exception(tiny_lm: LanguageModel) -> None:
    before = hook_count(tiny_lm.module.modules())
    batch = tiny_lm.align([IDS], [3])
    plain = tiny_lm.forward(batch).logits

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        recording({"all": tiny_lm.layers[0]}),
        replacing({tiny_lm.layers[1]: fail}),
    ):
        assert hook_count(tiny_lm.module.modules()) == before + 2
        tiny_lm.forward(batch)
    with (
        pytest.raises(ZeroDivisionError),
        standing_in(tiny_lm.layers, lambda index, args, kwargs: 1 / 0),
    ):
        tiny_lm.forward(batch)
    assert hook_count(tiny_lm.module.modules()) == before
    assert torch.equal(tiny_lm.forward(batch).logits, plain)


def test_a_stand_in_gives_back_a_forward_of_the_modules_own() -> None:
    layer = nn.Linear(2, 2)
    forward = layer.forward
    layer.forward = forward  # as models spread over devices carry it
    with standing_in([layer], lambda index, args, kwargs: "played"):
        assert layer(torch.ones(2)) == "played"
    assert vars(layer)["forward"] is forward


def test_a_change_of_the_last_layer_counts_once(tiny_lm: LanguageModel) -> None:
    """The head runs with something standing in for the layers. Their hooks must rest then."""
    with replacing({tiny_lm.layers[-1]: lambda hidden: hidden + torch.arange(hidden.shape[-1])}):
        expected = tiny_lm.forward(tiny_lm.align([IDS], [3])).logits[:, -1]
        torch.testing.assert_close(tiny_lm.last_logits(tiny_lm.align([IDS], [3])), expected)
    assert (tiny_lm.last_logits(tiny_lm.align([IDS], [3])) - expected).abs().max() > 1e-2


def test_first_tensor_and_its_inverse() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    for value in (a, (a, None), [a, (None,)], ((a, None), None)):
        assert first_tensor(with_first_tensor(value, b)) is b
        assert type(with_first_tensor(value, b)) is type(value)
    with pytest.raises(UnsupportedModelError, match="tensor"):
        first_tensor((None, 3))


def test_a_hook_that_was_left_behind_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C may leave a hook on. It must not end a later pass, and goes when it runs."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def interrupted(module: nn.Module, hook: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patching, pytest.raises(KeyboardInterrupt):
        patching.setattr(trace, "_forget", interrupted)
        with recording({"first": layers[0]}, stop=True):
            layers(torch.ones(1, 2))
    assert hook_count(layers) == 1, "the control: one was left behind"
    with recording({"last": layers[1]}) as calls:
        layers(torch.ones(1, 2))
    assert len(calls["last"]) == 1 and hook_count(layers) == 0


class _Interrupted(ExitStack):
    """One in which a Ctrl-C comes instead of everything that would be put back."""

    def callback(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        return super().callback(
            instead if function.__name__ in ("put_back", "_forget") else function, *args, **kwargs
        )


def test_what_was_left_standing_in_takes_no_hook_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that is registered later must not go with the stand-in that was left behind."""
    for use in ("recording", "replacing", "stand-in"):
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        expected = layers(torch.ones(1, 2))
        with monkeypatch.context() as patching, pytest.raises(KeyboardInterrupt):
            patching.setattr(trace, "ExitStack", _Interrupted)
            with standing_in([layers[1]], lambda index, args, kwargs: args[0]):
                layers(torch.ones(1, 2))
        assert hook_count(layers) == 1, "the control: it was left behind"
        if use == "recording":
            with recording({"last": layers[1]}, stop=True) as calls:
                layers(torch.ones(1, 2))
            assert torch.equal(calls["last"][0].output, expected) and len(calls["last"]) == 1
        elif use == "replacing":
            with replacing({layers[1]: lambda hidden: hidden + 1}):
                assert torch.equal(layers(torch.ones(1, 2)), expected + 1)
        else:
            with standing_in([layers[1]], lambda index, args, kwargs: args[0] * 0):
                assert not layers(torch.ones(1, 2)).any()
        assert (
            torch.equal(layers(torch.ones(1, 2)), expected)
            and hook_count(layers) == 0
            and "forward" not in vars(layers[1])
        )


@pytest.mark.parametrize("way", ["output", "input", "stand-in", "factors"])
@pytest.mark.parametrize("carries", [False, True], ids=["plain", "with its own forward"])
def test_what_was_not_put_back_puts_itself_back(
    monkeypatch: pytest.MonkeyPatch, way: str, carries: bool
) -> None:
    layer, x, calls = nn.Linear(2, 2), torch.ones(1, 2), []
    layer.register_forward_hook(lambda module, args, result: calls.append(result))
    if carries:
        layer.forward = layer.forward
    forward, expected = vars(layer).get("forward"), layer(x)

    def product(module: nn.Linear, x: Tensor) -> Tensor:
        return x @ module.weight.T + module.bias

    blocks = {
        "output": lambda: replacing({layer: lambda out: out + 1}),
        "input": lambda: replacing({layer: lambda given: given + 1}, where="input"),
        "stand-in": lambda: standing_in([layer], lambda index, args, kwargs: expected + 1),
        "factors": lambda: replacing_factors(
            {layer: ("weight", product, lambda left, offset: left + 1)}
        ),
    }
    with monkeypatch.context() as patching, pytest.raises(KeyboardInterrupt):
        patching.setattr(trace, "ExitStack", _Interrupted)
        with blocks[way]():
            assert not torch.allclose(layer(x), expected)
    left = hook_count([layer]) + (len(layer._forward_hooks) != 1)
    assert left > 1 + carries or vars(layer).get("forward") is not forward, (
        "the control: something was left behind"
    )
    calls.clear()
    for _ in range(2):
        assert torch.equal(layer(x), expected)
    assert (
        hook_count([layer]) == 1 + carries
        and vars(layer).get("forward") is forward
        and len(calls) == 2
    )
